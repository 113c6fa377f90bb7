"""What was noted about a model when its files came: the source, its commit, every file's size and hashes.

A record lies in the data folder beside `models`, not in it: it outlives a removed model, so that a later download or
import is held to the same bytes. Knows no network and no pack.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.types import BadRequest

NOTES_FILE = "niwaki.json"
LICENCE_FILES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*", re.IGNORECASE)
CHUNK = 1 << 20
_HEX = {"sha256": 64, "git_sha1": 40}


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one file. `git_sha1` is git's own name of a small file's content, for which the hub has no
    SHA-256; both None: only the size is known."""

    bytes: int
    sha256: str | None = None
    git_sha1: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One model's source and files, by path inside the folder. `notes_sha256` is the hash of our own niwaki.json, which
    is written when the model is complete; None: it never was."""

    repository: str | None
    revision: str | None
    files: dict[str, Known] = field(default_factory=dict)
    notes_sha256: str | None = None

    @property
    def bytes(self) -> int:
        return sum(known.bytes for known in self.files.values())


class Digest:
    """Hashes the bytes of one file as they pass by, and says what is wrong with them at the end."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(f"blob {known.bytes}\0".encode(), usedforsecurity=False)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    def update(self, data: bytes) -> None:
        self._bytes += len(data)
        self._sha256.update(data)
        if self._known.git_sha1:
            self._git.update(data)

    def fault(self) -> str | None:
        """What is wrong with everything that passed, or None."""
        known = self._known
        if self._bytes != known.bytes:
            return f"it has {self._bytes} bytes where {known.bytes} are recorded"
        if known.sha256 and self.sha256 != known.sha256:
            return f"its SHA-256 is {self.sha256} where {known.sha256} is recorded"
        if known.git_sha1 and self._git.hexdigest() != known.git_sha1:
            return f"its git hash is {self._git.hexdigest()} where {known.git_sha1} is recorded"
        return None


def path_of(model_id: str, data_dir: Path) -> Path:
    return Path(data_dir) / "records" / f"{model_id}.json"


def read(model_id: str, data_dir: Path) -> Record | None:
    """The record of a model, None where there is none. Raises BadRequest for a damaged one."""
    file = path_of(model_id, data_dir)
    try:
        declared = json.loads(file.read_bytes())
        files = {inside(path): _known(entry) for path, entry in declared["files"].items()}
        source = [declared[key] for key in ("repository", "revision", "notes_sha256")]
        if not all(value is None or isinstance(value, str) for value in source):
            raise ValueError("a name that is no text")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as why:
        raise BadRequest(f"{file} is damaged ({why}): delete it, and the hub's files are recorded anew") from None
    return Record(source[0], source[1], files, source[2])


def write(model_id: str, data_dir: Path, record: Record) -> None:
    """Keep a record, whole or not at all."""
    write_json(path_of(model_id, data_dir), asdict(record))


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """JSON written aside and renamed. Raises BadRequest where the folder cannot be written."""
    aside = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(file)
    except OSError as why:
        raise BadRequest(f"cannot write {file} ({why.strerror}): choose another data folder with --data") from None


def inside(path: str) -> str:
    """A recorded path, refused (ValueError) where it leaves the folder on any system."""
    if path in ("", ".") or path.startswith("/") or ".." in path.split("/") or any(mark in path for mark in "\\:\0"):
        raise ValueError(f"the path {path!r} is not inside the folder")
    return path


def licences(names: Iterable[str]) -> list[str]:
    """The licence and notice files among paths: those at the top."""
    return sorted(name for name in names if LICENCE_FILES.fullmatch(name))


def _known(entry: Any) -> Known:
    size = entry["bytes"]
    if type(size) is not int or size < 0:
        raise ValueError(f"{size!r} is no number of bytes")
    hashes = {key: entry.get(key) for key in _HEX}
    for key, value in hashes.items():
        if value is not None and not re.fullmatch(f"[0-9a-f]{{{_HEX[key]}}}", str(value)):
            raise ValueError(f"{value!r} is no {key}")
    return Known(size, **hashes)
