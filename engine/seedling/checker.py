"""Is this picture what the prompt asked for? Analysis by synthesis: what was asked for is drawn where things are.

The paper is compared with all papers there are; the things are held against all kinds, each drawn in the asked colour
at the place and size that fit it best. The picture is right if everything asked for is clearly there and nothing else
is. Knows the world and how it is drawn, but no model. A verdict always says why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from scipy import ndimage

from engine.seedling.backdrops import COLORS, OUTDOORS, PLAIN, WEATHERS, Backdrop
from engine.seedling.drawing import CELL, FORMS, coverage, falling, paper
from engine.seedling.scenes import GROUPS, KINDS, PLACES, RADIUS, Scene

PALETTE, NAMES = np.array(list(COLORS.values()), np.float32), tuple(COLORS)
SIDE = 96  # pixels of the shorter side at which things are looked at, or more: larger pictures are averaged
# Distances are Euclidean in 0..255 RGB. The nearest colours of the palette are 87 apart.
FOREGROUND = 38.0  # further than this from the paper is something; things are at least 85 away
SAME_COLOR = 55.0  # nearer than this to a palette colour may be that colour,
CLEARER = 14.0  # if every other is further by this much
EVEN = 0.7  # share of a thing's body, its outline aside, that is nearer to its colour than to any other
PAPER = 36.0  # further than this from the wanted paper, on average, is another one
FORGIVEN = 20.0  # how far all of it may be off together
TONE = 3.0  # nearer by this to another one is that one: an eye tells no less
DROPS = 0.5  # share of the cells without a thing in which a drop or flake is to be seen; weather is there from here on
FAINTEST, ALIKE = 0.25, 0.3  # a drop's strength against a drawn one's, and its correlation with that, at least
LIKENESS = 0.8  # what a thing has in common with its kind, at least
BETWEEN = 0.38  # how far it may be on the way to any other kind; half way it is neither
THICK = 0.21 * CELL  # of the shorter side: what a disc of that radius fits into is no drop or flake

WINDOW = 32  # pixels a side of what a kind and a thing are compared in, which reaches
REACH = 1.3  # radii from the centre
NEAR, STEPS = 0.2, 2  # kinds less likely by this than the likeliest are not moved; how often the others are
DIRT = 0.003  # share of the picture that may be something that belongs to no thing
ASTRAY = 0.3  # radii from a thing's outline up to which something belongs to it
SOFT = 0.05  # radii: how far both are blurred first, since outlines are soft and strokes a little off

Place = tuple[float, float, float, float]
"""x, y of the centre, half width and half height of a radius, in pixels of what is looked at"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a prompt says. `things` are (kind, colour): what it leaves open has its natural colour."""

    backdrop: Backdrop
    things: tuple[tuple[str, str], ...]
    relation: str = ""

    @classmethod
    def of(cls, scene: Scene) -> "Wanted":
        return cls(scene.backdrop, tuple((thing.kind, thing.color) for thing in scene.things), scene.relation)


@dataclass(frozen=True, slots=True)
class Verdict:
    right: bool
    reason: str


@dataclass(frozen=True, slots=True)
class View:
    """A picture, seen against its paper. `apart` is what differs from that, float32 [h, w, 3]; `tone` the paper itself,
    [h, 1, 3]; `shown` where something is, bool [h, w]."""

    apart: np.ndarray
    tone: np.ndarray
    shown: np.ndarray


@dataclass(frozen=True, slots=True)
class Match:
    """How much a thing is like a kind, 0..1, and where that kind would stand."""

    kind: str
    likeness: float
    place: Place


