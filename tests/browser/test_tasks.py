"""The tasks of the page, click by click, and what must survive tabs that come and go."""

import re
import threading
from typing import Any

import pytest

from studio import pictures
from studio.rows import LOCAL, STOPPED
from tests.browser.conftest import OpenTab
from tests.browser.steps import NASTY, NEW, PREVIOUS, Hand, ask_for, expect, make, settle, start_anew, wait_for
from tests.serving import Served

STEP = re.compile(r"Step \d of 4")


def test_the_loop_costs_one_click_where_others_take_three(tab: Any) -> None:
    start_anew(tab)
    thumbs = tab.locator("#strip .thumb")

    first = Hand(tab)
    first.type("a red circle on a blue background")
    first.press("Enter")
    wait_for(tab, "a red circle on a blue background")
    assert first.clicks == 1

    edit = Hand(tab)
    edit.type("a red circle on a yellow background")
    edit.press("Enter")
    wait_for(tab, "a red circle on a yellow background")
    expect(tab.locator(PREVIOUS)).to_have_attribute("alt", "a red circle on a blue background")
    expect(tab.locator("#stage .split")).to_be_attached()
    expect(tab.locator("#caption ins")).to_have_text("yellow")
    assert "seed 0" in tab.locator("#caption").inner_text()  # the same seed, and no arrow behind it
    assert edit.clicks == 1

    seeds = Hand(tab)
    seeds.press("Shift+Enter")
    expect(thumbs).to_have_count(6)
    settle(tab)
    assert seeds.clicks == 1

    gentle = Hand(tab)
    keeper = tab.locator(NEW).get_attribute("src")
    gentle.click("#stage [data-do=vary]")
    expect(thumbs).to_have_count(7)
    expect(tab.locator(PREVIOUS)).to_have_attribute("src", keeper)
    expect(tab.locator("#tree")).to_contain_text("vary subtle")
    assert gentle.clicks == 1

    compare = Hand(tab)
    compare.click("#stage [data-do=compare]")
    compare.click("#strip .thumb")
    expect(tab.locator(PREVIOUS)).to_have_attribute("alt", "a red circle on a blue background")
    expect(tab.locator("#caption del")).to_have_text("blue")
    assert compare.clicks == 2


def test_a_draft_is_kept_and_made_big_in_two_clicks(tab: Any, page_server: Served) -> None:
    start_anew(tab)
    tab.get_by_label("Draft, half as wide").check()
    make(tab, "a green circle")
    settle(tab)
    hand = Hand(tab)
    hand.click("#stage [data-do=keep]")
    hand.click("#stage [data-do=refine]")
    expect(tab.locator(NEW)).to_have_js_property("naturalWidth", 256)
    expect(tab.locator(PREVIOUS)).to_have_js_property("naturalWidth", 128)
    expect(tab.locator("#strip .kept")).to_have_count(1)
    assert hand.clicks == 2


