"""Where denoising begins: varied noise keeps its variance, and a draft grows without moving."""

from dataclasses import replace

import numpy as np
import pytest

from engine import schedule
from engine.latents import Recent, begin, enlarge, mixed, tokens
from engine.noise import noise
from engine.types import Request

REQUEST = Request("a red circle", "tiny", 3, 256, 256, 4)
SHAPE = (1, 32, 40, 40)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.5, 0.75, 1.0])
def test_variance_stays_and_the_correlation_is_the_promised_one(strength: float) -> None:
    base, varied = noise(3, SHAPE), mixed(replace(REQUEST, variations=((8, strength),)), SHAPE)
    assert varied.dtype == np.float32
    assert varied.std() == pytest.approx(1, abs=0.01)
    assert correlation(base, varied) == pytest.approx((1 - strength**2) ** 0.5, abs=0.01)


def test_a_chain_is_applied_in_order_from_the_recipe_alone() -> None:
    chain = replace(REQUEST, variations=((8, 0.5), (9, 0.3)))
    first = mixed(replace(REQUEST, variations=((8, 0.5),)), SHAPE)
    assert np.allclose(mixed(chain, SHAPE), (1 - 0.09) ** 0.5 * first + 0.3 * noise(9, SHAPE), atol=1e-6)
    assert not np.allclose(mixed(chain, SHAPE), mixed(replace(chain, variations=((9, 0.3), (8, 0.5))), SHAPE), atol=0.1)


def test_without_a_draft_it_is_the_seeds_noise() -> None:
    start = begin(REQUEST, 32, (4, 6), schedule.sigmas(24, 4))
    assert start.shape == (1, 24, 32)
    assert np.array_equal(start[0, 7], noise(3, (1, 32, 4, 6))[0, :, 1, 1])


def test_a_draft_gets_the_noise_of_its_step() -> None:
    sigmas = schedule.sigmas(24, 4)
    draft = np.full((1, 24, 32), 5, np.float32)
    start = begin(replace(REQUEST, draft=REQUEST, start=3), 32, (4, 6), sigmas, draft)
    assert start.dtype == np.float32
    assert np.allclose(start, (1 - sigmas[3]) * 5 + sigmas[3] * tokens(noise(3, (1, 32, 4, 6))))


def as_tokens(plane: np.ndarray) -> np.ndarray:
    """[c, 2 rows, 2 columns] -> [1, rows * columns, 4 c], written out pixel by pixel."""
    c, height, width = plane.shape
    made = np.zeros((1, height // 2 * (width // 2), c * 4), np.float32)
    for channel, y, x in np.ndindex(plane.shape):
        made[0, y // 2 * (width // 2) + x // 2, channel * 4 + y % 2 * 2 + x % 2] = plane[channel, y, x]
    return made


def test_enlarging_keeps_places_and_smooth_content() -> None:
    def slope(height: int, width: int) -> np.ndarray:
        y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
        return np.stack([y[:, None] + 0 * x, 0 * y[:, None] + x]).astype(np.float32)

    large = enlarge(as_tokens(slope(8, 12)), (4, 6), (8, 12))
    wanted = as_tokens(slope(16, 24))
    inside = np.ones((8, 12), bool)
    inside[[0, -1]] = inside[:, [0, -1]] = False  # at the edges the outermost value is held
    assert large.shape == (1, 96, 8) and large.dtype == np.float32
    assert np.abs(large - wanted)[0][inside.ravel()].max() < 1e-5
    same = as_tokens(slope(8, 12))
    assert np.allclose(enlarge(same, (4, 6), (4, 6)), same)


def test_recent_forgets_the_oldest_and_counts_the_steps_of_what_is_missing() -> None:
    recent = Recent(most=2)
    draft = replace(REQUEST, width=128, height=128)
    refined = replace(REQUEST, draft=draft, start=3)
    assert (recent.steps_to_make(draft), recent.steps_to_make(refined)) == (4, 5)
    recent.put(draft, np.zeros(1))
    assert recent.steps_to_make(refined) == 1
    recent.put(refined, np.zeros(1))
    recent.put(replace(draft, seed=9), np.zeros(1))
    assert recent.get(draft) is None and recent.get(refined) is not None
