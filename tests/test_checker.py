"""The checker, held against pictures whose truth is known: right ones pass, and everything else is refused.

At least 98 % of each class: of rendered truth at every size, also through what an eye forgives; of wishes wrong in one
thing, of things that are half gone, half another, doubled or of two colours, and of pictures that show nothing.
"""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from engine.seedling.backdrops import COLORS, PLAIN, SEASONS, TIMES, WEATHERS, Backdrop
from engine.seedling.checker import Verdict, Wanted, check
from engine.seedling.drawing import render
from engine.seedling.questions import questions
from engine.seedling.scenes import (
    KINDS,
    MIRROR,
    Scene,
    Thing,
    other_color,
    random_scene,
    training_scene,
)
from tests.labelled import labelled
from tests.truth import truth

Rng = np.random.Generator
SIZES = [(256, 256), (128, 128), (320, 192), (192, 320)]
CASES, ENOUGH = 31, 0.98


def share(verdicts: list[Verdict], right: bool) -> float:
    assert len(verdicts) >= 30
    return sum(verdict.right == right for verdict in verdicts) / len(verdicts)


def bytes_of(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels).clip(0, 255).astype(np.uint8)


def accepted(draw: Callable[[Rng], Scene], degrade: "Degradation", size: tuple[int, int], cases: int) -> float:
    rng, verdicts = np.random.default_rng(1), []
    for _ in range(cases):
        scene = draw(rng)
        verdicts.append(check(bytes_of(degrade(rng, scene, render(scene, *size))), Wanted.of(scene)))
    return share(verdicts, True)


Degradation = Callable[[Rng, Scene, np.ndarray], np.ndarray]


