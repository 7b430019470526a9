"""Data-parallel training on the cores of one machine: one process a core, gradients averaged once a
step.

On a shared machine this loses far less than one process with several threads, whose operations all
wait for the slowest.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


def _enter(
    rank: int, workers: int, store: str, work: Callable[..., None], args: argparse.Namespace
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    work(rank, args)
    dist.destroy_process_group()


def launch(work: Callable[..., None], args: argparse.Namespace, workers: int) -> None:
    """Run `work(rank, args)` in `workers` processes."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_enter, (workers, str(Path(folder) / "store"), work, args), nprocs=workers)


def average(parameters: Iterable[Tensor], note: float) -> float:
    """Average the gradients over the processes, and hand the note of process 0 to all of them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    workers, rank = dist.get_world_size(), dist.get_rank()
    own = torch.tensor([note * workers if rank == 0 else 0.0])
    flat = torch.cat([own, *(g.reshape(-1) for g in gradients)])
    dist.all_reduce(flat)
    flat /= workers
    place = 1
    for gradient in gradients:
        gradient.copy_(flat[place : place + gradient.numel()].view_as(gradient))
        place += gradient.numel()
    return float(flat[0])


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Hand process 0's values to all."""
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)
