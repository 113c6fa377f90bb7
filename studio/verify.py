"""Make a picture again from its recipe and say whether it is the same, near or different, and what could explain it.

Knows recipes and pixels, not the page. The engine comes from outside, as for the queue.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pixels

from engine.types import BadRequest, Picture
from studio.recipe import Recipe

# Mean difference in levels of 255 up to which two pictures are one to the eye. Another number format moves the tiny
# test packs' pictures by under 2 (tests/test_backend.py), a subtle variation the seedling's by more (SPEED.md).
NEAR = 4.0

SAME, NEARLY, DIFFERENT = "same", "near", "different"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`word` same, near or different; `levels` the mean difference of 255; `reasons` what isn't as it was."""

    word: str
    levels: float
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """One sentence for a person."""
        said = {
            SAME: "the same picture, pixel by pixel",
            NEARLY: f"nearly the same picture: {self.levels:.1f} of 255 levels apart on average",
            DIFFERENT: f"a different picture: {self.levels:.1f} of 255 levels apart on average",
        }[self.word]
        if self.reasons:
            return f"{said}; {', '.join(self.reasons)}"
        return said if self.word == SAME else f"{said}, though backend, number format and model files are as they were"


def read_pixels(path: Path) -> np.ndarray:
    """uint8 [height, width, 3]. Raises BadRequest for what is no picture."""
    try:
        with Pixels.open(path, formats=["PNG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Pixels.DecompressionBombError) as error:
        raise BadRequest(f"{path.name} can't be read ({error}): its recipe can still be used") from error


def compare(recipe: Recipe, before: np.ndarray, again: Picture, files: Mapping[str, str]) -> Verdict:
    """Hold the picture made again against the one before; `files` are the model's hashes now."""
    reasons = tuple(differences(recipe, again, files))
    if before.shape != again.pixels.shape:
        return Verdict(DIFFERENT, 255.0, (f"the file has {before.shape[1]}x{before.shape[0]} pixels", *reasons))
    levels = float(np.abs(before.astype(np.int16) - again.pixels).mean())
    word = SAME if np.array_equal(before, again.pixels) else NEARLY if levels <= NEAR else DIFFERENT
    return Verdict(word, levels, reasons)


def differences(recipe: Recipe, again: Picture, files: Mapping[str, str]) -> list[str]:
    """What drew it then and now, where that differs: backend, number format, model files by name."""
    found = []
    for name, then, now in (
        ("backend", recipe.backend, again.backend),
        ("number format", recipe.dtype, again.dtype),
    ):
        if then and now and then != now:
            found.append(f"{name} {then} then, {now} now")
    known = recipe.origin.model_files
    if known and files:
        changed = sorted(name for name in {*known, *files} if known.get(name) != files.get(name))
        found += [f"model file {name} has changed" for name in changed]
    return found
