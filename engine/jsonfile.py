"""Read JSON that nobody vouches for: an object, in little memory, or one sentence."""

import json
from pathlib import Path
from typing import Any

from engine.types import BadRequest

REPAIR = "fetch or copy the pack again"
# The largest we know is the header of a 4B text encoder, 100 kB. Python's objects take up to 30 times the text.
LARGEST = 2_000_000  # bytes


def read(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises BadRequest where the file is missing, or holds anything else."""
    try:
        with file.open("rb") as stream:
            return parse(stream.read(LARGEST + 1), str(file))
    except OSError as why:
        raise BadRequest(f"{file} cannot be read ({why.strerror}); {REPAIR}") from None


def parse(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`, which a sentence calls `what`. Raises BadRequest for anything else."""
    if len(data) > LARGEST:
        raise BadRequest(f"{what} is longer than {LARGEST} bytes, which no pack's is; {REPAIR}")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadRequest(f"{what} is no JSON object; {REPAIR}")
    return value
