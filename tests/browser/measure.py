"""How quick the page is to a person, in Chromium: `python -m tests.browser.measure` (part of make bench).

Enter to painted is from the key to the frame after the picture is decoded, minus the engine's own seconds: what the
page adds. K, X and Space are from the key to the next frame. Reports; judges nothing.
"""

import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from studio.rows import LOCAL
from tests.browser.conftest import ARGUMENTS, CHROMIUM, PATIENCE
from tests.serving import served

RUNS = 20

# Each waits for the change, then for the frame that paints it; returns milliseconds.
AFTER_ENTER = """prompt => new Promise(done => {
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
    document.querySelector('#prompt textarea').dispatchEvent(
        new KeyboardEvent('keypress', {key: 'Enter', bubbles: true, cancelable: true}));
})"""
AFTER_KEY = """key => new Promise(done => {
    const started = performance.now(), stage = document.querySelector('#stage');
    const watcher = new MutationObserver(() => {
        watcher.disconnect();
        requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - started)));
    });
    watcher.observe(stage, {subtree: true, childList: true, attributes: true});
    stage.querySelector('.view').dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true}));
})"""
SHIFTS = """window.shifted = 0; new PerformanceObserver(list => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifted += entry.value;
}).observe({type: 'layout-shift', buffered: true});"""


def measure(tab: Any, history: Any) -> dict[str, list[float]]:
    """Milliseconds of every run, by what was done."""
    took: dict[str, list[float]] = {"Enter to painted, beyond the engine": [], "K": [], "X": [], "Space": []}
    for number in range(RUNS + 1):
        prompt = f"a red circle {number}"
        tab.locator("#prompt textarea").fill(prompt)
        tab.locator("#diff ins").first.wait_for() if number else None
        painted = tab.evaluate(AFTER_ENTER, prompt)
        tab.locator("#queue .chip.idle").wait_for()
        job = history.jobs(LOCAL)[-1]
        engine = history.image(LOCAL, job.image).seconds
        if number:  # the first one starts the engine's process
            took["Enter to painted, beyond the engine"].append(painted - engine * 1000)
            for name, key in (("K", "k"), ("X", "x"), ("Space", " ")):
                took[name].append(tab.evaluate(AFTER_KEY, key))
                tab.wait_for_timeout(100)
    return took


def main() -> None:
    if not CHROMIUM.exists():
        print(f"{CHROMIUM} is missing, so the page was not measured: make browser")
        return
    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as page, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        tab = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.set_default_timeout(PATIENCE)
        tab.goto(page.address)
        tab.locator('#strip .strip:not([data-project="0"])').wait_for()
        tab.evaluate(SHIFTS)
        took = measure(tab, page.history)
        shifted = tab.evaluate("window.shifted")
        browser.close()
    for name, values in took.items():
        ordered = sorted(values)
        late = ordered[int(len(ordered) * 0.95) - 1]
        print(f"{name:<38} median {statistics.median(values):6.0f} ms, 95 % {late:6.0f} ms")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"layout shift {shifted:.3f}; {RUNS} runs, {os.cpu_count()} cores, load {load:.1f}")


if __name__ == "__main__":
    main()
