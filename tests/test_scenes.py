"""The garden's scenes: all of the world is in them, exact down to the freedom, and off what is held out."""

import numpy as np
import pytest

from engine.seedling import dataset, scenes
from engine.seedling.backdrops import COLORS, OUTDOORS, PLAIN, WHITE
from engine.seedling.scenes import HELD_OUT_TRIPLES, KINDS, MIRROR, NATURAL, OBJECTS, RELATIONS, SHAPES, Scene


def drawn(count: int, seed: int = 0, training: bool = False) -> list[Scene]:
    rng = np.random.default_rng(seed)
    draw = scenes.training_scene if training else scenes.random_scene
    return [draw(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def training_scenes() -> list[Scene]:
    return drawn(2000, training=True)


def test_every_part_of_the_world_is_drawn(training_scenes: list[Scene]) -> None:
    things = {(thing.kind, thing.color) for scene in training_scenes for thing in scene.things}
    assert len(things) == len(KINDS) * len(COLORS) - len(scenes.HELD_OUT_COLORS)
    assert {len(scene.things) for scene in training_scenes if not scene.relation} == {1, 2, 3, 4}
    assert {scene.relation for scene in training_scenes} == {"", *RELATIONS}
    assert {scene.backdrop for scene in training_scenes} == {*PLAIN, *OUTDOORS}


def test_shares_of_the_world() -> None:
    """As drawn: two thirds without plain shapes, four in ten outdoors and as many in natural colours, which a third
    has on purpose and the rest by chance."""
    made = drawn(3000)
    objects = [scene for scene in made if {thing.kind for thing in scene.things} <= set(OBJECTS)]
    natural = [s for s in made if all(t.color == scenes.natural_color(t.kind, s.backdrop) for t in s.things)]
    white, outdoors = ([scene for scene in made if bool(scene.backdrop.time) == out] for out in (False, True))
    plain = [scene for scene in white if scene.backdrop == WHITE]
    shares = [len(some) / len(made) for some in (objects, natural, outdoors, plain)]
    np.testing.assert_allclose(shares, [0.67, 0.40, 0.40, 0.285], atol=0.03)
    assert 0.52 < sum(not scene.relation for scene in made) / len(made) < 0.58


def test_a_kind_alone_is_never_held_out() -> None:
    """In a colour of its own, once: so a prompt that says no more can have been learned."""
    assert SHAPES + OBJECTS == KINDS == tuple(NATURAL)
    for kind, colors in NATURAL.items():
        assert len(set(colors)) == 2 and not {(kind, color) for color in colors} & scenes.HELD_OUT_COLORS
        assert (kind, 1) not in scenes.HELD_OUT_COUNTS


def test_every_kind_lacks_two_colours_a_count_and_partners() -> None:
    for kind in KINDS:
        assert len([color for held, color in scenes.HELD_OUT_COLORS if held == kind]) == 2
        assert len([count for held, count in scenes.HELD_OUT_COUNTS if held == kind]) == 1
        assert {relation for a, relation, b in HELD_OUT_TRIPLES if kind in (a, b)} == {"and", "left of", "above"}


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
        one, two = (scenes.draw_group(Told(seed, told), "ring", "red", count, WHITE) for seed in (1, 2))
        assert one == two and one.freedom == told
        for i in range(4):
            other = tuple(0.5 if j == i else value for j, value in enumerate(told))
            turned = scenes.draw_group(Told(1, other), "ring", "red", count, WHITE).things != one.things
            assert turned == (count > 1 or scenes.FREEDOM[i] != "turn")
    first, second = ("koi", "blue"), ("square", "red")
    pairs = [scenes.draw_pair(Told(1, told), *kinds, WHITE) for kinds in
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
        assert not {(thing.kind, thing.color) for thing in scene.things} & scenes.HELD_OUT_COLORS
        if scene.relation:
            first, second = (thing.kind for thing in scene.things)
            told = {(first, scene.relation, second), (second, MIRROR[scene.relation], first)}
            assert not told & HELD_OUT_TRIPLES
        else:
            assert (scene.things[0].kind, len(scene.things)) not in scenes.HELD_OUT_COUNTS


def test_what_is_held_out_would_be_drawn_otherwise() -> None:
    """Each entry of the tables keeps something away; an entry that names nothing would test nothing."""
    kept_away = [scene for scene in drawn(4000) if scene.held_out]
    colors = {(thing.kind, thing.color) for scene in kept_away for thing in scene.things}
    counts = {(scene.things[0].kind, len(scene.things)) for scene in kept_away if not scene.relation}
    assert colors >= scenes.HELD_OUT_COLORS and counts >= scenes.HELD_OUT_COUNTS


@pytest.mark.slow
def test_each_triple_that_is_held_out_would_be_drawn_otherwise() -> None:
    """As above; of one triple there is one in 5,000 scenes."""
    made = drawn(40000)
    triples = {(s.things[0].kind, s.relation, s.things[1].kind) for s in made if s.relation}
    triples |= {(b, MIRROR[relation], a) for a, relation, b in triples}
    assert triples >= HELD_OUT_TRIPLES


@pytest.mark.parametrize(("first", "relation", "second"), sorted(HELD_OUT_TRIPLES))
def test_a_triple_is_held_out_together_with_its_mirror_image(first: str, relation: str, second: str) -> None:
    assert scenes.triple_held_out(first, relation, second)
    assert scenes.triple_held_out(second, MIRROR[relation], first)
    assert relation == "and" or not scenes.triple_held_out(first, MIRROR[relation], second)
    rng, free = np.random.default_rng(0), [c for c in COLORS if not {(first, c), (second, c)} & scenes.HELD_OUT_COLORS]
    assert scenes.draw_pair(rng, (first, free[0]), relation, (second, free[1]), WHITE).held_out
    assert scenes.draw_pair(rng, (second, free[0]), MIRROR[relation], (first, free[1]), WHITE).held_out


def test_the_training_examples_are_training_scenes_and_stay_what_they_are() -> None:
    for size in dataset.SIZES:
        made = [dataset.scene_of(0, size, index) for index in range(50)]
        assert made == [dataset.scene_of(0, size, index) for index in range(50)]
        assert not any(scene.held_out for scene in made) and len(set(made)) == 50
