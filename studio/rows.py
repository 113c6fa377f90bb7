"""What comes out of the history: frozen rows of plain values, and how a Request becomes columns and back.

Knows no SQL. Ids are numbers, references to other rows are their ids, paths are absolute.
"""

import hashlib
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine import chain
from engine.types import EngineError, Request

PLAIN = ("prompt", "model", "seed", "width", "height", "steps")  # the fields of Request that are columns
LOCAL = "local"  # the owner where one person owns the machine; on a Space, a visitor's session is the owner

# The states of a job. The first two are to be done, the others are ends that `retry` may leave (except `done`).
WAITING, RUNNING, DONE, STOPPED, FAILED, INTERRUPTED = (
    "waiting", "running", "done", "stopped", "failed", "interrupted",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Project:
    """One line of work. `prompt` is what is being typed, `controls` the page's other values, saved as they change."""

    id: int
    owner: str
    name: str
    prompt: str
    controls: Mapping[str, Any]
    created_at: float
    used_at: float


@dataclass(frozen=True, slots=True)
class Revision:
    """One wording of a project's prompt. `label` is r1, r2 on the main line, r2a for a branch that leaves r2."""

    id: int
    project: int
    parent: int | None
    label: str
    prompt: str
    lang: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Job:
    """One picture to be made. `step` of `total` are done; `error` is a sentence; `image` the picture's id once done.

    `op` says what led here (make, vary, refine, ..) and `parent` is the image it started from. Jobs submitted
    together share `batch`. `tries` counts starts. `seconds_left` is None while nobody can know. `preview` is a small
    uint8 [h, w, 3] of what is coming, where steps are slow; like it, it is in no row.
    """

    id: int
    owner: str
    project: int
    revision: int
    batch: str
    op: str
    parent: int | None
    request: Request
    state: str
    step: int
    total: int
    error: str
    tries: int
    place: float
    created_at: float
    started_at: float | None
    ended_at: float | None
    image: int | None
    seconds_left: float | None = None
    preview: np.ndarray | None = field(default=None, compare=False)

    @property
    def over(self) -> bool:
        """Whether nothing more happens to it by itself."""
        return self.state not in (WAITING, RUNNING)


@dataclass(frozen=True, slots=True)
class Image:
    """One picture. `kept` is True kept, False rejected, None undecided; `rating` 0 to 5; `deleted_at` set: in the bin.

    `request` is the complete recipe; `seconds` the engine's total; `details` its parts, memory, unknown words and
    whatever else its PNG says. `thumb` is None where none could be made: show `path`.
    """

    id: int
    owner: str
    job: int | None
    project: int
    revision: int
    parent: int | None
    op: str
    request: Request
    fingerprint: str
    model_hash: str
    backend: str
    reason: str
    seconds: float
    details: Mapping[str, Any]
    path: Path
    thumb: Path | None
    sha256: str
    bytes: int
    rating: int
    kept: bool | None
    note: str
    created_at: float
    deleted_at: float | None
    tags: tuple[str, ...] = field(default=())


def columns(request: Request) -> dict[str, Any]:
    """A complete Request as column values: the plain fields, and the rest (variations, draft, ..) as JSON."""
    values = chain.values(request)
    plain = {name: values.pop(name) for name in PLAIN}
    return plain | {"rest": as_json(values)}


def request_of(row: Mapping[str, Any]) -> Request:
    """The Request in a row's columns."""
    return chain.request({name: row[name] for name in PLAIN} | json.loads(row["rest"]))


def fingerprint(request: Request) -> str:
    """The content address of a complete recipe: equal for equal pictures; fields that are not used are not in it."""
    return hashlib.sha256(as_json(chain.values(request)).encode()).hexdigest()


def as_json(value: Any) -> str:
    """Compact JSON with sorted keys; lone surrogates become `?`, since SQLite holds real text only."""
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    except TypeError as error:
        raise EngineError(f"this recipe can't be stored ({error}): its fields must be numbers and text") from error
    return clean(text)


def clean(text: str) -> str:
    """The text without what SQLite can't hold or search: lone surrogates and null characters."""
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def searchable(text: str) -> str:
    """Text as the search keeps it: composed, and without the joiners that one keyboard types and another doesn't."""
    return unicodedata.normalize("NFC", clean(text)).replace("\u200c", "").replace("\u200d", "")
