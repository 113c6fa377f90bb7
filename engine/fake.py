"""A backend without a model: paints a gradient from prompt and seed, at a steady pace, for tests and work on the page.

Knows nothing of packs, torch or hardware. Same prompt, seed and size: same pixels, on every machine.
"""

import hashlib
import time
from collections.abc import Callable, Iterator

import numpy as np

from engine.types import Cancelled, Picture, Request, Seconds, Step

BLOCKS = 5  # how often a step asks whether it should stop, like the blocks of a transformer
BLOCK_SECONDS = 0.004  # long enough that progress is seen, short enough that a test of four steps takes 0.1 s


class FakeBackend:
    """The Backend protocol, drawn by hand. The request must be complete (`plan.complete`)."""

    name = "fake"

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Step | Picture]:
        """Yield Step(0, n) .. Step(n, n) and the Picture; raise Cancelled as soon as `cancelled` says so."""
        started = time.perf_counter()
        width, height, total = request.width, request.height, request.steps
        assert width and height and total, "complete the request first"
        yield Step(0, total)
        for index in range(1, total + 1):
            for _ in range(BLOCKS):
                if cancelled():
                    raise Cancelled("stopped on request")
                time.sleep(BLOCK_SECONDS)
            yield Step(index, total)
        denoised = time.perf_counter()
        pixels = gradient(request.prompt, request.seed, width, height)
        ended = time.perf_counter()
        seconds = Seconds(denoise=denoised - started, decode=ended - denoised, total=ended - started)
        yield Picture(pixels, request, self.name, "fake: a gradient, no model was used", seconds, pixels.nbytes)

    def close(self) -> None:
        """Nothing to free."""


def gradient(prompt: str, seed: int, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: from one colour to another, both taken from a hash of prompt and seed."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    start, end = np.frombuffer(digest[:6], dtype=np.uint8).reshape(2, 1, 1, 3).astype(np.float32)
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return np.rint(start + (end - start) * (across + down) / 2).astype(np.uint8)
