"""What is shown of a picture on its way: when, how large, and that it is what comes."""

from pathlib import Path

import numpy as np
import pytest

from engine import preview
from engine.hardware import detect
from engine.latents import enlarge, foreseen, shrink
from engine.preview import Previews
from engine.types import Picture, Request, Step
from engine.worker import _open


def test_a_straight_course_is_foreseen_to_its_end() -> None:
    """Rectified flow: x = (1 - sigma) x0 + sigma noise. One step's velocity leads to x0 from anywhere."""
    rng = np.random.default_rng(0)
    x0, noise = (rng.standard_normal((1, 6, 8)).astype(np.float32) for _ in range(2))
    before, after = ((1 - sigma) * x0 + sigma * noise for sigma in (0.9, 0.6))
    assert np.abs(foreseen(before, after, 0.9, 0.6) - x0).max() < 1e-5
    assert np.array_equal(foreseen(before, after, 0.6, 0.0), after)


@pytest.mark.parametrize(("grid", "by", "small"), [((4, 6), 2, (2, 3)), ((5, 4), 2, (2, 2)), ((2, 9), 4, (1, 2))])
def test_shrunk_latents_are_averages_of_latent_pixels(
    grid: tuple[int, int], by: int, small: tuple[int, int]
) -> None:
    rows = np.repeat(np.arange(2 * grid[0]), 2 * grid[1]).reshape(2 * grid[0], -1)
    patches = rows.reshape(grid[0], 2, grid[1], 2).transpose(0, 2, 1, 3).reshape(1, -1, 4)  # one channel
    tokens, found = shrink(patches.astype(np.float32), grid, by)
    assert found == small
    plane = tokens.reshape(*small, 2, 2).transpose(0, 2, 1, 3).reshape(2 * small[0], -1)
    high = min(by, grid[0])
    assert np.array_equal(plane[:, 0], high * np.arange(2 * small[0]) + (high - 1) / 2)


def test_enlarging_and_shrinking_give_a_smooth_picture_back() -> None:
    smooth = np.full((1, 12, 8), 0.25, np.float32)
    assert np.allclose(shrink(enlarge(smooth, (3, 4), (6, 8)), (6, 8), 2)[0], smooth)


def test_quick_steps_and_dear_previews_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(0.5, 0.5), *(3.5, 4.0, 4.6, 4.6), *(6.6, 6.6), *(8.6, 8.7, 8.8, 8.8)])
    monkeypatch.setattr(preview.time, "perf_counter", lambda: next(clock))
    drawn: list[tuple[int, int]] = []

    def decode(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        drawn.append(grid)
        return np.zeros((1, 1, 3), np.uint8)

    previews = Previews(decode)
    shown = [previews.after(lambda: np.zeros((1, 64 * 96, 4), np.float32), (64, 96)) is not None for _ in range(4)]
    # half a second: too quick; three seconds: shown, for 0.6; two more would make it 30 %; four make it 15
    assert shown == [False, True, False, True]
    assert drawn == [(21, 32)] * 2


def test_a_backend_shows_what_it_is_on_its_way_to(
    tiny_packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.torch_backend.backend import TorchBackend

    monkeypatch.setattr(preview, "SLOW", 0.0)
    monkeypatch.setattr(preview, "SHARE", 1e9)
    backend = TorchBackend(detect(), tmp_path, previews=True)
    request = Request("a red circle", str(tiny_packs / "dense"), 3, 128, 64, 3)
    *steps, picture = backend.generate(request, lambda: False)
    assert isinstance(picture, Picture)
    seen = [step.preview for step in steps if isinstance(step, Step)]
    assert seen[0] is None and seen[-1] is None
    assert [p.shape for p in seen[1:-1] if p is not None] == [(32, 64, 3)] * 2
    backend.previews = False
    *unseen, _ = backend.generate(request, lambda: False)
    assert all(isinstance(step, Step) and step.preview is None for step in unseen)
    backend.close()


@pytest.mark.parametrize("wanted", [False, True])
def test_only_a_worker_with_previews_has_them_made(wanted: bool, tmp_path: Path) -> None:
    assert vars(_open("torch", tmp_path, wanted))["previews"] is wanted
