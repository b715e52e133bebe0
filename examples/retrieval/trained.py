"""A trained network, from the best.pt of its run: it embeds image files as the training program embedded its own.

from retrieval.trained import load

model = load("runs/digits-roadmap")
similarities = model.embed(["query.png"]) @ model.embed(["a.png", "b.png"]).T  # [1, 2]
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import checkpoint, decode, images
from .errors import FileError, InputError, reason
from .networks import Network
from .photos import Transform
from .survey import in_threads
from .training import Training, make_network

_AT_A_TIME = 256
_TEXT_OR_NONE = (str, type(None))
# What best.pt says of the network and of its images, beside the weights.
_MADE_OF = {
    "backbone": str, "dim": int, "blocks": int, "width": int, "pool": _TEXT_OR_NONE, "head": str,
    "freeze_batch_norm": bool, "channels": int, "size": int, "values": (list, type(None)),
    "test_resize": (list, type(None)), "normalize": bool,
}  # fmt: skip
_HOLDS = {"network": dict, "made_of": dict, "classes": list, "evaluation": dict}
_REMEDY = "restore it, or train again"
_DEEP = "more than 8 bits, where the network was trained on 8: nothing says which value is white; save it with 8"


def contents(training: Training) -> dict[str, Any]:
    """What best.pt holds of a training, as it is now."""
    given, trained_on = training.options, training.images
    known = {"channels": trained_on.channels, "size": trained_on.size, "normalize": given.normalize is not False}
    known["values"] = list(trained_on.values) if isinstance(trained_on, images.Images) and trained_on.values else None
    made_of = {name: known[name] if name in known else getattr(given, name) for name in _MADE_OF}
    return {"network": training.network.state_dict(), "made_of": made_of, "classes": trained_on.classes}


@dataclass(frozen=True)
class Trained:
    """A network that is ready to embed.

    Attributes:
        network: images [b, C, S, S] of 0 to 255 to embeddings [b, D]; in evaluation mode.
        made_of: the options that the network was made with, and its images' ``channels``, ``size`` and ``values``.
        classes: the names of those that it was trained on.
        evaluation: its row of metrics.csv, with the step.
    """

    network: Network
    made_of: dict[str, Any]
    classes: list[str]
    evaluation: dict[str, float | None]

    @torch.no_grad()
    def embed(self, files: Sequence[str | os.PathLike[str]]) -> Tensor:
        """[n, D] float32 of n image files, of norm 1 unless the network was trained to rank by plain products.

        Raises:
            TypeError: ``files`` is one file.
            InputError: one of them is not there, or damaged, or has more than 8 bits where those trained on had 8.
        """
        if isinstance(files, str | bytes | os.PathLike):
            raise TypeError(f"files must be a list of image files, got {files!r}: use embed([{files!r}])")
        device, out = self.network.mean.device, [torch.empty(0, self.made_of["dim"])]
        for begin in range(0, len(files), _AT_A_TIME):
            pixels = torch.stack(list(in_threads(self.pixels, files[begin : begin + _AT_A_TIME])))
            out.append(self.network(pixels.to(device).float()).float().cpu())
        return functional.normalize(torch.cat(out)) if self.made_of["normalize"] else torch.cat(out)

    def pixels(self, file: str | os.PathLike[str]) -> Tensor:
        """[C, S, S] uint8 of an image file, turned, cut and resized as those of the test were."""
        from PIL import Image

        channels, size, resized = (self.made_of[name] for name in ("channels", "size", "test_resize"))
        try:
            if resized is None:
                square = decode.square(io.BytesIO(Path(file).read_bytes()), channels, size)
                if square.dtype == np.float32 and self.made_of["values"] is None:
                    raise ValueError(_DEEP)
                return torch.from_numpy(decode.pixels(square, channels, self.made_of["values"]))
            with Image.open(file, formats=decode.FORMATS) as opened:
                if opened.mode.startswith(("I", "F")):
                    raise ValueError(_DEEP)
                picture = Transform(size, None, (1, 1), (1, 1), tuple(resized)).test(opened.convert("RGB"))
        except Exception as error:  # Pillow raises whatever a file's format leads it into
            raise InputError(f"{os.fspath(file)} cannot be read as an image ({reason(error)}): replace it") from error
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def load(run: str | os.PathLike[str], device: str | torch.device = "cpu") -> Trained:
    """The best network of a run: ``run`` is its folder, or its best.pt wherever that lies.

    Raises:
        FileError: it is not there or damaged, or not the best.pt of a run.
        InputError: the network is one of timm's, and timm is not installed; or there is no such device.
    """
    path = Path(run)
    path = path / "best.pt" if path.is_dir() else path
    found = checkpoint.read(path, _HOLDS, _REMEDY)
    made_of = found["made_of"]
    checkpoint.check_fields(path, made_of, _MADE_OF, _REMEDY)
    options = argparse.Namespace(**made_of, pretrained=False, weights=None, distilled=False)
    network = make_network(options, made_of["channels"], made_of["size"])
    wrong = checkpoint.difference(found["network"], network.state_dict(), "network")
    if wrong:
        raise FileError(path, f"does not hold what it says: {wrong}", _REMEDY)
    network.load_state_dict(found["network"])
    try:
        network.to(device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"device {str(device)!r} cannot be used ({reason(error)}): name another") from error
    return Trained(network.eval().requires_grad_(False), made_of, found["classes"], found["evaluation"])
