"""Draw the README's picture: one query's ranking before and after training, and what the loss asks of it in between.

Data, network and training are the demo's (digits.py). A query ranks 12 held-out digits, 4 of them its positives. Of the
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

REFERENCES, POSITIVES, TRIED = 12, 4, 200
GREEN, RED = "#1a7f37", "#cf222e"


def candidates(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [TRIED], the references of each [TRIED, REFERENCES], and which are positives, bool of the same."""
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
        colour = GREEN if right else RED
        axis.imshow(picture[0].numpy(), cmap="gray_r")
        axis.spines[:].set(color=colour, linewidth=3)
        mark = "\N{CHECK MARK}" if right else "\N{MULTIPLICATION X}"  # a mark that does not need colour
        axis.text(0.95, 0.93, mark, transform=axis.transAxes, ha="right", va="top", color=colour, fontsize=15)


def arrows(axes: list[Axes], pull: Tensor) -> None:
    """What the loss asks: an arrow up raises a similarity, one down lowers it, by `pull` [N]."""
    for axis, length in zip(axes, (pull / pull.abs().max()).tolist(), strict=True):
        colour, head = (GREEN, "^") if length > 0 else (RED, "v")
        axis.bar(0, length, width=0.25, color=colour)
        axis.plot(0, length, marker=head, color=colour, markersize=min(11, 40 * abs(length)))
        axis.axhline(0, color="gray", linewidth=1)
        axis.set(xlim=(-1, 1), ylim=(-0.6, 1.2))
        axis.spines[:].set_visible(False)


def draw(name: str, query: Tensor, rankings: list[tuple[str, Tensor, Tensor]], pull: Tensor, path: Path) -> None:
    """The query [8, 8] and its name; before and after, a title, the images in order and the positives; pull [N]."""
    figure = pyplot.figure(figsize=(11, 4.1), facecolor="white")
    grid = figure.add_gridspec(3, REFERENCES + 2, left=0.01, right=0.99, top=0.93, bottom=0.01, wspace=0.1, hspace=0.35)
    axis = figure.add_subplot(grid[1, :2], xticks=[], yticks=[], anchor="W")
    axis.imshow(query.numpy(), cmap="gray_r")
    axis.set_title(f"query: a {name}", fontsize=13, loc="left")
    rows = [[figure.add_subplot(grid[row, 2 + n], xticks=[], yticks=[]) for n in range(REFERENCES)] for row in range(3)]
    (before, *shown_before), (after, *shown_after) = rankings
    strip(rows[0], *shown_before)
    arrows(rows[1], pull)
    strip(rows[2], *shown_after)
    asked = "the pull of the AP loss (its negative gradient): up is towards the query, down is away"
    for axes, title in zip(rows, (before, asked, after), strict=True):
        axes[0].set_title(title, loc="left", fontsize=13)
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
    for when, scores in (("before training", before.detach()), (f"after {arguments.steps} steps of training", after)):
        order = scores[0].argsort(descending=True)
        title = f"{when}, most similar first: AP {average_precision(scores, positive).item():.2f}"
        rankings.append((title, images[references[0, order]], positive[0, order]))
    pull = -before.grad[0, before[0].argsort(descending=True)]
    draw(held.classes[labels[query[0]]], images[query[0], 0], rankings, pull, arguments.out)
    print(f"Wrote {arguments.out}")


if __name__ == "__main__":
    main()
