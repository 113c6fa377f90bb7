"""A picture seen against its paper: which paper that is, what falls on it, and what stands out from it.

The paper is compared with all papers there are, the weather with how it is drawn. Knows the world, but no things.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from scipy import ndimage

from engine.seedling.backdrops import OUTDOORS, PLAIN, WEATHERS, Backdrop
from engine.seedling.drawing import CELL, falling, paper

SIDE = 96  # pixels of the shorter side at which things are looked at, or more: larger pictures are averaged
# Distances are Euclidean in 0..255 RGB.
FOREGROUND = 38.0  # further than this from the paper is something; things are at least 85 away
PAPER = 36.0  # further than this from the wanted paper, on average, is another one
FORGIVEN = 20.0  # how far all of it may be off together
TONE = 3.0  # nearer by this to another one is that one: an eye tells no less
# The share of the cells without a thing in which a drop or flake is to be seen, and how like a drawn one all cells are
# on average, taken together: weather is there from here on. Rain at dusk is faint, but everywhere.
FALLING = 0.34
FAINTEST, ALIKE = 0.25, 0.3  # a drop's strength against a drawn one's, and its correlation with that, at least
THICK = 0.21 * CELL  # of the shorter side: what a disc of that radius fits into is no drop or flake


@dataclass(frozen=True, slots=True)
class View:
    """A picture, seen against its paper. `apart` is what differs from that, float32 [h, w, 3]; `tone` the paper itself,
    [h, 1, 3]; `shown` where something is, bool [h, w]."""

    apart: np.ndarray
    tone: np.ndarray
    shown: np.ndarray


def look(picture: np.ndarray, backdrop: Backdrop) -> View | str:
    """uint8 [H, W, 3] as it differs from its paper, or in words what is there instead of that backdrop."""
    pixels = _smaller(picture)
    profile = _profile(pixels)
    if fault := _other_paper(profile, backdrop):
        return fault
    tone = _fitted(profile, _wash(backdrop, len(profile)))
    apart = pixels - tone
    weather = _weather(apart, backdrop)
    if weather != backdrop.weather:
        return f"{weather or 'nothing'} falls, not {backdrop.weather or 'nothing'}"
    return _view(apart, tone, backdrop)


def _smaller(picture: np.ndarray) -> np.ndarray:
    """float32 [h, w, 3]; averaged over whole pixels."""
    pixels = picture.astype(np.float32)
    by = min(picture.shape[:2]) // SIDE
    if by < 2:
        return pixels
    h, w = (side // by for side in picture.shape[:2])
    return pixels[: h * by, : w * by].reshape(h, by, w, by, 3).mean(axis=(1, 3))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of RGB vectors [..., 3], summed."""
    return np.asarray(np.einsum("...c,...c->...", a, b))


def length(apart: np.ndarray) -> np.ndarray:
    """Of RGB vectors [..., 3]."""
    return np.sqrt(_product(apart, apart))


@lru_cache(maxsize=256)
def _wash(backdrop: Backdrop, height: int) -> np.ndarray:
    """The paper without weather, float32 [height, 1, 3]."""
    return paper(Backdrop(backdrop.color, backdrop.time, backdrop.season), 1, height)


def _profile(pixels: np.ndarray) -> np.ndarray:
    """The paper from top to bottom, float32 [h, 1, 3], as the left and right edge show it; drops are in a minority."""
    band = max(3, round(0.06 * min(pixels.shape[:2])))
    return np.median(np.concatenate([pixels[:, :band], pixels[:, -band:]], axis=1), axis=1)[:, None]


def _papers() -> tuple[Backdrop, ...]:
    return PLAIN + tuple(backdrop for backdrop in OUTDOORS if not backdrop.weather)


def _other_paper(profile: np.ndarray, wanted: Backdrop) -> str:
    """In words, what is there instead of the wanted paper; "" if that is what is there."""
    papers = _papers()
    washes = np.stack([_wash(each, len(profile)) for each in papers])
    off = profile[None] - washes
    common = np.median(off, axis=1, keepdims=True)  # the whole picture a little too warm or too dark is forgiven
    size = length(common)[..., None]
    off = off - common * np.minimum(1, FORGIVEN / np.maximum(size, 1))
    distances = np.minimum(length(off), 80).mean(axis=(1, 2))
    ours = distances[papers.index(Backdrop(wanted.color, wanted.time, wanted.season))]
    best = int(distances.argmin())
    if distances[best] > PAPER:
        return "the background is none of this world"
    return f"the background is {_words(papers[best])}, not {_words(wanted)}" if ours > distances[best] + TONE else ""


def _words(backdrop: Backdrop) -> str:
    return backdrop.color or " ".join(part for part in (backdrop.season, backdrop.time) if part)


def _fitted(profile: np.ndarray, wash: np.ndarray) -> np.ndarray:
    """The paper in the picture's own tone: off by so much above and by so much below."""
    y = np.linspace(-1, 1, len(wash), dtype=np.float32)
    off = np.clip(profile - wash, -PAPER, PAPER)[:, 0]
    slope = (y[:, None] * off).sum(axis=0) / (y * y).sum()
    return np.asarray(wash + (np.median(off, axis=0) + y[:, None] * slope)[:, None])


