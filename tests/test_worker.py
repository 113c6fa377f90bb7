"""The engine process: progress comes up, stopping goes down, and its death is a sentence and not the end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest

from engine import worker as module
from engine.politeness import NICE
from engine.types import BadRequest, Cancelled, EngineError, Picture, Request, Step
from engine.worker import Failure, Worker
from tests.packs.writers import write_pack

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 60  # far more than anything here takes, so that a hang fails instead of hanging


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("packs") / "tiny", "ternary")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One child for all tests that leave it in order: starting one takes half a second."""
    worker = Worker("fake", data_dir=tmp_path_factory.mktemp("data"))
    yield worker
    worker.close()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Worker]:
    worker = Worker("fake", data_dir=tmp_path)
    yield worker
    worker.close()


def request(pack: Path, steps: int = 2, **changes: object) -> Request:
    return Request("a red circle", str(pack), steps=steps, **changes)  # type: ignore[arg-type]


def long(pack: Path) -> Request:
    return request(pack, steps=50)  # a second of the fake backend


def picture_of(worker: Worker, wanted: Request) -> Picture:
    *_, picture = worker.run(wanted)
    assert isinstance(picture, Picture)
    return picture


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie that nobody reaps has.

    A killed process is a zombie while its other threads are still dying, and can't be reaped before: it has not.
    """
    try:
        os.kill(pid, 0)
        if sys.platform != "linux":
            return False
        proc = Path(f"/proc/{pid}")
        return (
            proc.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z"
            and len(list(proc.glob("task/*"))) == 1
        )
    except (ProcessLookupError, FileNotFoundError):
        return True


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + SECONDS
    while not gone(pid):
        assert time.monotonic() < deadline, f"process {pid} still lives"
        time.sleep(0.02)


def test_a_child_begun_early_draws_the_first_picture(own: Worker, pack: Path) -> None:
    assert own.pid is None
    own.begin()
    begun = own.pid
    assert begun is not None
    picture_of(own, request(pack))
    own.begin()
    assert own.pid == begun


def test_steps_then_a_picture_and_the_child_stays(shared: Worker, pack: Path) -> None:
    *steps, picture = shared.run(request(pack))
    assert steps == [Step(0, 2), Step(1, 2), Step(2, 2)]
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (64, 64, 3)
    assert (picture.request.width, picture.request.steps) == (64, 2)
    pid = shared.pid
    assert pid is not None and pid != os.getpid()
    picture_of(shared, request(pack, seed=1))
    assert shared.pid == pid


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no niceness")
def test_the_child_steps_back_so_that_the_page_answers(shared: Worker, pack: Path) -> None:
    picture_of(shared, request(pack))
    pid = shared.pid
    assert pid is not None
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICE)
    if sys.platform == "linux":
        assert os.sched_getscheduler(pid) == os.SCHED_BATCH
        assert os.getsid(pid) == os.getsid(0)  # a group of its own may starve (PITFALLS.md)


def test_what_the_child_imported_is_never_looked_through_again(tmp_path: Path) -> None:
    code = f"""
import gc
from multiprocessing import Pipe
from pathlib import Path
from engine.worker import _serve
ours, its = Pipe()
ours.send(None)
_serve(its, "torch", Path({str(tmp_path)!r}))
print(gc.get_freeze_count(), gc.isenabled())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    frozen, enabled = done.stdout.split()
    assert int(frozen) > 100_000 and enabled == "True"


def test_an_impossible_request_starts_no_child(own: Worker, pack: Path, tmp_path: Path) -> None:
    for wrong, words in (
        (Request("", str(pack)), "prompt is empty"),
        (request(pack, width=127, height=128), "127x128"),
        (Request("a circle", str(tmp_path / "nowhere")), "unknown model"),
        (Request("a circle", str(tmp_path)), "has no .*transformer"),
    ):
        with pytest.raises(BadRequest, match=words):
            next(own.run(wrong))
    assert own.pid is None


