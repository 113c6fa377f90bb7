"""The checker, held against pictures whose truth is known: right ones pass, and everything else is refused.

At least 97 % of each class: of rendered truth at every size, of captions wrong in one thing, of pictures that show
nothing, blends of two objects, and pictures of other prompts.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.seedling import dataset
from engine.seedling.checker import Verdict, Wanted, check
from engine.seedling.questions import questions
from engine.seedling.scenes import (
    COLORS,
    MIRROR,
    SHAPES,
    Scene,
    draw_group,
    other_color,
    random_scene,
    render,
)
from tests.labelled import labelled
from tests.truth import truth

SIZES = [(size.width, size.height) for size in dataset.SIZES]
CASES, ENOUGH = 160, 0.97


def cases(seed: int) -> Iterator[tuple[np.random.Generator, Scene, np.ndarray]]:
    """Random scenes at every size, with their pictures and a generator for what the test does to them."""
    rng = np.random.default_rng(seed)
    for number in range(CASES):
        scene = random_scene(rng)
        yield rng, scene, render(scene, *SIZES[number % len(SIZES)])


Change = Callable[[np.random.Generator, Wanted], Wanted | None]


def share(verdicts: list[Verdict], right: bool) -> float:
    assert len(verdicts) >= 150
    return sum(verdict.right == right for verdict in verdicts) / len(verdicts)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_truth_is_accepted(width: int, height: int) -> None:
    rng = np.random.default_rng(0)
    made = [random_scene(rng) for _ in range(CASES)]
    verdicts = [check(render(s, width, height), Wanted.of(s, colored=n % 4 > 0)) for n, s in enumerate(made)]
    assert share(verdicts, True) >= ENOUGH


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_the_truth_is_accepted_through_small_faults(width: int, height: int) -> None:
    """A model's pictures are a little noisy; that alone must not cost a point."""
    rng = np.random.default_rng(1)
    verdicts = []
    for _ in range(CASES):
        scene = random_scene(rng)
        noisy = render(scene, width, height) + rng.normal(0, 5, (height, width, 3))
        verdicts.append(check(noisy.clip(0, 255).astype(np.uint8), Wanted.of(scene)))
    assert share(verdicts, True) >= ENOUGH


def another_color(rng: np.random.Generator, wanted: Wanted) -> Wanted:
    """One thing in a colour that neither it nor the background has."""
    which = rng.integers(len(wanted.things))
    shape, color = wanted.things[which]
    return _with(wanted, int(which), (shape, other_color(rng, str(color), wanted.background)))


def another_shape(rng: np.random.Generator, wanted: Wanted) -> Wanted:
    which = rng.integers(len(wanted.things))
    shape, color = wanted.things[which]
    return _with(wanted, int(which), (str(rng.choice([s for s in SHAPES if s != shape])), color))


def one_more(rng: np.random.Generator, wanted: Wanted) -> Wanted:
    return replace(wanted, things=(*wanted.things, wanted.things[rng.integers(len(wanted.things))]))


def one_less(rng: np.random.Generator, wanted: Wanted) -> Wanted:
    return replace(wanted, things=wanted.things[:-1], relation="") if len(wanted.things) > 1 else one_more(rng, wanted)


def mirrored(rng: np.random.Generator, wanted: Wanted) -> Wanted | None:
    """None where there is nothing to mirror."""
    return None if wanted.relation in ("", "and") else replace(wanted, relation=MIRROR[wanted.relation])


def turned(rng: np.random.Generator, wanted: Wanted) -> Wanted | None:
    """Above or below instead of beside, and the other way round."""
    across = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    return replace(wanted, relation=across[wanted.relation]) if wanted.relation in across else None


def swapped(rng: np.random.Generator, wanted: Wanted) -> Wanted | None:
    """Two different shapes that exchange their colours: the classic failure of attribution."""
    if not wanted.relation or len(set(wanted.things)) < 2:
        return None
    (first, color), (second, other) = wanted.things
    return None if first == second or color == other else replace(wanted, things=((first, other), (second, color)))


def another_background(rng: np.random.Generator, wanted: Wanted) -> Wanted:
    return replace(wanted, background=other_color(rng, wanted.background))


def _with(wanted: Wanted, which: int, thing: tuple[str, str | None]) -> Wanted:
    return replace(wanted, things=(*wanted.things[:which], thing, *wanted.things[which + 1 :]))


@pytest.mark.parametrize(
    "change", [another_color, another_shape, one_more, one_less, mirrored, turned, swapped, another_background]
)
def test_a_caption_wrong_in_one_thing_is_refused(change: Change) -> None:
    rng, verdicts = np.random.default_rng(2), []
    while len(verdicts) < CASES:
        scene = random_scene(rng)
        wrong = change(rng, Wanted.of(scene))
        if wrong is not None:
            verdicts.append(check(render(scene, *SIZES[len(verdicts) % len(SIZES)]), wrong))
    assert share(verdicts, False) >= ENOUGH


