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

import torch
from retrieval import images as image_files
from retrieval import pictures
from retrieval.progress import Progress
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import roadmap_ext
from roadmap_ext.metrics import retrieval_metrics

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
    with Progress("training", steps, "steps") as progress:
        for _ in range(steps):
            batch = torch.randperm(len(images))[:batch_size].to(images.device)
            loss = loss_function(net(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.set_postfix_str(f"loss {loss.item():.3f}", False)
            progress.update()


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


def split() -> tuple[image_files.Images, image_files.Images]:
    """The digits to train on, and 600 that are held out."""
    data = image_files.digits()
    train, held = train_test_split(range(len(data)), test_size=600, random_state=0, stratify=data.labels)
    return data.take(torch.tensor(train)), data.take(torch.tensor(held))


def every(data: image_files.Images) -> Tensor:
    """All its images, [n, 1, 8, 8] uint8."""
    return data.pixels(torch.arange(len(data)))


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
    print("CUDA kernels: loaded" if build["cuda"] else f"CUDA kernels: none because {build['cuda_reason']}")

    torch.manual_seed(arguments.seed)
    train_data, held = split()
    train_images, held_images = (every(part).to(device) / 255 for part in (train_data, held))
    train_labels, held_labels = train_data.labels.to(device), held.labels.to(device)

    net = Embedding().to(device)
    embeddings = {
        "raw pixels": functional.normalize(held_images.flatten(1), dim=1),
        "untrained net": net(held_images).detach(),
    }
    train(net, train_images, train_labels, arguments.steps, arguments.batch_size)
    embeddings["trained net"] = net(held_images).detach()

    print(f"\n{len(held_labels)} held-out images   mAP@R     R@1")
    for name, points in embeddings.items():
        measured = retrieval_metrics(points, held_labels, k=[1])
        print(f"{name:<20}{measured['mAP@R']:>8.3f}{measured['R@1']:>8.3f}")

    batch = slice(0, arguments.batch_size)
    compare_speed(net(train_images[batch]), train_labels[batch])
    title = "held-out digits and their nearest others"
    pictures.neighbours(embeddings["trained net"], held, arguments.out, title)
    print(f"\nWrote {arguments.out}: some queries and what the net finds nearest to them")
    if measured["mAP@R"] < GOAL:
        sys.exit(
            f"mAP@R of the trained net is {measured['mAP@R']:.3f}, below {GOAL}: the training or this build is broken."
        )


if __name__ == "__main__":
    main()
