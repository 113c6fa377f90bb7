"""The one process that owns the model: requests go down a pipe, Steps and Pictures come up, everyone else iterates.

A spawned child keeps the page alive when a driver or the out-of-memory killer ends the engine, gives all memory back
when it is closed, and works in a single thread, so that inference mode and lazy arrays never cross threads. The first
request starts it, and the first request after its death starts the next. Knows nothing of what a backend does.

The protocol: the parent sends `(number, Request)` to start a run, `(number, None)` to end it, `None` to end the
child; the child answers `(number, Step | Picture | Failure | None)`, None being the last word. Whatever arrives while a
picture is being made means that nobody waits for it any more, so the cancel flag *is* "something lies in the pipe": no
shared lock that a killed child could take to its grave, and a parent that has gone counts as a cancel too.
"""

import functools
import gc
import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import NoReturn

from engine import catalog, hardware, products
from engine.packs import Pack, open_pack
from engine.plan import check_backend, choose_backend, complete, plan
from engine.politeness import step_back
from engine.types import Backend, Crashed, EngineError, Picture, Request, Step

log = logging.getLogger("niwaki.worker")


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong in the child: the error to raise again, and the traceback for the log if it is a bug of ours."""

    error: EngineError
    details: str = ""


class Worker:
    """Runs requests in a child process, one at a time. Safe to use from several threads: a second caller waits."""

    def __init__(self, backend: str = "auto", *, data_dir: Path, previews: bool = False) -> None:
        """`backend` is 'auto', 'torch', 'mlx' or 'fake'; raises BadRequest for any other. Starts nothing yet.

        With `previews` somebody looks at the Steps, and those of slow models show what is coming: a tenth of the time.
        """
        check_backend(backend)
        self._backend, self._data_dir, self._previews = backend, Path(data_dir), previews
        self._turn = threading.Lock()  # held for a whole run; not an RLock: several threads resume one generator
        self._state = threading.Lock()  # held for an instant, around the fields below
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None
        self._running: int | None = None  # the number of the run that somebody waits for
        self._number = 0

    @property
    def pid(self) -> int | None:
        """The child's process id, None while there is no child."""
        process = self._process
        return process.pid if process is not None and process.is_alive() else None

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        """Yield the Steps of one request and then its Picture. Closing the generator stops the work within one block.

        Raises BadRequest for an impossible request (before anything is started, except for a prompt with too many
        tokens), Cancelled after `stop`, and EngineError when the child fails or dies.
        """
        request = self.complete(request)
        with self._turn:
            process, pipe, number = self._start(request)
            try:
                yield from self._answers(process, pipe, number)
            finally:
                self.stop()

    def complete(self, request: Request) -> Request:
        """The request with every field set, as its model declares. Raises BadRequest for an impossible one."""
        return complete(request, self._pack(request.model))

    def foresee(self, request: Request) -> int:
        """Bytes that a complete request is predicted to take at most here and now, 0 where nobody can say.

        Raises BadRequest for one that would not fit, naming the largest size that would.
        """
        pack = self._pack(request.model)
        if pack is None or self._backend == "fake":
            return 0
        # A card's free memory is the child's to ask; what the child holds already is free for its next picture.
        free = 0 if self._machine.kind == "cuda" else hardware.available_bytes()
        room = free + (hardware.resident_bytes(self.pid) if self.pid else 0) if free else 0
        rates = products.rates(self._data_dir, self._machine)
        return plan(self._machine, pack, request, self._backend, room, rates).peak_bytes

    @functools.cached_property
    def _machine(self) -> hardware.Hardware:
        return hardware.detect()

    def begin(self) -> None:
        """Start the child now and let it import its libraries and, on a card, compile its kernels, while nobody waits
        for a picture yet. Raises nothing: what is wrong is said to whoever asks for the first picture."""
        with self._state, suppress(EngineError):
            self._alive()

    def warm(self, model: str) -> None:
        """Load a model now, so that the first picture needn't wait for it. Blocks; raises what `run` raises."""
        steps = self.run(Request(prompt="a circle", model=model))
        next(steps)  # Step 0: model and prompt are ready
        steps.close()

    def stop(self) -> None:
        """Cancel the running request, whose caller gets Cancelled. Does nothing when none is running."""
        with self._state:
            if self._running is not None and self._pipe is not None:
                with suppress(OSError):  # a dead child needs no stopping
                    self._pipe.send((self._running, None))
            self._running = None

    def close(self, patience: float = 2.0) -> None:
        """End the child, by force after `patience` seconds, and give its memory back; a later run starts a new one."""
        with self._state:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = self._running = None
        if process is None or pipe is None:
            return
        with suppress(OSError):
            pipe.send(None)
        process.join(timeout=patience)
        if process.is_alive():  # deep in a load or a long block; it holds nothing that needs tidying
            process.kill()
            process.join(timeout=patience + 2)  # even a killed process needs the processor to die
        pipe.close()

    def _pack(self, model: str) -> Pack | None:
        """The model's pack; None for the fake backend and a known model that isn't installed."""
        if self._backend == "fake" and model in catalog.MODELS and model not in catalog.installed(self._data_dir):
            return None
        return open_pack(catalog.find(model, self._data_dir))

    def _start(self, request: Request) -> tuple[SpawnProcess, Connection, int]:
        """Send a request to the child, which is started first if there is none."""
        with self._state:
            process, pipe = self._alive()
            self._number += 1
            self._running = self._number
            with suppress(OSError):  # it died just now: reading the answers finds that out and says so
                pipe.send((self._number, request))
            return process, pipe, self._number

    def _alive(self) -> tuple[SpawnProcess, Connection]:
        """The child and our end of its pipe, started if there is none. The caller holds `_state`."""
        if self._process is None or self._pipe is None or not self._process.is_alive():
            self._process, self._pipe = _spawn(self._backend, self._data_dir, self._previews)
        return self._process, self._pipe

    def _answers(self, process: SpawnProcess, pipe: Connection, number: int) -> Iterator[Step | Picture]:
        while True:
            try:
                # The sentinel as well: on a death, an end of the pipe held open elsewhere would keep us waiting.
                wait([pipe, process.sentinel])
                if not pipe.poll():
                    raise EOFError
                answered, message = pipe.recv()
            except (EOFError, OSError):
                raise self._buried(process, pipe) from None
            if answered != number:
                continue  # the last words of a run that its caller left
            if isinstance(message, Step | Picture):
                yield message
                continue
            with self._state:
                self._running = None
            if message is None:
                return
            if message.details:
                log.error("the engine process reports: %s\n%s", message.error, message.details)
            raise message.error

    def _buried(self, process: SpawnProcess, pipe: Connection) -> EngineError:
        """Forget a dead child, so that the next run starts a new one; returns the sentence about its death."""
        process.join(timeout=2)
        with self._state:
            closed = self._process is not process  # by `close`, on another thread
            if not closed:
                pipe.close()
                self._process = self._pipe = self._running = None
        error = (
            EngineError("the engine was closed while it worked: start the picture again")
            if closed
            else Crashed(_obituary(process))
        )
        log.error("%s", error)
        return error


