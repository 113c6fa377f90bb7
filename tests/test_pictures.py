"""A picture on disk is whole or absent, and carries its recipe."""

import json
import os
import zlib
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from engine.types import BadRequest, Picture, Request, Seconds
from studio import pictures


def a_picture(prompt: str = "two red circles", seed: int = 7, height: int = 32, width: int = 64) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    request = Request(prompt, "seedling-ternary", seed, width, height, 4)
    return Picture(pixels, request, "torch", "cpu: because", Seconds(0.1, 0.2, 0.3, 0.4, 1.0), 1234, ("astronaut",))


def test_pixels_and_recipe_survive(tmp_path: Path) -> None:
    picture = a_picture()
    path = pictures.save(picture, tmp_path / "deep" / "a.png")
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), picture.pixels)
    assert pictures.read_recipe(path) == {
        "format": 1,
        "prompt": "two red circles",
        "seed": 7,
        "width": 64,
        "height": 32,
        "steps": 4,
        "model": "seedling-ternary",
        "backend": "torch",
        "reason": "cpu: because",
        "seconds": {"load": 0.1, "encode": 0.2, "denoise": 0.3, "decode": 0.4, "total": 1.0},
        "peak_memory_bytes": 1234,
        "unknown_words": ["astronaut"],
        "dtype": "",
        "op": "make",
        "model_files": {},
        "ancestors": [],
    }


@pytest.mark.parametrize("prompt", ["नीला वृत्त", "நீல வட்டம்", "zwölf 🔵 <b>&\"'\n", "broken \ud83d paste"])
def test_any_prompt_survives(tmp_path: Path, prompt: str) -> None:
    assert pictures.read_recipe(pictures.save(a_picture(prompt), tmp_path / "a.png"))["prompt"] == prompt


def test_the_recipe_is_an_itxt_chunk_that_other_tools_can_read(tmp_path: Path) -> None:
    data = pictures.save(a_picture("नीला"), tmp_path / "a.png").read_bytes()
    at = data.index(b"iTXt")
    length = int.from_bytes(data[at - 4 : at], "big")
    keyword, text = data[at + 4 : at + 4 + length].split(b"\0\0\0\0\0")
    assert keyword == b"niwaki"
    assert json.loads(text.decode("utf-8"))["prompt"] == "नीला"
    assert zlib.crc32(data[at : at + 4 + length]).to_bytes(4, "big") == data[at + 4 + length : at + 8 + length]


def test_saving_again_replaces_the_picture(tmp_path: Path) -> None:
    pictures.save(a_picture(seed=1), tmp_path / "a.png")
    pictures.save(a_picture(seed=2), tmp_path / "a.png")
    assert pictures.read_recipe(tmp_path / "a.png")["seed"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_picture_and_no_half_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    pictures.save(a_picture(seed=1), tmp_path / "a.png")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(BadRequest, match=r"cannot save .*a\.png \(No space left on device\)"):
        pictures.save(a_picture(seed=2), tmp_path / "a.png")
    monkeypatch.undo()
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert pictures.read_recipe(tmp_path / "a.png")["seed"] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_while_writing_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("builtins.open", lambda *_: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"))
    with pytest.raises(BadRequest, match="No space left on device"):
        pictures.save(a_picture(), tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/a.png", "folder.png", "a.jpg", "no-suffix"])
def test_an_impossible_place_is_a_sentence_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BadRequest, match=name):
        pictures.save(a_picture(), tmp_path / name)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder.png"]


def test_the_page_keeps_a_folder_a_day(tmp_path: Path) -> None:
    path = pictures.keep(a_picture(seed=42), tmp_path, datetime(2026, 3, 9, 8, 5, 1, 7_000))
    assert path == tmp_path / "2026-03-09" / "080501.007-42.png"


def test_only_our_own_pictures_have_a_recipe(tmp_path: Path) -> None:
    def refused(name: str, sentence: str) -> None:
        with pytest.raises(BadRequest, match=sentence):
            pictures.read_recipe(tmp_path / name)

    def with_text(name: str, text: str) -> None:
        info = PngImagePlugin.PngInfo()
        info.add_itxt("niwaki", text)
        Image.new("RGB", (8, 8)).save(tmp_path / name, pnginfo=info)

    (tmp_path / "text.png").write_text("hello")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "jpeg.png", format="JPEG")
    (tmp_path / "half.png").write_bytes(pictures.save(a_picture(), tmp_path / "a.png").read_bytes()[:60])
    with_text("damaged.png", "{")
    with_text("list.png", "[]")
    with_text("later.png", '{"format": 99}')
    refused("text.png", "is not a PNG")
    refused("jpeg.png", "is not a PNG")
    refused("half.png", "half.png")
    refused("missing.png", "No such file")
    refused("plain.png", "carries no recipe")
    refused("damaged.png", "is damaged")
    refused("list.png", "is damaged")
    refused("later.png", "format 99")


def test_what_the_page_shows_is_the_same_bytes_in_its_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = pictures.save(a_picture(), tmp_path / "pictures" / "a.png")
    shown = pictures.publish(path, tmp_path / "cache")
    assert (tmp_path / "cache") in shown.parents
    assert shown.samefile(path)
    assert pictures.publish(path, tmp_path / "cache") == shown

    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    copied = pictures.publish(path, tmp_path / "other-disk")
    assert copied.read_bytes() == path.read_bytes()
    assert not copied.samefile(path)


def test_the_cache_is_swept_and_the_pictures_stay(tmp_path: Path) -> None:
    path = pictures.save(a_picture(), tmp_path / "pictures" / "a.png")
    shown = pictures.publish(path, tmp_path / "cache")
    pictures.sweep(tmp_path / "cache")
    assert shown.exists()
    pictures.sweep(tmp_path / "cache", age_seconds=-1)
    assert not shown.exists()
    assert path.exists()
