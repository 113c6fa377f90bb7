"""A backend without a model: paints a gradient from prompt and seed, at a steady pace, for tests and work on the page.

Knows nothing of packs, torch or hardware. Same prompt, seed and size: same pixels, on every machine.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from engine.types import Cancelled, Picture, Request, Seconds, Step

BLOCKS = 5  # how often a step asks whether it should stop, like the blocks of a transformer
BLOCK_SECONDS = 0.004  # long enough that progress is seen, short enough that a test of four steps takes 0.1 s


class FakeBackend:
    """The Backend protocol, drawn by hand. The request must be complete (`plan.complete`)."""

    name = "fake"

    def prepare(self) -> None:
        """Nothing takes it long."""

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Step | Picture]:
        """Yield Step(0, n) .. Step(n, n) and the Picture; raise Cancelled as soon as `cancelled` says so."""
        started = time.perf_counter()
        assert request.width and request.height and request.steps, "complete the request first"
        total = request.steps - request.start
        yield Step(0, total)
        for index in range(1, total + 1):
            for _ in range(BLOCKS):
                if cancelled():
                    raise Cancelled("stopped on request")
                time.sleep(BLOCK_SECONDS)
            yield Step(index, total)
        denoised = time.perf_counter()
        pixels = paint(request)
        ended = time.perf_counter()
        seconds = Seconds(denoise=denoised - started, decode=ended - denoised, total=ended - started)
        reason = "fake: a gradient, no model was used"
        yield Picture(pixels, request, self.name, reason, seconds, pixels.nbytes, dtype="float32")

    def close(self) -> None:
        """Nothing to free."""


def paint(request: Request) -> np.ndarray:
    """uint8 [height, width, 3]: the gradient of prompt and seed, varied in proportion, or mostly the enlarged draft."""
    assert request.width and request.height and request.steps
    colours = _colours(request.prompt, request.seed)
    for seed, strength in request.variations:
        colours = math.sqrt(1 - strength**2) * colours + strength * _colours(request.prompt, seed)
    pixels = _gradient(colours, request.width, request.height)
    if request.draft is not None:
        assert request.draft.width and request.draft.height
        rows = np.arange(request.height) * request.draft.height // request.height
        columns = np.arange(request.width) * request.draft.width // request.width
        share = request.start / request.steps
        pixels = share * paint(request.draft)[rows][:, columns] + (1 - share) * pixels
    return np.rint(pixels).astype(np.uint8)


def _colours(prompt: str, seed: int) -> np.ndarray:
    """Two colours around middle grey, float32 [2, 3] from -127.5 to 127.5, from a hash."""
    digest = hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()
    return np.frombuffer(digest[:6], dtype=np.uint8).reshape(2, 3).astype(np.float32) - 127.5


def _gradient(colours: np.ndarray, width: int, height: int) -> np.ndarray:
    """float32 [height, width, 3], from the first colour at top left to the second at bottom right."""
    start, end = np.clip(colours + 127.5, 0, 255)
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :, None]
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    return start + (end - start) * (across + down) / 2
