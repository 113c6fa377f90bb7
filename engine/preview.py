"""Pictures of the unfinished: once a step takes so long that a person waits, what it is on its way to is shown.

A preview is the expected end of the latents, shrunk and decoded by the pack's own decoder: right for any autoencoder.
A linear map from latents to colours, the usual way, would have to be fitted to each: SPEED.md has what it was worth.
Knows clocks and NumPy arrays, not models.
"""

import time
from collections.abc import Callable

import numpy as np

from engine.latents import shrink

SLOW = 1.0  # seconds of a step from which on a person wants to see something
SHARE = 0.15  # of the time goes into previews at most
SIDE = 32  # tokens along the longer side that are decoded at most: 512 pixels with the real autoencoder

Decode = Callable[[np.ndarray, tuple[int, int]], np.ndarray]


class Previews:
    """Decides at each step of one picture whether it is shown."""

    def __init__(self, decode: Decode) -> None:
        """`decode` makes pixels of final tokens [1, rows * columns, C] on a grid (rows, columns)."""
        self._decode = decode
        self._stepped = time.perf_counter()
        self._waited = 0.0  # seconds of steps since the last preview
        self._cost = 0.0  # seconds that it took

    def after(self, expected: Callable[[], np.ndarray], grid: tuple[int, int]) -> np.ndarray | None:
        """A small uint8 [height, width, 3] of the expected final tokens, or None where it isn't worth the time. To be
        called after every step."""
        step = time.perf_counter() - self._stepped
        self._waited += step
        try:
            if step < SLOW or self._cost > SHARE * self._waited:
                return None
            began = time.perf_counter()
            by = max(2, -(-max(grid) // SIDE))
            pixels = self._decode(*shrink(expected(), grid, by))
            self._cost, self._waited = time.perf_counter() - began, 0.0
            return pixels
        finally:
            self._stepped = time.perf_counter()
