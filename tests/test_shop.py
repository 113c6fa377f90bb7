"""Models on the page: listed with sizes, fetched with progress, stopped, and offered as soon as they are there."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine import catalog, download, hardware
from engine.download import Terms
from engine.install import Installed
from engine.transfer import Progress
from engine.types import BadRequest, Request
from engine.worker import Worker
from studio import models
from studio.page import Page, Tab
from studio.settings import Settings
from studio.shop import Shop, memory_words
from tests.serving import OFFERS
from tests.test_extras import look_of

TERMS = Terms("bonsai-ternary", "some/repo", "abc", True, "Apache-2.0", "text", "", 12, 3_900_000_000)
TAB = Tab("session")


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    settings = Settings(tmp_path, backend="fake")
    page: Any = SimpleNamespace(settings=settings, offers={offer.model: offer for offer in OFFERS})
    page.refused = lambda error: Page.refused(page, error)
    page.jobs = SimpleNamespace(foresee=lambda request: 0)
    return Shop(page)


def coming(*items: object) -> Any:
    def get(model: str, data_dir: Path) -> Iterator[object]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return get


def test_every_known_model_is_listed_with_its_size(shop: Shop) -> None:
    listed = {model["label"]: model for model in shop.shown()["models"]}
    assert listed[catalog.MODELS["bonsai-ternary"].label]["state"] == "not here, 3.9 GB to download"
    assert listed[OFFERS[0].label]["state"] == "installed" and listed[OFFERS[0].label]["about"] == OFFERS[0].why
    assert ("Bonsai Image 4B, ternary weights (3.9 GB)", "bonsai-ternary") in shop.choices()


def test_a_download_tells_terms_progress_and_offers_the_model(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    new = OFFERS[0].__class__("bonsai-ternary", "Bonsai", False, "cpu: here", ((512, 512),), 4)
    monkeypatch.setattr(models, "offers", lambda _: (*OFFERS, new))
    progress = Progress("transformer/a", 1_950_000_000, 3_900_000_000, rate=5e6, seconds_left=390)
    broken = Progress("transformer/a", 1_950_000_000, 3_900_000_000, waiting=4)
    done = Installed("bonsai-ternary", Path("/data/models/bonsai-ternary"), 3_900_000_000)
    monkeypatch.setattr(download, "get", coming(TERMS, progress, broken, done))
    looks = list(shop.get(TAB, "bonsai-ternary"))
    said = [look["shop_said"] for look in looks]
    assert "licence Apache-2.0: 12 files, 3.9 GB" in said[0]
    assert "50% of 3.9 GB: transformer/a, 5.0 MB/s, about 6 minutes left" in said[1]
    assert said[2].endswith("the connection broke, trying again in 4 s")
    assert said[-1] == "bonsai-ternary is installed: 3.9 GB in /data/models/bonsai-ternary."
    assert "bonsai-ternary" in shop.page.offers
    assert (looks[-1]["model"], looks[-1]["grid_models"]) == (None, None)  # both lists are made anew


def test_a_download_can_be_stopped_and_fails_with_a_sentence(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "get", coming(TERMS, TERMS, TERMS))
    run = shop.get(TAB, "bonsai-ternary")
    next(run)
    shop.stop(TAB, "bonsai-ternary")
    assert look_of(run)["shop_said"] == "Stopped. Download goes on where it stopped."
    monkeypatch.setattr(download, "get", coming(BadRequest("the disk is too small: free 3 GB")))
    assert look_of(shop.get(TAB, "bonsai-ternary"))["shop_said"] == "The disk is too small: free 3 GB."
    assert "no model is chosen" in look_of(shop.get(TAB, None))["shop_said"].lower()


def test_a_folder_is_imported_and_offered(shop: Shop, tiny_packs: Path) -> None:
    shop.stop(TAB, None)  # pressed with nothing chosen, it stops nothing that begins later
    look = look_of(shop.bring(TAB, str(tiny_packs / "ternary")))
    assert "is installed" in look["shop_said"], look
    assert list((shop.page.settings.data_dir / "models").glob("[!.]*/model_index.json"))
    assert "no folder is named" in look_of(shop.bring(TAB, " "))["shop_said"].lower()
    assert look_of(shop.bring(TAB, "/no/such/folder"))["shop_said"]


def test_on_a_space_nothing_is_fetched(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_ID", "somebody/niwaki")
    assert "on a space" in look_of(shop.bring(TAB, "/etc"))["shop_said"].lower()


def test_memory_is_predicted_before_queueing(
    shop: Shop, tiny_packs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Worker("torch", data_dir=shop.page.settings.data_dir)  # starts no process before the first picture
    shop.page.jobs = jobs = SimpleNamespace(foresee=lambda request: engine.foresee(engine.complete(request)))
    small = Request("a", str(tiny_packs / "ternary"), 0, 64, 64)
    assert "GB of memory" in memory_words(jobs, small)
    assert memory_words(jobs, Request("a", "bonsai-ternary", 0, 64, 64)).startswith("bonsai-ternary is not installed")
    room = engine.foresee(engine.complete(small)) + (1 << 20)
    monkeypatch.setattr(hardware, "available_bytes", lambda: room)
    refused = memory_words(jobs, replace(small, width=1024, height=1024))
    assert re.search(r"a 1024x1024 picture .* needs .* the largest size that fits is (\d+)x\1", refused)
    monkeypatch.undo()
    assert shop.foresee(TAB, None) == {"foresee": ""}
    assert "GB of memory." in shop.foresee(TAB, Request("a", str(tiny_packs / "ternary"), 0, 64, 64))["foresee"]
