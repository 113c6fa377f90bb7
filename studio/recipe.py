"""What a picture's file says about how it was made: written, and read back from files that strangers may have written.

Knows values, not files. JSON keys are the fields of Request and Picture; `ancestors` are the recipes of the pictures
that this one came from, the first one first, so that a single PNG can rebuild its whole chain.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from engine import chain
from engine.types import BadRequest, Picture, Request

FORMAT = 1  # raise it when a key changes its meaning, never when one is added
MAX_TEXT = 500_000  # characters of JSON in a PNG: readers refuse a million; the oldest ancestors go first
MAX_ANCESTORS = 100


@dataclass(frozen=True, slots=True)
class Link:
    """One picture of a chain: its recipe, what was done to get it, the SHA-256 of its file."""

    request: Request
    op: str = "make"
    sha256: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """What the engine doesn't know about a picture: what was done, from which pictures, with which model files."""

    op: str = "make"
    ancestors: tuple[Link, ...] = ()
    model_files: Mapping[str, str] = field(default_factory=dict)


UNKNOWN = Origin()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe read back. Only `request` is sure to be sensible; the rest is what the file says."""

    request: Request
    origin: Origin = UNKNOWN
    backend: str = ""
    dtype: str = ""
    reason: str = ""
    seconds: float = 0.0
    unknown_words: tuple[str, ...] = ()


def values(picture: Picture, origin: Origin = UNKNOWN) -> dict[str, Any]:
    """Everything needed to make the picture again, and what it took to make it."""
    found = {
        "format": FORMAT,
        **chain.values(picture.request),
        "backend": picture.backend,
        "dtype": picture.dtype,
        "reason": picture.reason,
        "seconds": {name: round(value, 4) for name, value in asdict(picture.seconds).items()},
        "peak_memory_bytes": picture.peak_memory_bytes,
        "unknown_words": list(picture.unknown_words),
        "op": origin.op,
        "model_files": dict(origin.model_files),
    }
    ancestors = [
        {**chain.values(link.request), "op": link.op, "sha256": link.sha256}
        for link in origin.ancestors[-MAX_ANCESTORS:]
    ]
    lengths = [len(json.dumps(link)) for link in ancestors]
    while sum(lengths) > MAX_TEXT:
        ancestors.pop(0)
        lengths.pop(0)
    return found | {"ancestors": ancestors}


def text(picture: Picture, origin: Origin = UNKNOWN) -> str:
    """The recipe as JSON."""
    # A lone surrogate from a broken paste is no UTF-8; written as \udXXX it is still valid JSON.
    return json.dumps(values(picture, origin), ensure_ascii=False).encode("utf-8", "backslashreplace").decode("utf-8")


def parameters(picture: Picture, origin: Origin = UNKNOWN) -> str:
    """The same in the words that A1111 and the tools after it read: the prompt, then one line of settings."""
    request = picture.request
    settings: dict[str, object] = {
        "Steps": request.steps, "Sampler": "Euler", "CFG scale": 1, "Seed": request.seed,
        "Size": f"{request.width}x{request.height}", "Model": request.model,
    }  # fmt: skip
    weights = next((sha256 for path, sha256 in origin.model_files.items() if path.startswith("transformer")), "")
    if weights:
        settings["Model hash"] = weights[:10]
    line = ", ".join(f"{name}: {value}" for name, value in {**settings, "Version": "Niwaki"}.items())
    return f"{request.prompt}\n{line}".encode("utf-8", "replace").decode("utf-8")


def loads(text: str, where: str) -> dict[str, Any]:
    """The JSON of a recipe. Raises BadRequest naming `where` when it is none, or from a later Niwaki."""
    try:
        found = json.loads(text)
        version = int(found["format"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise BadRequest(f"the recipe in {where} is damaged") from error
    if version > FORMAT:
        raise BadRequest(f"{where} was made by a later Niwaki (recipe format {version}, known here {FORMAT}): update")
    return found


def read(found: Mapping[str, Any], where: str) -> Recipe:
    """The recipe in these values. Raises BadRequest naming `where` when what matters is missing or wrong."""
    try:
        request = chain.request(found)
        ancestors = tuple(_link(each) for each in _list(found.get("ancestors"))[-MAX_ANCESTORS:])
    except BadRequest as error:
        raise BadRequest(f"the recipe in {where} is damaged: {error}") from error
    seconds = found.get("seconds")
    total = seconds.get("total") if isinstance(seconds, dict) else None
    files = found.get("model_files")
    return Recipe(
        request,
        Origin(_text(found, "op") or "make", ancestors, _texts(files) if isinstance(files, dict) else {}),
        _text(found, "backend"),
        _text(found, "dtype"),
        _text(found, "reason"),
        float(total) if isinstance(total, int | float) and 0 <= total < 1e9 else 0.0,
        tuple(word for word in _list(found.get("unknown_words")) if isinstance(word, str)),
    )


def _link(values: Any) -> Link:
    if not isinstance(values, dict):
        raise BadRequest(f"an ancestor is {str(values)[:40]!r}, which is no recipe")
    return Link(chain.request(values), _text(values, "op") or "make", _text(values, "sha256"))


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else ()


def _texts(values: Mapping[Any, Any]) -> dict[str, str]:
    return {name: value for name, value in values.items() if isinstance(value, str)}


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""
