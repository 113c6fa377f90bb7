"""Whether the page answers while a big picture is made: `python -m tests.browser.measure --pack FOLDER`.

The real command serves (`app.py`, as a person starts it), in a real Chromium, and makes a picture with that pack, four
steps as it declares them. All the while somebody keeps a picture (a synced commit, counted by the server), writes a
word (the diff under the prompt) and looks something up in the library, one after the other; each is timed from the key
to the frame that shows the server's answer, by what the engine was doing.
"""

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.catalog import MODELS
from engine.packs import open_pack
from studio.serve import free_port
from tests.browser.steps import make

ROOT = Path(__file__).parent.parent.parent
THOUGHT = 400  # milliseconds between two answers: nobody is quicker

# From a change of the page to the frame after the server's answer stands in `where`.
ANSWERED = """([where, what, words]) => new Promise(done => {
    const started = performance.now(), find = selector => document.querySelector(selector);
    const watcher = new MutationObserver(() => {
        watcher.disconnect();
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - started)));
    });
    watcher.observe(find(where), {subtree: true, childList: true, attributes: true, characterData: true});
    if (what === 'key') {
        find('#stage .view').dispatchEvent(new KeyboardEvent('keydown', {key: words, bubbles: true, cancelable: true}));
    } else {
        const box = find(what);
        box.value = words;
        box.dispatchEvent(new Event('input', {bubbles: true}));
    }
})"""
ASKED = {
    "keep, counted by the server": ("#strip .export", "key", "k"),
    "a word typed, its diff": ("#diff", "#prompt textarea", "a red circle {}"),
    "library, searched": ("#found", "#search textarea, #search input", ""),
}
"""What is asked of the page: where its answer stands, what is done, and with which words."""
SEARCHED = ("circle", "nothing that is there")  # in turn, so that every answer differs from the one before

Times = dict[str, dict[str, list[float]]]


def beside(tab: Any, pack: Path, size: str, seconds: float) -> Times:
    """Milliseconds of every answer, by what was asked and what the engine did; ends with the picture or `seconds`."""
    choose(tab, MODELS["seedling-ternary"].label)
    make(tab, "a red circle")
    choose(tab, open_pack(pack).notes.label)
    tab.locator("#size").get_by_text(size.replace("x", " × "), exact=True).click()
    took: Times = {name: defaultdict(list) for name in ASKED}
    number = 0
    tab.locator("#prompt textarea").fill("a bonsai tree")
    tab.locator("#prompt textarea").press("Enter")
    tab.locator("#queue .chip.busy").wait_for()
    until = time.monotonic() + seconds
    while (now := doing(tab)) is not None and time.monotonic() < until:
        for name, (where, what, words) in ASKED.items():
            number += 1
            words = words.format(number) or SEARCHED[number % 2]
            took[name][now].append(float(tab.evaluate(ANSWERED, [where, what, words])))
            tab.wait_for_timeout(THOUGHT)
    return took


def choose(tab: Any, label: str) -> None:
    """A model of the list at the top."""
    tab.locator("#model input").click()
    tab.get_by_role("option", name=label).click()


def doing(tab: Any) -> str | None:
    """What the engine is at; None when the picture is there."""
    if tab.locator("#queue .chip.idle").count():
        return None
    step, total = tab.locator("#progress progress").evaluate("bar => [bar.value, bar.max]")
    return "before step 1" if step == 0 else "decoding" if step == total else "later steps"


@contextmanager
def started(pack: Path) -> Iterator[str]:
    """The studio as a person starts it, on a data folder of its own; its address."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port("127.0.0.1", 20_000)
        command = [sys.executable, "app.py", "--model", str(pack), "--data", folder, "--port", str(port)]
        studio = subprocess.Popen([*command, "--no-browser"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert studio.stdout is not None
            for line in studio.stdout:
                if line.startswith("Niwaki is open"):
                    break
            yield f"http://127.0.0.1:{port}/"
        finally:
            studio.terminate()
            studio.wait()
