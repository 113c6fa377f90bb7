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
SAME_COLOR = 40.0  # nearer than this to a palette colour is that colour; half way between two is 44 from both
SPECK = 0.003  # blobs under this share of the picture are dirt, allowed up to DIRT in all
DIRT = 0.01
HALFWAY = 0.01  # share of a thing that may lie half way to the background, its outline (2 pixels) not counted
ASTRAY = 0.04  # of its radius: how far a blob's outline may run from its template's on average
OUTLINE = 0.12  # of its radius, beside one pixel: and how far anywhere


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a prompt says and no more: `color` None leaves it open."""

    background: str
    things: tuple[tuple[str, str | None], ...]
    relation: str = ""

    @classmethod
    def of(cls, scene: Scene, colored: bool = True) -> "Wanted":
        things = tuple((thing.shape, thing.color if colored else None) for thing in scene.things)
        return cls(scene.background, things, scene.relation)


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


# Of a shape with radius 1: its area, the length of its outline, and how far its centre of mass lies below the origin of
# its distance function.
AREA = {"circle": np.pi, "square": 1.76**2, "triangle": 0.75 * np.sqrt(3) * 1.2**2, "ring": np.pi * (1 - 0.52**2)}
LENGTH = {"circle": 2 * np.pi, "square": 4 * 1.76, "triangle": 3 * np.sqrt(3) * 1.2, "ring": 2 * np.pi * 1.52}
SAG = {"triangle": 0.24}


def shape_of(mask: np.ndarray) -> str:
    """The shape whose outline a blob follows best when given its area and its centre, "" where none. bool [h, w].

    What differs, over the length of the outline, is how far apart the outlines are on average. A share of the area
    would ask twice as much of a ring, which is nearly all outline, as of a circle.
    """
    cy, cx = ndimage.center_of_mass(mask)
    least, name = ASTRAY, ""
    for shape in SHAPES:
        r = float(np.sqrt(mask.sum() / AREA[shape]))
        margin = int(0.3 * r) + 1  # the template may reach beyond the blob's own box
        blob = np.pad(mask, margin)
        x = np.arange(blob.shape[1], dtype=np.float32)[None, :] - margin - cx
        y = np.arange(blob.shape[0], dtype=np.float32)[:, None] - margin - cy + SAG.get(shape, 0.0) * r
        distance = DISTANCE[shape](x, y, r)
        differs = blob != (distance < 0)
        astray = differs.sum() / (LENGTH[shape] * r * r)
        furthest = np.abs(distance[differs]).max(initial=0.0)
        if astray < least and furthest <= OUTLINE * r + 1:
            least, name = float(astray), shape
    return name


def find_blobs(pixels: np.ndarray, background: np.ndarray) -> tuple[list[Blob], float]:
    """Things in front of the background, and the share of the picture that is dirt. float32 [H, W, 3]."""
    labels, _ = ndimage.label(np.linalg.norm(pixels - background, axis=2) > FOREGROUND)
    blobs, dirt, area = [], 0, labels.size
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        box = tuple(slice(max(0, side.start - 3), side.stop + 3) for side in box)
        mask = labels[box] == index
        if mask.sum() < SPECK * area:
            dirt += int(mask.sum())
            continue
        inside = ndimage.binary_erosion(mask, iterations=2)  # the smoothed outline is neither colour
        colors = pixels[box][inside if inside.sum() > 8 else mask]
        rgb = np.median(colors, axis=0)
        plain = (np.linalg.norm(colors - rgb, axis=1) < SAME_COLOR).mean() > 0.9
        # 0 is background and 1 the thing: the outline lies half way, however soft it is, and nothing else does.
        axis = (rgb - background) / max(1.0, float(np.square(rgb - background).sum()))
        mixture = (pixels[box] - background) @ axis
        halfway = ndimage.binary_dilation(mask, iterations=3) & (np.abs(mixture - 0.5) < 0.25)
        clear = ndimage.binary_erosion(halfway, np.ones((3, 3))).sum() <= HALFWAY * mask.sum()
        mask &= mixture > 0.5
        cy, cx = ndimage.center_of_mass(mask)
        shape, color = shape_of(mask) if clear else "", nearest_color(rgb) if plain else ""
        blobs.append(Blob(shape, color, box[1].start + cx, box[0].start + cy))
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
