"""What the parts of `tests.cuda` share: the 4B model's shapes, the clock, and whom they stop meanwhile."""

import argparse
import gc
import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.packs.content import Configs, small

STEPS, TEXT = 4, 512
WARM = 2  # rounds before a product is timed
SETTLE = 2.0  # seconds that a stopped process's queued work may still take on the card
Size = tuple[int, int]
Part = Iterator[None]


class Bench:
    """What all parts share: the models' shapes, the sizes, the clock, and the way to say what was found."""

    def __init__(self, args: argparse.Namespace, rows: Any) -> None:
        self.small, self.device, self.count, self.pack, self.work = (
            args.small, args.device, args.pictures, args.pack, args.work
        )  # fmt: skip
        self.part, self._pause, self._rows = args.part, args.pause, rows
        self.configs = small() if self.small else Configs()
        self.sizes: list[Size] = [(64, 64), (96, 96)] if self.small else [(512, 512), (1024, 1024)]
        self.dtype = torch.bfloat16
        self.cuda = self.device == "cuda"
        self.compiler = args.compiler
        self.layer = tuple(args.layer or ())

    def say(self, **facts: Any) -> None:
        self._rows.write(json.dumps({"part": self.part, **facts}) + "\n")
        self._rows.flush()

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def grid(self, size: Size) -> tuple[int, int]:
        side = 2 << (len(self.configs.vae["block_out_channels"]) - 1)
        return size[1] // side, size[0] // side

    def tokens(self, size: Size) -> tuple[int, int]:
        rows, columns = self.grid(size)
        return rows * columns, TEXT

    def seconds(self, work: Callable[[], object], count: int | None = None) -> list[float]:
        """Of each call, with everything that it queued on the card done."""
        found = []
        for _ in range(count or self.count):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(time.perf_counter() - start)
        return found

    def median(self, work: Callable[[], object], count: int = 10) -> float:
        for _ in range(WARM):
            work()
        return statistics.median(self.seconds(work, 2 if self.small else count))

    def forget(self) -> None:
        """Peaks are counted from here."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else 0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Nobody whose command line has the pattern works meanwhile."""
        stopped = stop(self._pause) if self._pause else []
        try:
            if stopped:
                time.sleep(SETTLE)
            self.wait()
            yield
        finally:
            resume(stopped)


def stop(pattern: str) -> list[int]:
    """Stop the processes with `pattern` in their command lines, and their children; nobody of this bench."""
    commands, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    ours, pid = set(), os.getpid()
    while pid in parents:
        ours.add(pid)
        pid = parents[pid]
    chosen = {pid for pid, command in commands.items() if pattern in command and "tests.cuda" not in command} - ours
    while more := {pid for pid, parent in parents.items() if parent in chosen} - chosen - ours:
        chosen |= more
    for pid in chosen:
        with suppress(OSError):
            os.kill(pid, signal.SIGSTOP)
    return sorted(chosen)


def resume(pids: list[int]) -> None:
    for pid in pids:
        with suppress(OSError):
            os.kill(pid, signal.SIGCONT)


def random_like(bench: Bench, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.randn(*shape, device=bench.device, dtype=dtype or bench.dtype)


def put(module: nn.Module, twin: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace every linear layer inside `module`."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(module.get_submodule(parent), own, twin(layer))
