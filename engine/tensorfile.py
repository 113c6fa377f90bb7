"""Read and write safetensors files, one tensor at a time.

Reading: headers first, checked against the file to the last byte; then a tensor mapped, or read into memory of its own.
Writing: the header first, from known shapes, then each tensor's bytes; the library's own writer wants every tensor in
memory at once, which for these models is all of it. Knows nothing of packs, layers or frameworks.
"""

import hashlib
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import jsonfile, lowbit
from engine.jsonfile import REPAIR
from engine.types import BadRequest, EngineError

DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "BF16": "<u2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
}  # the safetensors names we read; NumPy has no bfloat16, so its bits are mapped and widened on reading
FLOATS = ("BF16", "F16", "F32")  # those that a weight may have
ITEM_BYTES = {name: np.dtype(kind).itemsize for name, kind in DTYPES.items()}
BLOCK = 8 << 20  # bytes read at once where a tensor is copied as it is
ROWS_VALUES = 4 << 20  # of a matrix looked at row by row: 16 MB as float32, of which its users need several
Part = np.ndarray | bytes | memoryview


def widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as they lie in a file, of the safetensors `dtype` F32, F16 or BF16, as float32."""
    return lowbit.from_bfloat16(values) if dtype == "BF16" else values.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: its safetensors dtype name, shape, size, file, and first byte in that file."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: Path
    offset: int


class Tensors(Mapping[str, TensorInfo]):
    """All tensors of a component by name. Only headers are read until `numpy` is called."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Read the headers of safetensors `files`. Raises BadRequest for a damaged one, or a name in two of them."""
        self.files = files
        self._infos: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in _read_header(file).items():
                if name in self._infos:
                    raise BadRequest(f"tensor {name} lies in {self._infos[name].file} and {file}; remove one of them")
                self._infos[name] = info

    def __getitem__(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def numpy(self, name: str) -> np.ndarray:
        """The tensor as a read-only memory map in its own dtype and shape; bfloat16 as a float32 copy."""
        info = self._infos[name]
        dtype = np.dtype(DTYPES[info.dtype])
        if info.nbytes == 0:  # the system maps no empty ranges
            return np.zeros(info.shape, np.float32 if info.dtype == "BF16" else dtype)
        try:
            data = np.memmap(info.file, dtype, "r", info.offset, info.shape)
        except (OSError, ValueError) as why:
            raise BadRequest(f"{info.file} changed while it was in use ({why}); {REPAIR}") from None
        return lowbit.from_bfloat16(np.asarray(data)) if info.dtype == "BF16" else data

    def read(self, name: str) -> np.ndarray:
        """The tensor in memory of its own; bfloat16 as uint16 bits. Pages of a map would stay with the process."""
        info = self._infos[name]
        return np.frombuffer(b"".join(self.blocks(name)), DTYPES[info.dtype]).reshape(info.shape)

    def floats(self, name: str) -> np.ndarray:
        """A tensor of F32, F16 or BF16 as float32, in memory of its own."""
        return widened(self.read(name), self._infos[name].dtype)

    def blocks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, some megabytes at a time."""
        info = self._infos[name]
        try:
            with info.file.open("rb") as stream:
                stream.seek(info.offset)
                for start in range(0, info.nbytes, BLOCK):
                    yield stream.read(min(BLOCK, info.nbytes - start))
        except OSError as why:
            raise BadRequest(f"{info.file} cannot be read ({why.strerror}); {REPAIR}") from None

    def rows(self, name: str) -> Iterator[np.ndarray]:
        """A matrix of F32, F16 or BF16 as float32, some rows at a time, not mapped; the reader may change them."""
        info = self._infos[name]
        rows, width = info.shape
        step = max(1, ROWS_VALUES // width)
        with info.file.open("rb") as stream:
            stream.seek(info.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                values = np.fromfile(stream, DTYPES[info.dtype], count * width).reshape(count, width)
                yield widened(values, info.dtype)


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
    """Write `file` and return its record {"bytes": .., "sha256": ..}; raises as `stream` does."""
    writing = stream(file, entries, metadata)
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return dict(end.value)


def stream(
    file: Path, entries: Sequence[Entry], metadata: Mapping[str, str] | None = None
) -> Generator[int, None, dict[str, Any]]:
    """Write `file`, yielding the bytes of each part when it is written; returns the record {"bytes", "sha256"}.

    Only one part is in memory at a time. Raises EngineError where a tensor yields other than its shape's bytes; OSError
    as the system says it.
    """
    digest, total = hashlib.sha256(), 0
    start, ordered = header(entries, metadata)
    with file.open("wb") as out:
        for entry in (None, *ordered):
            written = 0
            for part in entry.parts() if entry else (start,):
                data = np.ascontiguousarray(part).data.cast("B") if isinstance(part, np.ndarray) else part
                out.write(data)
                digest.update(data)
                written += len(data)
                yield len(data)
            if entry and written != entry.nbytes:
                raise EngineError(f"tensor {entry.name} gave {written} bytes for {file} instead of {entry.nbytes}")
            total += written
    return {"bytes": total, "sha256": digest.hexdigest()}


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file. Raises BadRequest unless they fill it exactly, without gap or overlap."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, jsonfile.LARGEST):
                raise BadRequest(f"{file} is cut short or foreign ({size} bytes, header of {length}); {REPAIR}")
            header = jsonfile.parse(stream.read(length), f"the header of {file}")
    except OSError as why:
        raise BadRequest(f"{file} cannot be read ({why.strerror}); {REPAIR}") from None
    header.pop("__metadata__", None)
    infos = {name: _tensor_info(file, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise BadRequest(f"tensor {name} of {file} starts at byte {info.offset} instead of {end}; {REPAIR}")
        end += info.nbytes
    if end != size:
        raise BadRequest(f"{file} has {size} bytes where its header promises {end}; {REPAIR}")
    return infos


def _tensor_info(file: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One entry of a safetensors header, its numbers checked against each other; the caller holds them to the file."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = dtype in DTYPES
        sound = all(type(number) is int and number >= 0 for number in (*shape, begin, end)) and (
            not known or end - begin == math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise BadRequest(f"the entry of tensor {name} in the header of {file} is damaged; {REPAIR}")
    if not known:
        raise BadRequest(f"tensor {name} of {file} has dtype {dtype}; convert it to one of {' '.join(DTYPES)}")
    return TensorInfo(dtype, shape, end - begin, file, data_start + begin)
