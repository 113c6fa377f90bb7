"""How a scene of the garden becomes pixels: every kind a body in its colour and accents in ink, on washed paper.

Forms are signed distances in units of the thing's radius around its centre, negative inside, y downwards; they keep
within 1.2 radii. Knows scenes; no captions, no models, no torch.
"""

from collections.abc import Callable

import numpy as np

from engine.seedling.backdrops import COLORS, Backdrop
from engine.seedling.scenes import Scene, Thing

Grid = np.ndarray
"""float32, broadcastable to [h, w]"""


def disc(x: Grid, y: Grid, cx: float, cy: float, r: float) -> Grid:
    return np.hypot(x - cx, y - cy) - r


def ellipse(x: Grid, y: Grid, cx: float, cy: float, a: float, b: float, turn: float = 0.0) -> Grid:
    """Not Euclidean far away, exact in sign, close at the outline. `turn` in radians, clockwise as seen."""
    dx, dy, c, s = x - cx, y - cy, np.cos(turn), np.sin(turn)
    u, v = (c * dx + s * dy) / a, (c * dy - s * dx) / b
    k = np.maximum(np.hypot(u, v), 1e-6)  # or the very middle would be neither inside nor outside
    return k * (k - 1) / np.maximum(np.hypot(u / a, v / b), 1e-6)


def box(x: Grid, y: Grid, cx: float, cy: float, w: float, h: float) -> Grid:
    return np.maximum(np.abs(x - cx) - w, np.abs(y - cy) - h)


