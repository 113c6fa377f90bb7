"""Who can use the page: axe-core finds nothing serious in any state, and everything can be reached from the keyboard.

No rule of axe is disabled. Its script comes from the package axe-playwright-python, not from a CDN.
"""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser.conftest import OpenTab
from tests.browser.steps import NEW, ask_for, expect, make, make_grid, settle, start_anew, to_the_stage, wait_for

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: make test")

PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
GRAVE = ("serious", "critical")

# Everything that a mouse could press, as (what it is, whether Tab has been there). Of a radio group and of a row of
# tabs the keyboard enters one and goes on with arrows, so one is enough.
UNREACHED = """() => {
    const group = (e) => e.type === "radio" ? `radio ${e.name}` : e.role === "tab" ? "tabs" : null;
    const groups = new Set([...window.walked].map(group));
    const selector = "button, a[href], input, select, textarea, summary, [tabindex='0'], [role=tab]";
    return [...document.querySelectorAll(selector)]
        .filter((e) => e.checkVisibility({ visibilityProperty: true }) && !e.disabled && !e.closest("[inert]"))
        .filter((e) => e.getBoundingClientRect().width > 0)
        .filter((e) => !window.walked.has(e) && !groups.has(group(e)))
        .map((e) => `${e.tagName} ${e.id || e.className} ${(e.ariaLabel || e.textContent).slice(0, 40)}`);
}"""
# Stops at which a person would not see where the focus is.
UNSEEN = """() => {
    const shows = (e) => { const s = getComputedStyle(e); return s.outlineStyle !== "none" || s.boxShadow !== "none"; };
    const e = document.activeElement, box = e.getBoundingClientRect();
    if (e === document.body) return "";
    window.walked.add(e);
    const seen = box.width > 0 && box.bottom > 0 && box.right > 0 && box.top < innerHeight && box.left < innerWidth;
    const marked = shows(e) || [...document.querySelectorAll(":focus-within")].some((p) => p !== e && p.contains(e)
        && p.getBoundingClientRect().width < 500 && shows(p));
    return seen && marked ? "" : `${e.tagName} ${e.id || e.className} ${seen ? "has no mark" : "is out of sight"}`;
}"""


def violations(tab: Any) -> list[str]:
    """What axe-core finds serious or critical, one line for each place."""
    found = axe.Axe().run(tab).response["violations"]
    return [
        f"{rule['id']} at {node['target']}: {node['html'][:120]}"
        for rule in found if rule["impact"] in GRAVE for node in rule["nodes"]
    ]  # fmt: skip


def walk(tab: Any) -> tuple[list[str], list[str]]:
    """Press Tab until nothing new comes; returns what it never came to, and where the focus could not be seen."""
    tab.evaluate("window.walked = new Set()")
    hidden, before, still = [], -1, 0
    for _ in range(300):
        tab.keyboard.press("Tab")
        hidden.append(tab.evaluate(UNSEEN))
        count = tab.evaluate("window.walked.size")
        still, before = (still + 1, before) if count == before else (0, count)
        if still > 3:
            break
    return tab.evaluate(UNREACHED), [*filter(None, dict.fromkeys(hidden))]


def on_the_desk(tab: Any, held: threading.Event) -> Iterator[str]:
    """State after state of the desk, each named; the tab shows it while the caller looks."""
    start_anew(tab)
    yield "first visit"
    make(tab, "a red circle")
    settle(tab)
    yield "one picture"
    ask_for(tab, "a held blue circle and an astronaut")
    expect(tab.locator("#progress")).to_contain_text("Step")
    ask_for(tab, "a held green circle")
    expect(tab.locator("#queue .chip")).to_contain_text("1 waiting")
    tab.locator("#queue .chip").click()
    yield "running, with the queue open"
    tab.keyboard.press("Escape")
    held.set()
    wait_for(tab, "a held green circle")
    settle(tab)
    for mode in ("side", "difference", "slider"):
        tab.locator(f"#stage [data-mode={mode}]").click()
        yield f"compare: {mode}"
    tab.locator("#stage .keep").click()
    tab.locator("#stage .more").click()
    yield "menu"
    tab.keyboard.press("Escape")
    ask_for(tab, " ")
    expect(tab.locator("#progress .error")).to_be_visible()
    tab.locator("#more button").first.click()
    expect(tab.locator("#facts .why")).to_be_visible()
    yield "an error, and the fold open"
    tab.locator("#more button").first.click()
    for name in ("revisions", "right", "keys"):
        opener = tab.locator(f"[data-opens={name}], #open-{name}").filter(visible=True)
        if opener.count():  # revisions and tree are sheets on a phone alone
            opener.click()
            yield f"sheet: {name}"
            tab.keyboard.press("Escape")


