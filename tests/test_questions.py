"""The questions of evaluation: well formed, the same every time, and none of them could have been in training."""

import re
from collections import Counter

import numpy as np
import pytest

from engine.prompt import unknown_words
from engine.seedling import captions, scenes
from engine.seedling.questions import TASKS, Question, questions
from engine.seedling.scenes import MIRROR, Scene, training_scene


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return questions(120)


@pytest.fixture(scope="module")
def training() -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(5)
    made = [training_scene(rng) for _ in range(5000)]
    return [(scene, captions.caption(rng, scene)) for scene in made]


def of(asked: list[Question], task: str) -> list[Question]:
    return [question for question in asked if question.task == task]


def test_as_many_of_each_task_all_different(asked: list[Question]) -> None:
    assert Counter(question.task for question in asked) == dict.fromkeys(TASKS, 120)
    assert list(TASKS) == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert len({(question.task, question.prompt) for question in asked}) == len(asked)
    assert len({question.seed for question in asked}) == len(asked)


def test_the_same_every_time_and_a_small_set_is_part_of_a_large_one(asked: list[Question]) -> None:
    assert questions(120) == asked
    few = questions(9)
    assert few == [question for task in TASKS for question in of(asked, task)[:9]]


def test_all_words_are_known(asked: list[Question]) -> None:
    vocabulary = captions.vocabulary()
    assert not [question.prompt for question in asked if unknown_words(question.prompt, vocabulary)]


def test_no_question_was_a_caption(asked: list[Question], training: list[tuple[Scene, str]]) -> None:
    assert not {question.prompt for question in asked} & {text for _, text in training}


def test_wordings_are_held_out(asked: list[Question], training: list[tuple[Scene, str]]) -> None:
    held_out = captions.HELD_OUT_PREFIXES
    openings = {next(p for p in held_out if q.prompt.startswith(p)) for q in of(asked, "single_object")}
    assert openings == set(held_out) and not openings & set(captions.PREFIXES)
    assert not [text for _, text in training if any(opening in text for opening in openings)]


def test_pairs_of_object_and_colour_are_held_out(asked: list[Question], training: list[tuple[Scene, str]]) -> None:
    drawn = {(thing.shape, thing.color) for scene, _ in training for thing in scene.things}
    told = " / ".join(text for _, text in training)
    for question in of(asked, "colors") + of(asked, "color_attr"):
        shape, color = question.wanted.things[0]
        assert (shape, color) not in drawn, question
        names = "|".join({shape, *captions.NAMES.get(shape, ())})
        colors = "|".join({str(color), *captions.COLOR_NAMES.get(str(color), ())})
        assert not re.search(rf"\b({colors}) ({names})s?\b", told), question


def test_pairs_of_object_and_number_are_held_out(asked: list[Question], training: list[tuple[Scene, str]]) -> None:
    drawn = {(scene.things[0].shape, len(scene.things)) for scene, _ in training if not scene.relation}
    told = " / ".join(text for _, text in training)
    for question in of(asked, "counting"):
        shape, number = question.wanted.things[0][0], len(question.wanted.things)
        assert (shape, number) not in drawn, question
        names, counts = "|".join({shape, *captions.NAMES.get(shape, ())}), "|".join({*captions.COUNTS[number]})
        assert not re.search(rf"\b({counts}) (\w+ )?({names})s\b", told), question


def test_triples_are_held_out_from_either_side(asked: list[Question], training: list[tuple[Scene, str]]) -> None:
    drawn = set()
    for scene, _ in training:
        if scene.relation:
            first, second = (thing.shape for thing in scene.things)
            drawn |= {(first, scene.relation, second), (second, MIRROR[scene.relation], first)}
    for question in of(asked, "two_object") + of(asked, "position"):
        (first, _), (second, _) = question.wanted.things
        assert (first, question.wanted.relation, second) not in drawn, question
        assert (question.task == "position") == (question.wanted.relation != "and")


def test_every_held_out_thing_is_asked_for(asked: list[Question]) -> None:
    assert {q.wanted.things[0] for q in of(asked, "colors")} == scenes.HELD_OUT_COLORS
    assert {(q.wanted.things[0][0], len(q.wanted.things)) for q in of(asked, "counting")} == scenes.HELD_OUT_COUNTS
    told = {(q.wanted.things[0][0], q.wanted.relation, q.wanted.things[1][0]) for q in asked if q.wanted.relation}
    either = {(second, MIRROR[relation], first) for first, relation, second in told} | told
    assert either >= scenes.HELD_OUT_TRIPLES


def test_attribution_does_not_also_ask_for_a_held_out_triple(asked: list[Question]) -> None:
    for question in of(asked, "color_attr"):
        (first, color), (second, other) = question.wanted.things
        assert first != second and color != other
        assert not scenes.triple_held_out(first, "and", second)


def test_what_is_wanted_is_what_the_prompt_says(asked: list[Question]) -> None:
    for question in asked:
        wanted = question.wanted
        said = re.search(r"on an? (\w+) background$", question.prompt)
        assert wanted.background == (said[1] if said else "white")
        body = question.prompt[: said.start()] if said else question.prompt
        places = [body.index(shape) for shape, _ in wanted.things]
        assert places == sorted(places)
        for shape, color in wanted.things:
            assert (f"{color} {shape}" if color else shape) in body
            assert color != wanted.background
        assert (f"{captions.COUNTS[len(wanted.things)][0]} " in body) if question.task == "counting" else True
