"""Torch operations side by side: as many threads as torch would use for one of them, each with a core of its own.

For work of many operations a part, among which are some that torch does on one core: those would leave the other cores
idle, and all others wait for the slowest core every time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

import torch

Part = TypeVar("Part")


class Cores:
    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, "cores", torch.set_num_threads, (1,))
        all_there = Barrier(self.count)
        list(self._pool.map(lambda _: all_there.wait(), range(self.count)))
        torch.set_num_threads(self.count)  # each thread has a number of its own, but MKL one for all

    def share(self, run: Callable[[int, Part], object], parts: Sequence[Part]) -> None:
        """`run(core, part)` for all parts; a core that is done takes the next one."""
        left = iter(parts)

        @torch.inference_mode()  # which a thread doesn't inherit
        def work(core: int) -> None:
            for part in left:
                run(core, part)

        list(self._pool.map(work, range(self.count)))