def stroke(x: Grid, y: Grid, x0: float, y0: float, x1: float, y1: float, w: float) -> Grid:
    """A round-ended stroke of half width `w`."""
    dx, dy = x1 - x0, y1 - y0
    t = np.clip(((x - x0) * dx + (y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - x0 - t * dx, y - y0 - t * dy) - w


def polygon(x: Grid, y: Grid, *corners: tuple[float, float]) -> Grid:
    """A convex polygon, corners clockwise as seen: distance to the furthest edge's line."""
    edges = []
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        length = float(np.hypot(x1 - x0, y1 - y0))
        edges.append(((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length)
    return _cut(*edges)


def _join(*forms: Grid) -> Grid:
    out = forms[0]
    for form in forms[1:]:
        out = np.minimum(out, form)
    return out


def _cut(*forms: Grid) -> Grid:
    out = forms[0]
    for form in forms[1:]:
        out = np.maximum(out, form)
    return out


Form = Callable[[Grid, Grid], tuple[Grid, Grid | None]]
"""(x, y) -> distances to the body, which takes the thing's colour, and to the ink over it, None for none."""


def _circle(x: Grid, y: Grid) -> tuple[Grid, None]:
    return disc(x, y, 0, 0, 1.0), None


def _square(x: Grid, y: Grid) -> tuple[Grid, None]:
    return box(x, y, 0, 0, 0.88, 0.88), None


def _triangle(x: Grid, y: Grid) -> tuple[Grid, None]:
    """Upright, equilateral, moved down a little so that it looks centred."""
    y = y - 0.24
    return np.maximum(0.8660254 * np.abs(x) - 0.5 * y, y) - 0.6, None


def _ring(x: Grid, y: Grid) -> tuple[Grid, None]:
    return np.abs(np.hypot(x, y) - 0.76) - 0.24, None


def _pine(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """A niwaki: three clouds on a bent trunk."""
    clouds = _join(
        ellipse(x, y, -0.45, 0.25, 0.55, 0.27), ellipse(x, y, 0.48, -0.05, 0.5, 0.25),
        ellipse(x, y, -0.05, -0.62, 0.6, 0.33),
    )  # fmt: skip
    trunk = _join(
        stroke(x, y, 0.05, 0.95, -0.08, 0.35, 0.11), stroke(x, y, -0.08, 0.35, 0.15, -0.15, 0.09),
        stroke(x, y, 0.15, -0.15, 0.0, -0.5, 0.07), stroke(x, y, -0.25, 0.95, 0.35, 0.95, 0.06),
    )  # fmt: skip
    return clouds, trunk


def _maple(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """A leaf of five points on its stem."""
    points = [
        polygon(x, y, (0.0, -1.0), (0.26, -0.2), (0.0, 0.45), (-0.26, -0.2)),
        polygon(x, y, (0.95, -0.45), (0.42, 0.16), (0.0, 0.45), (0.18, -0.16)),
        polygon(x, y, (-0.95, -0.45), (-0.18, -0.16), (0.0, 0.45), (-0.42, 0.16)),
        polygon(x, y, (0.82, 0.42), (0.28, 0.55), (0.0, 0.45), (0.28, 0.08)),
        polygon(x, y, (-0.82, 0.42), (-0.28, 0.08), (0.0, 0.45), (-0.28, 0.55)),
    ]
    return _join(*points), stroke(x, y, 0.0, 0.1, 0.06, 1.0, 0.06)


def _cherry(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """A blossom of five petals with an inked heart."""
    petals = []
    for i in range(5):
        a = 2 * np.pi * i / 5
        petals.append(ellipse(x, y, 0.56 * np.sin(a), -0.56 * np.cos(a), 0.33, 0.42, a))
    heart = [disc(x, y, 0, 0, 0.14)]
    heart += [disc(x, y, 0.3 * np.sin(a), -0.3 * np.cos(a), 0.055) for a in 2 * np.pi * np.arange(5) / 5]
    return _join(*petals), _join(*heart)


def _bamboo(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """Three canes with inked joints, and two pairs of leaves."""
    canes = _join(
        box(x, y, -0.55, 0.1, 0.13, 0.85), box(x, y, 0.0, -0.05, 0.13, 1.0), box(x, y, 0.55, 0.2, 0.13, 0.75),
        ellipse(x, y, -0.8, -0.62, 0.3, 0.1, 0.6), ellipse(x, y, 0.34, -0.85, 0.3, 0.1, -0.6),
        ellipse(x, y, 0.84, -0.42, 0.28, 0.1, 0.7),
    )  # fmt: skip
    joints = ((-0.55, -0.2), (-0.55, 0.4), (0.0, -0.45), (0.0, 0.15), (0.0, 0.7), (0.55, -0.05), (0.55, 0.5))
    return canes, _join(*(box(x, y, cx, cy, 0.17, 0.04) for cx, cy in joints))


def _moon(x: Grid, y: Grid) -> tuple[Grid, None]:
    return _cut(disc(x, y, 0, 0, 0.95), -disc(x, y, 0.45, -0.18, 0.78)), None


def _sun(x: Grid, y: Grid) -> tuple[Grid, None]:
    rays = [
        stroke(x, y, 0.78 * np.sin(a), -0.78 * np.cos(a), np.sin(a), -np.cos(a), 0.09) for a in np.pi * np.arange(8) / 4
    ]
    return _join(disc(x, y, 0, 0, 0.56), *rays), None


def _mountain(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """Two peaks, with three strokes down their sides."""
    peaks = _join(
        polygon(x, y, (-0.3, -0.9), (0.62, 0.72), (-1.1, 0.72)),
        polygon(x, y, (0.55, -0.25), (1.12, 0.72), (-0.1, 0.72)),
    )
    strokes = _join(
        stroke(x, y, -0.3, -0.62, -0.42, -0.05, 0.05), stroke(x, y, -0.18, -0.35, -0.08, 0.25, 0.05),
        stroke(x, y, 0.55, 0.0, 0.5, 0.4, 0.05),
    )  # fmt: skip
    return peaks, strokes


def _lantern(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """A paper lantern: ribs, caps and a loop in ink."""
    frame = _join(
        box(x, y, 0, -0.76, 0.34, 0.09), box(x, y, 0, 0.76, 0.34, 0.09), stroke(x, y, 0, -0.82, 0, -1.05, 0.05),
        stroke(x, y, 0, 0.82, 0, 1.05, 0.07), box(x, y, 0, -0.25, 0.66, 0.035), box(x, y, 0, 0.25, 0.66, 0.035),
    )  # fmt: skip
    return ellipse(x, y, 0, 0, 0.72, 0.78), frame


def _boat(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """Hull and sail, the mast in ink."""
    hull = _cut(ellipse(x, y, 0, 0.3, 1.05, 0.55), 0.36 - y)
    sail = polygon(x, y, (0.12, -0.95), (0.82, 0.2), (0.12, 0.2))
    return _join(hull, sail), _join(stroke(x, y, 0, 0.4, 0, -1.0, 0.06), stroke(x, y, -0.75, 0.56, 0.75, 0.56, 0.04))


def _crane(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """Standing, facing left: beak, tail and legs in ink."""
    body = _join(
        ellipse(x, y, 0.12, 0.05, 0.56, 0.3, -0.15), stroke(x, y, -0.3, 0.05, -0.5, -0.42, 0.1),
        stroke(x, y, -0.5, -0.42, -0.36, -0.78, 0.09), disc(x, y, -0.38, -0.84, 0.15),
    )  # fmt: skip
    ink = _join(
        stroke(x, y, -0.5, -0.84, -0.95, -0.72, 0.05), ellipse(x, y, 0.7, 0.02, 0.3, 0.17, 0.5),
        stroke(x, y, 0.02, 0.3, -0.06, 1.0, 0.05), stroke(x, y, 0.24, 0.3, 0.28, 1.0, 0.05),
    )  # fmt: skip
    return body, ink


def _koi(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """A fish swimming left: eye, fin and two bands in ink."""
    body = _join(
        ellipse(x, y, -0.2, 0, 0.75, 0.42), polygon(x, y, (0.38, 0.0), (1.02, -0.5), (0.84, 0.0)),
        polygon(x, y, (0.38, 0.0), (0.84, 0.0), (1.02, 0.5)),
    )  # fmt: skip
    bands = _join(ellipse(x, y, 0.0, 0, 0.09, 0.3), ellipse(x, y, 0.28, 0, 0.07, 0.22))
    return body, _join(disc(x, y, -0.62, -0.1, 0.09), bands, ellipse(x, y, -0.1, -0.46, 0.3, 0.1, -0.2))


def _bridge(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """An arched deck, its rail and posts in ink."""
    deck = _cut(np.abs(np.hypot(x, y - 0.93) - 1.0) - 0.14, y - 0.72)
    rail = _cut(np.abs(np.hypot(x, y - 0.95) - 1.5) - 0.05, y - 0.2)
    feet = ((s, abs(s)) for s in (-1.1, -0.4, 0.4, 1.1))
    posts = _join(*(stroke(x, y, 0.62 * s, 0.4 * a * a - 0.05, 0.72 * s, 0.35 * a - 0.5, 0.045) for s, a in feet))
    return deck, _cut(_join(rail, posts), np.abs(x) - 1.05)


def _rock(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """A boulder and a pebble, cracks in ink."""
    stone = polygon(x, y, (-0.45, -0.55), (0.2, -0.75), (0.75, -0.25), (0.95, 0.65), (-0.85, 0.65), (-0.8, 0.0))
    cracks = _join(
        stroke(x, y, 0.05, -0.5, -0.2, -0.05, 0.045), stroke(x, y, -0.2, -0.05, 0.05, 0.3, 0.045),
        stroke(x, y, 0.45, 0.0, 0.6, 0.4, 0.045), stroke(x, y, -0.95, 0.72, 1.05, 0.72, 0.06),
    )  # fmt: skip
    return stone, cracks


def _gate(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """A torii, the lid of its lintel in ink."""
    frame = _join(
        box(x, y, -0.55, 0.18, 0.13, 0.78), box(x, y, 0.55, 0.18, 0.13, 0.78), box(x, y, 0, -0.22, 0.82, 0.1),
        box(x, y, 0, -0.68, 1.0, 0.14),
    )  # fmt: skip
    return frame, _join(
        polygon(x, y, (-1.08, -0.94), (1.08, -0.94), (1.0, -0.79), (-1.0, -0.79)),
        box(x, y, -0.55, 0.91, 0.18, 0.06), box(x, y, 0.55, 0.91, 0.18, 0.06), box(x, y, 0, -0.45, 0.08, 0.14),
    )  # fmt: skip


def _pagoda(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """Three roofs; walls and spire in ink."""
    roofs = _join(*(
        polygon(x, y, (-0.45 * s, top), (0.45 * s, top), (1.05 * s, top + 0.34), (-1.05 * s, top + 0.34))
        for s, top in ((0.62, -0.82), (0.8, -0.24), (1.0, 0.36))
    ))  # fmt: skip
    walls = _join(
        stroke(x, y, 0, -1.08, 0, -0.8, 0.05), box(x, y, 0, -0.36, 0.3, 0.13), box(x, y, 0, 0.23, 0.4, 0.14),
        box(x, y, 0, 0.83, 0.5, 0.14),
    )  # fmt: skip
    return roofs, walls


def _umbrella(x: Grid, y: Grid) -> tuple[Grid, Grid]:
    """Open, ribs and handle in ink."""
    shade = _cut(disc(x, y, 0, 0.1, 1.0), y - 0.1)
    handle = _join(
        stroke(x, y, 0, -1.02, 0, 0.88, 0.055), stroke(x, y, 0, 0.88, 0.22, 0.88, 0.055),
        _cut(np.abs(ellipse(x, y, 0, 0.1, 0.5, 1.0)) - 0.04, y - 0.1),
    )  # fmt: skip
    return shade, handle


FORMS: dict[str, Form] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "ring": _ring, "pine": _pine, "maple": _maple,
    "cherry": _cherry, "bamboo": _bamboo, "moon": _moon, "sun": _sun, "mountain": _mountain, "lantern": _lantern,
    "boat": _boat, "crane": _crane, "koi": _koi, "bridge": _bridge, "rock": _rock, "gate": _gate, "pagoda": _pagoda,
    "umbrella": _umbrella,
}  # fmt: skip
REACH = 1.2  # radii


def paper(backdrop: Backdrop, width: int, height: int) -> np.ndarray:
    """float32 [height, width, 3]: one plain colour, or sky washed into ground; then rain or snow."""
    top, bottom = backdrop.edges
    wash = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None, None]
    canvas = np.broadcast_to(top + (bottom - top) * wash, (height, width, 3)).copy()
    if backdrop.weather:
        cover = (0.7 * falling(backdrop.weather, width, height))[..., None]
        canvas += cover * (np.array(_FLAKE[backdrop.weather], np.float32) - canvas)
    return canvas


_FLAKE = {"rain": (96, 120, 168), "snow": (255, 255, 255)}
CELL = 1 / 6  # of the shorter side: one drop or flake in each, a row in two moved by half


def falling(weather: str, width: int, height: int) -> np.ndarray:
    """How much of each pixel drops or flakes cover, float32 [height, width] in [0, 1]; always in the same places."""
    cell = CELL * min(width, height)
    x = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / cell
    y = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / cell
    row = np.floor(y)
    u, v = (x + 0.5 * (row % 2)) % 1 - 0.5, y - row - 0.5
    distance = stroke(u, v, 0.12, -0.3, -0.12, 0.3, 0.06) if weather == "rain" else disc(u, v, 0, 0, 0.17)
    return np.clip(0.5 - distance * cell, 0, 1)


def coverage(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray | None]:
    """How much body and ink cover each pixel; x, y in pixels from the centre, `radius` in pixels."""
    body, ink = FORMS[kind](x / radius, y / radius)
    return np.clip(0.5 - body * radius, 0, 1), None if ink is None else np.clip(0.5 - ink * radius, 0, 1)


def put(canvas: np.ndarray, thing: Thing, ink: tuple[int, int, int]) -> None:
    """Draws one thing onto a paper, float32 [height, width, 3], outlines smoothed over one pixel."""
    height, width = canvas.shape[:2]
    r = thing.radius * min(width, height)
    cx, cy = thing.x * width, thing.y * height
    reach = int(REACH * r) + 2
    x0, x1 = max(0, int(cx) - reach), min(width, int(cx) + reach + 1)
    y0, y1 = max(0, int(cy) - reach), min(height, int(cy) + reach + 1)
    x = np.arange(x0, x1, dtype=np.float32)[None, :] + 0.5 - cx
    y = np.arange(y0, y1, dtype=np.float32)[:, None] + 0.5 - cy
    area = canvas[y0:y1, x0:x1]
    covers = coverage(thing.kind, x, y, r)
    for cover, color in zip(covers, (COLORS[thing.color], ink), strict=True):
        if cover is not None:
            area += cover[..., None] * (np.array(color, np.float32) - area)


def render(scene: Scene, width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]."""
    canvas, ink = paper(scene.backdrop, width, height), scene.backdrop.ink
    for thing in scene.things:
        put(canvas, thing, ink)
    return np.rint(canvas).astype(np.uint8)
