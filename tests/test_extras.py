"""A dropped PNG, an export, a verification, and pictures that follow the typing, without a browser."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.types import Request
from studio import export, extras, files, library, relatives
from studio.extras import Extras
from studio.history import History
from studio.page import Page, Tab
from studio.rows import LOCAL
from studio.runs import Runs
from studio.settings import Settings
from tests.rows import InlineEngine, add_image, queue
from tests.serving import OFFERS

CONTROLS = {
    "size": "128x128", "quality": "full", "seed": 3, "lock": True, "steps": 4, "model": "seedling-ternary", "base": 0,
    "past": None,
}  # fmt: skip


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Extras]:
    with queue(tmp_path / "data", InlineEngine()) as jobs:
        page = Page(jobs._history, jobs, Settings(tmp_path / "data", backend="fake"), OFFERS)
        yield Extras(page, Runs(page))


@pytest.fixture
def tab(made: Extras) -> Tab:
    return made.page.tab("session")


def look_of(looks: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Everything that a stream of Looks says, the last word of each part."""
    whole: dict[str, Any] = {}
    for look in looks:
        whole |= look
    return whole


def test_a_dropped_png_restores_every_setting_and_says_what_differs(made: Extras, tab: Tab, tmp_path: Path) -> None:
    elsewhere = History(tmp_path / "elsewhere")
    first = add_image(elsewhere, "a circle", seed=7)
    varied = relatives.vary(replace(first.request, prompt="a red circle"), "subtle", seed=9)
    last = add_image(elsewhere, request=varied, parent=first.id, op="vary subtle")
    dropped = shutil.copy(last.path, tmp_path / "from a friend.png")
    elsewhere.close()

    look = made.dropped(tab, str(dropped), "another prompt", CONTROLS)
    assert (look["prompt"], look["seed"], look["steps"], look["size"]) == (
        "a red circle", 7, 4, ("seedling-ternary", "64x32"),
    )  # fmt: skip
    assert look["stage"]["a"]["alt"] == "a red circle" and look["drop"] is None
    said = look["progress"]["text"]
    assert said.startswith("From a friend.png: other words, seed 3 → 7, width 128 → 64, height 128 → 32")
    assert said.endswith("; 1 earlier picture in its chain, which More draws again.")
    history = made.page.history
    assert [row.prompt for row in history.revisions(LOCAL, tab.project)] == ["a circle", "a red circle"]
    (image,) = library.page(history, LOCAL).images
    assert image.request == varied and image.op == "vary subtle"
    made.dropped(tab, str(dropped), "", CONTROLS)
    assert library.count(history, LOCAL) == 1  # the same file again is the same picture

    assert any(action["name"] == "ancestors" for action in look["stage"]["actions"])
    look = look_of(made.ancestors(tab, image))
    assert look["progress"]["text"] == "1 earlier picture drawn again."
    assert [row["how"] for row in look["tree"]["rows"]] == ["", "vary subtle"]
    drawn = history.image(LOCAL, history.image(LOCAL, image.id).parent or 0)
    assert drawn.request == first.request and drawn.project == image.project
    assert look_of(made.ancestors(tab, image))["progress"]["text"] == "0 earlier pictures drawn again."
    stage = made.page.stage(tab, drawn)["stage"]
    assert not any(action["name"] == "ancestors" for action in stage["actions"])  # made here: nothing to draw


def test_the_settings_as_they_are_and_a_missing_model_are_said(made: Extras, tab: Tab, tmp_path: Path) -> None:
    elsewhere = History(tmp_path / "elsewhere")
    same = add_image(elsewhere, request=Request("a circle", "seedling-ternary", 3, 128, 128, 4))
    strange = add_image(elsewhere, request=Request("a circle", "klein-dense", 3, 128, 128, 4))
    look = made.dropped(tab, str(same.path), "a circle", CONTROLS)
    assert "the settings are as they were" in look["progress"]["text"]
    look = made.dropped(tab, str(strange.path), "a circle", CONTROLS)
    assert "its model klein-dense is not installed" in look["progress"]["text"]
    assert look["size"] == (OFFERS[0].model, "128x128")
    elsewhere.close()


def test_a_file_that_is_no_picture_of_ours_is_a_sentence(made: Extras, tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("hello")
    look = made.dropped(tab, str(tmp_path / "notes.png"), "", CONTROLS)
    assert look["progress"]["state"] == "error" and look["progress"]["text"] == "Notes.png is not a PNG picture."
    assert look["drop"] is None and "stage" not in look
    assert made.dropped(tab, None, "", CONTROLS) == {}


def test_export_makes_a_zip_with_an_address(made: Extras, tab: Tab) -> None:
    assert "no picture is kept" in made.export(tab)["progress"]["text"].lower()
    image = add_image(made.page.history, "a circle")
    made.page.history.keep(LOCAL, [image.id], True)
    look = made.export(tab)
    (path,) = made.page.settings.cache.rglob("*.zip")
    assert look["parcel"] == {"url": files.parcel(path)} and path.parent.parent.name == export.FOLDER
    assert look["progress"]["text"].startswith("1 picture, ")


def test_verify_says_the_same_and_a_changed_file_differs(made: Extras, tab: Tab) -> None:
    jobs, history = made.page.jobs, made.page.history
    (job,) = jobs.submit(LOCAL, tab.project, Request("a circle", "seedling-ternary", 3, 64, 64, 2))
    (*_, over) = jobs.watch(LOCAL, job.id)
    image = history.image(LOCAL, over.image or 0)
    look = look_of(made.verify(tab, image))
    assert look["progress"]["text"] == "Verified: the same picture, pixel by pixel."
    other = add_image(history, request=image.request, pixels=np.zeros((64, 64, 3), np.uint8))
    assert "Verified: a different picture" in look_of(made.verify(tab, other))["progress"]["text"]
    assert library.count(history, LOCAL) == 2  # what was drawn to compare isn't kept


def test_typing_shows_a_picture_and_only_the_settled_one_stays(
    made: Extras, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "DEBOUNCE", 0.01)
    monkeypatch.setattr(extras, "SETTLED", 0.01)
    history = made.page.history
    overtaken = made.typed(tab, True, "a red circ", CONTROLS, {})
    shown = next(overtaken)
    assert shown["stage"]["a"]["url"].startswith("data:image/webp;base64,") and not shown["stage"]["can_vary"]
    looks = list(made.typed(tab, True, "a red circle", CONTROLS, {}))
    assert list(overtaken) == []  # a newer key came: no revision of half a word
    assert looks[0]["stage"]["a"]["alt"] == "a red circle"
    (image,) = library.page(history, LOCAL).images
    assert image.request.prompt == "a red circle" and looks[-1].get("stage", looks[0]["stage"])
    assert [row.prompt for row in history.revisions(LOCAL, tab.project)] == ["a red circle"]
    assert history.jobs(LOCAL)[0].request == image.request


def test_off_or_empty_nothing_is_drawn(made: Extras, tab: Tab) -> None:
    assert list(made.typed(tab, False, "a red circle", CONTROLS, {})) == []
    assert list(made.typed(tab, True, "  ", CONTROLS, {})) == []
    assert library.count(made.page.history, LOCAL) == 0
