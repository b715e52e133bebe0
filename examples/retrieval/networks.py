"""Networks from images to embeddings: a small one of plain convolutions, or any of timm's."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import InputError, reason

_LAST = 4  # the side, in places, at which the small net stops to look at where things are


class Network(nn.Module):
    """Images [b, C, S, S] uint8 or float of 0 to 255 to embeddings [b, D].

    Its losses and metrics normalise, so it does not.
    """

    def __init__(self, body: nn.Module, head: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.body, self.head = body, head
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])  # [C, 1, 1]
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body((images - self.mean) / self.std))


def small(channels: int, size: int, dim: int, blocks: int = 3, width: int = 64) -> Network:
    """Blocks of convolution, batch norm, ReLU and a halving of the size; one linear layer on all that is left."""
    if size >> blocks < 1:
        raise InputError(f"images of {size} pixels cannot be halved {blocks} times: --blocks {size.bit_length() - 1}")
    layers: list[nn.Module] = []
    for block in range(blocks):
        layers += [nn.Conv2d(width if block else channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        size //= 2
    if size > _LAST:
        layers += [nn.AvgPool2d(size // _LAST)]
        size //= size // _LAST
    return Network(
        nn.Sequential(*layers, nn.Flatten()), nn.Linear(width * size**2, dim), [0.5] * channels, [0.25] * channels
    )


def from_timm(name: str, channels: int, size: int, dim: int, pretrained: bool, weights: Path | None) -> Network:
    """A backbone of timm's under one linear layer, with the mean and spread of pixels that it was trained with."""
    try:
        import timm
    except Exception as error:  # torchvision of another torch fails in ways of its own
        raise InputError(
            f"--backbone {name} takes timm, and a torchvision that fits torch {torch.__version__}: docs/training.md "
            f"says how to have them ({reason(error)})"
        ) from error
    known = timm.list_models()
    if name.split(".")[0] not in known:
        near = difflib.get_close_matches(name, known, 5)
        raise InputError(f"timm has no model {name!r}" + (f"; near to it are {', '.join(near)}" if near else ""))
    # A local file takes the place of the hub's.
    extra = {"pretrained_cfg_overlay": {"file": str(weights)}} if weights else {}
    wanted = pretrained or weights is not None
    try:
        body = timm.create_model(name, pretrained=wanted, num_classes=0, in_chans=channels, **extra)
    except Exception as error:  # a download that fails, a file of other weights: each has errors of its own
        raise InputError(f"--backbone {name}: timm cannot make it: {reason(error)}") from error
    try:
        with torch.no_grad():  # models do not agree on where they say how wide their output is
            width = body.eval()(torch.zeros(1, channels, size, size)).shape[1]
    except (AssertionError, RuntimeError, ValueError) as error:
        raise InputError(f"--backbone {name} does not take images of {size} pixels: {reason(error)}") from error
    pixels = timm.data.resolve_model_data_config(body)
    mean, std = list(pixels["mean"]), list(pixels["std"])
    if channels != len(mean):
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    return Network(body, nn.Linear(width, dim), mean, std)