@pytest.mark.parametrize("name", ["tpu", ""])
def test_a_backend_that_is_not_there_is_refused_at_once(name: str, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"unknown backend '{name}'"):
        Worker(name, data_dir=tmp_path)


def test_fake_needs_no_installed_model_but_a_known_one(shared: Worker) -> None:
    assert picture_of(shared, Request("a circle", "bonsai-ternary", steps=1)).pixels.shape == (512, 512, 3)
    with pytest.raises(BadRequest, match="unknown model 'bonsai'"):
        next(shared.run(Request("a circle", "bonsai")))


def test_stop_ends_the_running_request_and_no_other(shared: Worker, pack: Path) -> None:
    steps = shared.run(long(pack))
    assert next(steps) == Step(0, 50)
    shared.stop()
    with pytest.raises(Cancelled):  # and not the picture, a second later
        for _ in steps:
            pass
    shared.stop()  # nothing runs: nothing happens
    assert picture_of(shared, request(pack)).request.steps == 2


def test_closing_the_iterator_stops_the_work_and_its_last_words_are_dropped(shared: Worker, pack: Path) -> None:
    pid = shared.pid
    for _ in range(3):
        steps = shared.run(long(pack))
        next(steps)
        steps.close()
    *steps_after, picture = shared.run(request(pack, seed=9))
    assert [step.total for step in steps_after if isinstance(step, Step)] == [2, 2, 2]
    assert isinstance(picture, Picture) and picture.request.seed == 9
    assert pid in (None, shared.pid)


def test_a_second_caller_waits_for_its_turn(shared: Worker, pack: Path) -> None:
    first = shared.run(request(pack, seed=1))
    next(first)
    got: list[Picture] = []
    second = threading.Thread(target=lambda: got.append(picture_of(shared, request(pack, seed=2))))
    second.start()
    second.join(0.3)
    assert second.is_alive() and not got
    *_, picture = first
    second.join(SECONDS)
    assert isinstance(picture, Picture) and picture.request.seed == 1
    assert [each.request.seed for each in got] == [2]


def test_one_iterator_may_be_resumed_by_many_threads(shared: Worker, pack: Path) -> None:
    steps = shared.run(request(pack))
    got: list[object] = []
    for _ in range(4):  # Step 0, 1, 2 and the picture, each asked for by a thread of its own
        thread = threading.Thread(target=lambda: got.append(next(steps)))
        thread.start()
        thread.join(SECONDS)
    assert isinstance(got[-1], Picture) and next(steps, None) is None


def test_warm_starts_the_child_and_leaves_it_free(own: Worker, pack: Path) -> None:
    own.warm(str(pack))
    pid = own.pid
    assert pid is not None
    picture_of(own, request(pack))
    assert own.pid == pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_child_that_dies_is_a_sentence_and_the_next_run_starts_another(own: Worker, pack: Path, number: int) -> None:
    steps = own.run(long(pack))
    next(steps)
    pid = own.pid
    assert pid is not None
    os.kill(pid, number)
    words = f"ended by {signal.Signals(number).name}.*next picture starts it again"
    with pytest.raises(EngineError, match=words) as death:
        for _ in steps:
            pass
    assert not isinstance(death.value, BadRequest)
    assert own.pid is None
    picture_of(own, request(pack))
    assert own.pid not in (None, pid)


def test_a_child_that_died_between_two_pictures_is_not_missed(own: Worker, pack: Path) -> None:
    picture_of(own, request(pack))
    pid = own.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until_gone(pid)
    picture_of(own, request(pack))
    assert own.pid not in (None, pid)


def test_close_ends_the_child_even_in_the_middle_and_a_later_run_starts_one(own: Worker, pack: Path) -> None:
    steps = own.run(long(pack))
    next(steps)
    pid = own.pid
    assert pid is not None
    closing = threading.Thread(target=own.close)
    closing.start()
    with pytest.raises(EngineError):  # Cancelled, or "closed while it worked": whichever comes first
        for _ in steps:
            pass
    closing.join(SECONDS)
    assert own.pid is None
    wait_until_gone(pid)
    picture_of(own, request(pack))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()", "os._exit(0)"])
