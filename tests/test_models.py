"""Which models the page offers, and what each declares."""

from pathlib import Path

import pytest

from engine import catalog
from engine.prompt import unknown_words
from engine.types import BadRequest
from studio import models, page
from studio.settings import Settings
from tests.serving import OFFERS


def test_a_draft_has_exactly_the_shape_of_its_size() -> None:
    offer = OFFERS[2]
    assert [offer.draft(*size) for size in ((512, 512), (1248, 832), (1024, 512), (160, 96))] == [
        (256, 256), (576, 384), (512, 256), (160, 96),
    ]  # fmt: skip


def test_offers_come_from_the_packs(tmp_path: Path, tiny_packs: Path) -> None:
    offers = models.offers(Settings(tmp_path, model=str(tiny_packs / "binary"), backend="torch"))
    assert offers[0].model == str(tiny_packs / "binary")
    assert offers[0].label == "Tiny binary test pack"
    assert (offers[0].demo, offers[0].steps, offers[0].sizes[0], offers[0].variant) == (True, 4, (64, 64), "binary")
    assert offers[0].words
    assert "cpu" in offers[0].why or "cuda" in offers[0].why
    with pytest.raises(BadRequest):
        models.offers(Settings(tmp_path, model=str(tmp_path)))


def test_a_damaged_pack_is_left_out(
    tmp_path: Path, tiny_packs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "none")
    folder = tmp_path / "models" / "bonsai-binary"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    offers = models.offers(Settings(tmp_path, model=str(tiny_packs / "ternary"), backend="torch"))
    assert [offer.model for offer in offers] == [str(tiny_packs / "ternary")]
    assert "bonsai-binary is not offered" in caplog.text
    assert [model.id for model in models.installable(tmp_path)] == ["bonsai-ternary", "klein-dense"]


def test_the_examples_use_only_words_that_the_shipped_model_knows(tmp_path: Path) -> None:
    if "seedling-ternary" not in catalog.installed(tmp_path):
        pytest.skip("the seedling has not been exported yet")
    from engine.packs import open_pack

    notes = open_pack(catalog.find("seedling-ternary", tmp_path)).notes
    shown = [text for lang, text in page.EXAMPLES if lang in notes.languages]
    assert len(shown) >= 4
    assert {text: unknown_words(text, notes.vocabulary) for text in shown} == dict.fromkeys(shown, ())