def check(picture: np.ndarray, wanted: Wanted) -> Verdict:
    """uint8 [H, W, 3] against a wish. Everything has to be right: backdrop, number, kinds, colours, places."""
    pixels = _smaller(picture)
    profile = _profile(pixels)
    fault = _other_paper(profile, wanted.backdrop)
    if fault:
        return Verdict(False, fault)
    tone = _fitted(profile, _wash(wanted.backdrop, len(profile)))
    apart = pixels - tone
    weather = _weather(apart, wanted.backdrop)
    if weather != wanted.backdrop.weather:
        return Verdict(False, f"{weather or 'nothing'} falls, not {wanted.backdrop.weather or 'nothing'}")
    view = _view(apart, tone, wanted.backdrop)
    if view.shown.sum() < 0.005 * view.shown.size:
        return Verdict(False, "there is nothing to see")
    spots = _spots(view.shown, wanted)
    reason = f"nothing is {wanted.relation} anything"
    for order in _orders(view.shown, spots, wanted):
        reason, stray = "", 0
        for which, thing in zip(order, wanted.things, strict=True):
            if not reason:
                reason, pixels_astray = _fault(view, spots == which, *thing, wanted)
                stray += pixels_astray
        if not reason and stray <= DIRT * spots.size:
            return Verdict(True, "as asked")
    return Verdict(False, reason or "there is more than was asked for")


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


def _size(apart: np.ndarray) -> np.ndarray:
    """Of RGB vectors [..., 3]."""
    return np.sqrt(_product(apart, apart))


# --- The paper and what falls on it ---


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
    size = _size(common)[..., None]
    off = off - common * np.minimum(1, FORGIVEN / np.maximum(size, 1))
    distances = np.minimum(_size(off), 80).mean(axis=(1, 2))
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
    thick = ndimage.binary_opening(_size(apart) > FOREGROUND, _disc(radius))
    free = ~ndimage.binary_dilation(thick, _disc(1.2 * radius))
    found = {weather: _falls(apart, free, backdrop, weather) for weather in WEATHERS}
    best = max(found, key=lambda weather: found[weather][1])
    return best if found[best][0] >= DROPS else ""


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
    shown = _size(apart) > FOREGROUND
    if backdrop.weather:
        height, width = shown.shape
        side = min(height, width)
        drops = _drops(backdrop, backdrop.weather, width, height)
        zone = ndimage.binary_dilation(falling(backdrop.weather, width, height) > 0.1, _disc(0.026 * side))
        full = ndimage.maximum_filter1d(np.abs(drops).max(axis=1, keepdims=True), int(2 * CELL * side), axis=0)
        full = full * np.sign(drops.mean(axis=1, keepdims=True))  # a whole drop's colour less the paper's, row by row
        share = np.clip((apart * full).sum(axis=2) / np.maximum((full * full).sum(axis=2), 1), 0, 1.3)[..., None]
        drop = zone & (_size(apart - share * full) < FOREGROUND)
        thick = ndimage.binary_dilation(ndimage.binary_opening(shown, _disc(THICK * side)), _disc(0.01 * side))
        drop &= ~thick
        apart, shown = np.where(drop[..., None], 0, apart), shown & ~drop
    return View(apart.astype(np.float32), tone.astype(np.float32), shown)


# --- Where things are ---


