"""What a run looks like: its curves, and queries with what was found nearest to them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

from .images import Images
from .run import Table

_CANDIDATES = 1024  # queries among which those to show are looked for
_MARKS = 10  # on a line, at the most
_LABEL = 15  # letters that fit under a picture


def curves(steps: Table, metrics: Table, names: Sequence[str], title: str, path: Path) -> None:
    """Loss by step, and metrics by step."""
    with _figure(path, *pyplot.subplots(1, 2, figsize=(11, 4))) as (figure, (left, right)):
        losses = torch.tensor(steps.column("loss"))
        numbers = steps.column("step")
        window = len(losses) // 30
        left.plot(numbers, losses.numpy(), color="tab:blue", alpha=0.25 if window > 1 else 1, linewidth=0.8)
        if window > 1:
            smooth = losses.unfold(0, window, 1).mean(1).numpy()
            left.plot(numbers[window - 1 :], smooth, color="tab:blue", label=f"mean of {window} steps")
            left.legend()
        left.set(xlabel="step", ylabel="loss of a batch", title="training")
        measured = metrics.column("step")
        # Marks tell the lines apart without colour, for which a few are enough.
        look = {"markersize": 4, "markevery": -(-len(measured) // _MARKS) or 1}
        for name, mark in zip(names, "osD^v<>pP*", strict=False):
            right.plot(measured, metrics.column(name), marker=mark, label=name, **look)
        right.set(xlabel="step", ylim=(0, 1.03), title="retrieval of the test images")
        right.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        for axis in (left, right):
            axis.grid(alpha=0.3)
        figure.suptitle(title, parse_math=False)
        figure.tight_layout()


@torch.no_grad()
def neighbours(
    embeddings: Tensor, images: Images, path: Path, title: str, *, queries: int = 8, columns: int = 8, seed: int = 0
) -> None:
    """Queries of different classes and their nearest others.

    The upper half found all that they could, the lower half did not; as far as there are such.

    Args:
        embeddings: [n, D], of all images; normalised here.
    """
    points, labels = functional.normalize(embeddings.float().cpu(), dim=1), images.labels
    columns = min(columns, len(images) - 1)
    tried = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:_CANDIDATES]
    scores = points[tried] @ points.T
    scores[torch.arange(len(tried)), tried] = -torch.inf
    nearest = scores.topk(columns, dim=1).indices
    right = labels[nearest] == labels[tried, None]
    # Beyond the number of others of its class nothing right is left to find.
    possible = torch.arange(columns) < (labels.bincount()[labels[tried]] - 1)[:, None]
    wrong = (~right & possible).any(1)
    flawed, flawless = (_of_different_classes(chosen, labels[tried]) for chosen in (wrong, ~wrong))
    flawed = flawed[: max(queries // 2, queries - len(flawless))]
    shown = flawless[: queries - len(flawed)] + flawed

    size = (columns + 1, 1.15 * len(shown) + 1.1)
    with _figure(path, *pyplot.subplots(len(shown), columns + 1, figsize=size, squeeze=False)) as (figure, axes):
        for place, line in zip(shown, axes, strict=True):
            numbers = [int(tried[place]), *nearest[place].tolist()]
            pixels = images.pixels(torch.tensor(numbers))
            for column, (number, picture, axis) in enumerate(zip(numbers, pixels, line, strict=True)):
                correct = bool(labels[number] == labels[numbers[0]])
                late = column > 0 and not correct and not possible[place, column - 1]
                axis.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
                axis.set(xticks=[], yticks=[])
                colour = "black" if column == 0 else "tab:green" if correct else "silver" if late else "tab:red"
                axis.spines[:].set(color=colour, linewidth=3)
                if not correct and not late:  # a mark that does not need colour
                    mark = {"transform": axis.transAxes, "ha": "right", "va": "top", "fontweight": "bold"}
                    axis.text(0.98, 1.0, "\N{MULTIPLICATION X}", color="tab:red", fontsize=15, **mark)
                if column == 0 or not correct:
                    name = _short(images.classes[labels[number]])
                    axis.set_xlabel(name, fontsize=7, labelpad=2, parse_math=False)
        axes[0, 0].set_title("query", fontsize=10)
        about = [title, "each row: a query, then its nearest images; a cross marks an image of another class"]
        if flawed:
            rows = f"the lower {len(flawed)} rows" if len(flawed) < len(shown) else "all rows"
            about.append(
                f"{rows} are examples of queries with a cross: {int(wrong.sum()):,} of {len(tried):,} have one"
            )
        else:
            about.append(f"none of {len(tried):,} queries has a cross")
        if not possible[shown].all():
            about.append("gray frame: of another class, where no more images of the query's class are left to find")
        figure.suptitle("\n".join(about), fontsize=10, parse_math=False)
        figure.tight_layout(pad=0.4, h_pad=0.6, rect=(0, 0, 1, 1 - 0.1 / size[1]))


@contextmanager
def _figure(path: Path, figure: Figure, axes: object) -> Iterator[tuple[Figure, object]]:
    """Saves and closes the figure; letters that no font has become boxes, without a word."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")
            yield figure, axes
            figure.savefig(path, dpi=100)
    finally:
        pyplot.close(figure)


def _of_different_classes(chosen: Tensor, labels: Tensor) -> list[int]:
    """The places that are chosen, the first of each class before the second of any."""
    seen: dict[int, int] = {}
    ranked = []
    for place in chosen.nonzero().flatten().tolist():
        label = int(labels[place])
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], place))
    return [place for _, place in sorted(ranked)]


def _short(name: str) -> str:
    """Its beginning and its end, in a line."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    if len(name) <= _LABEL:
        return name
    return name[:5] + "\N{HORIZONTAL ELLIPSIS}" + name[6 - _LABEL :]
