"""How quick the page is to a person, in Chromium: `python -m tests.browser.measure` (part of make bench).

Enter to painted is from the key to the frame after the picture is decoded, minus the engine's own seconds: what the
page adds. K, X and Space are from the key to the next frame; kept is until the server's count of kept pictures is
there, alone and while every core computes as the engine of a big model does. Live is from the last key to its picture,
the pause and the engine included. Reports; judges nothing.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from studio.rows import LOCAL
from tests.browser import measure_big
from tests.browser.conftest import ARGUMENTS, CHROMIUM, PATIENCE
from tests.browser.steps import ask_for, settle
from tests.serving import Served, served

ROOT = Path(__file__).parent.parent.parent
RUNS = 20
LIVE_RUNS = 8  # each takes as long as a person thinks

# Each waits for the change, then for the frame that paints it; returns milliseconds.
AFTER_WORDS = """([prompt, how]) => new Promise(done => {
    const started = performance.now(), stage = document.querySelector('#stage');
    const look = async () => {
        const image = stage.querySelector('.layer.new img');
        if (image?.alt !== prompt) return;
        watcher.disconnect();
        await image.decode();
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - started)));
    };
    const watcher = new MutationObserver(look);
    watcher.observe(stage, {subtree: true, childList: true, attributes: true});
    const box = document.querySelector('#prompt textarea');
    if (how === 'typed') box.value = prompt;
    const enter = new KeyboardEvent('keypress', {key: 'Enter', bubbles: true, cancelable: true});
    box.dispatchEvent(how === 'typed' ? new Event('input', {bubbles: true}) : enter);
})"""
# From now on: while the page opens gradio puts its components up one after the other.
SHIFTS = """window.shifted = 0; new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({type: 'layout-shift'});"""


ENTER, KEPT = "Enter to painted, beyond the engine", "K, counted by the server"
BUSY, LIVE = f"{KEPT}, every core busy", "Live, from the last key"


def measure(tab: Any, page: Served) -> dict[str, list[float]]:
    """Milliseconds of every run, by what was done."""
    took: dict[str, list[float]] = {name: [] for name in (ENTER, "K", "X", "Space", KEPT, BUSY, LIVE)}
    for number in range(RUNS + 1):
        prompt = f"a red circle {number}"
        tab.locator("#prompt textarea").fill(prompt)
        tab.locator("#diff ins").first.wait_for() if number else None
        painted = tab.evaluate(AFTER_WORDS, [prompt, "entered"])
        settle(tab)
        job = page.history.jobs(LOCAL)[-1]
        engine = page.history.image(LOCAL, job.image).seconds
        if number:  # the first one starts the engine's process
            took[ENTER].append(painted - engine * 1000)
            for name, key in (("K", "k"), ("X", "x"), ("Space", " ")):
                took[name].append(pressed(tab, key, "#stage"))
    took[KEPT] = [pressed(tab, "k", "#strip .export") for _ in range(RUNS)]
    with busy():
        page.engine.let_go.clear()
        ask_for(tab, "a held red circle")
        tab.locator("#queue .chip.busy").wait_for()
        tab.wait_for_timeout(1000)  # the burners are still starting, not politely
        took[BUSY] = [pressed(tab, "k", "#strip .export") for _ in range(RUNS)]
        page.engine.let_go.set()
        settle(tab)
    tab.locator("#live input").check()
    for number in range(LIVE_RUNS):
        took[LIVE].append(tab.evaluate(AFTER_WORDS, [f"a green circle {number}", "typed"]))
        tab.locator("#strip .thumb").nth(RUNS + 2 + number).wait_for()  # it settled: its revision is there
        settle(tab)
    return took


def pressed(tab: Any, key: str, where: str) -> float:
    """Milliseconds from a key to the next change in `where`; then a moment of thought."""
    took = float(tab.evaluate(measure_big.ANSWERED, [where, "key", key]))
    tab.wait_for_timeout(100)
    return took


@contextmanager
def busy() -> Iterator[None]:
    """Every core computes, as politely as the engine's process does."""
    burn = "from engine.politeness import step_back\nstep_back()\nwhile True: pass"
    burners = [subprocess.Popen([sys.executable, "-c", burn], cwd=ROOT) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


def page_alone(browser: Any) -> None:
    """The page with the fake backend, nothing else running."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as page:
        tab = opened(browser, page.address)
        tab.evaluate(SHIFTS)
        for name, values in measure(tab, page).items():
            report(name, values)
        print(f"layout shift {tab.evaluate('window.shifted'):.4f}; {RUNS} runs")


def page_beside(browser: Any, pack: Path, size: str, seconds: float) -> None:
    """The page while a picture is made with this pack."""
    with measure_big.started(pack) as address:
        for name, by_phase in measure_big.beside(opened(browser, address), pack, size, seconds).items():
            for phase, values in by_phase.items():
                report(f"{name}, {phase}", values)
            report(f"{name}, all", [value for values in by_phase.values() for value in values])


def opened(browser: Any, address: str) -> Any:
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.set_default_timeout(PATIENCE)
    tab.goto(address)
    tab.locator('#strip .strip:not([data-project="0"])').wait_for()
    return tab


def report(name: str, values: list[float]) -> None:
    ordered = sorted(values)
    late = ordered[max(0, int(len(ordered) * 0.95) - 1)]
    median = statistics.median(values)
    print(f"{name:<42} {len(values):4} times, median {median:5.0f} ms, 95 % {late:5.0f} ms, most {ordered[-1]:5.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description="How quick the page is to a person, in Chromium.")
    parser.add_argument("--pack", type=Path, help="instead: while a picture is made with this pack (tests.packs.full)")
    parser.add_argument("--size", default="512x512", help="of that picture")
    parser.add_argument("--seconds", type=float, default=3600, help="then it is enough, picture or not")
    options = parser.parse_args()
    if not CHROMIUM.exists():
        print(f"{CHROMIUM} is missing, so the page was not measured: make browser")
        return
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        if options.pack:
            page_beside(browser, options.pack, options.size, options.seconds)
        else:
            page_alone(browser)
        browser.close()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{os.cpu_count()} cores, load {load:.1f}")


if __name__ == "__main__":
    main()