def _spots(shown: np.ndarray, wanted: Wanted) -> np.ndarray:
    """Which of the wanted things each pixel belongs to, int [h, w]: all that is shown, parted into so many heaps.

    Not by what touches: a bamboo is three canes, and two mountains may touch. If there are more or fewer things, some
    heap is no likeness of any.
    """
    height, width = shown.shape
    points = np.argwhere(shown)[:, ::-1].astype(np.float32)
    count, side = len(wanted.things), min(height, width)
    starts = [GROUPS[count]] + ([PLACES["above"]] if count == 2 else [])
    best, centres = np.inf, np.zeros((count, 2))
    for start in starts:
        found = _heaps(points[:: max(1, len(points) // 1500)] / side, np.array(start) * (width, height) / side)
        if found[0] < best:
            best, centres = found[0], found[1] * side
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    return np.asarray(np.hypot(x - centres[:, 0], y - centres[:, 1]).argmin(axis=2))


def _heaps(points: np.ndarray, centres: np.ndarray) -> tuple[float, np.ndarray]:
    """k-means [n, 2]: the mean square distance, and the centres it ends with."""
    for _ in range(12):
        squares = np.square(points[:, None] - centres).sum(axis=2)
        nearest = squares.argmin(axis=1)
        moved = np.array(
            [points[nearest == i].mean(axis=0) if (nearest == i).any() else c for i, c in enumerate(centres)]
        )
        if np.abs(moved - centres).max() < 1e-3:
            break
        centres = moved
    return float(squares.min(axis=1).mean()), centres


def _orders(shown: np.ndarray, spots: np.ndarray, wanted: Wanted) -> Iterator[tuple[int, ...]]:
    """Which spot may be which thing: by its place where that was asked for."""
    count = len(wanted.things)
    if not wanted.relation:
        yield tuple(range(count))
        return
    x, y = (
        np.array([np.nonzero(shown & (spots == i))[axis].mean() for i in range(count)]) / shown.shape[axis]
        for axis in (1, 0)
    )
    for order in permutations(range(count)):
        dx, dy = x[order[1]] - x[order[0]], y[order[1]] - y[order[0]]
        ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}.get(wanted.relation, 1.0)
        across = {"left of": dy, "right of": dy, "above": dx, "below": dx}.get(wanted.relation, 0.0)
        if ahead > 0.1 and ahead > abs(across):
            yield order


# --- What things are ---


def _fault(view: View, mine: np.ndarray, kind: str, color: str, wanted: Wanted) -> tuple[str, int]:
    """In words, what keeps what is shown where it is `mine` from being that thing, "" for nothing; and how many pixels
    of it are no part of that."""
    heap = _heap(view, mine, color, wanted)
    if heap is None:
        return f"nothing {color} where a {color} {kind} should be", 0
    matches = _matches(heap)
    ours = matches[kind]
    best = max(matches.values(), key=lambda match: match.likeness)
    if ours.likeness < LIKENESS:
        return (f"a {best.kind} instead of a {kind}" if best.likeness >= LIKENESS else f"a thing that is no {kind}"), 0
    for other in matches.values():
        near = other is not ours and other.likeness > ours.likeness - NEAR
        if near and (part := heap.between(ours, other)) > BETWEEN:
            if part > 1 - BETWEEN:
                return f"a {best.kind} instead of a {kind}", 0
            return f"a thing between a {kind} and a {other.kind}", 0
    seen = _color(view, mine, ours)
    if seen != color:
        return f"a {seen or 'strangely coloured'} {kind} instead of a {color} one", 0
    return "", _stray(view.shown & mine, ours)


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """How much body and ink of every kind cover the window, float32 [kinds, WINDOW, WINDOW, 2]."""
    fine = 4
    grid = ((np.arange(WINDOW * fine, dtype=np.float32) + 0.5) / fine - WINDOW / 2) * 2 * REACH / WINDOW
    scale = WINDOW * fine / (2 * REACH)
    made = []
    for kind in KINDS:
        body, ink = coverage(kind, grid[None, :] * scale, grid[:, None] * scale, scale)
        covers = np.stack([body, np.zeros_like(body) if ink is None else ink], axis=-1)
        covers[..., 0] *= 1 - covers[..., 1]  # what is seen of the body
        blurred = ndimage.gaussian_filter(covers, (SOFT * scale, SOFT * scale, 0))
        made.append(blurred.reshape(WINDOW, fine, WINDOW, fine, 2).mean(axis=(1, 3)))
    return np.stack(made).astype(np.float32)


def _felt(apart: np.ndarray) -> np.ndarray:
    """Differences from the paper as an eye weighs them, [..., 3]: none is none, and twice as much is not twice as
    clear, or dark ink would outweigh all else."""
    size = _size(apart)[..., None]
    return np.asarray(apart * (np.maximum(size - 12, 0) / (np.maximum(size, 1) * np.sqrt(size + 30))))


def _moments(weight: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Centre and spread of heaps [..., h, w], where x, y are [w], [h]: cx, cy, sx, sy, each [...]."""
    total = weight.sum(axis=(-1, -2)) + 1e-9
    columns, rows = weight.sum(axis=-2) / total[..., None], weight.sum(axis=-1) / total[..., None]
    cx, cy = columns @ x, rows @ y
    return cx, cy, np.sqrt(columns @ (x * x) - cx * cx + 1e-9), np.sqrt(rows @ (y * y) - cy * cy + 1e-9)


def _drawn(rgb: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """All kinds [kinds, WINDOW, WINDOW, 3] as they differ from the paper, given how their colour and ink do."""
    covers = _templates()
    return np.asarray(covers[..., :1] * rgb + covers[..., 1:] * ink)


def _sampled(picture: np.ndarray, place: Place) -> np.ndarray:
    """The window around a place, [WINDOW, WINDOW, 3]; 0 beyond the picture."""
    cx, cy, sx, sy = place
    out, axes = picture, ((0, cy, sy), (1, cx, sx))
    for axis, centre, size in axes:
        at = centre + _grid() * size - 0.5
        low = np.clip(np.floor(at).astype(int), 0, picture.shape[axis] - 2)
        part = np.clip(at - low, 0, 1)
        inside = (at > -0.5) & (at < picture.shape[axis] - 0.5)
        shape = (-1, 1, 1) if axis == 0 else (1, -1, 1)
        near, far = ((1 - part) * inside).reshape(shape), (part * inside).reshape(shape)
        out = out.take(low, axis) * near + out.take(low + 1, axis) * far
    return np.asarray(out)


@lru_cache(maxsize=1)
def _grid() -> np.ndarray:
    return np.asarray((((np.arange(WINDOW) + 0.5) / WINDOW * 2 - 1) * REACH).astype(np.float32))


@dataclass(frozen=True, slots=True)
class Heap:
    """What may be one thing: how it differs from the paper, blurred, [h, w, 3]; `power`, the sum of what is felt of it
    squared, in pixels; the paper [h, 1, 3]; its colour and its ink, RGB."""

    apart: np.ndarray
    power: float
    tone: np.ndarray
    rgb: np.ndarray
    ink: np.ndarray

    def drawn(self, kind: str, place: Place, frame: Place) -> np.ndarray:
        """The kind at a place, as felt in the window around `frame`, [WINDOW, WINDOW, 3]."""
        rows = np.clip((frame[1] + _grid() * frame[3]).astype(int), 0, len(self.tone) - 1)
        covers = _templates()[KINDS.index(kind)]
        if place != frame:
            scale = WINDOW / (2 * REACH)  # the frame's window in pixels of the template's
            cx, cy = ((frame[i] - place[i]) / place[i + 2] * scale + WINDOW / 2 for i in (0, 1))
            covers = _sampled(covers, (cx, cy, frame[2] / place[2] * scale, frame[3] / place[3] * scale))
        tone = self.tone[rows]
        return _felt(covers[..., :1] * (self.rgb - tone) + covers[..., 1:] * (self.ink - tone))

    def against(self, kind: str, place: Place) -> tuple[float, np.ndarray, np.ndarray]:
        """The likeness, 0..1, of what is there and the kind drawn at that place; and both, as felt."""
        seen, drawn = _felt(_sampled(self.apart, place)), self.drawn(kind, place, place)
        all_of_it = self.power / (place[2] * place[3] * (2 * REACH / WINDOW) ** 2)
        common = 2 * float(np.vdot(seen, drawn)) / (all_of_it + float(np.vdot(drawn, drawn)))
        return common, seen, drawn

    def between(self, ours: Match, other: Match) -> float:
        """Where what is there lies on the way from one kind to another: 0 is the first, 1 the other."""
        seen, mine = _felt(_sampled(self.apart, ours.place)), self.drawn(ours.kind, ours.place, ours.place)
        way = self.drawn(other.kind, other.place, ours.place) - mine
        return float(np.vdot(seen - mine, way)) / (float(np.vdot(way, way)) + 1e-6)


def _heap(view: View, mine: np.ndarray, color: str, wanted: Wanted) -> Heap | None:
    """None where next to nothing of what is shown is near that colour; else it is drawn as this picture has it."""
    apart, named = np.where(mine[..., None], view.apart, 0), np.array(COLORS[color], np.float32)
    shown = (apart + view.tone)[view.shown & mine]
    near = shown[_size(shown - named) < SAME_COLOR]
    if len(near) < max(20, 0.1 * len(shown)):
        return None
    blur = SOFT * sum(RADIUS[len(wanted.things)]) / 2 * min(mine.shape)
    apart = ndimage.gaussian_filter(apart, (blur, blur, 0))
    ink = np.array(wanted.backdrop.ink, np.float32)
    return Heap(apart, float(np.square(_felt(apart)).sum()), view.tone, np.median(near, axis=0), ink)


def _matches(heap: Heap) -> dict[str, Match]:
    """The heap against every kind: each where its middle and its spread are the heap's, the likelier ones moved a
    little to where they fit best."""
    height, width = heap.apart.shape[:2]
    felt = np.square(_size(_felt(heap.apart)))
    cx, cy, sx, sy = _moments(felt, np.arange(width) + 0.5, np.arange(height) + 0.5)
    paper_there = heap.tone[int(cy), 0]
    drawn = _drawn(heap.rgb - paper_there, heap.ink - paper_there)
    xs, ys, wide, high = _moments(np.square(_size(_felt(drawn))), _grid(), _grid())
    sizes = np.hypot(sx, sy) / np.hypot(wide, high)
    places = [tuple(place) for place in np.stack([cx - xs * sizes, cy - ys * sizes, sizes, sizes], axis=1).tolist()]
    first = [Match(kind, heap.against(kind, place)[0], place) for kind, place in zip(KINDS, places, strict=True)]
    least = max(match.likeness for match in first) - NEAR
    return {match.kind: _refined(heap, match) if match.likeness > least else match for match in first}


def _refined(heap: Heap, match: Match) -> Match:
    """Moved and stretched by a few steps of Gauss and Newton's."""
    best, place = match, match.place
    for _ in range(STEPS + 1):
        likeness, seen, drawn = heap.against(match.kind, place)
        if likeness > best.likeness:
            best = Match(match.kind, likeness, place)
        down, right, _ = np.gradient(0.5 * (seen + drawn), 2 * REACH / WINDOW)
        x, y = _grid()[None, :, None], _grid()[:, None, None]
        slopes = np.stack([right, down, right * x, down * y]).reshape(4, -1)
        square = slopes @ slopes.T
        step = np.linalg.solve(square + (0.005 * np.trace(square) + 1) * np.eye(4), slopes @ (drawn - seen).ravel())
        dx, dy, wider, higher = np.clip(step, -0.12, 0.12)
        mean = np.sqrt(place[2] * place[3])
        sx, sy = place[2] * (1 + wider), place[3] * (1 + higher)
        sx, sy = (float(np.clip(size, mean * 0.9, mean * 1.1)) for size in (sx, sy))
        place = (float(place[0] + dx * place[2]), float(place[1] + dy * place[3]), sx, sy)
    return best


def _stray(shown: np.ndarray, match: Match) -> int:
    """How many pixels are shown that are not part of what matched, nor near it."""
    cx, cy, sx, sy = match.place
    x, y = np.arange(shown.shape[1]) + 0.5, np.arange(shown.shape[0]) + 0.5
    distances = FORMS[match.kind](((x - cx) / sx)[None, :], ((y - cy) / sy)[:, None])
    near = [distance < ASTRAY for distance in distances if distance is not None]
    return int(ndimage.binary_opening(shown & ~np.logical_or.reduce(near), np.ones((3, 3))).sum())  # dust is none


def _color(view: View, mine: np.ndarray, match: Match) -> str:
    """The colour of the body of what matched, "" where it is none, or not one."""
    apart = _sampled(np.where(mine[..., None], view.apart, 0), match.place)
    rows = np.clip((match.place[1] + _grid() * match.place[3]).astype(int), 0, len(view.tone) - 1)
    body = _templates()[KINDS.index(match.kind), ..., 0]
    colors = (apart + view.tone[rows])[body > max(0.8 * body.max(), 0.5)]
    distances = _size(PALETTE - colors[:, None])
    typical = _size(PALETTE - np.median(colors, axis=0))
    best, second = np.argsort(typical)[:2]
    even = (distances.argmin(axis=1) == best).mean() >= EVEN
    clear = typical[best] < SAME_COLOR and typical[second] - typical[best] > CLEARER
    return NAMES[best] if even and clear else ""
