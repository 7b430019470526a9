"""Several processes of one run, forked from a server that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

PRELOAD = ["shortft.train", "shortft.families.sd", "shortft.rewards.clip", "accelerate"]


def forked() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def as_rank(rank: int, size: int, port: int, target: Callable[..., None], args: Any) -> None:
    import torch

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    target(rank, *args)


def together(size: int, target: Callable[..., None], *args: Any) -> list[int | None]:
    """Run target(rank, *args) in so many processes that know of one another; their exit codes."""
    port, context = free_port(), forked()
    children = [
        context.Process(target=as_rank, args=(rank, size, port, target, args))
        for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    return [child.exitcode for child in children]
