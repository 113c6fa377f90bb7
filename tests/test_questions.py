"""The questions of evaluation: well formed, the same every time, and none of them could have been in training."""

from collections import Counter

import numpy as np
import pytest

from engine.prompt import unknown_words
from engine.seedling import captions, scenes
from engine.seedling.captions import LANGUAGES, TABLES
from engine.seedling.captions.core import FORMS
from engine.seedling.questions import TASKS, Question, questions
from engine.seedling.scenes import MIRROR, Scene, Thing, natural_color, training_scene


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    return questions()


@pytest.fixture(scope="module")
def training() -> list[tuple[Scene, str]]:
    rng = np.random.default_rng(5)
    made = [training_scene(rng) for _ in range(2500)]
    return [(scene, captions.caption(rng, scene)) for scene in made]


def of(asked: list[Question], task: str) -> list[Question]:
    return [question for question in asked if question.task == task]


def scene_of(question: Question) -> Scene:
    wanted = question.wanted
    return Scene(wanted.backdrop, tuple(Thing(*thing, 0.5, 0.5, 0.2) for thing in wanted.things), wanted.relation)


def test_as_many_of_each_task_and_language_all_different(asked: list[Question]) -> None:
    counts = Counter((question.task, question.language) for question in asked)
    assert counts == {(task, language): 60 for task in TASKS for language in LANGUAGES}
    assert TASKS == ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    assert len({(question.task, question.prompt) for question in asked}) == len(asked)
    assert len({question.seed for question in asked}) == len(asked)


def test_the_same_every_time_and_a_small_set_is_part_of_a_large_one(asked: list[Question]) -> None:
    few = questions(9)
    assert few == questions(9) == [question for task in TASKS for question in of(asked, task)[: 9 * len(LANGUAGES)]]
    for task in TASKS:
        assert [question.language for question in of(few, task)] == list(LANGUAGES) * 9


def test_three_in_ten_are_about_plain_shapes_half_are_on_plain_paper(asked: list[Question]) -> None:
    for task in TASKS:
        for language in LANGUAGES:
            assert sum(question.shapes for question in of(asked, task) if question.language == language) == 18
    assert 0.45 < sum(bool(question.wanted.backdrop.color) for question in asked) / len(asked) < 0.57
    assert not Question("colors", "en", "", 0, next(q for q in asked if not q.shapes).wanted).shapes


def test_all_words_are_known_and_of_the_language(asked: list[Question]) -> None:
    vocabulary = captions.vocabulary()
    letters = {"en": "az", "hi": "ऀॿ", "mr": "ऀॿ", "ta": "\u0b80\u0bff"}
    for question in asked:
        low, high = letters[question.language]
        assert not unknown_words(question.prompt, vocabulary), question
        assert all(low <= letter <= high or letter in " ,:" for letter in question.prompt), question


def test_all_but_wordings_are_held_out_as_scenes(asked: list[Question]) -> None:
    for question in asked:
        assert scene_of(question).held_out == (question.task != "single_object"), question


def test_no_question_was_a_caption(asked: list[Question], training: list[tuple[Scene, str]]) -> None:
    assert not {question.prompt for question in asked} & {text for _, text in training}


def test_wordings_are_held_out(asked: list[Question]) -> None:
    for language, table in TABLES.items():
        used = set()
        for question in of(asked, "single_object"):
            if question.language == language:
                fits = [frame for frame in table.held_out_frames if _framed(question.prompt, frame)]
                assert fits, question
                used.update(fits)
        assert used == set(table.held_out_frames)


def _framed(prompt: str, frame: str) -> bool:
    opening, closing = frame.split("{}")
    return prompt.startswith(opening) and prompt.endswith(closing)


def test_training_draws_nothing_that_is_asked(asked: list[Question], training: list[tuple[Scene, str]]) -> None:
    drawn = {(thing.kind, thing.color) for scene, _ in training for thing in scene.things}
    counts = {(scene.things[0].kind, len(scene.things)) for scene, _ in training if not scene.relation}
    triples = set()
    for scene, _ in training:
        if scene.relation:
            first, second = (thing.kind for thing in scene.things)
            triples |= {(first, scene.relation, second), (second, MIRROR[scene.relation], first)}
    for question in of(asked, "colors") + of(asked, "color_attr"):
        assert question.wanted.things[0] not in drawn, question
    for question in of(asked, "counting"):
        assert (question.wanted.things[0][0], len(question.wanted.things)) not in counts, question
    for question in of(asked, "two_object") + of(asked, "position"):
        (first, _), (second, _) = question.wanted.things
        assert (first, question.wanted.relation, second) not in triples, question
        assert (question.task == "position") == (question.wanted.relation != "and")


def test_every_held_out_thing_is_asked_for(asked: list[Question]) -> None:
    assert {q.wanted.things[0] for q in of(asked, "colors")} == scenes.HELD_OUT_COLORS
    assert {(q.wanted.things[0][0], len(q.wanted.things)) for q in of(asked, "counting")} == scenes.HELD_OUT_COUNTS
    told = {(q.wanted.things[0][0], q.wanted.relation, q.wanted.things[1][0]) for q in asked if q.wanted.relation}
    either = {(second, MIRROR[relation], first) for first, relation, second in told} | told
    assert either >= scenes.HELD_OUT_TRIPLES


def test_attribution_does_not_also_ask_for_another_held_out_thing(asked: list[Question]) -> None:
    for question in of(asked, "color_attr"):
        (first, color), (second, other) = question.wanted.things
        assert first != second and color != other
        assert not scenes.triple_held_out(first, "and", second) and (second, other) not in scenes.HELD_OUT_COLORS


def test_what_is_asked_can_be_seen(asked: list[Question]) -> None:
    for question in asked:
        assert all(question.wanted.backdrop.shows(color) for _, color in question.wanted.things), question


def test_what_is_wanted_is_what_the_prompt_says(asked: list[Question]) -> None:
    """In the plainest words of each table: things, colours unless natural, number, paper or what is out of doors."""
    for question in asked:
        table, backdrop, prompt = TABLES[question.language], question.wanted.backdrop, question.prompt
        for kind, color in question.wanted.things:
            noun = table.names[kind][0]
            assert any(noun.form(form) in prompt for form in FORMS), question
            stated = any(table.agree(table.colors[color][0], noun.gender, form) in prompt for form in FORMS)
            assert stated or color == natural_color(kind, backdrop), question
        if question.task == "counting":
            assert table.numbers[len(question.wanted.things)][0] in prompt, question
        entries = {**table.times, **table.seasons, **table.weathers}
        said = {part for part, phrases in entries.items() if phrases[0] in prompt}
        assert said == {backdrop.time, backdrop.season, backdrop.weather} - {""}, question
        if backdrop.color not in ("", "white"):
            template, gender, form = table.papers[0]
            color = table.agree(table.colors[backdrop.color][0], gender, form)
            assert template.format(x="", c=color, a=table.article(color)).strip() in prompt, question
