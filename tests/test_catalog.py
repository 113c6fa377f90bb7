"""Names, folders, and what is said about models that aren't there."""

import json
from pathlib import Path

import pytest

from engine import catalog
from engine.types import VARIANTS, BadRequest

RELEASES = Path("/work/shared/bonsai-release-files.json")


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree with one seedling in it."""
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "assets")
    _install(tmp_path / "assets" / "seedling-ternary")
    return tmp_path


def _install(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")


def test_every_model_is_complete() -> None:
    assert list(catalog.MODELS) == [
        "seedling-ternary", "seedling-binary", "seedling-dense", "bonsai-ternary", "bonsai-binary", "klein-dense",
    ]  # fmt: skip
    for id, model in catalog.MODELS.items():
        assert model.id == id and model.variant in VARIANTS and id.endswith(model.variant)
        assert model.demo == id.startswith("seedling") == ("demo" in model.label)
        assert (model.repository is None) == (model.bytes is None)


def test_a_release_is_pinned_by_a_whole_commit() -> None:
    assert catalog.MODELS["bonsai-ternary"].revision == "2c24c81b934a658ba5590cf39088ba929985b4a8"
    assert all(len(model.revision) == 40 for model in catalog.MODELS.values() if model.revision)


def test_shipped_models_lie_beside_the_source_and_others_in_the_data_folder(shipped: Path) -> None:
    data = shipped / "data"
    assert catalog.find("seedling-ternary", data) == shipped / "assets" / "seedling-ternary"
    _install(data / "models" / "bonsai-binary")
    assert catalog.find("bonsai-binary", data) == data / "models" / "bonsai-binary"
    assert catalog.installed(data) == ("seedling-ternary", "bonsai-binary")


def test_the_default_is_the_biggest_that_is_there(shipped: Path) -> None:
    data = shipped / "data"
    assert catalog.default_id(data) == "seedling-ternary"
    for bigger in ("klein-dense", "bonsai-binary", "bonsai-ternary"):
        _install(data / "models" / bigger)
        assert catalog.default_id(data) == bigger


def test_nothing_installed_still_has_a_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "nowhere")
    assert catalog.default_id(tmp_path) == "seedling-ternary"
    with pytest.raises(BadRequest, match="seedling-ternary is not installed: get a complete copy .* installed: none"):
        catalog.find("seedling-ternary", tmp_path)


def test_any_folder_is_a_model(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert catalog.find(str(shipped / "assets"), shipped) == shipped / "assets"
    monkeypatch.setenv("HOME", str(shipped))
    assert catalog.find("~/assets", shipped) == shipped / "assets"


@pytest.mark.parametrize("name", ["bonsai", "", "  ", "nul\0l", "x" * 5000, "~nobody-of-that-name/x"])
def test_an_unknown_model_is_refused_with_the_known_ones(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="unknown model .*; known: seedling-ternary, .*klein-dense"):
        catalog.find(name, tmp_path)


def test_a_known_model_that_is_missing_says_where_its_files_go(shipped: Path) -> None:
    words = "run `app.py models get bonsai-ternary` .prism-ml/.*-ternary-4B-mlx-2bit.; installed: seedling-ternary"
    with pytest.raises(BadRequest, match=words):
        catalog.find("bonsai-ternary", shipped / "data")


@pytest.mark.skipif(not RELEASES.exists(), reason="the shared page of released files is not on this machine")
def test_bytes_and_revisions_agree_with_the_shared_page() -> None:
    known = json.loads(RELEASES.read_text())
    for id in ("bonsai-ternary", "bonsai-binary"):
        model = catalog.MODELS[id]
        release = known[model.repository]
        assert model.revision == release["revision"]
        assert model.bytes == release["total_bytes_of_weights_tokenizer_and_json"]
