"""A step of training: batch, network, loss, optimiser."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import batches, losses, networks
from .errors import InputError
from .images import MIB, Images
from .options import AMP

_EMBEDDED = 256  # images that are embedded at a time where no gradient is wanted


class Training:
    """Network, optimiser and loss. A step depends on these and on its number alone: all chance is drawn from that."""

    def __init__(self, options: argparse.Namespace, train: Images, device: torch.device) -> None:
        self.options, self.device = options, device
        sampler = batches.PerClassBatches(train.labels, options.batch_size, options.per_class, options.seed)
        self.per_class, self.repeating = sampler.per_class, sampler.repeating
        self._feed = batches.Feed(train, sampler)
        self._distort = batches.Distortion(options.rotate, options.resize, options.shift, options.flip)
        self.loss = losses.make(options)
        self._meter = losses.Meter(self.loss, device)
        torch.manual_seed(options.seed)
        self.network = _make_network(options, train.channels, train.size).to(device)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), options.lr, weight_decay=options.weight_decay)
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        self._autocast = torch.autocast(device.type, AMP[options.amp], enabled=options.amp != "none")

    def probe(self) -> None:
        """Runs the loss once, for its errors: no kernel for this device, no such method."""
        embeddings, labels = torch.eye(4, self.options.dim), torch.tensor([0, 0, 1, 1])
        try:
            self._meter(embeddings.to(self.device), labels.to(self.device), self._scaler)
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--loss {self.options.loss} on {self.device}: {error}") from error

    def step(self, number: int) -> dict[str, Any]:
        """Trains on the batch of a step, and says what it took."""
        begin = time.perf_counter()
        pixels, labels = self._feed(number)
        pixels, labels = pixels.to(self.device), labels.to(self.device)
        random = batches.generator("distortion", self.options.seed, number)
        torch.manual_seed(batches.seed_of("network", self.options.seed, number))  # dropout, wherever it is
        rate = self.learning_rate(number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        distorted = self._distort(pixels.float(), random)
        with self._autocast:
            embeddings = self.network(distorted)
        loss, gradient = self._meter(embeddings, labels, self._scaler)
        self._optimizer.zero_grad()
        embeddings.backward(gradient)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        value = loss.item()
        if not math.isfinite(value):
            raise InputError(f"the loss of step {number + 1} is {value}: lower --lr, or train with --amp none")
        return {
            "step": number + 1,
            "loss": value,
            "learning_rate": rate,
            "step_ms": 1e3 * (time.perf_counter() - begin),
            "loss_ms": 1e3 * self._meter.seconds,
            "loss_mib": None if self._meter.bytes is None else self._meter.bytes / MIB,
        }

    def learning_rate(self, number: int) -> float:
        """A line up over the first steps, then constant or half a cosine down to 0."""
        options = self.options
        rate = options.lr * min(1.0, (number + 1) / max(1, options.warmup))
        if options.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * number / options.steps)) / 2
        return rate

    @torch.no_grad()
    def embed(self, what: Images, check: Callable[[], None]) -> Tensor:
        """[n, D] float32 of all images; ``check`` is called between batches."""
        self.network.eval()
        out = []
        for index in torch.arange(len(what)).split(_EMBEDDED):
            check()
            with self._autocast:
                out.append(self.network(what.pixels(index).to(self.device).float()).float())
        return torch.cat(out)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but its number."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of state()."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])


def _make_network(options: argparse.Namespace, channels: int, size: int) -> networks.Network:
    if options.backbone == "small":
        return networks.small(channels, size, options.dim, options.blocks, options.width)
    return networks.from_timm(options.backbone, channels, size, options.dim, options.pretrained, options.weights)
