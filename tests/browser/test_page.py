"""What a person sees and does on the page, in a real Chromium."""

import http.client
import re
import secrets
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from studio import page, pictures
from studio.rows import LOCAL
from tests.browser.conftest import OpenTab
from tests.browser.steps import NASTY, NEW, PREVIOUS, ask_for, expect, make, settle, to_the_stage, wait_for
from tests.serving import Served


def saved(page_server: Served) -> set[Path]:
    return set(page_server.settings.pictures.rglob("*.png"))


def overflow(tab: Any) -> tuple[int, int]:
    """Pixels by which the page is wider and taller than the window."""
    root = "document.documentElement"
    return tuple(tab.evaluate(f"[{root}.scrollWidth - innerWidth, {root}.scrollHeight - innerHeight]"))


def fetch(address: str) -> tuple[int, bytes]:
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    connection.request("GET", parts.path)
    answer = connection.getresponse()
    status, body = answer.status, answer.read()
    connection.close()
    return status, body


def test_enter_makes_the_picture_and_its_file_keeps_the_recipe(tab: Any, page_server: Served) -> None:
    before = saved(page_server)
    make(tab, "two red circles on a blue background")
    expect(tab.locator(NEW)).to_have_js_property("naturalWidth", 256)
    expect(tab.locator("#caption")).to_contain_text("256 × 256")
    (path,) = saved(page_server) - before
    assert pictures.read_recipe(path)["prompt"] == "two red circles on a blue background"
    source = page_server.address.rstrip("/") + tab.locator(NEW).get_attribute("src")
    assert fetch(source) == (200, path.read_bytes())  # not a WebP, and with its recipe
    assert str(page_server.settings.data_dir) not in source  # an address tells nothing about the disk
    guessed = re.sub(r"-[0-9a-f]{20}", "-" + "0" * 20, source)
    assert guessed != source and fetch(guessed)[0] == 404


def test_the_download_is_the_png_itself(tab: Any, tmp_path: Path) -> None:
    make(tab, "a green circle")
    tab.locator("#stage .more").click()
    with tab.expect_download() as download:
        tab.get_by_text("Download the PNG").click()
    download.value.save_as(tmp_path / "a.png")
    assert pictures.read_recipe(tmp_path / "a.png")["prompt"] == "a green circle"
    assert re.fullmatch(r"niwaki-r\w+-\d+\.png", download.value.suggested_filename)


def test_the_second_run_is_a_slider_with_the_words_that_changed(tab: Any) -> None:
    make(tab, "a red circle on a blue background")
    tab.locator("#prompt textarea").fill("a red triangle on a blue background")
    expect(tab.locator("#diff del")).to_have_text("circle")
    expect(tab.locator("#diff ins")).to_have_text("triangle")
    tab.locator("#prompt textarea").press("Enter")
    wait_for(tab, "a red triangle on a blue background")
    expect(tab.locator(PREVIOUS)).to_have_attribute("alt", "a red circle on a blue background")
    expect(tab.locator("#caption del")).to_have_text("circle")
    expect(tab.locator("#caption .facts-line")).to_contain_text(re.compile(r"\d\.\d\d s"))
    split = tab.locator("#stage .split")
    split.focus()
    before = tab.locator("#stage .new").evaluate("e => getComputedStyle(e).clipPath")
    split.press("ArrowRight")
    assert tab.locator("#stage .new").evaluate("e => getComputedStyle(e).clipPath") != before


def test_keys_act_on_the_picture_and_never_while_typing(tab: Any, page_server: Served) -> None:
    make(tab, "a red circle kxvfcrl")  # letters in a prompt are letters
    assert tab.locator("#stage .keep").get_attribute("aria-pressed") == "false"
    settle(tab)
    to_the_stage(tab)
    tab.keyboard.press("k")
    assert tab.locator("#stage .keep").get_attribute("aria-pressed") == "true"  # at once, before Python knows
    expect(tab.locator("#strip .export")).to_contain_text("Export kept (1)")
    tab.keyboard.press("x")
    expect(tab.locator("#strip .export")).to_contain_text("Export kept (0)")
    expect(tab.locator("#tree .rejected")).to_have_count(1)
    tab.keyboard.press("l")
    expect(tab.locator("#lock input")).not_to_be_checked()
    tab.keyboard.press("l")
    tab.keyboard.press("?")
    expect(tab.locator("dialog.keys")).to_be_visible()
    tab.locator("dialog.keys .letters").uncheck()
    tab.keyboard.press("Escape")
    to_the_stage(tab)
    tab.keyboard.press("k")
    assert tab.locator("#stage .keep").get_attribute("aria-pressed") == "false"
    tab.evaluate("localStorage.clear()")


def test_enter_that_ends_a_composed_word_does_not_run(tab: Any, page_server: Served) -> None:
    before = len(page_server.history.jobs(LOCAL))
    tab.locator("#prompt textarea").fill("नीला")
    tab.evaluate(
        """const box = document.querySelector('#prompt textarea'), options = {key: 'Enter', bubbles: true};
        box.dispatchEvent(new KeyboardEvent('keydown', {...options, isComposing: true, shiftKey: true}));
        box.dispatchEvent(new KeyboardEvent('keydown', {...options, isComposing: true}));"""
    )
    tab.locator("#prompt textarea").press("Alt+Enter")
    expect(tab.locator("#prompt textarea")).to_have_value("नीला\n")
    assert len(page_server.history.jobs(LOCAL)) == before


def test_an_empty_prompt_is_one_sentence(tab: Any, page_server: Served) -> None:
    before = saved(page_server)
    ask_for(tab, "   ")
    expect(tab.locator("#progress .error")).to_contain_text("The prompt is empty")
    assert "Traceback" not in tab.locator("body").inner_text()
    assert saved(page_server) == before
    make(tab, "a red circle")


