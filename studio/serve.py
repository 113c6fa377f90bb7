"""Serve the page: the port, the browser, the log, and a clean end on Ctrl-C.

Knows gradio's launch and the operating system; what the page looks like is `ui`.
"""

import errno
import gc
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

from engine.types import BadRequest
from engine.worker import Worker
from studio import files, models, pictures, privacy, space, ui
from studio.history import History
from studio.jobs import Jobs
from studio.settings import Settings, make_folder, start_log
from studio.template import ASSETS, style_sheets

if TYPE_CHECKING:
    import gradio as gr

log = logging.getLogger(__name__)

THREADS = 200  # an open tab's follower holds one of them, most of the time asleep
PORTS = 100  # how many are tried from the first one on


def serve(settings: Settings, say: Callable[[str], None] = print) -> None:
    """Serve until Ctrl-C or SIGTERM, then close the engine. Raises BadRequest when it can't start, with the way out."""
    gc.disable()  # what gradio and its libraries bring is no garbage, and looking for some takes half a second
    make_folder(settings.data_dir)
    start_log(settings)
    prepare(settings)
    stopped = _stop_on_signals()
    offers = models.offers(settings)
    port = free_port(settings.host, settings.port)
    if port != settings.port:
        say(f"Port {settings.port} is taken, using {port}.")
    history = History(settings.data_dir)
    space.sweep(history)
    engine = Worker(settings.backend, data_dir=settings.data_dir, previews=True)
    jobs = Jobs(history, engine)
    blocks = None
    try:
        blocks = ui.build(history, jobs, settings, offers, models.installable(settings.data_dir))
        address = launch(blocks, replace(settings, port=port), history)
        gc.enable()
        engine.begin()
        log.info("serving %s with %s: %s", address, offers[0].model, offers[0].why)
        say(f"Niwaki is open at {address} (stop it with Ctrl-C).")
        say(f"Model: {offers[0].label}. {offers[0].why}")
        say(f"Pictures, models and the log lie in {settings.data_dir}.")
        while not stopped.wait(0.5):  # a bare wait() would keep Windows from delivering Ctrl-C
            pass
        say("Stopping.")
    finally:
        gc.enable()
        jobs.close()
        engine.close()
        history.close()
        if blocks is not None:
            blocks.close(verbose=False)
        log.info("stopped")


def prepare(settings: Settings) -> None:
    """Tell gradio, before it is imported, to report nothing and to keep its files in our cache."""
    cache = make_folder(settings.cache)
    pictures.sweep(cache)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"  # else pandas sums all events up after every one
    os.environ["GRADIO_TEMP_DIR"] = str(cache)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(cache / "examples")  # else .gradio/ in the current folder
    for name in ("NO_PROXY", "no_proxy"):  # gradio asks itself over HTTP; a company proxy has no business there
        if "127.0.0.1" not in os.environ.get(name, ""):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))


def launch(blocks: "gr.Blocks", settings: Settings, history: History) -> str:
    """Start serving in the background on exactly `settings.port`; returns the address to open."""
    options = launch_options(settings)
    options["app_kwargs"]["routes"] = files.routes(history)
    blocks.launch(**options)
    host = "127.0.0.1" if settings.host in privacy.EVERYWHERE else settings.host
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/"


def launch_options(settings: Settings) -> dict[str, Any]:
    """Everything gradio is told: nothing shared, nothing reported, no file served but from the cache."""
    import gradio as gr

    fonts = ["system-ui", "Noto Sans", "Noto Sans Devanagari", "Noto Sans Tamil", "sans-serif"]
    return dict(
        server_name=settings.host,
        server_port=settings.port,
        inbrowser=settings.open_browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        strict_cors=True,
        show_error=False,
        max_file_size="20mb",
        max_threads=THREADS,
        allowed_paths=[],
        theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css_paths=style_sheets(),
        favicon_path=ASSETS / "niwaki.svg",
        app_kwargs={"middleware": privacy.guard(settings.host)},
    )


def free_port(host: str, first: int) -> int:
    """The first port from `first` on that nobody listens on. Raises BadRequest when the host can't be used at all."""
    if not 0 < first < 65_536:
        raise BadRequest(f"port {first} is impossible: give one from 1 to 65535")
    last = min(first + PORTS, 65_536)
    for port in range(first, last):
        try:
            with socket.create_server((host.strip("[]"), port), family=_family(host)):
                return port
        except OSError as error:
            reason = error
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise BadRequest(f"cannot listen on host {host!r} ({error}): use 127.0.0.1") from error
    raise BadRequest(f"ports {first} to {last - 1} are all taken or forbidden ({reason}): choose another with --port")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _stop_on_signals() -> threading.Event:
    """An event that Ctrl-C and SIGTERM set; without effect outside the main thread, where Python allows no handlers."""
    stopped = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            sys.exit(1)  # asked twice: somebody is in a hurry
        stopped.set()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)
    return stopped