def nothing(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    return picture


def blurred(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    return ndimage.gaussian_filter(picture.astype(np.float32), (2, 2, 0))


def jpeg(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=40)
    return np.asarray(Image.open(file))


def off_in_colour(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    way = rng.normal(size=3)
    return picture + 25 * way / np.linalg.norm(way)


def noisy(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    return picture + rng.normal(0, 6, picture.shape)


def warped(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    """By 2.5 pixels, in waves of about thirty."""
    height, width = picture.shape[:2]
    shifts = [ndimage.gaussian_filter(rng.normal(size=(height, width)), 16) for _ in range(2)]
    at = np.indices((height, width)) + np.stack([2.5 * shift / shift.std() for shift in shifts])
    parts = [ndimage.map_coordinates(picture[..., c].astype(np.float32), at, order=1, mode="nearest") for c in range(3)]
    return np.stack(parts, axis=2)


def faint_ink(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    """Strokes half as strong: what has ink's colour goes half way to the paper."""
    paper = render(replace(scene, things=()), *picture.shape[1::-1]).astype(np.float32)
    inked = np.linalg.norm(picture.astype(np.float32) - scene.backdrop.ink, axis=2) < 8
    return picture + 0.4 * inked[..., None] * (paper - picture)


def all_a_little(rng: Rng, scene: Scene, picture: np.ndarray) -> np.ndarray:
    softened = ndimage.gaussian_filter(warped(rng, scene, picture), (1.2, 1.2, 0))
    return softened + 0.5 * (off_in_colour(rng, scene, picture) - picture) + rng.normal(0, 3, picture.shape)


@pytest.mark.parametrize("draw", [random_scene, pytest.param(training_scene, marks=pytest.mark.slow)])
def test_the_truth_is_accepted(draw: Callable[[Rng], Scene]) -> None:
    assert accepted(draw, nothing, SIZES[0], 50) >= ENOUGH


@pytest.mark.parametrize("size", [SIZES[1], *(pytest.param(size, marks=pytest.mark.slow) for size in SIZES[2:])])
def test_the_truth_is_accepted_at_other_sizes(size: tuple[int, int]) -> None:
    assert accepted(random_scene, nothing, size, 40) >= ENOUGH


# all_a_little has a little of each of these
ONE_BY_ONE = [pytest.param(part, marks=pytest.mark.slow) for part in (blurred, off_in_colour, noisy)]


@pytest.mark.parametrize("degrade", [jpeg, warped, faint_ink, all_a_little, *ONE_BY_ONE])
def test_what_an_eye_forgives_is_accepted(degrade: Degradation) -> None:
    assert accepted(random_scene, degrade, SIZES[0], 40) >= ENOUGH


Change = Callable[[Rng, Wanted], Wanted | None]
"""A wish that is wrong in one thing; None where there is nothing of that sort to change."""


def another_color(rng: Rng, wanted: Wanted) -> Wanted:
    which = int(rng.integers(len(wanted.things)))
    kind, color = wanted.things[which]
    return _with(wanted, which, (kind, other_color(rng, wanted.backdrop, color)))


def another_kind(rng: Rng, wanted: Wanted) -> Wanted:
    which = int(rng.integers(len(wanted.things)))
    kind, color = wanted.things[which]
    return _with(wanted, which, (str(rng.choice([each for each in KINDS if each != kind])), color))


def one_more(rng: Rng, wanted: Wanted) -> Wanted | None:
    more = (*wanted.things, wanted.things[int(rng.integers(len(wanted.things)))])
    return replace(wanted, things=more, relation="") if len(more) <= 4 else None


def one_less(rng: Rng, wanted: Wanted) -> Wanted | None:
    return replace(wanted, things=wanted.things[:-1], relation="") if len(wanted.things) > 1 else None


def mirrored(rng: Rng, wanted: Wanted) -> Wanted | None:
    return None if wanted.relation in ("", "and") else replace(wanted, relation=MIRROR[wanted.relation])


def turned(rng: Rng, wanted: Wanted) -> Wanted | None:
    """Above or below instead of beside, and the other way round."""
    across = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    return replace(wanted, relation=across[wanted.relation]) if wanted.relation in across else None


def swapped(rng: Rng, wanted: Wanted) -> Wanted | None:
    """Two different kinds that exchange their colours: the classic failure of attribution."""
    if not wanted.relation:
        return None
    (first, color), (second, other) = wanted.things
    return None if first == second or color == other else replace(wanted, things=((first, other), (second, color)))


def another_paper(rng: Rng, wanted: Wanted) -> Wanted:
    backdrops = [backdrop for backdrop in PLAIN if backdrop != wanted.backdrop]
    return replace(wanted, backdrop=backdrops[int(rng.integers(len(backdrops)))])


def another_time(rng: Rng, wanted: Wanted) -> Wanted | None:
    return _outdoors(wanted, time=str(rng.choice([time for time in TIMES if time != wanted.backdrop.time])))


def another_season(rng: Rng, wanted: Wanted) -> Wanted | None:
    here = wanted.backdrop.season
    return _outdoors(wanted, season=str(rng.choice([each for each in ("", *SEASONS) if each != here])))


def another_weather(rng: Rng, wanted: Wanted) -> Wanted | None:
    here = wanted.backdrop.weather
    return _outdoors(wanted, weather=str(rng.choice([each for each in ("", *WEATHERS) if each != here])))


def _outdoors(wanted: Wanted, **change: str) -> Wanted | None:
    return None if wanted.backdrop.color else replace(wanted, backdrop=replace(wanted.backdrop, **change))


def _with(wanted: Wanted, which: int, thing: tuple[str, str]) -> Wanted | None:
    things = (*wanted.things[:which], thing, *wanted.things[which + 1 :])
    return replace(wanted, things=things)


CHANGES = [
    another_color, another_kind, one_more, one_less, mirrored, turned, swapped, another_paper, another_time,
    another_season, another_weather,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_wish_wrong_in_one_thing_is_refused(change: Change) -> None:
    rng, verdicts = np.random.default_rng(2), []
    while len(verdicts) < CASES:
        scene = random_scene(rng)
        if wrong := change(rng, Wanted.of(scene)):
            size = SIZES[len(verdicts) // 2 % len(SIZES) if len(verdicts) % 2 else 0]
            verdicts.append(check(render(scene, *size), wrong))
    assert share(verdicts, False) >= ENOUGH


Spoiling = Callable[[Rng, Scene, Thing], np.ndarray | None]
"""A picture in which one of its things is wrong; None where this one cannot be spoilt so."""


def _without(scene: Scene, thing: Thing) -> Scene:
    return replace(scene, things=tuple(each for each in scene.things if each is not thing))


def _other(scene: Scene, thing: Thing, **change: str) -> Scene:
    return replace(scene, things=tuple(replace(t, **change) if t is thing else t for t in scene.things))


def gone(rng: Rng, scene: Scene, thing: Thing) -> np.ndarray:
    return render(_without(scene, thing), 256, 256)


def half_gone(rng: Rng, scene: Scene, thing: Thing) -> np.ndarray | None:
    """Its left or its right half. What is left of a moon is a moon."""
    if thing.kind == "moon":
        return None
    picture, middle = render(scene, 256, 256), round(thing.x * 256)
    half = slice(None, middle) if rng.random() < 0.5 else slice(middle, None)
    near = np.abs(np.arange(256) / 256 - thing.y) < 1.2 * thing.radius
    picture[near, half] = render(_without(scene, thing), 256, 256)[near, half]
    return picture


def half_another(rng: Rng, scene: Scene, thing: Thing) -> np.ndarray:
    """Neither the one kind nor the other."""
    kind = str(rng.choice([each for each in KINDS if each != thing.kind]))
    both = [render(each, 256, 256).astype(np.float32) for each in (scene, _other(scene, thing, kind=kind))]
    return bytes_of(0.5 * both[0] + 0.5 * both[1])


def of_two_colours(rng: Rng, scene: Scene, thing: Thing) -> np.ndarray | None:
    if thing.kind == "moon":  # nearly all of it is on one side
        return None
    other = _other(scene, thing, color=other_color(rng, scene.backdrop, thing.color))
    picture, middle = render(scene, 256, 256), round(thing.x * 256)
    picture[:, middle:] = render(other, 256, 256)[:, middle:]
    return picture


def with_one_too_many(rng: Rng, scene: Scene, thing: Thing) -> np.ndarray:
    """A small one, in a corner or on the middle line where there is room."""
    spots = [(x, y) for x in (0.12, 0.5, 0.88) for y in (0.12, 0.5, 0.88)]
    x, y = max(spots, key=lambda spot: min(np.hypot(spot[0] - t.x, spot[1] - t.y) for t in scene.things))
    return render(replace(scene, things=(*scene.things, replace(thing, x=x, y=y, radius=0.09))), 256, 256)


@pytest.mark.parametrize("spoil", [gone, half_gone, half_another, of_two_colours, with_one_too_many])
def test_a_picture_wrong_in_one_thing_is_refused(spoil: Spoiling) -> None:
    rng, verdicts = np.random.default_rng(3), []
    while len(verdicts) < CASES:
        scene = random_scene(rng)
        spoilt = spoil(rng, scene, scene.things[int(rng.integers(len(scene.things)))])
        if spoilt is not None:
            verdicts.append(check(spoilt, Wanted.of(scene)))
    assert share(verdicts, False) >= ENOUGH


@pytest.mark.parametrize("noise", ["uniform", "normal", "coarse", "flat", "empty"])
def test_what_shows_nothing_is_refused(noise: str) -> None:
    rng, verdicts = np.random.default_rng(4), []
    for _ in range(CASES):
        scene = random_scene(rng)
        made = {
            "uniform": lambda: rng.integers(0, 256, (256, 256, 3)),
            "normal": lambda: rng.normal(127, 60, (256, 256, 3)),
            "coarse": lambda: rng.normal(127, 90, (16, 16, 3)).repeat(16, 0).repeat(16, 1),  # never denoised
            "flat": lambda: np.full((256, 256, 3), rng.integers(0, 256, 3)),
            "empty": lambda scene=scene: render(replace(scene, things=()), 256, 256),  # the very paper asked for
        }[noise]()
        verdicts.append(check(bytes_of(made), Wanted.of(scene)))
    assert share(verdicts, False) >= ENOUGH


def test_pictures_of_another_prompt_are_refused() -> None:
    rng = np.random.default_rng(5)
    scenes = [random_scene(rng) for _ in range(CASES)]
    verdicts = [
        check(render(other, 256, 256), Wanted.of(scene))
        for scene, other in zip(scenes, scenes[1:], strict=False)
        if Wanted.of(scene) != Wanted.of(other)
    ]
    assert share(verdicts, False) >= ENOUGH


def test_the_questions_of_evaluation_can_be_answered() -> None:
    rng, asked = np.random.default_rng(6), questions(2)
    verdicts = [check(truth(rng, question.wanted, 256), question.wanted) for question in asked]
    assert share(verdicts, True) >= ENOUGH


def test_a_verdict_says_why() -> None:
    autumn = Backdrop("", "dusk", "autumn", "rain")
    things = (Thing("pine", "green", 0.26, 0.5, 0.18), Thing("moon", "yellow", 0.74, 0.5, 0.18))
    picture = render(Scene(autumn, things, "left of"), 256, 256)
    wanted = Wanted(autumn, (("pine", "green"), ("moon", "yellow")), "left of")
    assert check(picture, wanted) == Verdict(True, "as asked")
    for wrong, words in [
        (replace(wanted, backdrop=Backdrop()), "the background is autumn dusk, not white"),
        (replace(wanted, backdrop=replace(autumn, weather="snow")), "rain falls, not snow"),
        (replace(wanted, backdrop=replace(autumn, weather="")), "rain falls, not nothing"),
        (replace(wanted, things=(("pine", "blue"), ("moon", "yellow"))), "nothing blue where a blue pine should be"),
        (replace(wanted, things=(("maple", "green"), ("moon", "yellow"))), "a pine instead of a maple"),
        (replace(wanted, relation="above"), "nothing is above anything"),
    ]:
        assert check(picture, wrong) == Verdict(False, words)


def test_every_colour_is_known_for_what_it_is() -> None:
    for color in COLORS:
        backdrop = next(each for each in PLAIN if each.shows(color))
        picture = render(Scene(backdrop, (Thing("circle", color, 0.5, 0.5, 0.28),)), 128, 128)
        assert [other for other in COLORS if check(picture, Wanted(backdrop, (("circle", other),))).right] == [color]


def test_the_checker_agrees_with_the_eye() -> None:
    """A hundred pictures of the dense seedling, labelled by looking before the checker was asked.

    They differ in five of them: three things are refused that the eye lets pass, one for its rays and two for being a
    little round; a gray boat gone tan and a koi that is hardly one are accepted.
    """
    wishes = {question.prompt: question.wanted for question in questions()}
    seen = [(check(picture.pixels, wishes[picture.prompt]).right, picture.right) for picture in labelled()]
    wrong = [verdict for verdict, right in seen if not right]
    assert len(seen) == 100 and sum(verdict == right for verdict, right in seen) >= 95
    assert len(wrong) >= 5 and sum(wrong) <= 2
