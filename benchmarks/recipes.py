"""What the paper's experiments take at full size, counted: images, operations, memory of the activations.

`python -m benchmarks.recipes` prints a row a recipe of examples/recipes. Nothing is trained and nothing is downloaded:
networks run one step on fake tensors, which have shapes and no numbers, while what is computed and what autograd keeps
is counted. Takes timm (docs/training.md says how to have it).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from retrieval.options import parse
from retrieval.recipes import FOLDER
from retrieval.training import make_network

from . import report

# Images to train on, and of the test (docs/recipes.md); super-classes of the hierarchical sampler.
SIZES = {"sop": (59_551, 60_502), "cub": (5_864, 5_924), "inat": (325_846, 136_093)}
SUPER_CLASSES = 12
GIB = 1 << 30


@dataclass(frozen=True)
class Cost:
    """Of one recipe."""

    name: str
    steps: int
    images: int  # trained on, in all
    test_images: int
    operations: float  # of a step, forward and backward; two for a multiply-add
    activations: dict[str, int]  # bytes that autograd keeps of a batch, by --amp
    state: int  # bytes of the weights, their gradients and the optimiser's averages


def count(name: str) -> Cost:
    """The cost of a recipe by name."""
    options = parse(None, ["--recipe", name, "--data-root", "."])
    options.pretrained = options.distilled = False  # of the same shapes
    train, test = SIZES[options.data_set]
    epoch = max(1, round(train / options.batch_size))
    if options.sampler == "hierarchical":
        epoch = options.batches_per_pair * SUPER_CLASSES * (SUPER_CLASSES - 1) // 2
    steps = options.epochs * epoch
    # timm tries a network on an image as it makes it: real, but small.
    network = make_network(options, 3, options.image_size).train()
    activations = {}
    counter = FlopCounterMode(display=False)
    for amp in ("none", "bf16"):
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            learnt = {key for key, _ in network.named_parameters()}
            weights = {
                key: fake.from_tensor(value.detach()).requires_grad_(key in learnt)
                for key, value in network.state_dict().items()
            }
            images = torch.empty(options.batch_size, 3, options.image_size, options.image_size)
            kept: dict[int, int] = {}

            def keep(x: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
                kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
                return x

            with (
                torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
                counter if amp == "none" else nullcontext(),
            ):
                with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
                    embeddings = torch.func.functional_call(network, weights, images)
                embeddings.sum().backward()
            own = {x.untyped_storage()._cdata for x in weights.values()}
            activations[amp] = sum(size for key, size in kept.items() if key not in own)
    parameters = sum(p.numel() * p.element_size() for p in network.parameters())
    return Cost(name, steps, steps * options.batch_size, test, counter.get_total_flops(), activations, 4 * parameters)


def line(cost: Cost, speed: float) -> str:
    """A row of the table."""
    activations = [f"{cost.activations[amp] / GIB:.1f}" for amp in ("none", "bf16")]
    cells = [
        f"`{cost.name}`",
        f"{cost.steps:,}",
        f"{cost.images / 1e6:.1f} million",
        f"{cost.operations / 1e12:.1f}",
        " / ".join(activations) + " GiB",
        f"{cost.state / GIB:.2f} GiB",
        f"{cost.images / speed / 3600:.1f} h",
    ]
    return report.markdown_row(cells)


def main() -> None:
    """Counts and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-second", type=float, default=1000.0, help="of the training; default 1000")
    speed = parser.parse_args().images_per_second
    heads = ["recipe", "steps", "images", "1e12 operations a step", "kept for backward, float32 / 16 bits"]
    print(report.markdown_head([*heads, "weights and Adam", f"at {speed:,.0f} images a second"]))
    for path in sorted(FOLDER.glob("*.toml")):
        print(line(count(path.stem), speed), flush=True)


if __name__ == "__main__":
    main()
