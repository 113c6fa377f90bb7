"""Threads with a core each: whether torch keeps to it, and what a failure leaves."""

import gc
import os
import threading
from collections.abc import Iterator

import pytest
import torch

from engine.torch_backend.cores import Cores

TASKS = "/proc/self/task"


def count_tasks() -> int:
    """Threads of this process, torch's own among them; 0 where nobody knows."""
    return len(os.listdir(TASKS)) if os.path.exists(TASKS) else 0


@pytest.fixture(autouse=True)
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_each_core_has_one_thread_and_the_caller_as_many_as_before(threads: int) -> None:
    cores, x, found = Cores(8), torch.ones(1 << 20), []
    tasks = count_tasks()

    def run(core: int, part: int) -> None:
        torch.add(x, part)  # which is when torch would give a thread the process's number
        found.append((core, part, torch.get_num_threads(), torch.is_inference_mode_enabled()))

    cores.share(run, range(20))
    assert cores.count == threads == torch.get_num_threads()
    assert sorted(part for _, part, *_ in found) == list(range(20))
    assert all(core < threads and (one, inferring) == (1, True) for core, _, one, inferring in found)
    assert count_tasks() == tasks
    assert Cores(2).count == 2 and torch.get_num_threads() == threads


def test_after_a_failure_nothing_is_begun_and_nobody_is_at_work() -> None:
    cores, begun = Cores(8), []

    def run(core: int, part: int) -> None:
        begun.append(part)
        if part == 2:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        cores.share(run, range(1000))
    assert len(begun) < 1000
    count = len(begun)
    cores.share(lambda core, part: None, range(10))
    assert len(begun) == count


def test_where_a_thread_is_refused_the_others_do_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    real = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Cores(8)
    monkeypatch.undo()
    gc.collect()  # a pool that nobody has ends its threads
    started[0].join(10)
    assert not started[0].is_alive()
