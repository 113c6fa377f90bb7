"""What a person sees and does on the page, in a real Chromium."""

import http.client
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from studio import pictures, ui
from tests.browser.conftest import OpenTab, playwright
from tests.serving import Served

expect = playwright.expect
STEP = re.compile(r"Step \d of 4")


def ask_for(tab: Any, prompt: str) -> None:
    tab.locator("#prompt textarea").fill(prompt)
    tab.locator("#prompt textarea").press("Enter")


def wait_until_done(tab: Any) -> None:
    expect(tab.locator("#progress .progress")).to_have_class("progress done")


def saved(page_server: Served) -> set[Path]:
    return set(page_server.settings.pictures.rglob("*.png"))


def overflow(tab: Any) -> tuple[int, int]:
    """Pixels by which the page is wider and taller than the window."""
    root = "document.documentElement"
    return tuple(tab.evaluate(f"[{root}.scrollWidth - innerWidth, {root}.scrollHeight - innerHeight]"))


def test_enter_makes_the_picture_and_its_file_keeps_the_recipe(tab: Any, page_server: Served) -> None:
    before = saved(page_server)
    ask_for(tab, "two red circles on a blue background")
    image = tab.locator("#picture img")
    expect(image).to_have_attribute("alt", "two red circles on a blue background")
    expect(image).to_have_js_property("naturalWidth", 256)
    expect(tab.locator("#note .caption")).to_contain_text("256 × 256, seed 0, 4 steps")
    (path,) = saved(page_server) - before
    assert pictures.read_recipe(path)["prompt"] == "two red circles on a blue background"
    expect(tab.locator("#note .where")).to_contain_text(str(path))
    source = urlsplit(image.get_attribute("src"))
    connection = http.client.HTTPConnection(source.netloc, timeout=10)
    connection.request("GET", source.path)
    assert connection.getresponse().read() == path.read_bytes()  # not a WebP, and with its recipe
    connection.close()
    assert Path(unquote(source.path).partition("file=")[2]).is_relative_to(page_server.settings.cache)


def test_the_download_button_gives_the_png_itself(tab: Any, page_server: Served, tmp_path: Path) -> None:
    ask_for(tab, "a green circle")
    wait_until_done(tab)
    with tab.expect_download() as download:
        tab.locator("#picture").get_by_label("Download").click()
    download.value.save_as(tmp_path / "a.png")
    assert pictures.read_recipe(tmp_path / "a.png")["prompt"] == "a green circle"


def test_progress_is_told_step_by_step(tab: Any) -> None:
    tab.evaluate(
        """window.seen = [];
        const look = () => window.seen.push(document.querySelector('#progress p').innerText);
        const all = {childList: true, subtree: true, characterData: true};
        new MutationObserver(look).observe(document.querySelector('#progress'), all);"""
    )
    ask_for(tab, "a slow blue circle")
    expect(tab.locator("#generate")).to_be_disabled()
    expect(tab.locator("#progress progress")).to_have_attribute("max", "4")
    wait_until_done(tab)
    seen = list(dict.fromkeys(tab.evaluate("window.seen")))
    assert [text for text in seen if text.startswith("Step")] == [f"Step {index} of 4" for index in (1, 2, 3, 4)]
    expect(tab.locator("#generate")).to_be_enabled()


def test_unknown_words_are_named_under_the_picture(tab: Any) -> None:
    ask_for(tab, "a red astronaut on a horse")
    expect(tab.locator("#note .unknown")).to_contain_text("does not know “astronaut” and “horse”")
    ask_for(tab, "a red circle")
    expect(tab.locator("#note .unknown")).to_have_count(0)


def test_an_empty_prompt_is_one_sentence(tab: Any, page_server: Served) -> None:
    before = saved(page_server)
    ask_for(tab, "   ")
    error = tab.locator("#progress .error")
    expect(error).to_contain_text("The prompt is empty")
    assert "Traceback" not in tab.locator("body").inner_text()
    expect(tab.locator("#generate")).to_be_enabled()
    assert saved(page_server) == before
    ask_for(tab, "a red circle")
    wait_until_done(tab)


@pytest.mark.parametrize("selector", ["#seed input", "#steps input[type=number]"])
def test_impossible_numbers_are_a_sentence_or_put_right(tab: Any, selector: str) -> None:
    tab.locator("#more button").first.click()
    tab.locator(selector).fill("-5")
    ask_for(tab, "a red circle")
    expect(tab.locator("#progress .error, #progress .done")).to_have_count(1)
    if tab.locator("#progress .error").count():
        expect(tab.locator("#progress .error")).to_contain_text("-5")
    assert tab.locator(".toast-wrap .error").count() == 0


NASTY = (
    """<img src=x onerror="window.hit=1"><script>window.hit=1</script>""",
    "${(window['hit']=1)}",
    "${window.hit=1}",
    "`+(window.hit=1)+`",
    r"\${window.hit=1} \` \u \x C:\new\Users",
    "{{value}} {{{value}}} {{#each value}} $& $1",
)


@pytest.mark.parametrize("nasty", NASTY)
def test_what_people_type_is_never_markup(tab: Any, nasty: str) -> None:
    ask_for(tab, nasty)
    expect(tab.locator("#picture img")).to_have_attribute("alt", nasty)
    for word in nasty.split():
        expect(tab.locator("#note .unknown")).to_contain_text(f"“{word}”")
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hit") is None
    assert tab.locator("#note img, #progress img").count() == 0


