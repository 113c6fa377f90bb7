"""The noise levels of a picture: FLUX.2's dynamically shifted schedule. Knows nothing of models or pictures."""

import math

import numpy as np

# scheduler_config.json as released. Its static shift is never applied.
RELEASED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip
_LONG = 4300  # image tokens above which the shift no longer depends on the number of steps


def sigmas(image_tokens: int, steps: int) -> np.ndarray:
    """Noise levels, float32 [steps + 1]: from 1 (pure noise) down to exactly 0; also the transformer's timesteps.

    s = 1, .., 1/steps evenly, sigma = e^mu / (e^mu + 1/s - 1), with mu as FLUX.2 fits it to the number of image tokens
    and of steps (formula: the empirical mu of black-forest-labs/flux2). The static shift in the scheduler's JSON is
    never applied. Raises ValueError for fewer than one step or token.
    """
    if steps < 1 or image_tokens < 1:
        raise ValueError(f"a schedule needs at least one step and one image token, not {steps} and {image_tokens}")
    shift = math.exp(_mu(image_tokens, steps))
    levels = shift / (shift + 1 / np.linspace(1, 1 / steps, steps) - 1)
    return np.append(levels, 0).astype(np.float32)


def _mu(image_tokens: int, steps: int) -> float:
    """The log of the shift: fitted at 10 and at 200 steps, and on the straight line through both elsewhere."""
    at_200 = 1.6927e-4 * image_tokens + 0.45666666
    if image_tokens > _LONG:
        return at_200
    at_10 = 8.73809524e-5 * image_tokens + 1.89833333
    return at_10 + (at_200 - at_10) * (steps - 10) / 190
