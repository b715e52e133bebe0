"""What a run looks like: its curves, and queries with what was found nearest to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from torch import Tensor
from torch.nn import functional

from .images import Images
from .run import Table

_CANDIDATES = 1024  # queries among which those to show are looked for


def curves(steps: Table, metrics: Table, names: Sequence[str], title: str, path: Path) -> None:
    """Loss by step, and metrics by step."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    losses = torch.tensor(steps.column("loss"))
    numbers = steps.column("step")
    left.plot(numbers, losses.numpy(), color="tab:blue", alpha=0.25, linewidth=0.8)
    window = max(1, len(losses) // 30)
    if len(losses) >= 2 * window:
        smooth = losses.unfold(0, window, 1).mean(1)
        left.plot(numbers[window - 1 :], smooth.numpy(), color="tab:blue", label=f"mean of {window} steps")
        left.legend()
    left.set(xlabel="step", ylabel="loss of a batch", title="training")
    for name, mark in zip(names, "osD^v<>pP*", strict=False):
        right.plot(metrics.column("step"), metrics.column(name), marker=mark, markersize=4, label=name)
    right.set(xlabel="step", ylim=(0, 1), title="retrieval of the test images")
    right.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@torch.no_grad()
def neighbours(
    embeddings: Tensor, images: Images, path: Path, title: str, *, queries: int = 8, columns: int = 8, seed: int = 0
) -> None:
    """Queries of different classes and their nearest others; up to half of the queries have a wrong one among these.

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
    flawed = _of_different_classes((~right).any(1), labels[tried])
    flawless = _of_different_classes(right.all(1), labels[tried])
    flawed = flawed[: max(queries // 2, queries - len(flawless))]
    shown = flawless[: queries - len(flawed)] + flawed

    figure, axes = pyplot.subplots(
        len(shown), columns + 1, figsize=(columns + 1, 1.12 * len(shown) + 0.6), squeeze=False
    )
    for place, line in zip(shown, axes, strict=True):
        numbers = [int(tried[place]), *nearest[place].tolist()]
        pixels = images.pixels(torch.tensor(numbers))
        for column, (number, picture, axis) in enumerate(zip(numbers, pixels, line, strict=True)):
            correct = bool(labels[number] == labels[numbers[0]])
            axis.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="black" if column == 0 else "tab:green" if correct else "tab:red", linewidth=3)
            if not correct:  # a mark that does not need colour
                mark = {"transform": axis.transAxes, "ha": "right", "va": "top", "fontsize": 15, "fontweight": "bold"}
                axis.text(0.98, 1.0, "\N{MULTIPLICATION X}", color="tab:red", **mark)
            if column == 0 or not correct:
                axis.set_xlabel(_short(images.classes[labels[number]]), fontsize=6, labelpad=2)
    axes[0, 0].set_title("query", fontsize=10)
    figure.suptitle(f"{title}\nnearest first; a cross and a red frame mark another class", fontsize=10)
    figure.tight_layout(pad=0.4, h_pad=0.6, rect=(0, 0, 1, 0.98))
    figure.savefig(path, dpi=100)
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
    return name if len(name) <= 20 else "\N{HORIZONTAL ELLIPSIS}" + name[-19:]
