"""Write a safetensors file one tensor at a time: the header first, from known shapes, then each tensor's bytes.

The library's own writer wants every tensor in memory at once, which for these models is all of it. Knows nothing of
packs or layers; reading is engine.packs' business.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.types import EngineError

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8,
    "I64": 8, "F64": 8,
}  # fmt: skip
Part = np.ndarray | bytes | memoryview


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be written: its safetensors dtype name and shape, and a function that yields its bytes in parts.

    Arrays are written as they lie in memory, so they are little-endian and contiguous; bfloat16 comes as uint16 bits.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Part]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def header(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> tuple[bytes, list[Entry]]:
    """The bytes before the first tensor, and the entries in the order in which they must follow.

    Larger items come first and names are sorted among equals, as the library does it: every tensor is then aligned.
    """
    ordered = sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.name))
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for entry in ordered:
        begin, end = end, end + entry.nbytes
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, ordered


def size_of(entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> int:
    """Bytes of the file that `write` would make; no part is asked for."""
    return len(header(entries, metadata)[0]) + sum(entry.nbytes for entry in entries)


def write(file: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write `file` and return its record {"bytes": .., "sha256": ..}. Only one part is in memory at a time.

    Raises EngineError where a tensor yields other than its shape's bytes; OSError as the system says it.
    """
    digest, total = hashlib.sha256(), 0
    start, ordered = header(entries, metadata)
    with file.open("wb") as stream:
        for entry in (None, *ordered):
            written = 0
            for part in entry.parts() if entry else (start,):
                data = np.ascontiguousarray(part).data.cast("B") if isinstance(part, np.ndarray) else part
                stream.write(data)
                digest.update(data)
                written += len(data)
            if entry and written != entry.nbytes:
                raise EngineError(f"tensor {entry.name} gave {written} bytes for {file} instead of {entry.nbytes}")
            total += written
    return {"bytes": total, "sha256": digest.hexdigest()}
