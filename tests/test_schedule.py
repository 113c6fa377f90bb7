"""The noise levels against the published table, and against diffusers."""

import numpy as np
import pytest

from engine.schedule import RELEASED, sigmas


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (256, 256, [1, 0.955391, 0.877134, 0.704112, 0]),
        (512, 512, [1, 0.958085, 0.883982, 0.717497, 0]),
        (1024, 1024, [1, 0.967384, 0.908144, 0.767200, 0]),
        (1248, 832, [1, 0.967277, 0.907861, 0.766594, 0]),
    ],
)
def test_four_steps_as_in_the_table(width: int, height: int, expected: list[float]) -> None:
    levels = sigmas(width * height // 256, 4)
    assert levels.dtype == np.float32
    np.testing.assert_allclose(levels, expected, atol=6e-7, rtol=0)  # six printed digits


@pytest.mark.parametrize("tokens", [4, 64, 1024, 4300, 4301, 8192])
@pytest.mark.parametrize("steps", [1, 2, 4, 10, 50, 200])
def test_equal_to_diffusers(tokens: int, steps: int) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu


    scheduler = FlowMatchEulerDiscreteScheduler.from_config(RELEASED)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    np.testing.assert_allclose(sigmas(tokens, steps), scheduler.sigmas.numpy(), atol=3e-7, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_falls_from_one_to_zero(steps: int) -> None:
    levels = sigmas(64, steps)
    assert levels.shape == (steps + 1,)
    assert levels[0] == 1 and levels[-1] == 0 and (np.diff(levels) < 0).all()


@pytest.mark.parametrize(("tokens", "steps"), [(64, 0), (0, 4)])
def test_refuses_nothing_to_do(tokens: int, steps: int) -> None:
    with pytest.raises(ValueError, match="at least one"):
        sigmas(tokens, steps)