@lru_cache(maxsize=64)
def _drops(backdrop: Backdrop, weather: str, width: int, height: int) -> np.ndarray:
    """What weather changes in a paper, float32 [height, width, 3]."""
    wash = Backdrop(backdrop.color, backdrop.time, backdrop.season)
    rained = Backdrop(backdrop.color, backdrop.time, backdrop.season, weather)
    scale = 2  # drawn larger and averaged, as pictures are
    large = paper(rained, width * scale, height * scale) - paper(wash, width * scale, height * scale)
    drops = large.reshape(height, scale, width, scale, 3).mean(axis=(1, 3))
    return np.asarray(ndimage.gaussian_filter(drops, (0.7, 0.7, 0)))  # soft, as a model draws


@lru_cache(maxsize=16)
def _cells(width: int, height: int) -> np.ndarray:
    """The number of the cell that each pixel is in, int [height, width]; drawing.falling lays one drop into each."""
    cell = CELL * min(width, height)
    x, y = (np.arange(width)[None, :] + 0.5) / cell, (np.arange(height)[:, None] + 0.5) / cell
    row = np.floor(y)
    column = np.floor(x + 0.5 * (row % 2))
    return (row * (column.max() + 1) + column).astype(int)


def _weather(apart: np.ndarray, backdrop: Backdrop) -> str:
    """What falls: "rain", "snow" or "" for neither. float32 [h, w, 3], the picture less its paper."""
    if backdrop.color and not backdrop.weather:
        return ""  # what there is on plain paper that does not belong there, the things' likeness tells
    radius = THICK * min(apart.shape[:2])
    thick = ndimage.binary_opening(length(apart) > FOREGROUND, _disc(radius))
    free = ~ndimage.binary_dilation(thick, _disc(1.2 * radius))
    found = {weather: _falls(apart, free, backdrop, weather) for weather in WEATHERS}
    best = max(found, key=lambda weather: sum(found[weather]))
    return best if sum(found[best]) >= FALLING else ""


def _falls(apart: np.ndarray, free: np.ndarray, backdrop: Backdrop, weather: str) -> tuple[float, float]:
    """The share of free cells with such a drop, wherever in reach of its place, and their mean correlation with it."""
    cells = _cells(free.shape[1], free.shape[0]).ravel()
    sizes = np.bincount(cells, free.ravel())
    whole = sizes > 0.6 * np.bincount(cells).max()
    if whole.sum() < 4:
        return 0.0, 0.0
    seen = np.clip(apart, -110, 110) * free[..., None]
    means = (
        np.stack([np.bincount(cells, seen[..., c].ravel()) for c in range(3)], axis=1) / np.maximum(sizes, 1)[:, None]
    )
    seen = (seen - means[cells].reshape(seen.shape)) * free[..., None]  # a cell's own tone says nothing
    power = np.bincount(cells, _product(seen, seen).ravel())
    strength, alike = np.zeros(len(sizes)), np.zeros(len(sizes))
    drops = _drops(backdrop, weather, free.shape[1], free.shape[0])
    for shift in product((-1, 0, 1), repeat=2):
        drop = np.roll(drops, shift, (0, 1))
        drawn = np.bincount(cells, (_product(drop, drop) * free).ravel()) + 1e-6
        both = np.bincount(cells, _product(seen, drop).ravel())
        strength = np.maximum(strength, both / drawn)
        alike = np.maximum(alike, both / np.sqrt(drawn * power + 1e-6))
    there = (strength > FAINTEST) & (alike > ALIKE)
    return float(there[whole].mean()), float(alike[whole].mean())


@lru_cache(maxsize=64)
def _disc(radius: float) -> np.ndarray:
    reach = np.arange(-int(radius), int(radius) + 1)
    return np.asarray(np.hypot(reach[:, None], reach[None, :]) <= radius)


def _view(apart: np.ndarray, tone: np.ndarray, backdrop: Backdrop) -> View:
    """The picture without the weather: what lies where drops lie and looks like them becomes paper."""
    shown = length(apart) > FOREGROUND
    if backdrop.weather:
        height, width = shown.shape
        side = min(height, width)
        drops = _drops(backdrop, backdrop.weather, width, height)
        zone = ndimage.binary_dilation(falling(backdrop.weather, width, height) > 0.1, _disc(0.026 * side))
        full = ndimage.maximum_filter1d(np.abs(drops).max(axis=1, keepdims=True), int(2 * CELL * side), axis=0)
        full = full * np.sign(drops.mean(axis=1, keepdims=True))  # a whole drop's colour less the paper's, row by row
        share = np.clip((apart * full).sum(axis=2) / np.maximum((full * full).sum(axis=2), 1), 0, 1.3)[..., None]
        drop = zone & (length(apart - share * full) < FOREGROUND)
        thick = ndimage.binary_dilation(ndimage.binary_opening(shown, _disc(THICK * side)), _disc(0.01 * side))
        drop &= ~thick
        apart, shown = np.where(drop[..., None], 0, apart), shown & ~drop
    return View(apart.astype(np.float32), tone.astype(np.float32), shown)
