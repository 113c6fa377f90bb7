"""The garden's pictures: things inside and apart, in their colours, all kinds unlike; papers, ink and weather."""

from itertools import combinations, product

import numpy as np
import pytest

from engine.seedling import backdrops, dataset, drawing, scenes
from engine.seedling.backdrops import COLORS, OUTDOORS, PLAIN, WHITE, Backdrop
from engine.seedling.drawing import FORMS, coverage, paper, render
from engine.seedling.scenes import GROUPS, KINDS, PLACES, RADIUS, Scene, Thing, natural_color, random_scene

SIZES = [(size.width, size.height) for size in dataset.SIZES]
BACKDROPS = (*PLAIN, *OUTDOORS)
FAR = (0.1, 0.9)  # freedoms; four of these at once are already one scene in thousands


def drawn(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


def covers(thing: Thing, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """How much body and ink cover each pixel, float [height, width], worked out over the whole picture."""
    x = np.arange(width, dtype=np.float32)[None, :] + 0.5 - thing.x * width
    y = np.arange(height, dtype=np.float32)[:, None] + 0.5 - thing.y * height
    body, ink = coverage(thing.kind, x, y, thing.radius * min(width, height))
    return body, np.zeros_like(body) if ink is None else ink


def touched(thing: Thing, width: int, height: int) -> np.ndarray:
    """Where a thing covers anything of a pixel, bool [height, width]. Looked for within 1.5 radii, which is quicker;
    `test_no_kind_reaches_further_than_is_drawn` says that there is nothing beyond."""
    r = 1.5 * thing.radius * min(width, height)
    left, top = max(0, int(thing.x * width - r)), max(0, int(thing.y * height - r))
    right, bottom = min(width, int(thing.x * width + r) + 1), min(height, int(thing.y * height + r) + 1)
    x = np.arange(left, right, dtype=np.float32)[None, :] + 0.5 - thing.x * width
    y = np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - thing.y * height
    body, ink = coverage(thing.kind, x, y, thing.radius * min(width, height))
    out = np.zeros((height, width), bool)
    out[top:bottom, left:right] = body > 0 if ink is None else (body > 0) | (ink > 0)
    return out


def widened(mask: np.ndarray) -> np.ndarray:
    """With the pixels beside it."""
    out = mask.copy()
    out[1:] |= mask[:-1]
    out[:-1] |= mask[1:]
    out[:, 1:] |= mask[:, :-1]
    out[:, :-1] |= mask[:, 1:]
    return out


def inside(mask: np.ndarray) -> bool:
    return bool(mask.any()) and not (mask[[0, -1]].any() or mask[:, [0, -1]].any())


def silhouettes(ink_too: bool) -> dict[str, np.ndarray]:
    """Every kind on the same grid, bool."""
    at = ((np.arange(240) - 119.5) / 100).astype(np.float32)
    out = {}
    for kind, form in FORMS.items():
        body, ink = form(at[None, :], at[:, None])
        out[kind] = (body < 0) | (ink < 0) if ink_too and ink is not None else np.broadcast_to(body < 0, (240, 240))
    return out


def test_every_kind_has_a_form() -> None:
    assert tuple(FORMS) == KINDS


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_things_keep_inside_and_apart(width: int, height: int) -> None:
    for scene in drawn(300):
        masks = [touched(thing, width, height) for thing in scene.things]
        assert all(inside(mask) for mask in masks), scene
        for a, b in combinations(masks, 2):
            assert not (widened(a) & b).any(), scene


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_kind_keeps_inside_and_apart_in_every_group(width: int, height: int) -> None:
    """Moved, turned and enlarged nearly as far as scenes go; everything at its utmost, a bridge loses two pixels."""
    wrong = set()
    for kind, count, moved, turn in product(KINDS, GROUPS, FAR, FAR):
        things = scenes._place([(kind, "red")] * count, GROUPS[count], (moved, moved, FAR[1], turn))
        masks = [touched(thing, width, height) for thing in things]
        if not all(inside(mask) for mask in masks):
            wrong.add((kind, count, "leaves"))
        if any((widened(a) & b).any() for a, b in combinations(masks, 2)):
            wrong.add((kind, count, "touches"))
    assert not wrong


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_two_kinds_keep_inside_and_apart(width: int, height: int) -> None:
    for relation, moved, turn in product(("left of", "above"), FAR, FAR):
        sides = []
        for side in (0, 1):
            masks = []
            for kind in KINDS:
                thing = scenes._place([(kind, "red")] * 2, PLACES[relation], (moved, moved, FAR[1], turn))[side]
                masks.append(touched(thing, width, height))
            sides.append(masks)
        assert all(inside(mask) for masks in sides for mask in masks)
        ones = np.array([widened(mask).ravel() for mask in sides[0]], np.float32)
        others = np.array([mask.ravel() for mask in sides[1]], np.float32)
        both = np.argwhere(ones @ others.T > 0)
        assert not len(both), [(KINDS[i], KINDS[j]) for i, j in both]


def test_no_kind_reaches_further_than_is_drawn() -> None:
    """`put` draws the square of REACH radii around a thing; half a pixel beyond, nothing may be left to draw."""
    at = np.arange(-3, 3, 0.02, dtype=np.float32)
    beyond = np.maximum(np.abs(at[None, :]), np.abs(at[:, None])) > drawing.REACH
    for kind, form in FORMS.items():
        for distance in form(at[None, :], at[:, None]):
            assert distance is None or np.broadcast_to(distance, beyond.shape)[beyond].min() > 0.01, kind


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rendering_shows_the_scene_and_nothing_else(width: int, height: int) -> None:
    for scene in drawn(60, seed=1):
        picture = render(scene, width, height)
        assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
        rest = np.ones((height, width), bool)
        for thing in scene.things:
            body, ink = covers(thing, width, height)
            rest &= (body == 0) & (ink == 0)
            colored, inked = (body == 1) & (ink == 0), ink == 1
            assert (picture[colored] == COLORS[thing.color]).all() and colored.any()
            assert (picture[inked] == scene.backdrop.ink).all()
            assert inked.any() == (FORMS[thing.kind](np.zeros(1, np.float32), np.zeros(1, np.float32))[1] is not None)
        bare = np.rint(paper(scene.backdrop, width, height))
        np.testing.assert_array_equal(picture[rest], bare[rest].astype(np.uint8))


def test_every_colour_that_is_drawn_shows_on_its_backdrop() -> None:
    assert not [scene for scene in drawn(2000) if not all(scene.backdrop.shows(t.color) for t in scene.things)]
    assert not [(kind, b) for kind in KINDS for b in BACKDROPS if not b.shows(natural_color(kind, b))]
    assert min(sum(backdrop.shows(color) for color in COLORS) for backdrop in BACKDROPS) >= 6


def test_what_shows_is_far_from_every_row_of_the_paper() -> None:
    """Of the paper as it is drawn; weather apart, whose marks a thing covers."""
    for backdrop in BACKDROPS:
        rows = paper(Backdrop(backdrop.color, backdrop.time, backdrop.season), 2, 256)[:, 0]
        for color, rgb in COLORS.items():
            nearest = np.linalg.norm(rows - rgb, axis=1).min()
            assert nearest > 80 if backdrop.shows(color) else nearest < 90, (color, backdrop)
        assert np.linalg.norm(rows - backdrop.ink, axis=1).min() > 100, backdrop  # of ink there is one choice of two


def test_a_plain_backdrop_never_shows_its_own_colour() -> None:
    assert not [backdrop for backdrop in PLAIN if backdrop.shows(backdrop.color)]


@pytest.mark.parametrize("ink_too", [False, True])
def test_kinds_are_unlike(ink_too: bool) -> None:
    """Of two silhouettes laid over each other, at most 0.85 of what either covers is covered by both."""
    forms = silhouettes(ink_too)
    alike = {(a, b): (forms[a] & forms[b]).sum() / (forms[a] | forms[b]).sum() for a, b in combinations(KINDS, 2)}
    assert max(alike.values()) < 0.85, max(alike, key=lambda pair: alike[pair])


def test_a_thing_is_large_enough_to_see() -> None:
    """The body of the slenderest kind, where it is smallest, is 150 pixels of the smallest picture."""
    forms = silhouettes(ink_too=False)
    radius = min(low for low, _ in RADIUS.values()) * min(min(size) for size in SIZES)
    assert min(form.sum() for form in forms.values()) / 100**2 * radius**2 > 150


def test_a_backdrop_is_either_plain_or_a_time_of_day() -> None:
    for color, time in (("", ""), ("blue", "night")):
        with pytest.raises(ValueError, match="either plain or a time"):
            Backdrop(color, time)
    assert Backdrop("white") == WHITE == Backdrop() and len(set(BACKDROPS)) == 10 + 4 * 5 * 3


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_sky_is_washed_into_ground(width: int, height: int) -> None:
    for backdrop in BACKDROPS:
        if backdrop.weather:
            continue
        canvas = paper(backdrop, width, height)
        assert canvas.shape == (height, width, 3) and canvas.dtype == np.float32
        assert (canvas == canvas[:, :1]).all()  # no row changes from left to right
        top, bottom = backdrop.edges
        np.testing.assert_allclose(canvas[[0, -1], 0], [top, bottom], atol=1.0)
        steps = np.diff(canvas[:, 0], axis=0)
        np.testing.assert_allclose(steps, np.broadcast_to((bottom - top) / height, steps.shape), atol=1e-3)
    assert (paper(Backdrop("pink"), width, height) == COLORS["pink"]).all()


def test_every_backdrop_looks_its_own() -> None:
    """Nearest of all are spring and summer at night, 20.8 apart."""
    pictures = {backdrop: paper(backdrop, 64, 64) for backdrop in BACKDROPS}
    for one, two in combinations(pictures, 2):
        assert np.linalg.norm(pictures[one] - pictures[two], axis=2).max() > 20, (one, two)


@pytest.mark.parametrize("weather", backdrops.WEATHERS)
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_weather_always_falls_in_the_same_places(weather: str, width: int, height: int) -> None:
    """One mark in each cell, whatever the sky; nothing of the paper changes between them."""
    marks = drawing.falling(weather, width, height)
    assert marks.shape == (height, width) and marks.min() >= 0 and marks.max() == 1
    side = drawing.CELL * min(width, height)
    row, column = ((np.arange(length) / side + 1e-9).astype(int) for length in (height, width))
    cells = np.zeros((row[-1] + 1, column[-1] + 1))
    np.add.at(cells, (row[:, None], column[None, :]), marks)
    whole = cells[: int(height / side + 1e-9) : 2, : int(width / side + 1e-9)]  # rows that are not moved by half
    assert np.ptp(whole) < 0.02 * whole.mean() and (cells[:, : whole.shape[1]] > 0).all()
    for backdrop in OUTDOORS:
        if backdrop.weather != weather:
            continue
        clear = paper(Backdrop("", backdrop.time, backdrop.season), width, height)
        changed = np.abs(paper(backdrop, width, height) - clear).max(axis=2)
        assert not changed[marks == 0].any()
        assert changed[marks == 1].max() > 20  # it is seen, at least somewhere between sky and ground


def test_rain_and_snow_are_told_apart() -> None:
    rain, snow = (drawing.falling(weather, 256, 256) > 0.5 for weather in ("rain", "snow"))
    assert (rain & snow).sum() / (rain | snow).sum() < 0.6


@pytest.fixture
def grid() -> tuple[np.ndarray, np.ndarray]:
    at = np.linspace(-2, 2, 161, dtype=np.float32)
    return at[None, :], at[:, None]


def test_an_ellipse_is_negative_inside_and_near_the_outline_a_distance(grid: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = grid
    turn, a, b = 0.6, 1.2, 0.5
    along = np.cos(turn) * (x - 0.25) + np.sin(turn) * (y + 0.5)  # clockwise as seen, since y points down
    across = np.cos(turn) * (y + 0.5) - np.sin(turn) * (x - 0.25)
    distance = drawing.ellipse(x, y, 0.25, -0.5, a, b, turn)
    np.testing.assert_array_equal(distance < 0, (along / a) ** 2 + (across / b) ** 2 < 1)
    at = np.array([0.25, -0.5])  # the very middle, where both axes meet
    assert drawing.ellipse(*at[:, None], *at, a, b, turn) < -0.25
    u, out = np.array([np.cos(turn), np.sin(turn)]), np.array([-0.02, 0.02])
    tip = at[:, None] + u[:, None] * (a + out)
    np.testing.assert_allclose(drawing.ellipse(*tip, *at, a, b, turn), out, rtol=0.1)


def test_a_polygon_is_negative_inside(grid: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = grid
    distance = drawing.polygon(x, y, (-1.0, -0.51), (1.0, -0.51), (1.0, 0.51), (-1.0, 0.51))  # clockwise as seen
    np.testing.assert_array_equal(distance < 0, (np.abs(x) < 1) & (np.abs(y) < 0.51))
    np.testing.assert_allclose(distance, np.maximum(np.abs(x) - 1, np.abs(y) - 0.51), atol=1e-5)
    assert drawing.polygon(x, y, (0.0, -1.0), (1.0, 1.0), (-1.0, 1.0))[80, 80] < 0


def test_a_stroke_has_round_ends(grid: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = grid
    distance = drawing.stroke(x, y, -0.5, -0.5, 0.7, 0.3, 0.2)
    ends = np.minimum(np.hypot(x + 0.5, y + 0.5), np.hypot(x - 0.7, y - 0.3)) - 0.2
    assert (distance <= ends + 1e-6).all() and distance.min() == pytest.approx(-0.2, abs=0.02)
    along = 1.2 * (x + 0.5) + 0.8 * (y + 0.5)
    beyond = (along < 0) | (along > 1.2**2 + 0.8**2)
    np.testing.assert_allclose(distance[beyond], ends[beyond], atol=1e-5)  # beyond the ends only these count
    assert drawing.stroke(*np.array([[0.1], [-0.1]]), -0.5, -0.5, 0.7, 0.3, 0.2) == pytest.approx(-0.2)


def test_every_polygon_is_convex_and_clockwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its sign is wrong, and it is drawn as something else or not at all."""
    seen = []
    polygon = drawing.polygon
    monkeypatch.setattr(drawing, "polygon", lambda x, y, *corners: seen.append(corners) or polygon(x, y, *corners))
    for form in FORMS.values():
        form(np.zeros(1, np.float32), np.zeros(1, np.float32))
    assert len(seen) > 10
    for corners in seen:
        edges = np.roll(corners, -1, axis=0) - np.array(corners)
        after = np.roll(edges, -1, axis=0)
        assert (edges[:, 0] * after[:, 1] - edges[:, 1] * after[:, 0] > 0).all(), corners
