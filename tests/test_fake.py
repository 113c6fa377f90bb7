"""The backend without a model keeps the contract of the others."""

from dataclasses import replace

import numpy as np
import pytest

from engine.fake import FakeBackend, paint
from engine.types import Cancelled, Picture, Request, Step

REQUEST = Request("a red circle", "tiny", 3, 96, 64, 2)


def test_steps_come_in_order_and_then_one_picture() -> None:
    *steps, picture = FakeBackend().generate(REQUEST, lambda: False)
    assert steps == [Step(0, 2), Step(1, 2), Step(2, 2)]
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (64, 96, 3) and picture.pixels.dtype == np.uint8
    assert picture.request == REQUEST and picture.backend == "fake"
    assert picture.seconds.total >= picture.seconds.denoise > 0


def drawn(**changes: object) -> np.ndarray:
    return paint(replace(Request("a", "tiny", 1, 32, 32, 4), **changes)).astype(int)


def test_same_prompt_and_seed_same_pixels_else_others() -> None:
    first = drawn()
    assert np.array_equal(first, drawn())
    assert not np.array_equal(first, drawn(seed=2))
    assert not np.array_equal(first, drawn(prompt="b"))
    assert first[0, 0].tolist() != first[-1, -1].tolist()


def test_a_stronger_variation_changes_more() -> None:
    changes = [np.abs(drawn(variations=((9, strength),)) - drawn()).mean() for strength in (0.2, 0.5, 1)]
    assert 0 < changes[0] < changes[1] < changes[2]
    assert np.array_equal(drawn(variations=((9, 1.0),)), drawn(seed=9))


def test_a_refined_draft_looks_like_it_and_takes_fewer_steps() -> None:
    draft = replace(REQUEST, width=48, height=32, steps=4)
    refined = replace(REQUEST, steps=4, seed=5, draft=draft, start=3)
    *steps, _ = FakeBackend().generate(refined, lambda: False)
    assert steps == [Step(0, 1), Step(1, 1)]
    small = paint(draft).astype(int)
    alone = paint(replace(refined, draft=None, start=0)).astype(int)
    assert np.abs(paint(refined)[::2, ::2] - small).mean() < np.abs(alone[::2, ::2] - small).mean() / 2


def test_it_stops_within_a_step() -> None:
    asked = iter([False, False, True])
    work = FakeBackend().generate(REQUEST, lambda: next(asked))
    assert next(work) == Step(0, 2)
    with pytest.raises(Cancelled):
        next(work)
