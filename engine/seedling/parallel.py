"""Data-parallel training on the cores of one machine: one thread a process, gradients averaged in shared memory.

Two threads in one process are slower than that, and very much slower beside any other busy process; with
torch.distributed's gloo each core was 71 % busy, with this 93 %. In a single process every function here does nothing,
and a run is reproducible loss by loss.
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

LOG_FORMAT = "%(asctime)s %(message)s"
CAPACITY = 16_000_000  # gradient values at most; the pages that nobody touches cost nothing


@dataclass
class _Team:
    rank: int
    gradients: Tensor  # float32 [processes, CAPACITY], shared
    barrier: Barrier


_team: _Team | None = None  # set once, at the start of a spawned member


def rank() -> int:
    return _team.rank if _team else 0


def processes() -> int:
    return len(_team.gradients) if _team else 1


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replaces every gradient by its mean over the processes."""
    if _team is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    sizes = [g.numel() for g in gradients]
    torch.cat([g.flatten() for g in gradients], out=_team.gradients[_team.rank, : sum(sizes)])
    _team.barrier.wait()
    mean = _team.gradients[:, : sum(sizes)].mean(0)
    _team.barrier.wait()  # nobody writes the next step's gradients before everyone has read these
    for gradient, part in zip(gradients, mean.split(sizes), strict=True):
        gradient.copy_(part.view_as(gradient))


@contextmanager
def half_precision() -> Iterator[None]:
    """Products in bfloat16 for as long as it is entered, and attention in parts, which backwards takes half the time of
    torch's fused one at these sizes. A pass without gradients needs one of its own, for weights are converted once in
    each and keep what they were for."""
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


def _member(
    index: int, gradients: Tensor, barrier: Barrier, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    global _team
    _team = _Team(index, gradients, barrier)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    work(*arguments)


def run(members: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work(*arguments)` in each of so many processes; with one, right here."""
    if members == 1:
        torch.set_num_threads(1)
        work(*arguments)
        return
    barrier = multiprocessing.get_context("spawn").Barrier(members)
    gradients = torch.zeros(members, CAPACITY).share_memory_()
    torch.multiprocessing.spawn(_member, (gradients, barrier, work, arguments), nprocs=members)
