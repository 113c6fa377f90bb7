"""The noise against torch's own generator."""

import numpy as np
import pytest
import torch

from engine.noise import noise


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**40 + 17, 2**63 - 1])
@pytest.mark.parametrize(
    "shape", [(16,), (17,), (31,), (32,), (1, 64, 4, 4), (1, 64, 3, 5), (3, 333), (1, 128, 26, 39)], ids=str
)
def test_equal_to_torch(seed: int, shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    made = noise(seed, shape)
    assert made.dtype == np.float32 and made.shape == shape
    np.testing.assert_allclose(made, expected, atol=1e-6, rtol=0)


def test_extreme_draws_are_finite_and_equal_to_torch() -> None:
    """A million values, so that uniforms of almost 0 and almost 1 occur."""
    expected = torch.randn(2**20, generator=torch.Generator("cpu").manual_seed(3)).numpy()
    np.testing.assert_allclose(noise(3, (2**20,)), expected, atol=1e-6, rtol=0)
    assert np.abs(expected).max() > 4.5


def test_a_seed_counts_modulo_two_to_the_32_and_nothing_else() -> None:
    np.testing.assert_array_equal(noise(2**32 + 5, (1, 64, 4, 4)), noise(5, (1, 64, 4, 4)))
    assert not np.array_equal(noise(6, (1, 64, 4, 4)), noise(5, (1, 64, 4, 4)))


def test_does_not_touch_the_global_generator() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]
    noise(1, (64,))
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]


@pytest.mark.parametrize("shape", [(15,), (0,), (1, 3)])
def test_refuses_what_torch_draws_differently(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="fewer than 16"):
        noise(0, shape)