def _obituary(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        if name == "SIGKILL":
            name += ", most often because memory ran out: try a smaller size or a smaller model"
        return f"the engine process was ended by {name}; the next picture starts it again"
    return f"the engine process ended with exit code {code}; the next picture starts it again"


def _spawn(backend: str, data_dir: Path, previews: bool) -> tuple[SpawnProcess, Connection]:
    """Start the child. Raises EngineError where the system refuses a new process."""
    context = multiprocessing.get_context("spawn")  # a fork would copy locks, threads and CUDA state
    ours, theirs = context.Pipe()
    child = theirs, backend, data_dir, previews
    process = context.Process(target=_child, args=child, name="niwaki-engine", daemon=True)
    try:
        with _deaf_to_ctrl_c():
            process.start()
    except OSError as error:
        ours.close()
        raise EngineError(f"the engine process can't be started ({error}): close other programs, try again") from None
    finally:
        theirs.close()  # while we hold it open, a dead child would never read as the end of the pipe
    return process, ours


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A child started here inherits a blocked SIGINT: Ctrl-C in the terminal is for the parent, which ends the child.

    Ignoring it in the child comes too late: half a second of imports would answer with a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # starting it later, inside start(), would unblock SIGINT again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child(pipe: Connection, backend: str, data_dir: Path, previews: bool) -> NoReturn:
    _serve(pipe, backend, data_dir, previews)
    os._exit(0)  # nothing is left to tidy, and taking a framework apart costs whoever waits half a second


def _serve(pipe: Connection, backend: str, data_dir: Path, previews: bool = False) -> None:
    """In the child: make what comes down the pipe, until it says None or breaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    step_back()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.disable()  # while it imports: a quarter of a million objects of libraries are no garbage
    engine: Backend | None = None
    with suppress(Exception):  # what is wrong is said to whoever asks for a picture
        engine = _open(backend, data_dir, previews)
    gc.freeze()  # what was imported stays, and is not looked through when memory is given back
    gc.enable()
    with suppress(Exception):
        if engine and not pipe.poll():  # nobody waits for a picture yet
            engine.prepare()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while (message := pipe.recv()) is not None:
            number, request = message
            if request is None:
                continue  # a stop that came after the last word
            try:
                engine = engine or _open(backend, data_dir, previews)
                for answer in engine.generate(request, pipe.poll):
                    pipe.send((number, answer))
                pipe.send((number, None))
            except Exception as error:
                pipe.send((number, _failure(error)))


def _open(backend: str, data_dir: Path, previews: bool = False) -> Backend:
    if backend == "fake":
        from engine.fake import FakeBackend

        return FakeBackend()
    machine = hardware.detect()
    if choose_backend(machine, backend) == "mlx":
        try:
            from engine.mlx_backend.backend import MlxBackend
        except ImportError as fault:  # installed without the library for this platform
            raise EngineError(
                f"the package mlx can't be loaded here ({fault}): on Apple Silicon pip install --force-reinstall mlx, "
                "on Linux pip install 'mlx[cpu]'"
            ) from None
        return MlxBackend(machine, data_dir, previews=previews)
    from engine.torch_backend.backend import TorchBackend, use_cores

    use_cores(machine)
    return TorchBackend(machine, data_dir, previews=previews)


def _failure(error: Exception) -> Failure:
    if isinstance(error, EngineError):
        return Failure(error)
    if isinstance(error, MemoryError):
        return Failure(EngineError("memory ran out while the picture was made: try a smaller size or a smaller model"))
    if isinstance(error, ModuleNotFoundError):
        sentence = f"the Python package {error.name} is missing: run make setup"
    else:
        sentence = f"the engine failed on this request ({type(error).__name__}: {error}): the log has the details"
    return Failure(EngineError(sentence), traceback.format_exc())


def _end_with_parent() -> None:
    """End at once when the parent is gone, killed or not, even in the middle of loading 4 GB."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
