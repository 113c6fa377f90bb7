"""Is this picture what the prompt asked for? Analysis by synthesis: what was asked for is drawn where things are.

What stands out from the wanted paper (views.py) is held against all kinds, each drawn in the asked colour at the place
and size that fit it best. The picture is right if everything asked for is clearly there and nothing else
is. Knows the world and how it is drawn, but no model. A verdict always says why.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage

from engine.seedling.backdrops import COLORS, Backdrop
from engine.seedling.drawing import FORMS, coverage
from engine.seedling.scenes import GROUPS, KINDS, PLACES, RADIUS, Scene
from engine.seedling.views import View, length, look

PALETTE, NAMES = np.array(list(COLORS.values()), np.float32), tuple(COLORS)
# Distances are Euclidean in 0..255 RGB. The nearest colours of the palette are 87 apart.
SAME_COLOR = 55.0  # nearer than this to a palette colour may be that colour,
CLEARER = 14.0  # if every other is further by this much
EVEN = 0.7  # share of a thing's body, its outline aside, that is nearer to its colour than to any other
LIKENESS = 0.8  # what a thing has in common with its kind, at least
BETWEEN = 0.38  # how far it may be on the way to any other kind; half way it is neither

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
class Match:
    """How much a thing is like a kind, 0..1, and where that kind would stand."""

    kind: str
    likeness: float
    place: Place


def check(picture: np.ndarray, wanted: Wanted) -> Verdict:
    """uint8 [H, W, 3] against a wish. Everything has to be right: backdrop, number, kinds, colours, places."""
    view = look(picture, wanted.backdrop)
    if isinstance(view, str):
        return Verdict(False, view)
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
    size = length(apart)[..., None]
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
    near = shown[length(shown - named) < SAME_COLOR]
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
    felt = np.square(length(_felt(heap.apart)))
    cx, cy, sx, sy = _moments(felt, np.arange(width) + 0.5, np.arange(height) + 0.5)
    paper_there = heap.tone[int(cy), 0]
    drawn = _drawn(heap.rgb - paper_there, heap.ink - paper_there)
    xs, ys, wide, high = _moments(np.square(length(_felt(drawn))), _grid(), _grid())
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
    distances = length(PALETTE - colors[:, None])
    typical = length(PALETTE - np.median(colors, axis=0))
    best, second = np.argsort(typical)[:2]
    even = (distances.argmin(axis=1) == best).mean() >= EVEN
    clear = typical[best] < SAME_COLOR and typical[second] - typical[best] > CLEARER
    return NAMES[best] if even and clear else ""
