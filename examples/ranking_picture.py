"""Draw the README's picture: one query's ranking before and after training, and what the loss asks of it in between.

Data, network and training are the demo's (digits.py). A query ranks 16 held-out digits, 5 of them its positives. Of the
queries tried, the one that the untrained network ranks worst is drawn. `python examples/ranking_picture.py` writes
docs/images/ranking.png; it takes seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from digits import Embedding, every, split, train
from matplotlib import pyplot
from matplotlib.axes import Axes
from torch import Tensor

import roadmap_ext
from roadmap_ext.metrics import average_precision

REFERENCES, POSITIVES, TRIED = 16, 5, 200
GREEN, RED = "#1a7f37", "#cf222e"


def candidates(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [TRIED], the references of each [TRIED, REFERENCES], and which of these are positives [TRIED, REFERENCES]."""
    queries = torch.randperm(len(labels))[:TRIED]
    references = []
    for query in queries.tolist():
        order = torch.randperm(len(labels))
        order = order[order != query]
        same = labels[order] == labels[query]
        references.append(torch.cat([order[same][:POSITIVES], order[~same][: REFERENCES - POSITIVES]]))
    return queries, torch.stack(references), (torch.arange(REFERENCES) < POSITIVES).expand(TRIED, REFERENCES)


def similarities(net: Embedding, images: Tensor, query: Tensor, references: Tensor) -> Tensor:
    """Cosine similarities [Q, N] of queries [Q] to the references [Q, N] of each; both are numbers of images."""
    points = net(images).detach()
    return (points[references] @ points[query][:, :, None])[:, :, 0]


def strip(axes: list[Axes], images: Tensor, positive: Tensor) -> None:
    """A ranking, the most similar first: images [N, 1, 8, 8] and which of them are positives [N]."""
    for axis, picture, right in zip(axes, images, positive.tolist(), strict=True):
        axis.imshow(picture[0], cmap="gray")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=GREEN if right else RED, linewidth=2.5)
        mark = "\N{CHECK MARK}" if right else "\N{MULTIPLICATION X}"  # a mark that does not need colour
        axis.set_xlabel(mark, color=GREEN if right else RED, fontsize=12, labelpad=1)


def arrows(axis: Axes, pull: Tensor) -> None:
    """What the loss asks: an arrow up raises a similarity, one down lowers it, by `pull` [N]."""
    lengths = (pull / pull.abs().max()).tolist()
    for place, length in enumerate(lengths):
        if abs(length) > 0.01:
            colour, style = (GREEN if length > 0 else RED), {"arrowstyle": "simple,head_width=0.7,head_length=0.5"}
            axis.annotate("", (place, length), (place, 0), arrowprops=style | {"color": colour, "shrinkA": 0, "shrinkB": 0})
    axis.axhline(0, color="silver", linewidth=1)
    axis.set(xlim=(-0.5, len(pull) - 0.5), ylim=(-1.1, 1.1))
    axis.axis("off")


def draw(query: Tensor, rankings: list[tuple[str, Tensor, Tensor]], pull: Tensor, path: Path) -> None:
    """The query [1, 8, 8]; before and after: a title, the images in their order and which are positives; pull [N]."""
    figure = pyplot.figure(figsize=(11, 4.2), facecolor="white")
    rows = figure.add_gridspec(3, REFERENCES + 3, height_ratios=[1, 1.1, 1], left=0.01, right=0.99, top=0.9, bottom=0.06)
    axis = figure.add_subplot(rows[1, :2])
    axis.imshow(query[0], cmap="gray")
    axis.set(xticks=[], yticks=[], title="the query")
    for row, (title, images, positive) in zip((0, 2), rankings, strict=True):
        axes = [figure.add_subplot(rows[row, 3 + place]) for place in range(REFERENCES)]
        strip(axes, images, positive)
        axes[0].set_title(title, loc="left", fontsize=12)
    arrows(figure.add_subplot(rows[1, 3:]), pull)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs/images/ranking.png")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    train_data, held = split()
    images, labels = every(held) / 255, held.labels
    query, references, positive = candidates(labels)
    net = Embedding()
    before = similarities(net, images, query, references)
    worst = average_precision(before, positive).argmin()
    query, references, positive = query[worst, None], references[worst, None], positive[worst, None]
    before = before[worst, None].requires_grad_()
    roadmap_ext.ap_loss(before, positive).backward()
    train(net, every(train_data) / 255, train_data.labels, arguments.steps, batch_size=512)
    after = similarities(net, images, query, references)

    rankings = []
    for when, scores in (("before training", before.detach()), (f"after {arguments.steps} steps", after)):
        order = scores[0].argsort(descending=True)
        title = f"{when}: AP {average_precision(scores, positive).item():.2f}"
        rankings.append((title, images[references[0, order]], positive[0, order]))
    pull = -before.grad[0, before[0].argsort(descending=True)]
    draw(images[query[0]], rankings, pull, arguments.out)
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