def in_the_sheets(tab: Any) -> Iterator[str]:
    tab.locator("#open-library").click()
    expect(tab.locator("#grid li").first).to_be_visible()
    yield "library"
    tab.locator("#search textarea, #search input").first.fill("nothing like it")
    expect(tab.locator("#found")).to_contain_text("Nothing found")
    yield "library, nothing found"
    tab.keyboard.press("Escape")
    make_grid(tab, "a red circle\na green circle", "1 2", pictures=4)
    settle(tab)
    yield "grids"
    for name, ready in (("Templates", "#fill"), ("Models", "#shop li"), ("Data", "#storage table")):
        tab.get_by_role("tab", name=name).click()
        expect(tab.locator(ready).first).to_be_visible()
        yield name


def test_axe_finds_nothing_where_pictures_are_compared(tab: Any) -> None:
    start_anew(tab)
    make(tab, "a red circle and a kangaroo")
    make(tab, "a blue circle and a kangaroo on a table that is long enough for a second line of words")
    settle(tab)
    tab.locator("#stage .more").click()
    assert violations(tab) == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_axe_finds_nothing_in_any_state(open_tab: OpenTab, held: threading.Event, size: str, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme, **(PHONE if size == "phone" else {}))
    found = {}
    for states in (on_the_desk(tab, held), in_the_sheets(tab)):
        for state in states:
            tab.wait_for_timeout(200)  # a colour that is still fading is no colour
            if grave := violations(tab):
                found[state] = grave
    assert found == {}


def test_the_keyboard_reaches_everything_on_the_desk(tab: Any) -> None:
    start_anew(tab)
    make(tab, "a red circle")
    make(tab, "a blue circle")
    settle(tab)
    assert walk(tab) == ([], [])
    to_the_stage(tab)
    for key in ("+", "Shift+ArrowLeft"):
        tab.keyboard.press(key)
    moved = tab.locator(NEW).evaluate("e => getComputedStyle(e).transform.match(/-?[\\d.]+/g).map(Number)")
    assert moved[0] == 1.5 and moved[4] > 0
    tab.keyboard.press("-")


@pytest.mark.slow
def test_the_keyboard_reaches_everything_in_the_sheets(tab: Any) -> None:
    make(tab, "a red circle")
    settle(tab)
    found = {}
    for state in in_the_sheets(tab):
        if (lost := walk(tab)) != ([], []):
            found[state] = lost
        tab.evaluate("document.activeElement.blur()")
    assert found == {}
    tab.locator("#open-library").click()
    tab.locator("#search textarea, #search input").first.fill("")
    picture = tab.locator("#grid .thumb").first
    picture.focus()
    tab.keyboard.press("k")  # the picture that has the focus, whatever is on the stage
    expect(tab.locator("#grid li").first.get_by_role("button", name="Keep")).to_have_attribute("aria-pressed", "true")


@pytest.mark.slow
def test_a_menu_is_opened_walked_and_left_by_keys_alone(tab: Any) -> None:
    make(tab, "a red circle")
    settle(tab)
    tab.locator("#stage .more").focus()
    tab.keyboard.press("Enter")
    expect(tab.locator("#more-of-stage")).to_be_visible()
    items = tab.locator("#more-of-stage :is(button, a, input)").count()
    stops = set()
    for _ in range(items):
        tab.keyboard.press("Tab")
        stops.add(tab.evaluate("document.activeElement.closest('.menu') && document.activeElement.textContent"))
    assert len(stops) == items and None not in stops
    tab.keyboard.press("Escape")
    expect(tab.locator("#more-of-stage")).not_to_be_visible()
    assert tab.evaluate("document.activeElement.className") == "more"
    tab.locator("#open-keys").focus()
    tab.keyboard.press("Enter")
    expect(tab.locator("dialog.keys")).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("dialog.keys")).not_to_be_visible()
