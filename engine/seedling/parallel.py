"""Data-parallel training on the cores of one machine: one thread a process, gradients averaged between them.

Two threads in one process are slower than that, and very much slower beside any other busy process. In a single process
every function here does nothing, and a run is reproducible loss by loss.
"""

import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


LOG_FORMAT = "%(asctime)s %(message)s"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Over all processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= processes()
    for g, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))


def _member(index: int, members: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    dist.init_process_group("gloo", rank=index, world_size=members)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()


def run(members: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work(*arguments)` in each of so many processes; with one, right here."""
    if members == 1:
        torch.set_num_threads(1)
        work(*arguments)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_member, (members, port, work, arguments), nprocs=members)
