"""What comes and goes in a real Chromium: an export, a dropped PNG, live pictures, grids and templates."""

import threading
import zipfile
from pathlib import Path
from typing import Any

from studio import library
from studio.rows import LOCAL
from tests.browser.conftest import playwright
from tests.browser.steps import NEW, Hand, make, make_grid, settle, to_the_stage, wait_for
from tests.serving import Served

expect = playwright.expect

def test_the_keepers_leave_with_one_click(tab: Any, page_server: Served, tmp_path: Path) -> None:
    make(tab, "a red circle")
    to_the_stage(tab)
    tab.keyboard.press("k")
    expect(tab.locator("#strip .export")).to_be_enabled()
    hand = Hand(tab)
    with tab.expect_download() as download:
        hand.click("#strip .export")
    assert hand.clicks == 1 and download.value.suggested_filename.endswith("-kept.zip")
    download.value.save_as(tmp_path / "kept.zip")
    with zipfile.ZipFile(tmp_path / "kept.zip") as archive:
        assert archive.testzip() is None and "pictures.csv" in archive.namelist()
        assert "a red circle" in archive.read("pictures.csv").decode("utf-8-sig")


def test_one_drop_restores_a_picture_and_says_what_differs(tab: Any, page_server: Served) -> None:
    make(tab, "a green circle")
    image = library.page(page_server.history, LOCAL).images[0]
    tab.locator("#prompt textarea").fill("something else")
    hand = Hand(tab)
    hand.drop(image.path.read_bytes())
    expect(tab.locator("#progress")).to_contain_text("From-a-friend.png: other words")
    expect(tab.locator("#prompt textarea")).to_have_value("a green circle")
    expect(tab.locator(NEW)).to_have_attribute("alt", "a green circle")
    assert hand.clicks == 1


def test_a_dropped_stranger_is_a_sentence(tab: Any) -> None:
    Hand(tab).drop(b"no picture")
    expect(tab.locator("#progress .error")).to_contain_text("is not a PNG picture")


def test_live_pictures_follow_the_typing_and_only_the_settled_one_stays(
    tab: Any, page_server: Served, held: threading.Event
) -> None:
    """`held` keeps a live picture from its end, and so from settling, however slow the typing is."""

    def wait_for_live(prompt: str) -> None:
        while [shot.request.prompt for shot in list(page_server.jobs._live._shots.values())] != [prompt]:
            tab.wait_for_timeout(20)

    history = page_server.history
    held.set()
    make(tab, "a held circle")
    settle(tab)
    held.clear()
    pictures, jobs = library.count(history, LOCAL), len(history.jobs(LOCAL))
    tab.locator("#live input").check()
    wait_for_live("a held circle")
    box = tab.locator("#prompt textarea")
    box.fill("a held circle on")
    wait_for_live("a held circle on")
    box.fill("a circle on blue")
    tab.wait_for_function("s => document.querySelector(s)?.src.startsWith('data:image')", arg=NEW)
    wait_for(tab, "a circle on blue")
    tab.wait_for_function("s => !document.querySelector(s)?.src.startsWith('data:')", arg=NEW)
    settle(tab)
    newest = library.page(history, LOCAL).images[0].request
    assert newest.prompt == "a circle on blue" and history.find(LOCAL, newest) is not None
    assert (library.count(history, LOCAL) - pictures, len(history.jobs(LOCAL)) - jobs) == (1, 1)


def test_a_grid_with_labels_and_a_filled_template(tab: Any, page_server: Served) -> None:
    make_grid(tab, "a red circle\na <b>blue</b> circle", "31 32", pictures=4)
    expect(tab.locator("#cells thead th")).to_have_text(["seed 31", "seed 32"])
    expect(tab.locator("#cells tbody th")).to_have_text(["a red circle", "a <b>blue</b> circle"])
    tab.get_by_role("tab", name="Templates").click()
    tab.locator("#slots textarea").fill("a {colour} ring")
    tab.locator("#table textarea").fill("colour\nred\nblue")
    expect(tab.locator("#bill")).to_contain_text("2 pictures")
    tab.locator("#fill").click()
    expect(tab.locator("#bill")).to_contain_text("2 pictures are queued")
    settle(tab)
    assert {"a red ring", "a blue ring"} <= {i.request.prompt for i in library.page(page_server.history, LOCAL).images}
    tab.get_by_role("tab", name="Models").click()
    expect(tab.locator("#shop li").first).to_contain_text("Seedling")
    tab.keyboard.press("Escape")
    expect(tab.locator("#workshop")).to_be_hidden()