def test_four_seeds_are_picked_by_number_and_arrows_move(tab: Any) -> None:
    start_anew(tab)
    tab.locator("#prompt textarea").fill("a green triangle")
    tab.keyboard.press("Shift+Enter")
    expect(tab.locator("#strip .thumb")).to_have_count(4)
    settle(tab)
    tab.keyboard.press("Escape")  # nothing runs: the focus goes to the picture
    current = tab.locator("#strip .thumb[aria-current]")
    sources = [img.get_attribute("src") for img in tab.locator("#strip .thumb img").all()]
    for key, place in (("3", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("1", 0)):
        tab.keyboard.press(key)
        expect(current.locator("img")).to_have_attribute("src", sources[place])
    tab.keyboard.press(" ")
    expect(tab.locator("#stage [data-flick=b]")).to_have_count(1)
    expect(tab.locator(PREVIOUS)).to_be_visible()


def test_the_same_recipe_on_the_other_weights_in_one_click(tab: Any) -> None:
    start_anew(tab)
    make(tab, "a blue circle")
    settle(tab)
    tab.locator("#stage .more").click()
    tab.locator("#stage [data-do=other]").click()
    expect(tab.locator("#caption")).to_contain_text("ternary → binary")
    expect(tab.locator(PREVIOUS)).to_have_count(1)


def test_enter_at_once_after_another_model_is_not_lost(tab: Any) -> None:
    start_anew(tab)
    tab.locator("#prompt textarea").fill("a red square")
    tab.locator("#model input").click()
    option = tab.get_by_role("option", name="Bonsai Image 4B, 1-bit weights")
    option.wait_for()
    tab.evaluate("""() => {
        const option = [...document.querySelectorAll('[role=option]')].find(one => one.innerText.includes('Bonsai'));
        option.dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
        const enter = new KeyboardEvent('keypress', {key: 'Enter', bubbles: true, cancelable: true});
        document.querySelector('#prompt textarea').dispatchEvent(enter);
    }""")  # before the page has heard of the new model's sizes
    wait_for(tab, "a red square")
    expect(tab.locator("#size input:checked")).to_have_value("512x512")


def test_a_run_survives_reload_and_a_closed_tab(open_tab: OpenTab, held: threading.Event) -> None:
    tab = open_tab()
    start_anew(tab)
    ask_for(tab, "a held red circle")
    expect(tab.locator("#progress")).to_contain_text(STEP)
    tab.reload()
    expect(tab.locator("#progress")).to_contain_text(STEP)
    tab.context.close()
    again = open_tab()
    expect(again.locator("#progress")).to_contain_text(STEP)
    held.set()
    wait_for(again, "a held red circle")


def test_cancel_stops_the_right_one_of_three(tab: Any, page_server: Served, held: threading.Event) -> None:
    start_anew(tab)
    for number in ("two", "blue", "green"):
        ask_for(tab, f"a held {number} circle")
        expect(tab.locator("#queue-rows li .what").last).to_contain_text(number)
    tab.locator("#queue .chip").click()
    row = tab.locator("#queue-rows li.waiting", has_text="a held blue circle")
    row.get_by_role("button", name="Cancel").click()
    expect(tab.locator("#queue-rows li.stopped")).to_contain_text("a held blue circle")
    tab.keyboard.press("Escape")
    held.set()
    wait_for(tab, "a held green circle")
    settle(tab)
    jobs = page_server.history.jobs(LOCAL)[-3:]
    assert {job.request.prompt: job.state for job in jobs if job.state == STOPPED} == {"a held blue circle": STOPPED}
    tab.locator("#queue .chip").click()
    tab.locator("#queue-rows li.stopped").get_by_role("button", name="Retry").first.click()
    wait_for(tab, "a held blue circle")


def test_two_people_at_once_lose_nothing(open_tab: OpenTab, held: threading.Event) -> None:
    first, second = open_tab(), open_tab()
    start_anew(first)
    second.goto(first.url)
    second.locator("#stage .empty").wait_for()
    ask_for(first, "a held red circle")
    expect(first.locator("#progress")).to_contain_text(STEP)
    ask_for(second, "a held green circle")
    expect(second.locator("#queue .chip")).to_have_text("1 running, 1 waiting")
    held.set()
    wait_for(first, "a held red circle")
    wait_for(second, "a held green circle")
    for tab in (first, second):
        expect(tab.locator("#strip .thumb")).to_have_count(2)  # the other's too, and each once
    expect(first.locator(NEW)).to_have_attribute("alt", "a held red circle")


ODD = {
    "quotes": "\"a' «b» “c” & <d>",
    "right to left": "دائرة حمراء على خلفية زرقاء",
    "emoji": "🌲 a red 👩‍👩‍👧 circle 🟥",
    "Devanagari": "नीली पृष्ठभूमि पर दो लाल वृत्त",
    "Tamil": "நீல பின்னணியில் இரண்டு சிவப்பு வட்டங்கள்",
    "long": "a red circle " * 770 + "at the end",  # 10,000 characters and some
    "markup": NASTY[0],
    "templates": NASTY[1],
}


def squeezed(text: str) -> str:
    """Without white space, which HTML and the diff lay out as they like."""
    return re.sub(r"\s+", "", text)


def words_of(tab: Any, part: str) -> str:
    """A diff's words, squeezed, without those that are gone."""
    return squeezed("".join(tab.locator(f"{part} .words :is(span, ins)").all_text_contents()))


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ODD.values(), ids=ODD)
def test_odd_prompts_are_shown_to_the_letter_everywhere(tab: Any, page_server: Served, prompt: str) -> None:
    start_anew(tab)
    make(tab, "before")
    settle(tab)
    wanted = squeezed(prompt)
    tab.locator("#prompt textarea").fill(prompt)
    expect(tab.locator("#diff del")).to_have_text("before")
    assert words_of(tab, "#diff") == wanted
    tab.locator("#prompt textarea").press("Enter")
    wait_for(tab, prompt)
    settle(tab)
    expect(tab.locator("#caption del")).to_have_text("before")
    assert words_of(tab, "#caption") == wanted
    current = tab.locator("#revisions [aria-current]")
    expect(current.locator("b")).to_have_text("r2")
    assert squeezed("".join(current.locator("ins").all_text_contents())) == wanted
    assert tab.locator("#strip .thumb").last.get_attribute("aria-label").endswith(f": {prompt}")
    recipe = pictures.read_recipe(page_server.history.image(LOCAL, page_server.history.jobs(LOCAL)[-1].image).path)
    assert recipe["prompt"] == prompt
    tab.locator("#open-library").click()
    expect(tab.locator("#grid li").first).to_contain_text(prompt[:40].strip())
    assert wanted in squeezed(tab.locator("#grid li").first.text_content())
    tab.locator("#open-workshop").click()
    tab.locator("#grid-prompts textarea").fill(prompt)
    tab.locator("#grid-seeds input, #grid-seeds textarea").first.fill("0")
    expect(tab.locator("#grid-cost")).to_contain_text("there already")
    tab.locator("#grid-go").click()
    expect(tab.locator("#cells img")).to_have_count(1)
    assert squeezed(tab.locator("#cells tbody th").text_content()) == wanted
    assert tab.evaluate("window.hit") is None
    assert tab.locator("#caption img, #revisions img, #diff img, #cells th img").count() == 0
    tab.reload()
    wait_for(tab, prompt)
    expect(tab.locator("#prompt textarea")).to_have_value(prompt)


@pytest.mark.slow
def test_a_prompt_beyond_all_measure_is_refused_with_a_sentence(tab: Any) -> None:
    ask_for(tab, "a red circle " * 2_000)
    expect(tab.locator("#progress .error")).to_contain_text("characters: give at most")
