"""The history's file: one Niwaki at a time has it open, one thread writes to it, anybody reads.

Knows the lock, the threads and what a full disk sounds like; not what is written.
"""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import sqlalchemy as sa

from engine.types import BadRequest, EngineError
from studio.migrations import migrate
from studio.settings import make_folder
from studio.tables import FILE, connect

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Store:
    """An open history. `read` from any thread, `write` one after another on a thread of its own."""

    def __init__(self, data_dir: Path) -> None:
        """Lock the folder and bring the file up to date. Raises BadRequest when either can't be done."""
        self.data_dir = make_folder(Path(data_dir))
        self._lock = lock(self.data_dir)
        try:
            migrate(self.data_dir / FILE, self.data_dir / "backups")
        except BaseException:
            self._lock.close()
            raise
        self._engine = connect(self.data_dir / FILE)
        self._writing = self._engine.execution_options(writing=True)
        self._writer = ThreadPoolExecutor(1, "niwaki-history")

    def read(self, query: Callable[[sa.Connection], Result]) -> Result:
        """Run a query in a snapshot of its own. Raises EngineError with a sentence where the file can't be read."""
        try:
            with self._engine.begin() as db:
                return query(db)
        except sa.exc.OperationalError as error:
            raise self._sentence("read", error) from error

    def write(self, change: Callable[[sa.Connection], Result]) -> Result:
        """Run a change in one transaction on the writer's thread: all of it or nothing.

        Raises EngineError with a sentence where it can't be written, most often because the disk is full.
        """
        return self._writer.submit(self._change, change).result()

    def shrink(self) -> None:
        """Move what the write-ahead log holds into the file and empty it, so that deleted text lies nowhere."""
        self._writer.submit(self._checkpoint).result()

    def close(self) -> None:
        """Finish what is being written and let another Niwaki have the folder."""
        self._writer.shutdown()
        self._engine.dispose()
        self._lock.close()

    def _change(self, change: Callable[[sa.Connection], Result]) -> Result:
        try:
            with self._writing.begin() as db:
                return change(db)
        except sa.exc.OperationalError as error:
            raise self._sentence("written", error) from error

    def _checkpoint(self) -> None:
        connection = self._engine.raw_connection()
        try:
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            connection.close()

    def _sentence(self, what: str, error: sa.exc.OperationalError) -> EngineError:
        log.error("the history can't be %s: %s", what, error)
        return EngineError(
            f"the history in {self.data_dir} can't be {what} ({error.orig}): free some space on the disk and try again"
        )


def lock(folder: Path) -> IO[str]:
    """Take the folder for this process until the file is closed or the process ends, however it ends.

    Raises BadRequest when another Niwaki has it. Where the file system knows no locks, a warning in the log is all.
    """
    path = folder / "niwaki.lock"
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # stays open as long as the lock is held
    try:
        _take(file)
    except BlockingIOError:
        file.seek(0)
        who = file.read().strip() or "unknown"
        file.close()
        raise BadRequest(
            f"another Niwaki (process {who}) is using the data folder {folder}: use its page, stop it first, "
            "or choose another folder with --data"
        ) from None
    except OSError as error:
        log.warning("%s can't be locked (%s): do not start a second Niwaki on this folder", path, error)
        return file
    with contextlib.suppress(OSError):  # a full disk: the lock holds without the number in it
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
    return file


if sys.platform == "win32":

    def _take(file: IO[str]) -> None:
        import msvcrt

        file.seek(1 << 20)  # far behind the process id, which a second Niwaki wants to read
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            raise BlockingIOError from None

else:

    def _take(file: IO[str]) -> None:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
