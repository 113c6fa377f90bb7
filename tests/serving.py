"""A running page for tests: the real one, on a free port, with the fake backend in its real child process."""

import os
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.catalog import MODELS
from engine.types import Picture, Request, Step
from engine.worker import Worker
from studio import serve, ui
from studio.history import History
from studio.jobs import Jobs
from studio.models import Offer
from studio.settings import Settings, start_log

WORDS = {"a", "two", "red", "green", "blue", "circle", "circles", "triangle", "on", "yellow", "background", "slow"}
SIZES = ((256, 256), (128, 128), (192, 128))
OFFERS = (
    Offer(
        "seedling-ternary",
        "Seedling, ternary weights (demo model)",
        True,
        "cpu: a test machine",
        SIZES,
        4,
        20,
        "ternary",
    ),
    Offer(
        "seedling-binary", "Seedling, 1-bit weights (demo model)", True, "cpu: a test machine", SIZES, 4, 20, "binary"
    ),
    Offer("bonsai-binary", "Bonsai Image 4B, 1-bit weights", False, "cuda: a big card", ((512, 512), (96, 64)), 6),
)


class SlowWorker(Worker):
    """The fake backend knows no vocabulary and is quick; this one reports words, dawdles on a `slow` prompt, and stays
    in the middle of a `held` one until `let_go` is set."""

    def __init__(self, backend: str, *, data_dir: Path) -> None:
        super().__init__(backend, data_dir=data_dir)
        self.let_go = threading.Event()

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        with closing(super().run(request)) as run:
            for item in run:
                if isinstance(item, Picture):
                    unknown = tuple(word for word in request.prompt.split() if word not in WORDS)
                    item = replace(item, unknown_words=unknown)
                elif "slow" in request.prompt:
                    time.sleep(0.6)
                elif "held" in request.prompt and item.index == 1:
                    item = replace(item, preview=np.full((16, 24, 3), 200, np.uint8))
                elif "held" in request.prompt and item.index == 2:
                    while self._running is not None and not self.let_go.wait(0.05):
                        pass
                yield item


@dataclass(frozen=True)
class Served:
    """An open page: where, what gradio built, and how it was set."""

    address: str
    blocks: Any
    settings: Settings
    engine: SlowWorker
    history: History
    jobs: Jobs


@contextmanager
def served(data_dir: Path, host: str = "127.0.0.1") -> Iterator[Served]:
    """Serve from `data_dir` until the block ends."""
    first = 20_000 + os.getpid() % 10_000  # two test runs on one machine shouldn't race for the same port
    settings = Settings(data_dir, host=host, port=serve.free_port(host, first), backend="fake", open_browser=False)
    start_log(settings)
    serve.prepare(settings)
    history = History(data_dir)
    engine = SlowWorker("fake", data_dir=data_dir)
    jobs = Jobs(history, engine)
    blocks = ui.build(history, jobs, settings, OFFERS, [MODELS["klein-dense"]])
    try:
        yield Served(serve.launch(blocks, settings, history), blocks, settings, engine, history, jobs)
    finally:
        jobs.close()
        engine.close()
        history.close()
        blocks.close(verbose=False)
