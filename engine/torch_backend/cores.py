"""Work side by side: as many threads as torch would use for an operation, each with a core of its own.

For passes in C++, and for those in torch that are many operations a part, among which are some that torch does on one
core: those would leave the other cores idle, and all others wait for the slowest core every time.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier
from typing import TypeVar

import torch

Part = TypeVar("Part")


class Cores:
    """`most`: no more cores than that. Raises RuntimeError where the system refuses a thread."""

    def __init__(self, most: int) -> None:
        threads = torch.get_num_threads()
        self.count = min(threads, most)
        self._pool = ThreadPoolExecutor(self.count, "cores", _one_thread)
        all_there = Barrier(self.count)
        try:
            list(self._pool.map(lambda _: all_there.wait(), range(self.count)))
        except RuntimeError:
            all_there.abort()  # else those that were started would wait for ever
            raise
        torch.set_num_threads(threads)  # threads that torch meets later begin with what was said last

    def share(self, run: Callable[[int, Part], object], parts: Sequence[Part]) -> None:
        """`run(core, part)` for all parts; a core that is done takes the next one. After an exception no further part
        is begun. For one caller at a time, and not from within."""
        left = iter(parts)

        @torch.inference_mode()  # which a thread doesn't inherit
        def work(core: int) -> None:
            try:
                for part in left:
                    run(core, part)
            finally:
                list(left)  # nobody is to take what a failure leaves

        busy = [self._pool.submit(work, core) for core in range(self.count)]
        wait(busy)
        for core in busy:
            core.result()


def _one_thread() -> None:
    torch.get_num_threads()  # torch gives a thread its number at the first question, whatever was said before
    torch.set_num_threads(1)