def test_stop_stops_and_saves_nothing(tab: Any, page_server: Served) -> None:
    before = saved(page_server)
    expect(tab.locator("#stop")).to_be_disabled()
    ask_for(tab, "a slow red circle")
    expect(tab.locator("#progress")).to_contain_text(STEP)
    tab.locator("#stop").click()
    expect(tab.locator("#progress")).to_contain_text("Stopped")
    expect(tab.locator("#generate")).to_be_enabled()
    expect(tab.locator("#stop")).to_be_disabled()
    assert saved(page_server) == before


def test_two_tabs_take_turns_and_stop_only_their_own(open_tab: OpenTab) -> None:
    first, second = open_tab(), open_tab()
    ask_for(first, "a slow red circle")
    expect(first.locator("#progress")).to_contain_text(STEP)
    ask_for(second, "a blue circle")
    expect(second.locator("#progress")).to_contain_text("another picture is being made")
    second.locator("#stop").click()
    expect(second.locator("#progress")).to_contain_text("Stopped")
    wait_until_done(first)
    expect(first.locator("#picture img")).to_have_attribute("alt", "a slow red circle")


def test_a_closed_tab_lets_go_of_the_engine(open_tab: OpenTab, page_server: Served) -> None:
    before = saved(page_server)
    first, second = open_tab(), open_tab()
    ask_for(first, "a slow red circle")
    expect(first.locator("#progress")).to_contain_text(STEP)
    first.close()
    ask_for(second, "a blue circle")
    wait_until_done(second)
    made = [pictures.read_recipe(path)["prompt"] for path in saved(page_server) - before]
    assert made == ["a blue circle"]


def test_the_examples_run(tab: Any) -> None:
    chips = tab.locator("#examples button")
    assert chips.all_inner_texts() == list(ui.EXAMPLES)
    chips.nth(1).click()
    expect(tab.locator("#picture img")).to_have_attribute("alt", ui.EXAMPLES[1])
    assert tab.locator("#prompt textarea").input_value() == ui.EXAMPLES[1]


def test_the_dice_give_another_seed_and_it_is_used(tab: Any) -> None:
    seed = tab.locator("#seed input")
    tab.locator("#dice").click()
    expect(seed).not_to_have_value("0")
    value = seed.input_value()
    assert 0 <= int(value) < ui.NEW_SEEDS
    ask_for(tab, "a red circle")
    expect(tab.locator("#note .caption")).to_contain_text(f"seed {value}")


def test_size_and_steps_reach_the_engine(tab: Any) -> None:
    tab.get_by_text("192 × 128").click()
    tab.locator("#more button").first.click()
    tab.locator("#steps input[type=number]").fill("3")
    tab.locator("#steps input[type=number]").press("Tab")
    tab.locator("#prompt textarea").fill("a red circle")
    tab.locator("#generate").click()
    expect(tab.locator("#picture img")).to_have_js_property("naturalWidth", 192)
    expect(tab.locator("#note .caption")).to_contain_text("192 × 128, seed 0, 3 steps")


def test_the_model_says_what_it_is_and_can_be_switched(tab: Any) -> None:
    expect(tab.locator("#bar .badge")).to_have_text("demo model")
    expect(tab.locator("#facts")).to_contain_text("It knows 20 words and nothing else")
    expect(tab.locator("#facts")).to_contain_text("Runs on cpu: a test machine.")
    tab.locator("#model input").click()
    tab.get_by_role("option", name="Bonsai Image 4B, 1-bit weights").click()
    expect(tab.locator("#facts")).to_contain_text("Runs on cuda: a big card.")
    expect(tab.locator("#bar .badge")).to_have_count(0)
    expect(tab.locator("#facts")).not_to_contain_text("demo")
    assert tab.locator("#size label").all_inner_texts() == ["512 × 512", "96 × 64"]
    tab.get_by_text("96 × 64").click()
    ask_for(tab, "a red circle")
    expect(tab.locator("#note .caption")).to_contain_text("96 × 64, seed 0, 6 steps")


def test_what_else_could_be_installed_is_said(tab: Any, page_server: Served) -> None:
    others = tab.locator("#others")
    others.locator("summary").click()
    expect(others).to_contain_text("Bonsai Image 4B, ternary weights 3.9 GB")
    expect(others).to_contain_text(str(page_server.settings.data_dir / "models"))


def test_the_first_screen_needs_no_scrolling(open_tab: OpenTab) -> None:
    tab = open_tab(viewport={"width": 1280, "height": 800})
    assert overflow(tab) == (0, 0)
    stage = tab.locator("#picture").bounding_box()
    ask_for(tab, "a red astronaut")
    wait_until_done(tab)
    assert overflow(tab) == (0, 0)
    assert tab.locator("#picture").bounding_box() == stage  # nothing moved


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_scrolls_in_one_direction_only(open_tab: OpenTab, width: int) -> None:
    tab = open_tab(viewport={"width": width, "height": 844}, is_mobile=True, has_touch=True)
    assert overflow(tab)[0] == 0
    ask_for(tab, "a red astronaut with-a-word-that-is-longer-than-any-telephone-is-wide-and-has-no-place-to-break")
    wait_until_done(tab)
    assert overflow(tab)[0] == 0
    box = tab.locator("#picture img").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width


def luminance(tab: Any) -> float:
    red, green, blue = (
        int(part) / 255 for part in tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)")[:3]
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_dark_mode_follows_the_system(open_tab: OpenTab) -> None:
    assert luminance(open_tab(color_scheme="dark")) < 0.2
    assert luminance(open_tab(color_scheme="light")) > 0.8