def test_the_child_ends_with_its_parent(pack: Path, tmp_path: Path, end: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from engine.types import Request\n"
        "from engine.worker import Worker\n"
        "if __name__ == '__main__':\n"
        f"    worker = Worker('fake', data_dir=Path({str(tmp_path)!r}))\n"
        f"    steps = worker.run(Request('a circle', {str(pack)!r}, steps=50))\n"
        "    next(steps)\n"
        "    print(worker.pid, flush=True)\n"
        f"    {end}\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    # Files, not pipes: a child that outlives its parent would hold a pipe open and hang the test instead of failing it.
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        subprocess.run([sys.executable, script], env=environment, stdout=stdout, stderr=stderr, timeout=60, check=False)
    wait_until_gone(int(out.read_text()))
    assert "Traceback" not in err.read_text()


class Broken:
    """A backend whose every run fails with the error it was given."""

    name = "broken"

    def __init__(self, error: Exception) -> None:
        self.error = error

    def prepare(self) -> None: ...

    def generate(self, request: Request, cancelled: object) -> Iterator[Step | Picture]:
        yield Step(0, 1)
        raise self.error

    def close(self) -> None: ...


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test process may serve, and keeps its Ctrl-C and its priority."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(module, "step_back", lambda: None)


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize(
    ("error", "kind", "words", "logged"),
    [
        (BadRequest("too long: 600 tokens"), BadRequest, "^too long: 600 tokens$", False),
        (Cancelled("stopped"), Cancelled, "^stopped$", False),
        (MemoryError(), EngineError, "memory ran out", False),
        (ModuleNotFoundError("no", name="torch"), EngineError, "package torch is missing: run make setup", True),
        (ZeroDivisionError("by zero"), EngineError, r"\(ZeroDivisionError: by zero\)", True),
    ],
)
def test_errors_keep_their_kind_and_bugs_their_traceback(monkeypatch, error, kind, words: str, logged: bool) -> None:
    monkeypatch.setattr(module, "_open", lambda *_: Broken(error))
    ours, theirs = Pipe()
    for message in ((1, None), (2, Request("a", "b")), None):  # a late stop, a run, the end
        ours.send(message)
    module._serve(theirs, "broken", Path())
    assert ours.recv() == (2, Step(0, 1))
    number, failure = ours.recv()
    assert number == 2 and isinstance(failure, Failure)
    assert type(failure.error) is kind
    with pytest.raises(kind, match=words):
        raise failure.error
    assert ("Traceback" in failure.details) is logged
    assert not ours.poll()


@pytest.mark.usefixtures("no_child")
@pytest.mark.parametrize("waiting", [True, False])
def test_the_child_prepares_itself_while_nobody_waits(monkeypatch: pytest.MonkeyPatch, waiting: bool) -> None:
    class Early(Broken):
        def prepare(self) -> None:
            prepared.append(self)
            ours.send(None)
            raise self.error

    prepared: list[Early] = []
    monkeypatch.setattr(module, "_open", lambda *_: Early(OSError("no card")))
    ours, theirs = Pipe()
    late = threading.Timer(10, ours.send, [None])  # the end, should nobody have said it
    late.start()
    if waiting:
        ours.send(None)
    module._serve(theirs, "early", Path())
    late.cancel()
    assert len(prepared) == (0 if waiting else 1)


@pytest.mark.slow
def test_torch_through_the_worker(pack: Path, tmp_path: Path) -> None:
    worker = Worker("torch", data_dir=tmp_path)
    try:
        first = picture_of(worker, request(pack))
        again = picture_of(worker, request(pack))
        assert first.backend == "torch" and (first.pixels == again.pixels).all()
        assert first.seconds.load > 0 and again.seconds.load == 0 and again.seconds.encode == 0
        with pytest.raises(BadRequest, match="tokens"):
            picture_of(worker, Request("red " * 500, str(pack)))
    finally:
        worker.close()
