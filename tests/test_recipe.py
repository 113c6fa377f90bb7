"""A recipe goes into a PNG and comes back; a damaged or hostile one becomes a sentence."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from engine import catalog, chain
from engine.types import BadRequest, Picture, Request, Seconds
from studio import modelfiles, pictures, recipe
from studio.recipe import Link, Origin

REQUEST = Request("नीला, \"two\" <b>red</b>", "seedling-ternary", 7, 64, 32, 4, variations=((8, 0.3),))
PICTURE = Picture(np.zeros((32, 64, 3), np.uint8), REQUEST, "torch", "cpu", Seconds(total=1.5), 9, ("x",), "float32")
FIRST = Link(replace(REQUEST, prompt="a circle", variations=()), "make", "aa")
REFINED = Link(replace(REQUEST, draft=REQUEST, start=3), "refine", "bb")
ORIGIN = Origin("vary", (FIRST, REFINED), {"transformer/a": "cc"})


def png(path: Path, text: str) -> Path:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("niwaki", text)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_everything_comes_back_from_the_file_alone(tmp_path: Path) -> None:
    found = pictures.reopen(pictures.save(PICTURE, tmp_path / "a.png", ORIGIN))
    assert (found.request, found.origin) == (REQUEST, ORIGIN)
    assert (found.backend, found.dtype, found.seconds, found.unknown_words) == ("torch", "float32", 1.5, ("x",))


def test_other_tools_find_prompt_and_settings(tmp_path: Path) -> None:
    with Image.open(pictures.save(PICTURE, tmp_path / "a.png", ORIGIN)) as image:
        prompt, settings = image.info["parameters"].rsplit("\n", 1)
    assert prompt == REQUEST.prompt
    assert settings.startswith("Steps: 4, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 64x32, Model: seedling-ternary")
    assert "Model hash: cc" in settings


def test_a_plain_prompt_is_a_text_chunk_that_the_oldest_readers_know(tmp_path: Path) -> None:
    plain = replace(PICTURE, request=replace(REQUEST, prompt="a circle"))
    assert b"tEXtparameters\0a circle\nSteps" in pictures.save(plain, tmp_path / "a.png").read_bytes()


def test_a_long_history_loses_its_oldest_part_and_stays_readable(tmp_path: Path) -> None:
    long = tuple(Link(replace(REQUEST, prompt=f"{number} " + "ச" * 20_000), "make") for number in range(60))
    found = pictures.reopen(pictures.save(PICTURE, tmp_path / "a.png", Origin("make", long)))
    assert 0 < len(found.origin.ancestors) < 60
    assert found.origin.ancestors[-1].request.prompt.startswith("59 ")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": 3}, "no text"),
        ({"seed": "x" * 500}, "no whole number"),
        ({"variations": [["a", "b"]]}, "variations"),
        ({"draft": [1]}, "draft"),
        ({"ancestors": ["x"]}, "an ancestor is 'x'"),
        ({"ancestors": [{"prompt": "a"}]}, "no model"),
        ({"format": "one"}, "is damaged"),
        ({"format": float("inf")}, "is damaged"),
        ({"format": 2}, "later Niwaki"),
    ],
)
def test_hostile_values_are_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    file = png(tmp_path / "a.png", json.dumps({**recipe.values(PICTURE, ORIGIN), **changes}))
    with pytest.raises(BadRequest, match=words) as refused:
        pictures.reopen(file, "dropped.png")
    assert "dropped.png" in str(refused.value) and len(str(refused.value)) < 300 and "\n" not in str(refused.value)


BROKEN = ["", "[", "3", "null", '"x"', "[" * 100_000, '{"format": 1}', '{"format": ' + "9" * 5000]


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_no_recipe_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadRequest, match="a.png is damaged"):
        pictures.reopen(png(tmp_path / "a.png", text))


def test_a_bomb_of_compressed_text_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("niwaki", "0" * 20_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "bomb.png", pnginfo=info)
    with pytest.raises(BadRequest, match="bomb.png"):
        pictures.reopen(tmp_path / "bomb.png")


def test_odd_but_harmless_values_are_dropped() -> None:
    odd = {**recipe.values(PICTURE), "backend": 3, "seconds": [1], "unknown_words": {"a": 1}, "model_files": 7}
    found = recipe.read(odd, "a.png")
    assert found == recipe.Recipe(REQUEST, Origin(), "", "float32", "cpu", 0.0, ())
    assert chain.values(found.request)["variations"] == [[8, 0.3]]


def test_the_hashes_of_a_model_are_those_of_its_files_and_are_kept(tiny_packs: Path, tmp_path: Path) -> None:
    import hashlib
    import shutil

    pack = shutil.copytree(tiny_packs / "ternary", tmp_path / "pack")
    found = modelfiles.hashes(str(pack), tmp_path / "data")
    assert len(found) == 3 and {name.split("/")[0] for name in found} >= {"vae"}
    for name, sha256 in found.items():
        assert hashlib.sha256((pack / name).read_bytes()).hexdigest() == sha256
    kept = tmp_path / "data" / modelfiles.FILE
    assert modelfiles.hashes(str(pack), tmp_path / "data") == found
    before = kept.read_text()
    weights = pack / next(name for name in found if name.startswith("vae"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    changed = modelfiles.hashes(str(pack), tmp_path / "data")
    assert {name for name in found if found[name] != changed[name]} == {weights.relative_to(pack).as_posix()}
    assert modelfiles.combined(changed) != modelfiles.combined(found) and kept.read_text() != before
    kept.write_text("[")
    assert modelfiles.hashes(str(pack), tmp_path / "data") == changed


def test_a_model_that_is_not_there_has_no_hashes(tmp_path: Path) -> None:
    assert modelfiles.hashes("bonsai-ternary", tmp_path) == {} and modelfiles.combined({}) == ""
    assert "bonsai-ternary" in catalog.MODELS
