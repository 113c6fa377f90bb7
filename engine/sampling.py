"""A number that changes, read every 50 ms while something else works: the interval of the published memory figures.

Knows nothing of what it reads.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SAMPLE_SECONDS = 0.05


@contextmanager
def sampled(read: Callable[[], int]) -> Iterator[list[int]]:
    """What `read` said, from the start of the block, at least once, to its end or to the first 0: it can't be told."""
    samples: list[int] = []
    done = threading.Event()

    def sample() -> None:
        while value := read():
            samples.append(value)
            if done.wait(SAMPLE_SECONDS):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