def test_progress_is_told_and_stop_stops(tab: Any, page_server: Served, held: threading.Event) -> None:
    make(tab, "a blue circle")
    settle(tab)
    before = saved(page_server)
    ask_for(tab, "a held blue circle")
    expect(tab.locator("#progress")).to_contain_text(re.compile(r"Step \d of 4"))
    expect(tab.locator("#progress img")).to_have_js_property("naturalWidth", 24)  # what is coming, where steps are slow
    tab.locator("#open-library").click()
    tab.keyboard.press("Escape")  # closes the library and nothing else
    expect(tab.locator("#library")).to_be_hidden()
    expect(tab.locator("#progress .busy")).to_have_count(1)
    tab.locator("#stop").click()
    expect(tab.locator("#progress")).to_contain_text("Stopped")
    settle(tab)
    assert saved(page_server) == before


def test_a_reload_and_another_tab_keep_everything(open_tab: OpenTab) -> None:
    tab = open_tab()
    make(tab, "a green circle")
    tab.locator("#prompt textarea").fill("a green circle and what I am typ")
    expect(tab.locator("#diff ins")).to_contain_text("typ")
    address = tab.url
    tab.context.close()
    again = open_tab()
    expect(again.locator("#prompt textarea")).to_have_value("a green circle and what I am typ")
    expect(again.locator(NEW)).to_have_attribute("alt", "a green circle")
    assert "project=" in address


def test_the_library_finds_and_opens(tab: Any) -> None:
    word = secrets.token_hex(4)  # another try must not find this one's picture
    make(tab, f"a yellow triangle {word}")
    settle(tab)
    tab.locator("#open-library").click()
    tab.locator("#search input, #search textarea").first.fill(f"yellow triangle {word[:4]}")
    expect(tab.locator("#found")).to_contain_text("1 to 1 of 1")
    tab.locator("#grid .thumb").click()
    expect(tab.locator("#library")).not_to_be_visible()
    expect(tab.locator(NEW)).to_have_attribute("alt", f"a yellow triangle {word}")


@pytest.mark.parametrize("nasty", NASTY)
def test_what_people_type_is_never_markup(tab: Any, nasty: str) -> None:
    make(tab, nasty)
    words = nasty.split()
    expect(tab.locator("#caption")).to_contain_text(words[-1])
    expect(tab.locator("#revisions")).to_contain_text(words[0])
    expect(tab.locator("#strip .thumb").last).to_have_attribute("aria-label", re.compile(re.escape(nasty) + "$"))
    tab.locator("#open-library").click()
    expect(tab.locator("#grid")).to_contain_text(words[0])
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hit") is None
    assert tab.locator("#caption img, #revisions img, #diff img").count() == 0


def test_the_first_screen_needs_no_scrolling_and_nothing_moves(open_tab: OpenTab) -> None:
    tab = open_tab(viewport={"width": 1280, "height": 800})
    assert overflow(tab) == (0, 0)
    make(tab, "a red astronaut")
    frame = tab.locator("#stage .frame").bounding_box()
    make(tab, "a blue astronaut")
    assert overflow(tab) == (0, 0)
    assert tab.locator("#stage .frame").bounding_box() == frame


# Of one instant: while they are asked for one by one, the progress that goes lets them sink.
SPANS = """parts => parts.map(part => {
    const box = document.querySelector(part).getBoundingClientRect();
    return [box.top, box.bottom];
})"""


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_scrolls_in_one_direction_only(open_tab: OpenTab, width: int) -> None:
    tab = open_tab(viewport={"width": width, "height": 844}, is_mobile=True, has_touch=True)
    assert overflow(tab)[0] == 0
    make(tab, "a red astronaut with-a-word-that-is-longer-than-any-telephone-is-wide-and-has-no-place-to-break")
    settle(tab)  # the strip, which stays at the bottom, comes after the picture
    assert overflow(tab)[0] == 0
    box = tab.locator(NEW).bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    stay = ["#prompt textarea", "#generate", "#strip .thumb"]  # in this order, none over another
    for place in (0, 100_000):
        tab.evaluate("y => window.scrollTo(0, y)", place)
        spans = tab.evaluate(SPANS, stay)
        assert all(top >= 0 and bottom <= 844 for top, bottom in spans)
        assert all(upper[1] <= lower[0] for upper, lower in pairwise(spans)), spans
    last = tab.locator("#sheets").bounding_box()
    assert last["y"] + last["height"] <= tab.locator("#ask").bounding_box()["y"]  # the page ends above what stays
    tab.evaluate("window.scrollTo(0, 0)")
    assert tab.locator("#stage .frame").bounding_box()["y"] < tab.locator("#ask").bounding_box()["y"] / 2


def luminance(tab: Any) -> float:
    red, green, blue = (
        int(part) / 255 for part in tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")[:3]
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_dark_mode_follows_the_system(open_tab: OpenTab) -> None:
    assert luminance(open_tab(color_scheme="dark")) < 0.2
    assert luminance(open_tab(color_scheme="light")) > 0.8


def test_an_empty_project_offers_prompts_that_run(tab: Any) -> None:
    tab.locator("#project input").click()
    tab.get_by_role("option", name="New project").click()
    examples = tab.locator("#stage .empty [data-do=example]")
    expect(examples).to_have_count(4)
    prompt = examples.first.inner_text()
    assert prompt == page.EXAMPLES[0][1]
    examples.first.click()
    wait_for(tab, prompt)
    expect(tab.locator("#prompt textarea")).to_have_value(prompt)