@pytest.mark.parametrize("noise", ["uniform", "normal", "smooth"])
def test_noise_is_refused(noise: str) -> None:
    verdicts = []
    for rng, scene, picture in cases(3):
        shape = picture.shape
        if noise == "uniform":
            made = rng.integers(0, 256, shape)
        elif noise == "normal":
            made = rng.normal(127, 60, shape)
        else:  # coarse spots, as of a latent that was never denoised
            coarse = rng.normal(127, 90, (shape[0] // 8, shape[1] // 8, 3))
            made = coarse.repeat(8, 0).repeat(8, 1)
        verdicts.append(check(made.clip(0, 255).astype(np.uint8), Wanted.of(scene)))
    assert share(verdicts, False) >= ENOUGH


def test_flat_colour_is_refused() -> None:
    """Both the background that was asked for, which is the hardest, and any other."""
    verdicts = []
    for rng, scene, picture in cases(4):
        verdicts.append(check(np.full_like(picture, COLORS[scene.background]), Wanted.of(scene)))
        verdicts.append(check(np.full_like(picture, rng.integers(0, 256, 3)), Wanted.of(scene)))
    assert share(verdicts, False) >= ENOUGH


def blends(seed: int, kind: str, sizes: list[tuple[int, int]]) -> list[Verdict]:
    """Pictures half way between two objects at one place that differ in colour, in shape or in both; either wish."""
    rng, verdicts = np.random.default_rng(seed), []
    for number in range(CASES // 2):
        background = str(rng.choice(list(COLORS)))
        shape, color = str(rng.choice(SHAPES)), other_color(rng, background)
        one = draw_group(rng, shape, color, int(rng.integers(1, 5)), background)
        change = {}
        if kind != "shape":
            change["color"] = other_color(rng, background, color)
        if kind != "color":
            change["shape"] = str(rng.choice([s for s in SHAPES if s != shape]))
        two = replace(one, things=tuple(replace(thing, **change) for thing in one.things))
        a, b = (render(scene, *sizes[number % len(sizes)]).astype(np.float32) for scene in (one, two))
        verdicts += [check((0.5 * a + 0.5 * b).astype(np.uint8), Wanted.of(scene)) for scene in (one, two)]
    return verdicts


def test_blends_of_two_objects_are_refused() -> None:
    """Two shapes of one colour are the hard kind: a small circle half over a square is just a soft outline."""
    verdicts = {kind: blends(5, kind, SIZES) for kind in ("color", "both", "shape")}
    assert share(verdicts["color"], False) >= ENOUGH
    assert share(verdicts["both"], False) >= ENOUGH
    assert share(verdicts["color"] + verdicts["both"] + verdicts["shape"], False) >= ENOUGH


def test_cross_fades_of_two_shapes_are_refused_at_the_size_of_evaluation() -> None:
    assert share(blends(6, "shape", SIZES[:1]), False) >= ENOUGH


def test_objects_of_two_halves_are_refused() -> None:
    """Left half of one colour, right half of another."""
    verdicts = []
    for rng, _, picture in cases(7):
        height, width = picture.shape[:2]
        background = str(rng.choice(list(COLORS)))
        scene = draw_group(rng, str(rng.choice(SHAPES)), other_color(rng, background), 1, background)
        (thing,) = scene.things
        other = replace(thing, color=other_color(rng, background, thing.color))
        made, half = render(scene, width, height), render(replace(scene, things=(other,)), width, height)
        middle = round(thing.x * width)
        made[:, middle:] = half[:, middle:]
        verdicts.append(check(made, Wanted.of(replace(scene, things=(thing if rng.random() < 0.5 else other,)))))
    assert share(verdicts, False) >= ENOUGH


def test_pictures_of_another_prompt_are_refused() -> None:
    scenes = [(scene, picture) for _, scene, picture in cases(8)]
    verdicts = []
    for (scene, _), (other, picture) in zip(scenes, scenes[1:], strict=False):
        if Wanted.of(scene, colored=False) != Wanted.of(other, colored=False):
            verdicts.append(check(picture, Wanted.of(scene)))
    assert share(verdicts, False) >= ENOUGH


def test_pictures_of_another_question_of_evaluation_are_refused() -> None:
    """Within a task, where prompts are alike: a model that always draws the same must not score."""
    rng, verdicts = np.random.default_rng(9), []
    asked = questions(40)
    for question in asked:
        other = asked[int(rng.integers(len(asked)))]
        if other.wanted != question.wanted and not _also_fits(other.wanted, question.wanted):
            verdicts.append(check(truth(rng, other.wanted, 128), question.wanted))
    assert share(verdicts, False) >= ENOUGH


def _also_fits(shown: Wanted, wanted: Wanted) -> bool:
    """Whether a true picture of one wish may be a true one of the other: same shapes, and no colour told twice."""
    shapes = [sorted(shape for shape, _ in wish.things) for wish in (shown, wanted)]
    return shapes[0] == shapes[1] and shown.background == wanted.background


def test_the_questions_of_evaluation_can_be_answered() -> None:
    rng = np.random.default_rng(10)
    verdicts = [check(truth(rng, question.wanted, 128), question.wanted) for question in questions(40)]
    assert share(verdicts, True) >= ENOUGH


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_background, "background is"),
        (one_more, "things, not"),
        (another_color, "not as asked"),
    ],
)
def test_a_verdict_says_why(change: Change, words: str) -> None:
    scene = random_scene(np.random.default_rng(11))
    picture = render(scene, 128, 128)
    assert check(picture, Wanted.of(scene)) == Verdict(True, "as asked")
    wrong = change(np.random.default_rng(0), Wanted.of(scene))
    assert wrong is not None and words in check(picture, wrong).reason


def test_the_checker_agrees_with_the_eye() -> None:
    """A hundred pictures of the dense seedling, labelled by looking before the checker was asked.

    Most are right, so the crooked ones count for themselves: a checker that accepts everything would agree in 93.
    """
    wishes = {question.prompt: question.wanted for question in questions()}
    seen = [(check(picture.pixels, wishes[picture.prompt]).right, picture.right) for picture in labelled()]
    wrong = [verdict for verdict, right in seen if not right]
    assert len(seen) == 100 and sum(verdict == right for verdict, right in seen) >= 95
    assert len(wrong) >= 5 and not any(wrong)
