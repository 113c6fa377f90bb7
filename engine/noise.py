"""The starting noise: the numbers of torch.randn with a CPU generator, without torch, so that a seed is one picture.

Knows nothing of latents; the caller says which shape it wants.
"""

import math
from collections.abc import Sequence

import numpy as np

_BLOCK = 16  # torch fills normals in blocks of 16: eight radii, then eight angles
_UNIFORM_BITS = 24  # what a float32 mantissa holds


def noise(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Standard normals, float32 of `shape`, equal to torch.randn(shape, generator=CPU generator with `seed`) to 1e-6.

    MT19937 started from the seed modulo 2**32, its low 24 bits as uniforms, Box-Muller in blocks of 16 (torch's
    normal_fill, in ATen/native/cpu/DistributionTemplates.h). Raises ValueError below 16 values: torch draws those in
    another way.
    """
    count = math.prod(shape)
    if count < _BLOCK:
        raise ValueError(f"noise of shape {tuple(shape)} has fewer than {_BLOCK} values, which torch draws differently")
    # RandomState, not Generator: it seeds MT19937 as torch does, and its stream is frozen for good.
    generator = np.random.RandomState(seed % 2**32)
    whole = count // _BLOCK * _BLOCK
    uniforms = _uniforms(generator, count)
    values = np.empty(count, np.float32)
    values[:whole] = _box_muller(uniforms[:whole])
    if whole < count:  # torch then draws the last 16 afresh, over values that it has already made
        values[-_BLOCK:] = _box_muller(_uniforms(generator, _BLOCK))
    return values.reshape(shape)


def _uniforms(generator: np.random.RandomState, count: int) -> np.ndarray:
    """`count` float32 values in [0, 1), one 32-bit draw each."""
    draws = generator.randint(0, 2**_UNIFORM_BITS, count, dtype=np.uint32)
    return draws.astype(np.float32) * np.float32(2.0**-_UNIFORM_BITS)


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Normals from uniforms [16 n], in float32 as torch does: exact angles would miss its values by 1.7e-6."""
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    values = np.empty_like(blocks)
    radius = np.log(1 - blocks[:, 0])
    radius *= np.float32(-2)
    np.sqrt(radius, out=radius)
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    np.multiply(radius, np.cos(angle), out=values[:, 0])
    np.multiply(radius, np.sin(angle, out=angle), out=values[:, 1])
    return values.reshape(-1)
