"""The MLX backend against the torch backend, each part and all of it: same pack, same seed, same picture."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from engine import importers, plan  # noqa: E402
from engine.hardware import Hardware  # noqa: E402
from engine.mlx_backend import backend as mlx_backend  # noqa: E402
from engine.mlx_backend.transformer import token_ids  # noqa: E402
from engine.packs import Pack, open_pack  # noqa: E402
from engine.plan import Plan  # noqa: E402
from engine.torch_backend import backend as torch_backend  # noqa: E402
from engine.torch_backend import transformer as torch_text  # noqa: E402
from engine.types import Picture, Request  # noqa: E402
from tests.packs import layouts  # noqa: E402
from tests.packs.content import Content, small  # noqa: E402
from tests.packs.writers import Dims, write_pack, write_tokenizer  # noqa: E402

HARDWARE = Hardware("cpu", "test processor", 0, 1, frozenset(), "cpu: test processor")
PROMPT, GRID, CLOSE = "two red circles on a blue background", (4, 6), 1e-4


def silent() -> None:
    pass


@pytest.fixture(scope="module", params=["dense", "ternary", "binary", "4-bit"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("packs") / request.param
    dims = Dims(double_blocks=2, single_blocks=2, group_size=64 if request.param == "4-bit" else 128)
    return open_pack(write_pack(folder, request.param, dims))


@pytest.fixture(scope="module")
def torch_model(pack: Pack) -> torch_backend.Model:
    model = torch_backend.Model(pack.folder)
    exact = Plan("torch", "cpu", "float32", "")
    model.load_encoder(exact)
    model.load(exact, silent)
    return model


@pytest.fixture(scope="module")
def mlx_model(pack: Pack, tmp_path_factory: pytest.TempPathFactory) -> mlx_backend.Model:
    model = mlx_backend.Model(pack.folder, tmp_path_factory.mktemp("data"))
    model.load_text_encoder(mx.float32, silent)
    model.load_transformer(mx.float32, silent)
    model.load_decoder(mx.float32, silent)
    return model


def relative_error(found: mx.array, expected: torch.Tensor) -> float:
    ours, theirs = np.array(found, dtype=np.float64), expected.double().numpy()
    assert ours.shape == theirs.shape and np.linalg.norm(theirs) > 0
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def embeddings(torch_model: torch_backend.Model) -> torch.Tensor:
    ids, mask, _ = torch_model.tokenizer.encode(PROMPT, torch_model.pack.notes.text_length)
    return torch_model.text_encoder.encode(ids, mask, silent)


def tokens(pack: Pack) -> np.ndarray:
    shape = (1, GRID[0] * GRID[1], pack.transformer.config["in_channels"])
    return np.random.default_rng(4).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("prompt", [PROMPT, "a लाल वृत्त, வட்டம் 3"])
def test_text_states(torch_model, mlx_model, prompt: str) -> None:  # type: ignore[no-untyped-def]
    ids, mask, _ = torch_model.tokenizer.encode(prompt, torch_model.pack.notes.text_length)
    expected = torch_model.text_encoder.encode(ids, mask, silent)
    assert relative_error(mlx_model.text_encoder.encode(ids, mask, silent), expected) < CLOSE


@torch.inference_mode()
def test_velocity(pack, torch_model, mlx_model) -> None:  # type: ignore[no-untyped-def]
    text, x = embeddings(torch_model), tokens(pack)
    ids = torch_text.token_ids(text.shape[1], GRID, "cpu")
    expected = torch_model.weights.transformer(torch.from_numpy(x), text, torch.tensor([0.717]), *ids, silent)
    ours = token_ids(text.shape[1], GRID)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(ours, ids, strict=True))
    found = mlx_model.transformer(mx.array(x), mx.array(text.numpy()), mx.array([0.717]), *ours, silent)
    assert relative_error(found, expected) < CLOSE


def picture(backend: object, request: Request) -> np.ndarray:
    *_, made = backend.generate(request, lambda: False)  # type: ignore[attr-defined]
    assert isinstance(made, Picture)
    return made.pixels.astype(np.float64)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape and one.std() > 1
    return float(10 * np.log10(255**2 / max(((one - other) ** 2).mean(), 1e-9)))


def both(data_dir: Path) -> Iterator[object]:
    yield torch_backend.TorchBackend(HARDWARE, data_dir)
    yield mlx_backend.MlxBackend(HARDWARE, data_dir)


def test_variations_and_drafts_are_the_same_pictures(tiny_packs: Path, tmp_path: Path) -> None:
    draft = Request(PROMPT, str(tiny_packs / "ternary"), 3, 64, 32, steps=2, variations=((7, 0.5), (8, 0.3)))
    refined = replace(draft, width=128, height=64, variations=(), draft=draft, start=1)
    torch_made, mlx_made = ([picture(each, made) for made in (draft, refined)] for each in both(tmp_path))
    for one, other in zip(torch_made, mlx_made, strict=True):
        assert psnr(one, other) >= 50


@pytest.mark.slow
def test_a_pack_imported_from_gemlite_draws_the_same_picture(tmp_path: Path) -> None:
    """Carried from a machine with an NVIDIA card to a Mac: float32 scales, and a text encoder that was HQQ."""
    source = tmp_path / "source"
    layouts.write_gemlite(source, Content(small(), "ternary"), write_tokenizer)
    notes = {"label": "tiny", "sizes": [[64, 64]], "text_length": 64, "hidden_states": [1, 2, 3]}
    (source / "niwaki.json").write_text(json.dumps(notes))
    assert list(importers.import_folder(source, tmp_path / "pack"))
    request = Request("a red circle", str(tmp_path / "pack"), seed=3, width=64, height=64, steps=1)
    one, other = (picture(each, request) for each in both(tmp_path))
    assert psnr(one, other) >= 50


def seedling(variant: str, size: int) -> Request:
    return Request(PROMPT, f"seedling-{variant}", seed=3, width=size, height=size)


def test_the_seedling_draws_the_same_picture(tmp_path: Path) -> None:
    one, other = (picture(each, replace(seedling("ternary", 64), steps=2)) for each in both(tmp_path))
    assert psnr(one, other) >= 50


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ternary", "binary", "dense"])
@pytest.mark.parametrize(("dtype", "least"), [("float32", 50), ("bfloat16", 35)])
def test_seedlings_in_both_number_formats(
    variant: str, dtype: str, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = plan.plan
    monkeypatch.setattr(plan, "plan", lambda *how, **more: replace(decide(*how, **more), dtype=dtype))
    one, other = (picture(each, seedling(variant, 128 if dtype == "float32" else 64)) for each in both(tmp_path))
    assert psnr(one, other) >= least
