"""How a big picture is cut into tiles for decoding, and which of its patches stand for the whole: arithmetic only.

Both backends decode by it, so that a picture has the same seams (none) on every machine.
"""

import math

import numpy as np

PATCH_CELLS = 4  # latent pixels a side of the patches that statistics are taken from


def mosaic(length: int, step: int) -> np.ndarray:
    """Positions 0 .. length - 1, of which from every `step` patches one is left."""
    positions = np.arange(length)
    return positions[positions // PATCH_CELLS % step == step // 2]


def spans(length: int, most: int) -> list[tuple[int, int]]:
    """Cut `length` into the fewest pieces of at most `most`, all about equally long: (start, stop) of each."""
    pieces = math.ceil(length / most)
    return [(length * i // pieces, length * (i + 1) // pieces) for i in range(pieces)]
