"""The page in a real Chromium. Whatever a test does, no other machine may be asked, and nothing may break."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Served, served

CHROMIUM = Path("/usr/bin/chromium")
# The second line: else Chromium itself phones home, and the test that nothing goes out would blame the page.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HARMLESS = (
    "Autofocus processing was blocked",
    "Method not implemented.",  # gradio 6.31 closing the progress of an upload
    "AbortError: signal is aborted",  # .. and a stream whose page is reloaded
)
PATIENCE = 120_000  # ms; a busy machine is slow, and what never comes is found out all the same

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make setup")

playwright.expect.set_options(timeout=PATIENCE)
OpenTab = Callable[..., Any]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two more tries: a browser, a server and an engine on two cores lose an event now and then, and -r R says so."""
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.flaky(reruns=2))


@pytest.fixture(scope="module")
def page_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("page")) as page:
        yield page


@pytest.fixture(scope="module")  # no longer: while playwright's driver lives, no other test can use asyncio.run
def chromium() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: install Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(chromium: Any, page_server: Served) -> Iterator[OpenTab]:
    """Open the page in a new window: `open_tab(viewport=.., color_scheme=..)`. What it asks and logs is judged."""
    contexts: list[Any] = []
    asked: list[str] = []
    complaints: list[str] = []

    def complain(message: Any) -> None:
        if message.type in ("error", "warning"):
            judge(message.text)

    def judge(text: str) -> None:
        if not text.startswith(HARMLESS) and "errored out" not in text:  # gradio's word for the same lost stream
            complaints.append(text)

    def open_one(**options: Any) -> Any:
        options.setdefault("viewport", {"width": 1280, "height": 800})
        contexts.append(chromium.new_context(**options))
        contexts[-1].on("request", lambda request: asked.append(request.url))
        tab = contexts[-1].new_page()
        tab.on("console", complain)
        tab.on("pageerror", lambda error: judge(str(error)))
        tab.set_default_timeout(PATIENCE)
        tab.goto(page_server.address)
        tab.locator('#strip .strip:not([data-project="0"])').wait_for()  # the project has been opened
        return tab

    yield open_one
    for context in contexts:
        context.close()
    own = (page_server.address, "data:", "blob:")
    assert [url for url in asked if not url.startswith(own)] == []
    assert asked
    assert complaints == []


@pytest.fixture
def held(page_server: Served) -> Iterator[threading.Event]:
    """Prompts with `held` in them stay at step 2 until this is set."""
    page_server.engine.let_go.clear()
    yield page_server.engine.let_go
    page_server.engine.let_go.set()


@pytest.fixture
def tab(open_tab: OpenTab) -> Any:
    return open_tab()
