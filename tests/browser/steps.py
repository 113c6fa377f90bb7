"""What a person does on the page, and how many clicks it takes: one press of a button or a key; typing is free."""

import base64
from typing import Any

from tests.browser.conftest import playwright

expect = playwright.expect
# What would act if any part of the page took it for markup, or for one of the two template languages behind it.
NASTY = (
    """<img src=x onerror="window.hit=1"><script>window.hit=1</script>""",
    "${(window['hit']=1)} `+(window.hit=1)+` \\${window.hit=1} \\` C:\\new\\Users {{value}} {{{value}}} $& $1",
)
NEW, PREVIOUS = "#stage .layer.new img", "#stage .layer.previous img"

DROP = """(b64) => {
  const bytes = Uint8Array.from(atob(b64), (char) => char.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], "from-a-friend.png", { type: "image/png" }));
  document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


class Hand:
    """One hand on mouse and keyboard that counts what it presses."""

    def __init__(self, tab: Any) -> None:
        self.tab = tab
        self.clicks = 0

    def click(self, selector: str) -> None:
        self.clicks += 1
        self.tab.locator(selector).first.click()

    def press(self, key: str) -> None:
        self.clicks += 1
        self.tab.keyboard.press(key)

    def drop(self, png: bytes) -> None:
        """Drop a file anywhere on the page."""
        self.clicks += 1
        self.tab.evaluate(DROP, base64.b64encode(png).decode())

    def type(self, prompt: str) -> None:
        """Type a prompt; the prompt box has the focus when a page opens, and after a run."""
        self.tab.locator("#prompt textarea").fill(prompt)


def ask_for(tab: Any, prompt: str) -> None:
    tab.locator("#prompt textarea").fill(prompt)
    tab.locator("#prompt textarea").press("Enter")


def wait_for(tab: Any, prompt: str) -> None:
    """Until the picture of this prompt is on the stage, painted."""
    expect(tab.locator(NEW)).to_have_attribute("alt", prompt)
    tab.wait_for_function("s => document.querySelector(s)?.naturalWidth > 0", arg=NEW)


def make(tab: Any, prompt: str) -> None:
    ask_for(tab, prompt)
    wait_for(tab, prompt)


def settle(tab: Any) -> None:
    """Until nothing runs or waits."""
    expect(tab.locator("#queue .chip")).to_have_class("chip idle")


def to_the_stage(tab: Any) -> None:
    """Move the focus from wherever it is to the picture."""
    tab.locator("#stage .view").focus()


def make_grid(tab: Any, prompts: str, seeds: str, pictures: int) -> None:
    """A grid of prompts and seeds from the workshop, until every cell has its picture."""
    tab.locator("#open-workshop").click()
    tab.locator("#grid-prompts textarea").fill(prompts)
    tab.locator("#grid-seeds input, #grid-seeds textarea").first.fill(seeds)
    expect(tab.locator("#grid-cost")).to_contain_text(f"{pictures} pictures")
    tab.locator("#grid-go").click()
    expect(tab.locator("#cells img")).to_have_count(pictures)


def start_anew(tab: Any) -> None:
    """An empty project, so that a test sees its own pictures only."""
    strip = tab.locator("#strip .strip")
    before = strip.get_attribute("data-project")
    tab.locator("#project input").click()
    tab.get_by_role("option", name="New project").click()
    expect(strip).not_to_have_attribute("data-project", before)  # an empty stage may be that of the one before
    tab.locator("#prompt textarea").focus()
