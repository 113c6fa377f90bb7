"""A recipe is run again and held against its picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.fake import FakeBackend
from engine.types import BadRequest, Picture, Request
from studio import pictures, verify
from studio.recipe import Origin

REQUEST = Request("a red circle", "tiny", 3, 64, 32, 2)
FILES = {"transformer/a.safetensors": "aa", "vae/b.safetensors": "bb"}


def made(**changes: object) -> Picture:
    *_, picture = FakeBackend().generate(replace(REQUEST, **changes), lambda: False)  # type: ignore[arg-type]
    assert isinstance(picture, Picture)
    return picture


def verdict(tmp_path: Path, before: Picture, again: Picture, files: dict[str, str]) -> verify.Verdict:
    path = pictures.save(before, tmp_path / "a.png", Origin(model_files=FILES))
    return verify.compare(pictures.reopen(path), verify.read_pixels(path), again, files)


def test_the_same(tmp_path: Path) -> None:
    found = verdict(tmp_path, made(), made(), FILES)
    assert found == verify.Verdict("same", 0.0, ())
    assert str(found) == "the same picture, pixel by pixel"


def test_near_and_why(tmp_path: Path) -> None:
    again = made()
    again = replace(again, pixels=np.clip(again.pixels.astype(int) + 2, 0, 255).astype(np.uint8), dtype="bfloat16")
    found = verdict(tmp_path, made(), again, FILES | {"vae/b.safetensors": "cc"})
    assert found.word == "near"
    assert found.reasons == ("number format float32 then, bfloat16 now", "model file vae/b.safetensors has changed")
    assert str(found).startswith("nearly the same picture: 2.0 of 255 levels apart on average; number format")


def test_different(tmp_path: Path) -> None:
    other = verdict(tmp_path, made(), made(seed=4), FILES)
    assert other.word == "different" and "though backend, number format and model files are as they were" in str(other)
    mlx = verdict(tmp_path, made(), replace(made(seed=4), backend="mlx"), {})
    assert mlx.reasons == ("backend fake then, mlx now",)
    size = verdict(tmp_path, made(), made(width=32), FILES)
    assert size.word == "different" and size.reasons == ("the file has 64x32 pixels",)


def test_a_file_that_is_no_picture_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(BadRequest, match="a.png can't be read"):
        verify.read_pixels(tmp_path / "a.png")
