"""Captions say what the scene shows, in words of the vocabulary, with the right article."""

import re
from collections import Counter

import numpy as np
import pytest

from engine.prompt import unknown_words
from engine.seedling import captions
from engine.seedling.scenes import COLORS, HELD_OUT_COLORS, SHAPES, Scene, Thing, random_scene, unsaid_color

SHAPE_OF = {name: shape for shape in SHAPES for name in (shape, *captions.NAMES.get(shape, ()))}
COLOR_OF = {name: color for color in COLORS for name in (color, *captions.COLOR_NAMES.get(color, ()))}
COUNT_OF = {"a pair of": 2, "two": 2, "2": 2, "three": 3, "3": 3, "four": 4, "4": 4}
PLACES = (
    (r"\bleft\b", "left of"), (r"\bright\b", "right of"), (r"\b(above|over|at the top)\b", "above"),
    (r"\b(below|under|at the bottom)\b", "below"),
)  # fmt: skip
COLOR, NAME = "|".join(COLOR_OF), "|".join(SHAPE_OF)
THING = re.compile(rf"\b(an?|one|{'|'.join(COUNT_OF)}) (?:({COLOR}) )?({NAME})(s?)\b")
BACKGROUND = re.compile(rf"\b({COLOR}) (?:background|backdrop)|\bon ({COLOR})$")


def pairs(count: int, seed: int = 0) -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(seed)
    made = [random_scene(rng) for _ in range(count)]
    return [(scene, captions.caption(rng, scene)) for scene in made]


@pytest.fixture(scope="module")
def told() -> list[tuple[Scene, str]]:
    return pairs(4000)


def background_of(text: str) -> str | None:
    found = BACKGROUND.search(text)
    return COLOR_OF[found[1] or found[2]] if found else None


def relation_of(text: str) -> str:
    """Between the first thing told and the second: the first place word belongs to the first of them."""
    found = [(match.start(), relation) for rule, relation in PLACES if (match := re.search(rule, text))]
    return min(found)[1] if found else "and"


def test_every_word_is_in_the_vocabulary(told: list[tuple[Scene, str]]) -> None:
    vocabulary = captions.vocabulary()
    assert not [text for _, text in told if unknown_words(text, vocabulary)]
    assert not [prefix for prefix in captions.HELD_OUT_PREFIXES if unknown_words(prefix, vocabulary)]
    assert unknown_words("a red hexagon", vocabulary) == ("hexagon",)


def test_every_word_of_the_vocabulary_is_used(told: list[tuple[Scene, str]]) -> None:
    used = {word for _, text in told for word in text.replace(",", " ").split()}
    assert captions.vocabulary() == used


def test_articles(told: list[tuple[Scene, str]]) -> None:
    for _, text in told:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_captions_are_tidy(told: list[tuple[Scene, str]]) -> None:
    for _, text in told:
        assert text == text.strip().lower() and "  " not in text and " ," not in text and "{" not in text, text


def test_captions_vary(told: list[tuple[Scene, str]]) -> None:
    assert len({text for _, text in told}) > 3000
    rng = np.random.default_rng(1)
    scene = Scene("white", (Thing("circle", "red", 0.5, 0.5, 0.3),))
    assert len({captions.caption(rng, scene) for _ in range(200)}) > 60


def test_the_background_is_told_unless_it_is_white(told: list[tuple[Scene, str]]) -> None:
    for scene, text in told:
        said = background_of(text)
        assert said == scene.background or (said is None and scene.background == "white"), text


def test_things_and_their_number_are_those_of_the_scene(told: list[tuple[Scene, str]]) -> None:
    for scene, text in told:
        found = THING.findall(text)
        if scene.relation:
            assert len(found) == 2 and not [text for number, *_, plural in found if number in COUNT_OF or plural]
            unsaid = unsaid_color(scene.background)
            told_as = Counter((SHAPE_OF[name], COLOR_OF.get(color, unsaid)) for _, color, name, _ in found)
            assert told_as == Counter((t.shape, t.color) for t in scene.things), text
        else:
            ((number, color, name, plural),) = found
            assert COUNT_OF.get(number, 1) == len(scene.things) and bool(plural) == (len(scene.things) > 1), text
            assert SHAPE_OF[name] == scene.things[0].shape
            assert COLOR_OF.get(color, unsaid_color(scene.background)) == scene.things[0].color, text


def test_a_color_goes_without_saying_often_but_not_always(told: list[tuple[Scene, str]]) -> None:
    plain = [
        text for scene, text in told if {t.color for t in scene.things} == {unsaid_color(scene.background)}
    ]  # fmt: skip
    silent = [text for text in plain if not any(color for _, color, _, _ in THING.findall(text))]
    assert 0.2 < len(plain) / len(told) < 0.35 and 0.7 < len(silent) / len(plain) < 0.9
    assert not {(shape, color) for shape, color in HELD_OUT_COLORS if color in ("gray", "white")}


def test_the_relation_is_that_of_the_scene(told: list[tuple[Scene, str]]) -> None:
    both = set()
    for scene, text in told:
        if not scene.relation:
            continue
        first = scene.things[0]
        _, color, name, _ = THING.findall(text)[0]
        same_shape = first.shape == scene.things[1].shape
        named = COLOR_OF.get(color, unsaid_color(scene.background))
        in_order = named == first.color if same_shape else SHAPE_OF[name] == first.shape
        expected = scene.relation if in_order else captions.MIRROR[scene.relation]
        assert relation_of(text) == expected, (scene, text)
        both.add(in_order)
    assert both == {True, False}  # scenes are told from either side


@pytest.mark.parametrize(
    ("words", "expected"), [("red circle", "a red circle"), ("orange ring", "an orange ring"), ("ring", "a ring")]
)
def test_article(words: str, expected: str) -> None:
    assert captions.article(words) == expected


def test_the_openings_of_evaluation_are_not_used_in_training(told: list[tuple[Scene, str]]) -> None:
    assert not [text for _, text in told if text.startswith(captions.HELD_OUT_PREFIXES)]
    assert not [text for _, text in told if any(f", {prefix}" in text for prefix in captions.HELD_OUT_PREFIXES)]
