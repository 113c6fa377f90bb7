"""What keeps people out: axe-core's serious and critical findings (none is excused), names and keys for everything."""

from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import OpenTab
from tests.browser.steps import expect, make, settle

axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed: make setup")
SCRIPT = next(Path(axe.__file__).parent.rglob("axe.min.js"))


def barriers(tab: Any) -> list[str]:
    tab.evaluate(SCRIPT.read_text(encoding="utf-8"))
    found = tab.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barrier_on_stage_queue_menu_and_library(open_tab: OpenTab, scheme: str) -> None:
    tab = open_tab(color_scheme=scheme)
    make(tab, "a red circle")
    make(tab, "a blue circle")
    settle(tab)
    assert barriers(tab) == []
    tab.locator("#stage .more").click()
    assert barriers(tab) == []
    tab.keyboard.press("Escape")
    tab.locator("#open-library").click()
    tab.locator("#grid .thumb").first.wait_for()
    assert barriers(tab) == []


def test_every_picture_has_words_and_every_button_a_name(tab: Any) -> None:
    make(tab, "a red circle")
    settle(tab)
    nameless = """[...document.querySelectorAll('button, img, input, textarea')].filter(e => e.offsetParent &&
        !e.labels?.length && !(e.getAttribute('aria-label') ?? e.getAttribute('alt') ?? e.innerText).trim()
        && !e.closest('[aria-label], button')).map(e => e.outerHTML.slice(0, 120))"""
    assert tab.evaluate(nameless) == []


@pytest.mark.slow
def test_the_tab_key_reaches_everything(tab: Any) -> None:
    make(tab, "a red circle")
    make(tab, "a blue circle")
    settle(tab)
    wanted = {
        "prompt", "generate", "four", "dice", "project", "model", "switch", "queue", "open-library", "open-keys",
        "stage", "strip", "tree", "revisions", "seed", "lock", "size",
    }  # fmt: skip
    tab.locator("body").evaluate("e => document.activeElement.blur()")
    seen: set[str] = set()
    for _ in range(90):
        tab.keyboard.press("Tab")
        ids = "e => { const ids = []; for (; e; e = e.parentElement) if (e.id) ids.push(e.id); return ids; }"
        seen |= set(tab.evaluate(f"({ids})(document.activeElement)"))
    assert wanted <= seen, wanted - seen
    expect(tab.locator("#stage .split")).to_have_attribute("aria-label", "How much of the previous picture to show")
