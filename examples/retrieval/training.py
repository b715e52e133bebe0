"""A step of training: batch, network, loss, optimiser."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import roadmap_ext
from roadmap_ext import EmbeddingMemory, cached_backward

from . import batches, losses, networks
from .batches import PerClassBatches
from .checkpoint import difference
from .errors import InputError
from .hierarchy import HierarchicalBatches
from .images import MIB, Images
from .options import AMP
from .photos import Photos
from .ranks import Ranks

_EMBEDDED = 256  # images that are embedded at a time where no gradient is wanted


class Training:
    """Network, optimiser and loss. A step depends on these and on its number alone: all chance is drawn from that.

    Of several ranks each takes its share of the batch; the loss is that of the whole.
    """

    def __init__(self, options: argparse.Namespace, train: Images | Photos, device: torch.device, ranks: Ranks) -> None:
        self.options, self.device, self.ranks = options, device, ranks
        self.images = train
        sampler = make_sampler(options, train)
        self.per_class, self.repeating = sampler.per_class, sampler.repeating
        self._share = ranks.share(options.batch_size)
        self._sampler = sampler
        self._feed = batches.Feed(train, sampler, self._share)
        self._distort = batches.Distortion(options.rotate, options.resize, options.shift, options.flip)
        self.loss = losses.make(options, ranks.world > 1)
        self._meter = losses.Meter(device)
        self._ranked: tuple[Tensor, Tensor, Tensor] | None = None
        self._memory: EmbeddingMemory | None = None
        if options.memory_size is not None:
            self._memory = EmbeddingMemory(
                options.memory_size,
                options.dim,
                warm_up=options.memory_warmup,
                gather_across_devices=ranks.world > 1,
                device=device,
            )
        torch.manual_seed(options.seed)
        self.network = make_network(options, train.channels, train.size).to(device)
        self._model = ranks.together(self.network, device)
        self._optimizer = _make_optimizer(options, self.network)
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        self._autocast = torch.autocast(device.type, AMP[options.amp], enabled=options.amp != "none")

    def close(self) -> None:
        """Lets go of what belongs to the ranks' group, which has to end after it.

        Else DistributedDataParallel takes the group along, and holds Python's lock while gloo's threads wait for it to
        put their last tensors away.
        """
        self._model = self.network

    def probe(self) -> None:
        """Runs the loss once, for its errors: no kernel for this device, no such method."""
        embeddings, labels = torch.eye(4, self.options.dim, device=self.device), torch.tensor([0, 0, 1, 1])
        try:
            self._scaler.scale(self.loss(embeddings.requires_grad_(), labels.to(self.device))).backward()
        except (ValueError, RuntimeError) as error:
            raise InputError(f"--loss {self.options.loss} on {self.device}: {error}") from error

    def step(self, number: int) -> dict[str, Any]:
        """Trains on the batch of a step, and says what it took."""
        begin = time.perf_counter()
        pixels, labels, ids = (x.to(self.device) for x in self._feed(number))
        random = batches.generator("distortion", self.options.seed, number)
        draw = self._distort.draw(self.options.batch_size, random)[self._share].to(self.device)
        rank = f" on rank {self.ranks.rank}" if self.ranks.rank else ""
        torch.manual_seed(batches.seed_of("network" + rank, self.options.seed, number))  # dropout, wherever it is
        rate = self.learning_rate(number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["share"]
        self.network.train()
        self._optimizer.zero_grad()
        value = self._backward((pixels, draw), labels, ids).item()
        self._scaler.step(self._optimizer)
        self._scaler.update()
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

    def _backward(self, inputs: tuple[Tensor, Tensor], labels: Tensor, ids: Tensor) -> Tensor:
        """The loss of pixels [b, C, S, S] and how they are to be distorted [b, 5]; adds to the gradients."""

        def embed(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
            return model(self._distort(inputs[0].float(), inputs[1]))

        def rank(embeddings: Tensor) -> Tensor:
            # By ids, an image that comes again, in this batch or from the memory, is not its own positive.
            weight = self.options.loss_weight
            self._ranked = embeddings.detach(), labels, ids
            if self._memory is None:
                return weight * self.loss(embeddings, labels, ids=ids, ref_ids=ids)
            self._memory.enqueue(embeddings, labels, ids)
            return weight * self.loss(embeddings, labels, ref_emb=self._memory, ids=ids)

        if self.options.mini_batch_size is not None:
            with self._autocast:
                return cached_backward(
                    self._model,
                    inputs,
                    labels,
                    lambda embeddings, _: self._meter(embeddings, rank),
                    mini_batch_size=self.options.mini_batch_size,
                    scaler=self._scaler,
                    call=embed,
                )
        with self._autocast:
            embeddings = embed(self._model, inputs)
        leaf = embeddings.detach().requires_grad_()
        loss = self._meter(leaf, rank)
        self._scaler.scale(loss).backward()
        embeddings.backward(leaf.grad)
        return loss.detach()

    def batches(self, step: int) -> list[Tensor]:
        """Image numbers of the batches of the epoch that ends with a step; at the beginning, of the first."""
        first = max(0, step - self.options.epoch)
        return [self._sampler(number) for number in range(first, first + self.options.epoch)]

    def diagnose(self) -> roadmap_ext.Diagnosis:
        """What the last step's batch, of all ranks, gave the loss to do; past embeddings are not in it."""
        assert self._ranked is not None
        embeddings, labels, ids = (self.ranks.gather(x) for x in self._ranked)
        return roadmap_ext.diagnose(embeddings, labels, self.loss, ids=ids, ref_ids=ids)

    def learning_rate(self, number: int) -> float:
        """A line up over the first steps, then constant, half a cosine down to 0, or a factor at each milestone."""
        options = self.options
        rate = options.lr * min(1.0, (number + 1) / max(1, options.warmup))
        if options.schedule == "cosine":
            rate *= (1 + math.cos(math.pi * number / options.steps)) / 2
        if options.schedule == "milestones":
            rate *= options.lr_factor ** sum(number >= each * options.epoch for each in options.milestones)
        return rate

    @torch.no_grad()
    def embed(self, what: Images | Photos, check: Callable[[], None]) -> Tensor:
        """[n, D] float32 of all images; ``check`` is called between batches. Each rank embeds its share."""
        self.ranks.share_buffers(self.network)
        self.network.eval()
        out = [torch.empty(0, self.options.dim, device=self.device)]
        parts = torch.arange(len(what))[self.ranks.share(len(what))].split(_EMBEDDED)
        for pixels in batches.ahead(what.pixels, [part for part in parts if len(part)]):
            check()
            with self._autocast:
                out.append(self.network(pixels.to(self.device).float()).float())
        return self.ranks.gather(torch.cat(out))

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, but its number."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "memory": self._memory and self._memory.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of state().

        Raises:
            ValueError: it is not the state of such a training.
        """
        own, kept = self.state(), state["optimizer"].get("state")
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        # Those that have had no gradient yet have nothing there, and load_state_dict() looks at their number alone.
        own["optimizer"]["state"] = {
            number: {"step": torch.tensor(0.0), "exp_avg": parameter, "exp_avg_sq": parameter}
            for number, parameter in enumerate(parameters)
            if not isinstance(kept, dict) or number in kept
        }
        for name, expected in own.items():
            if wrong := difference(state[name], expected, name):
                raise ValueError(wrong)
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._memory is not None:
            self._memory.load_state_dict(state["memory"])


def make_network(options: argparse.Namespace, channels: int, size: int) -> networks.Network:
    if options.backbone == "small":
        return networks.small(channels, size, options.dim, options.blocks, options.width)
    return networks.from_timm(
        options.backbone,
        channels,
        size,
        options.dim,
        options.pretrained,
        options.weights,
        distilled=options.distilled,
        pool=options.pool,
        head=options.head,
        freeze_batch_norm=options.freeze_batch_norm,
    )


def make_sampler(options: argparse.Namespace, train: Images | Photos) -> PerClassBatches | HierarchicalBatches:
    """What the options take a batch to be."""
    given = options.batch_size, options.per_class, options.seed
    if options.sampler == "per-class":
        return PerClassBatches(train.labels, *given)
    return HierarchicalBatches(train.labels, train.group_of, train.groups, *given, options.batches_per_pair)


def _make_optimizer(options: argparse.Namespace, network: networks.Network) -> torch.optim.Optimizer:
    """Its groups have the ``share`` of the learning rate that is theirs."""
    head = 1.0 if options.head_lr is None else options.head_lr / options.lr
    groups = [
        {"params": list(part.parameters()), "share": share}
        for part, share in ((network.body, 1.0), (network.head, head))
    ]
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind([group for group in groups if group["params"]], options.lr, weight_decay=options.weight_decay)
