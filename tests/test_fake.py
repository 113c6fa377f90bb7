"""The backend without a model keeps the contract of the others."""

import numpy as np
import pytest

from engine.fake import FakeBackend, gradient
from engine.types import Cancelled, Picture, Request, Step

REQUEST = Request("a red circle", "tiny", 3, 96, 64, 2)


def test_steps_come_in_order_and_then_one_picture() -> None:
    *steps, picture = FakeBackend().generate(REQUEST, lambda: False)
    assert steps == [Step(0, 2), Step(1, 2), Step(2, 2)]
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (64, 96, 3) and picture.pixels.dtype == np.uint8
    assert picture.request == REQUEST and picture.backend == "fake"
    assert picture.seconds.total >= picture.seconds.denoise > 0


def test_same_prompt_and_seed_same_pixels_else_others() -> None:
    first = gradient("a", 1, 32, 32)
    assert np.array_equal(first, gradient("a", 1, 32, 32))
    assert not np.array_equal(first, gradient("a", 2, 32, 32))
    assert not np.array_equal(first, gradient("b", 1, 32, 32))
    assert first[0, 0].tolist() != first[-1, -1].tolist()


def test_it_stops_within_a_step() -> None:
    asked = iter([False, False, True])
    work = FakeBackend().generate(REQUEST, lambda: next(asked))
    assert next(work) == Step(0, 2)
    with pytest.raises(Cancelled):
        next(work)
