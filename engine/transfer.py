"""Bytes on their way to the disk: how many, how fast, how long still; hashed, copied, and never more than fit.

Knows no network and no model.
"""

import shutil
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.records import CHUNK, Digest
from engine.types import BadRequest

REPORT_SECONDS = 0.2
RATE_SECONDS = 10  # the rate is that of the last seconds, as a person understands "now"
SPARE_BYTES = 200_000_000  # left free on a disk: a full one breaks other programs


@dataclass(frozen=True, slots=True)
class Progress:
    """`path` is worked on; `done` of `total` bytes of all files are there. `rate` is in bytes a second, and it and
    `seconds_left` are None until they can be told. `waiting`: seconds until a broken connection is tried again."""

    path: str
    done: int
    total: int
    rate: float | None = None
    seconds_left: float | None = None
    waiting: float = 0.0


class Meter:
    """Counts the bytes of a whole download or copy."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.came = 0  # what was really moved, not found there
        self._moved: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._reported = float("-inf")

    def found(self, number: int) -> None:
        """Bytes that were there already; negative where they turned out to be wrong."""
        self.done += number

    def moved(self, number: int) -> None:
        self.done += number
        self.came += number
        now = time.monotonic()
        if now - self._moved[-1][0] > REPORT_SECONDS / 2:
            self._moved.append((now, self.came))
        while len(self._moved) > 2 and now - self._moved[0][0] > RATE_SECONDS:
            self._moved.popleft()

    def due(self) -> bool:
        """Whether it is time for another report."""
        now = time.monotonic()
        if now - self._reported < REPORT_SECONDS:
            return False
        self._reported = now
        return True

    def progress(self, path: str, waiting: float = 0.0) -> Progress:
        then, before = self._moved[0]
        seconds = time.monotonic() - then
        rate = (self.came - before) / seconds if seconds > REPORT_SECONDS and self.came > before else None
        left = (self.total - self.done) / rate if rate else None
        return Progress(path, self.done, self.total, rate, left, waiting)


def hash_file(file: Path, digest: Digest, path: str, meter: Meter) -> Iterator[Progress]:
    """Read a file that is already in its place."""
    for chunk in _chunks(file):
        digest.update(chunk)
        meter.found(len(chunk))
        if meter.due():
            yield meter.progress(path)


def copy_file(source: Path, target: Path, digest: Digest, path: str, meter: Meter) -> Iterator[Progress]:
    """Copy a file and hash what was read, in one pass. Raises BadRequest where the target cannot be written."""
    make_folder(target.parent)
    with writing(target), target.open("wb") as out:
        for chunk in _chunks(source):
            digest.update(chunk)
            out.write(chunk)
            meter.moved(len(chunk))
            if meter.due():
                yield meter.progress(path)


def make_folder(folder: Path) -> Path:
    """The folder, created if need be. Raises BadRequest with the reason and the way out."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class writing:
    """A context in which an OSError means that `place` cannot be written, said as BadRequest."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, why: BaseException | None, trace: object) -> None:
        if isinstance(why, OSError):
            reason = why.strerror or str(why)
            way_out = "free some space or choose another data folder with --data, and do the same again"
            raise BadRequest(f"cannot write {self.place} ({reason}): {way_out}") from None


def check_space(folder: Path, needed: int) -> None:
    """Raise BadRequest where `needed` more bytes do not fit on the disk of `folder`, which need not exist yet."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed + SPARE_BYTES > free:
        raise BadRequest(
            f"{size(needed)} are needed in {folder} and {size(free)} are free there: free some space, or choose "
            "another data folder with --data"
        )


def size(number: float) -> str:
    """Bytes for a person, decimal: 3.89 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return f"{number:.0f} bytes"


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                yield chunk
    except OSError as why:
        raise BadRequest(f"{file} cannot be read ({why.strerror or why}): check the disk, or copy it again") from None
