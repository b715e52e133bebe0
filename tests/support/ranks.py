"""Ranks for the tests: processes forked from one that has imported what takes long, torch above all."""

import datetime
import multiprocessing
import time

import torch

_IMPORTED = ["torch", "torch._dynamo", "pytest", "sklearn.datasets", "matplotlib.figure", "PIL.Image", "tqdm"]


def begin(rank, world, folder, seconds):
    """Joins the ranks, which from then on wait ``seconds`` for each other. They all have to be there first."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), world)
    store.set(f"here {rank}", "")
    store.wait([f"here {other}" for other in range(world)], datetime.timedelta(seconds=60))
    timeout = datetime.timedelta(seconds=seconds)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)


def start(world, target, *arguments):
    """Processes that call target(rank, world, ...)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    processes = [context.Process(target=target, args=(rank, world, *arguments), daemon=True) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def statuses(processes, seconds=120):
    """Exit statuses; None of one that had to be killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    exits = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return exits
