"""The processes of a run: one alone, or those that torchrun started, which train as one."""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from roadmap_ext.distributed import gather

from .errors import InputError

T = TypeVar("T")

_TIMEOUT = datetime.timedelta(hours=1)  # the first rank evaluates alone


class Ranks:
    """This process among all of them.

    Attributes:
        world: how many there are.
        rank: which one this is.
        local: which one of this machine.
        first: whether this is the one that writes.
    """

    def __init__(self) -> None:
        try:
            self.world, self.rank, self.local = (
                int(os.environ.get(name, default))
                for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0"))
            )
        except ValueError as error:
            raise InputError(f"WORLD_SIZE, RANK and LOCAL_RANK are torchrun's to set, to numbers: {error}") from error
        self.first = self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meets the others."""
        if self.world > 1:
            backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
            torch.distributed.init_process_group(backend, timeout=_TIMEOUT)

    def leave(self) -> None:
        """Ends what join() began."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def share(self, total: int) -> slice:
        """Which of ``total`` things are this rank's; shares differ by one at the most."""
        return slice(total * self.rank // self.world, total * (self.rank + 1) // self.world)

    def check(self, batch_size: int) -> None:
        """Raises InputError if a batch is too small to be shared."""
        if batch_size < 2 * self.world:
            raise InputError(f"--batch-size {batch_size} leaves {self.world} processes fewer than 2 images each")

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        if self.world == 1:
            return here
        flag = torch.tensor(int(here))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first rank makes, on all of them; so is its InputError or OSError."""
        if self.world == 1:
            return make()
        made: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                made[0] = make()
            except (InputError, OSError) as raised:
                error, made[1] = raised, str(raised)
        torch.distributed.broadcast_object_list(made)
        if error is not None:
            raise error
        if made[1] is not None:
            raise InputError(f"rank 0: {made[1]}")
        return made[0]

    def together(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network, whose gradients all ranks average in backward."""
        if self.world == 1:
            return network
        return DistributedDataParallel(network, [device] if device.type == "cuda" else None)

    def gather(self, rows: Tensor) -> Tensor:
        """Those of all ranks, in their order."""
        return rows if self.world == 1 else gather(rows)

    def share_buffers(self, network: nn.Module) -> None:
        """Gives all ranks the first one's, such as the means of batch norm; in training the forward does that."""
        if self.world > 1:
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
