"""Networks from images to embeddings: a small one of plain convolutions, or any of timm's."""

from __future__ import annotations

import difflib
from pathlib import Path

import torch
from torch import Tensor, nn

from . import checkpoint
from .errors import FileError, InputError, reason

_LAST = 4  # the side, in places, at which the small net stops to look at where things are


class Network(nn.Module):
    """Images [b, C, S, S] uint8 or float of 0 to 255 to embeddings [b, D].

    Its losses and metrics normalise, so it does not. With ``freeze_batch_norm`` batch norm goes by its running means
    and variances in training, too; its scale and shift are trained all the same, as in ROADMAP's released code.
    """

    def __init__(
        self, body: nn.Module, head: nn.Module, mean: list[float], std: list[float], freeze_batch_norm: bool = False
    ) -> None:
        super().__init__()
        self.body, self.head, self._freeze_batch_norm = body, head, freeze_batch_norm
        self.register_buffer("mean", 255 * torch.tensor(mean)[:, None, None])  # [C, 1, 1]
        self.register_buffer("std", 255 * torch.tensor(std)[:, None, None])

    def train(self, mode: bool = True) -> Network:
        """As of any module."""
        super().train(mode)
        if self._freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

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


def from_timm(
    name: str,
    channels: int,
    size: int,
    dim: int,
    pretrained: bool,
    weights: Path | None,
    *,
    distilled: bool = False,
    pool: str | None = None,
    head: str = "linear",
    freeze_batch_norm: bool = False,
) -> Network:
    """A backbone of timm's under a head, with the mean and spread of pixels that it was trained with.

    Args:
        weights: a file of the model's parameters, under timm's names for them; those of its classifier are left out.
        distilled: begin with the weights of the DeiT's distilled twin, which ``weights`` then are, too.
        pool: over places, "avg" or "max"; None for what the model has.
        head: "linear"; "norm-linear", after a layer norm without scale and shift; or "none".
    """
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
    wanted = pretrained or weights is not None
    pooled = {} if pool is None else {"global_pool": pool}

    def make(name: str, pretrained: bool, **keywords: object) -> nn.Module:
        downloaded = pretrained and weights is None
        made = timm.create_model(name, pretrained=downloaded, num_classes=0, in_chans=channels, **keywords)
        if pretrained and weights is not None:
            _begin_with(made, weights, name)
        return made

    try:
        if distilled and wanted:
            body = make(name, False, **pooled)
            body.load_state_dict(_without_distillation(make(_twin(name, known), True).state_dict()))
        else:
            body = make(name, wanted, **pooled)
    except InputError:
        raise
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
    if head == "none":
        if width != dim:
            raise InputError(f"--head none leaves the {width} dimensions of --backbone {name}: --dim {width}")
        return Network(body, nn.Identity(), mean, std, freeze_batch_norm)
    layers = [nn.Linear(width, dim)]
    if head == "norm-linear":
        layers.insert(0, nn.LayerNorm(width, elementwise_affine=False))
    return Network(body, layers[0] if len(layers) == 1 else nn.Sequential(*layers), mean, std, freeze_batch_norm)


def _begin_with(body: nn.Module, path: Path, name: str) -> None:
    """Loads a file of weights into a model. timm itself may unpickle anything, and passes over what is missing."""
    found, own = checkpoint.read_weights(path), body.state_dict()
    classifier = getattr(body, "pretrained_cfg", {}).get("classifier") or ()
    left_out = tuple(f"{part}." for part in ([classifier] if isinstance(classifier, str) else classifier))
    found = {key: value for key, value in found.items() if key in own or not key.startswith(left_out)}
    for key, value in found.items():
        shape = own[key].shape if key in own else value.shape
        if value.dim() == 4 and value.shape[1] == 3 and shape == (len(value), 1, *value.shape[2:]):
            found[key] = value.sum(1, keepdim=True)  # gray is three equal colours
    try:
        body.load_state_dict(found)
    except RuntimeError as error:
        said = "; ".join(line.strip().rstrip(". ")[:200] for line in str(error).splitlines()[1:4])
        raise FileError(path, f"is not of --backbone {name} ({said})", "name a file of that model's weights") from error


def _twin(name: str, known: list[str]) -> str:
    """The name of a DeiT's distilled twin."""
    twin = name.split(".")[0].replace("_patch", "_distilled_patch")
    if twin not in known or not name.startswith("deit_"):
        raise InputError(
            f"--distilled is for a --backbone such as deit_small_patch16_224: {name} has no distilled twin"
        )
    return twin


def _without_distillation(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a distilled DeiT without its distillation token, which stands after the class token."""
    places = weights["pos_embed"]  # [1, 2 + patches, D]
    weights["pos_embed"] = torch.cat([places[:, :1], places[:, 2:]], dim=1)
    return {name: value for name, value in weights.items() if name != "dist_token"}
