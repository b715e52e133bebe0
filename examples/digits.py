"""Train a small network to retrieve handwritten digits with roadmap_ext.RoadmapLoss, and see what it learnt.

scikit-learn's 1,797 scanned digits of 8 x 8 pixels come with it, so nothing is downloaded; a CPU takes seconds.
Run it from a clone by `make demo`; it needs scikit-learn, matplotlib and tqdm. Writes digits.png. mAP@R is the mean,
over queries, of the precision at each relevant image among the first R, R being how many are relevant; R@1 the share
of queries whose nearest image is relevant.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import roadmap_ext

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the yardstick below is not part of the package
from benchmarks.loop import torch_loop
from benchmarks.measure import paired, step

GOAL = 0.9  # mAP@R on the held-out images below which something is broken


class Embedding(nn.Sequential):
    """Images [B, 1, 8, 8] to points on the unit sphere, [B, 64]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 64),
        )

    def forward(self, images: Tensor) -> Tensor:
        return functional.normalize(super().forward(images), dim=1)


def batch_scores(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every image against every other: scores, which pairs are relevant, and which to ignore (each its own query)."""
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return embeddings @ embeddings.T, labels[:, None] == labels[None], itself


def train(net: Embedding, images: Tensor, labels: Tensor, steps: int, batch_size: int) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss_function = roadmap_ext.RoadmapLoss()
    with tqdm(range(steps), desc="training", unit="step") as progress:
        for _ in progress:
            batch = torch.randperm(len(images))[:batch_size].to(images.device)
            loss = loss_function(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def evaluate(embeddings: Tensor, labels: Tensor) -> tuple[float, float]:
    """mAP@R and R@1, each image a query against all others; a tie counts against the ranking."""
    scores, target, itself = batch_scores(embeddings, labels)
    precisions, firsts = [], []
    for row, positive, self_ in zip(scores, target, itself, strict=True):
        others, positives = row[~self_], row[positive & ~self_]
        rank = (others[None] >= positives[:, None]).sum(1)
        rank_positive = (positives[None] >= positives[:, None]).sum(1)
        precisions.append((rank_positive / rank)[rank <= len(positives)].sum() / len(positives))
        firsts.append(rank.min() == 1)
    return torch.stack(precisions).mean().item(), torch.stack(firsts).float().mean().item()


def compare_speed(embeddings: Tensor, labels: Tensor) -> None:
    """What the AP loss takes of a training step, beside the loop one would write by hand."""
    scores, target, itself = batch_scores(embeddings.detach(), labels)
    pair = paired(
        step(lambda leaf: roadmap_ext.ap_loss(leaf, target, ignore=itself), scores),
        step(lambda leaf: torch_loop(leaf, target, itself), scores),
    )
    ours, loop, ratio = (1e3 * pair.ours[-1].median, 1e3 * pair.peer[-1].median, pair.ratio[-1].median)
    print(f"\nThe AP loss and its gradient, {len(labels)} x {len(labels)} scores: {ours:.2f} ms a step")
    print(f"The same in plain PyTorch, one query at a time:  {loop:.0f} ms a step ({ratio:.0f} times as long)")


def one_a_digit(images: Tensor, labels: Tensor) -> list[int]:
    """The first of the given image numbers for each digit among them."""
    return [int(images[labels[images] == digit][0]) for digit in labels[images].unique()]


@torch.no_grad()
def draw(embeddings: Tensor, labels: Tensor, images: Tensor, path: Path, queries: int = 8, neighbours: int = 8) -> None:
    """Queries and their nearest held-out images; up to half of the queries have a wrong one among these."""
    scores, target, itself = batch_scores(embeddings.cpu(), labels.cpu())
    labels, images = labels.cpu(), images.cpu()
    nearest = scores.masked_fill(itself, -torch.inf).topk(neighbours, dim=1).indices
    right = target.gather(1, nearest)
    flawed = one_a_digit((~right).any(1).nonzero().flatten(), labels)[: queries // 2]
    flawless = one_a_digit(right.all(1).nonzero().flatten(), labels)[len(flawed) - queries :]

    figure, axes = pyplot.subplots(queries, neighbours + 1, figsize=(neighbours + 1, queries + 0.7), squeeze=False)
    for query, line in zip(flawless + flawed, axes, strict=False):
        for column, (image, axis) in enumerate(zip([query, *nearest[query].tolist()], line, strict=True)):
            correct = bool(labels[image] == labels[query])
            axis.imshow(images[image, 0], cmap="gray_r")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="black" if column == 0 else "tab:green" if correct else "tab:red", linewidth=3)
            if not correct:  # a mark that does not need colour
                mark = {"transform": axis.transAxes, "ha": "right", "va": "top", "fontsize": 15, "fontweight": "bold"}
                axis.text(0.98, 1.0, "\N{MULTIPLICATION X}", color="tab:red", **mark)
                axis.set_xlabel(f"a {labels[image]}", fontsize=8, labelpad=2)
        line[0].set_ylabel(str(labels[query].item()), rotation=0, labelpad=10, va="center", fontsize=13)
    axes[0, 0].set_title("query", fontsize=10)
    figure.tight_layout(pad=0.4, h_pad=0.9, rect=(0, 0, 1, 0.97))
    figure.suptitle("Held-out digits and their nearest others; a cross and a red frame mark another digit", fontsize=11)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="where the picture goes")
    arguments = parser.parse_args()

    build = roadmap_ext.build_info()
    device = torch.device("cuda" if torch.cuda.is_available() and build["cuda"] else "cpu")
    print(f"Device: {device}")
    print("CUDA kernels: built" if build["cuda"] else f"CUDA kernels: not built because {build['cuda_reason']}")

    torch.manual_seed(arguments.seed)
    data = load_digits()
    split = train_test_split(data.images / 16, data.target, test_size=600, random_state=0, stratify=data.target)
    train_images, held_images = (torch.tensor(x, dtype=torch.float32, device=device)[:, None] for x in split[:2])
    train_labels, held_labels = (torch.tensor(x, device=device) for x in split[2:])

    net = Embedding().to(device)
    embeddings = {
        "raw pixels": functional.normalize(held_images.flatten(1), dim=1),
        "untrained net": net(held_images).detach(),
    }
    train(net, train_images, train_labels, arguments.steps, arguments.batch_size)
    embeddings["trained net"] = net(held_images).detach()

    print(f"\n{len(held_labels)} held-out images   mAP@R     R@1")
    for name, points in embeddings.items():
        map_at_r, recall = evaluate(points, held_labels)
        print(f"{name:<20}{map_at_r:>8.3f}{recall:>8.3f}")

    batch = slice(0, arguments.batch_size)
    compare_speed(net(train_images[batch]), train_labels[batch])
    draw(embeddings["trained net"], held_labels, held_images, arguments.out)
    print(f"\nWrote {arguments.out}: some queries and what the net finds nearest to them")
    if map_at_r < GOAL:
        sys.exit(f"mAP@R of the trained net is {map_at_r:.3f}, below {GOAL}: the training, or this build, is broken.")


if __name__ == "__main__":
    main()
