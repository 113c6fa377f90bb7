"""Where a picture's denoising begins, in NumPy for every backend: seeded noise, varied or laid over a draft.

A token is a 2 x 2 patch of latent pixels, its channels slowest ([c, 2, 2]). Knows neither weights nor devices.
"""

import math
from collections import OrderedDict
from typing import Any

import numpy as np

from engine import schedule
from engine.noise import noise
from engine.packs import Pack
from engine.plan import token_grid
from engine.types import Request

PATCH = 2  # latent pixels a token side

Array = Any  # of NumPy, torch or MLX: only their arithmetic is used


def outset(request: Request, pack: Pack, recent: "Recent") -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """What a pack's denoising of a complete request is given: the tokens that it begins with, the noise levels from
    there on, and the tokens' grid. The request's draft, if it has one, must be among the `recent` ones."""
    assert request.steps is not None
    grid, draft = token_grid(request, pack), None
    if request.draft is not None:
        draft = recent.get(request.draft)
        assert draft is not None
        draft = enlarge(draft, token_grid(request.draft, pack), grid)
    sigmas = schedule.sigmas(grid[0] * grid[1], request.steps)
    start = begin(request, pack.transformer.config["in_channels"], grid, sigmas, draft)
    return start, sigmas[request.start :], grid


def begin(
    request: Request, channels: int, grid: tuple[int, int], sigmas: np.ndarray, draft: np.ndarray | None = None
) -> np.ndarray:
    """The tokens, float32 [1, rows * columns, channels], that step `request.start` is fed with.

    `grid` (rows, columns) of image tokens, `sigmas` the whole schedule. `draft`: final latents of `request.draft`,
    already on this grid (`enlarge`); x = (1 - sigma) x0 + sigma noise puts them where the schedule takes them up.
    """
    start = tokens(mixed(request, (1, channels, *grid)))
    if draft is None:
        return start
    sigma = sigmas[request.start]
    return (1 - sigma) * draft + sigma * start


def mixed(request: Request, shape: tuple[int, ...]) -> np.ndarray:
    """The seed's noise with the variations mixed in, in order: float32 of `shape`, unit variance at every strength."""
    values = noise(request.seed, shape)
    for seed, strength in request.variations:
        values = np.float32(math.sqrt(1 - strength**2)) * values + np.float32(strength) * noise(seed, shape)
    return values


def tokens(latents: np.ndarray) -> np.ndarray:
    """[1, C, rows, columns] -> [1, rows * columns, C]."""
    return np.ascontiguousarray(latents.reshape(1, latents.shape[1], -1).transpose(0, 2, 1))


def enlarge(latents: np.ndarray, grid: tuple[int, int], larger: tuple[int, int]) -> np.ndarray:
    """Tokens float32 [1, rows * columns, C] of one grid on a larger one, interpolated linearly between latent pixels.

    Between latent pixels, not between tokens: a token is a patch, and blending patches would repeat each one's inside.
    """
    rows, columns = grid
    patches = latents.reshape(rows, columns, -1, PATCH, PATCH).transpose(2, 0, 3, 1, 4)
    plane = patches.reshape(-1, rows * PATCH, columns * PATCH)
    plane = _stretch(_stretch(plane, larger[0] * PATCH, axis=1), larger[1] * PATCH, axis=2)
    patches = plane.reshape(-1, larger[0], PATCH, larger[1], PATCH).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(patches.reshape(1, larger[0] * larger[1], -1))


def shrink(latents: np.ndarray, grid: tuple[int, int], by: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Tokens of a picture 1/`by` as wide: latent pixels averaged, and their grid. What is left over at an edge goes."""
    rows, columns = (max(1, length // by) for length in grid)
    patches = latents.reshape(*grid, -1, PATCH, PATCH).transpose(2, 0, 3, 1, 4)
    plane = patches.reshape(-1, grid[0] * PATCH, grid[1] * PATCH)
    high, wide = min(by, grid[0]), min(by, grid[1])  # a side shorter than `by` tokens becomes one
    plane = plane[:, : rows * high * PATCH, : columns * wide * PATCH]
    means = plane.reshape(-1, rows * PATCH, high, columns * PATCH, wide).mean(axis=(2, 4))
    patches = means.reshape(-1, rows, PATCH, columns, PATCH).transpose(1, 3, 0, 2, 4)
    return np.ascontiguousarray(patches.reshape(1, rows * columns, -1)), (rows, columns)


def foreseen(before: Array, after: Array, sigma: float, sigma_next: float) -> Array:
    """Where a step's velocity would lead without another step: the picture that half-denoised latents are on the way
    to. `before` and `after` are the latents around the step from `sigma` to `sigma_next`."""
    return after - sigma_next / (sigma_next - sigma) * (after - before)


def _stretch(plane: np.ndarray, length: int, axis: int) -> np.ndarray:
    """One axis resampled to `length`, pixel centres aligned, edges held."""
    old = plane.shape[axis]
    at = np.clip((np.arange(length) + 0.5) * old / length - 0.5, 0, old - 1)
    before = at.astype(int)
    after = np.minimum(before + 1, old - 1)
    weight = (at - before).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(plane.ndim)])
    return plane.take(before, axis) * (1 - weight) + plane.take(after, axis) * weight


class Recent:
    """Final latents of the last few pictures, so that refining one needn't draw it again. By complete request."""

    def __init__(self, most: int = 8) -> None:  # 2 MB each at 1024 x 1024
        self._most = most
        self._kept: OrderedDict[Request, np.ndarray] = OrderedDict()

    def get(self, request: Request) -> np.ndarray | None:
        """Tokens [1, rows * columns, C] float32, or None when they have to be made again."""
        return self._kept.get(request)

    def put(self, request: Request, latents: np.ndarray) -> None:
        """Remember; the oldest goes."""
        self._kept[request] = latents
        self._kept.move_to_end(request)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def steps_to_make(self, request: Request) -> int:
        """How many denoising steps the (complete) request costs now: its own, and those of drafts not remembered."""
        assert request.steps is not None
        steps = request.steps - request.start
        if request.draft is None or request.draft in self._kept:
            return steps
        return steps + self.steps_to_make(request.draft)
