"""Is this picture what the prompt asked for? Segments it, matches every blob with a template, counts, orders.

Knows the world's shapes and colours but no model. Its own error rates are measured by tests on rendered pictures: right
captions accepted, captions with one thing changed refused. A verdict always says why.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage

from engine.seedling.scenes import COLORS, DISTANCE, SHAPES, Scene

PALETTE = np.array(list(COLORS.values()), np.float32)
NAMES = tuple(COLORS)
# Distances are Euclidean in 0..255 RGB. The two nearest colours of the palette are 88 apart (orange and yellow).
FOREGROUND = 44.0  # further than this from the background is a thing
SAME_COLOR = 50.0  # nearer than this to a palette colour is that colour
SPECK = 0.003  # blobs under this share of the picture are dirt, allowed up to DIRT in all
DIRT = 0.01
MATCH = 0.82  # smallest overlap (intersection over union) of a blob with its template


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a prompt says and no more: `color` None leaves it open."""

    background: str
    things: tuple[tuple[str, str | None], ...]
    relation: str = ""

    @classmethod
    def of(cls, scene: Scene, colored: bool = True) -> "Wanted":
        return cls(scene.background, tuple((t.shape, t.color if colored else None) for t in scene.things), scene.relation)


@dataclass(frozen=True, slots=True)
class Blob:
    """One connected thing in a picture; `shape` or `color` is "" where nothing fits. Centre in pixels."""

    shape: str
    color: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Verdict:
    right: bool
    reason: str


def nearest_color(rgb: np.ndarray) -> str:
    """The palette's name for a colour, "" where none is near."""
    distances = np.linalg.norm(PALETTE - rgb, axis=1)
    best = int(distances.argmin())
    return NAMES[best] if distances[best] < SAME_COLOR else ""


def background_color(pixels: np.ndarray) -> tuple[str, np.ndarray]:
    """Name and RGB of the border, "" where it is not one plain palette colour."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    rgb = np.median(border, axis=0)
    plain = (np.linalg.norm(border - rgb, axis=1) < FOREGROUND).mean() > 0.9
    return (nearest_color(rgb) if plain else ""), rgb


def _template(shape: str, height: int, width: int) -> np.ndarray:
    """The shape's silhouette, as large as fits into a box of that size by its longer side."""
    span = {"circle": 2.0, "ring": 2.0, "square": 1.76, "triangle": 1.2 * 1.7320508}[shape]
    tall = {"triangle": 1.8}.get(shape, span)
    r = 0.5 * (width / span + height / tall)
    middle = {"triangle": -0.06 * r}.get(shape, 0.0)  # a triangle's box is not centred on its origin
    x = np.arange(width, dtype=np.float32)[None, :] + 0.5 - width / 2
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5 - height / 2 + middle
    return DISTANCE[shape](x, y, r) < 0


def shape_of(mask: np.ndarray) -> str:
    """The shape whose template overlaps a blob's bounding box best, "" where none does well. bool [h, w]."""
    best, name = MATCH, ""
    for shape in SHAPES:
        template = _template(shape, *mask.shape)
        overlap = (mask & template).sum() / max(1, (mask | template).sum())
        if overlap > best:
            best, name = float(overlap), shape
    return name


def find_blobs(pixels: np.ndarray, background: np.ndarray) -> tuple[list[Blob], float]:
    """Things in front of the background, and the share of the picture that is dirt. float32 [H, W, 3]."""
    labels, count = ndimage.label(np.linalg.norm(pixels - background, axis=2) > FOREGROUND)
    blobs, dirt, area = [], 0, labels.size
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels[box] == index
        if mask.sum() < SPECK * area:
            dirt += int(mask.sum())
            continue
        inside = ndimage.binary_erosion(mask, iterations=2)  # the smoothed outline is neither colour
        colors = pixels[box][inside if inside.sum() > 8 else mask]
        rgb = np.median(colors, axis=0)
        plain = (np.linalg.norm(colors - rgb, axis=1) < SAME_COLOR).mean() > 0.9
        cy, cx = ndimage.center_of_mass(mask)
        color = nearest_color(rgb) if plain else ""
        blobs.append(Blob(shape_of(mask), color, box[1].start + cx, box[0].start + cy))
    return blobs, dirt / area


def _holds(relation: str, first: Blob, second: Blob, height: int, width: int) -> bool:
    dx, dy = (second.x - first.x) / width, (second.y - first.y) / height
    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}.get(relation, 1.0)
    across = {"left of": dy, "right of": dy, "above": dx, "below": dx}.get(relation, 0.0)
    return ahead > 0.1 and ahead > abs(across)


def _fits(wanted: Wanted, order: tuple[Blob, ...], height: int, width: int) -> bool:
    for (shape, color), blob in zip(wanted.things, order, strict=True):
        if blob.shape != shape or (color is not None and blob.color != color):
            return False
    return not wanted.relation or _holds(wanted.relation, order[0], order[1], height, width)


def check(picture: np.ndarray, wanted: Wanted) -> Verdict:
    """uint8 [H, W, 3] against a wish. Everything has to be right: background, number, shapes, colours, places."""
    pixels = picture.astype(np.float32)
    name, rgb = background_color(pixels)
    if name != wanted.background:
        return Verdict(False, f"background is {name or 'not plain'}, not {wanted.background}")
    blobs, dirt = find_blobs(pixels, rgb)
    if dirt > DIRT:
        return Verdict(False, f"{dirt:.1%} of the picture is specks")
    if len(blobs) != len(wanted.things):
        return Verdict(False, f"{len(blobs)} things, not {len(wanted.things)}")
    odd = next((b for b in blobs if not b.shape or not b.color), None)
    if odd is not None:
        return Verdict(False, f"a thing with no clear {'colour' if odd.shape else 'shape'}")
    if any(_fits(wanted, order, *picture.shape[:2]) for order in permutations(blobs)):
        return Verdict(True, "as asked")
    return Verdict(False, "found " + ", ".join(f"a {b.color} {b.shape}" for b in blobs) + ", not as asked")
