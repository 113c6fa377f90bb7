"""The shape world: what is drawn stays in the picture, apart from its neighbours, and off what is held out."""

from itertools import combinations

import numpy as np
import pytest

from engine.seedling import dataset, scenes
from engine.seedling.scenes import COLORS, DISTANCE, HELD_OUT_TRIPLES, MIRROR, RELATIONS, Scene, Thing

SIZES = [(size.width, size.height) for size in dataset.SIZES]


def drawn(count: int, seed: int = 0, training: bool = False) -> list[Scene]:
    rng = np.random.default_rng(seed)
    draw = scenes.training_scene if training else scenes.random_scene
    return [draw(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def training_scenes() -> list[Scene]:
    return drawn(2000, training=True)


def covers(thing: Thing, width: int, height: int) -> np.ndarray:
    """Where a thing touches a pixel at all, bool [height, width], worked out over the whole picture."""
    x = np.arange(width)[None, :] + 0.5 - thing.x * width
    y = np.arange(height)[:, None] + 0.5 - thing.y * height
    return DISTANCE[thing.shape](x, y, thing.radius * min(width, height)) < 0.5


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_things_keep_inside_and_apart(width: int, height: int) -> None:
    for scene in drawn(300):
        masks = [covers(thing, width, height) for thing in scene.things]
        for mask in masks:
            assert mask.any() and not (mask[[0, -1]].any() or mask[:, [0, -1]].any()), scene
        for a, b in combinations(masks, 2):
            beside = a | np.roll(a, 1, 0) | np.roll(a, -1, 0) | np.roll(a, 1, 1) | np.roll(a, -1, 1)
            assert not (beside & b).any(), scene


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_rendering_shows_the_scene_and_nothing_else(width: int, height: int) -> None:
    for scene in drawn(60, seed=1):
        picture = scenes.render(scene, width, height)
        assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
        rest = np.ones((height, width), bool)
        for thing in scene.things:
            mask = covers(thing, width, height)
            rest &= ~mask
            inside = scenes.DISTANCE[thing.shape](
                np.arange(width)[None, :] + 0.5 - thing.x * width,
                np.arange(height)[:, None] + 0.5 - thing.y * height,
                thing.radius * min(width, height),
            ) < -0.5  # fmt: skip
            assert (picture[inside] == COLORS[thing.color]).all() and inside.any()
        assert (picture[rest] == COLORS[scene.background]).all()


def test_a_thing_never_has_the_colour_of_the_background() -> None:
    assert not [s for s in drawn(2000) if any(thing.color == s.background for thing in s.things)]


def test_every_part_of_the_world_is_drawn(training_scenes: list[Scene]) -> None:
    things = {(thing.shape, thing.color) for scene in training_scenes for thing in scene.things}
    assert len(things) == 40 - len(scenes.HELD_OUT_COLORS)
    assert {len(scene.things) for scene in training_scenes if not scene.relation} == {1, 2, 3, 4}
    assert {scene.relation for scene in training_scenes} == {"", *RELATIONS}
    assert {scene.background for scene in training_scenes} == set(COLORS)


def test_a_relation_is_what_the_places_show() -> None:
    for scene in drawn(2000):
        if scene.relation in ("", "and"):
            continue
        first, second = scene.things
        dx, dy = second.x - first.x, second.y - first.y
        sign = 1 if scene.relation in ("left of", "above") else -1
        ahead, across = (dx, dy) if scene.relation in ("left of", "right of") else (dy, dx)
        assert sign * ahead > 0.4 and abs(across) < 0.15


def test_caption_and_freedom_determine_a_scene() -> None:
    """Drawn with other random numbers but told the same, a scene comes out the same; each freedom changes it."""
    told = (0.1, 0.8, 0.3, 0.9)
    for count in (1, 2, 3, 4):
        one, two = (scenes.draw_group(Told(seed, told), "ring", "red", count, "white") for seed in (1, 2))
        assert one == two and one.freedom == told
        for i in range(4):
            other = tuple(0.5 if j == i else value for j, value in enumerate(told))
            turned = scenes.draw_group(Told(1, other), "ring", "red", count, "white").things != one.things
            assert turned == (count > 1 or scenes.FREEDOM[i] != "turn")
    first, second = ("triangle", "blue"), ("square", "red")
    pairs = [scenes.draw_pair(Told(1, told), *kinds, "white") for kinds in
             ((first, "and", second), (second, "and", first), (second, "left of", first))]  # fmt: skip
    assert len({frozenset(pair.things) for pair in pairs}) == 1


class Told(np.random.Generator):
    """Random numbers, but the freedom of a scene is given."""

    def __init__(self, seed: int, freedom: tuple[float, ...]):
        super().__init__(np.random.PCG64(seed))
        self.freedom = freedom

    def random(self, size: object = None, *args: object, **kwargs: object) -> np.ndarray | float:
        return np.array(self.freedom) if size == len(self.freedom) else super().random(size)


def test_no_training_scene_is_held_out(training_scenes: list[Scene]) -> None:
    """Worked out here once more, from the tables alone; a triple is the same scene as its mirror image."""
    for scene in training_scenes:
        assert not scene.held_out
        assert not {(thing.shape, thing.color) for thing in scene.things} & scenes.HELD_OUT_COLORS
        if scene.relation:
            first, second = (thing.shape for thing in scene.things)
            told = {(first, scene.relation, second), (second, MIRROR[scene.relation], first)}
            assert not told & HELD_OUT_TRIPLES
        else:
            assert (scene.things[0].shape, len(scene.things)) not in scenes.HELD_OUT_COUNTS


def test_what_is_held_out_would_be_drawn_otherwise() -> None:
    """Each entry of the tables keeps something away; an entry that names nothing would test nothing."""
    kept_away = [scene for scene in drawn(4000) if scene.held_out]
    colors = {(thing.shape, thing.color) for scene in kept_away for thing in scene.things}
    counts = {(scene.things[0].shape, len(scene.things)) for scene in kept_away if not scene.relation}
    triples = {(scene.things[0].shape, scene.relation, scene.things[-1].shape) for scene in kept_away}
    assert colors >= scenes.HELD_OUT_COLORS and counts >= scenes.HELD_OUT_COUNTS and triples >= HELD_OUT_TRIPLES


@pytest.mark.parametrize(("first", "relation", "second"), sorted(HELD_OUT_TRIPLES))
def test_a_triple_is_held_out_together_with_its_mirror_image(first: str, relation: str, second: str) -> None:
    assert scenes.triple_held_out(first, relation, second)
    assert scenes.triple_held_out(second, MIRROR[relation], first)
    assert relation == "and" or not scenes.triple_held_out(first, MIRROR[relation], second)


def test_the_training_examples_are_training_scenes_and_stay_what_they_are() -> None:
    for size in dataset.SIZES:
        made = [dataset.scene_of(0, size, index) for index in range(50)]
        assert made == [dataset.scene_of(0, size, index) for index in range(50)]
        assert not any(scene.held_out for scene in made) and len(set(made)) == 50
