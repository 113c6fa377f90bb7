"""Read a torch checkpoint whose tensors are larger than memory: the structure first, then one tensor at a time.

The pickle goes through `torch.load(weights_only=True)`, which runs no code, onto the meta device, which holds no bytes;
torch then knows where in the file each tensor lies, and we read it there. (Measured on 1.5 GB: mapping the file instead
leaves every page that was touched with the process.) Every byte read is held to the archive's checksum.
Knows nothing of what the tensors mean. torch is imported when a file is opened.
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from engine import tensorfile
from engine.jsonfile import REPAIR
from engine.types import BadRequest, EngineError

LARGEST_PICKLE = 16_000_000  # bytes; the released ones have under 300 kB
MOST_RECORDS = 100_000
# torch's name -> that of safetensors
DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "uint16": "U16", "int16": "I16", "float16": "F16", "bfloat16": "BF16",
    "uint32": "U32", "int32": "I32", "float32": "F32", "uint64": "U64", "int64": "I64", "float64": "F64",
}  # fmt: skip


class Checkpoint:
    """`structure` is what was saved, its tensors on the meta device, with shape and dtype; `read` has the rest."""

    def __init__(self, file: Path) -> None:
        """Raises BadRequest for a file that is damaged, foreign, or holds more than tensors and plain values."""
        self.file = file
        self._records = _records(file)
        import torch

        try:
            self.structure: Any = torch.load(file, map_location="meta", weights_only=True)
        except Exception as why:  # the bytes are untrusted, and torch raises whatever its parts do
            raise BadRequest(
                f"{file} does not hold tensors alone ({_first_line(why)}), and nothing in it was run; {REPAIR}"
            ) from None

    def is_tensor(self, value: object) -> bool:
        import torch

        return isinstance(value, torch.Tensor)

    def dtype(self, tensor: Any) -> str:
        """The safetensors name of a tensor's dtype. Raises BadRequest where there is none."""
        name = str(tensor.dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise BadRequest(f"{self.file} holds a tensor of {name}; convert it to one of {' '.join(DTYPES)}")
        return DTYPES[name]

    def read(self, tensor: Any) -> np.ndarray:
        """The tensor in memory of its own; bfloat16 as uint16 bits. Raises BadRequest where bytes changed."""
        kind = np.dtype(tensorfile.DTYPES[self.dtype(tensor)])
        offset, shape, strides = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        items = tensor.untyped_storage().nbytes() // kind.itemsize
        if 0 in shape:
            return np.zeros(shape, kind)
        if min((offset, *strides)) < 0 or last >= items:
            raise BadRequest(f"a tensor of {self.file} reaches beyond its bytes; {REPAIR}")
        whole = np.frombuffer(b"".join(self._stored(tensor)), kind, items)
        byte_strides = [stride * kind.itemsize for stride in strides]
        return np.lib.stride_tricks.as_strided(whole[offset:], shape, byte_strides, writeable=False)

    def floats(self, tensor: Any) -> np.ndarray:
        """A floating tensor widened to float32."""
        values = self.read(tensor)
        return tensorfile.widened(values, self.dtype(tensor))

    def blocks(self, tensor: Any) -> Iterator[bytes | np.ndarray]:
        """The tensor's bytes in order, some megabytes at a time where it fills its storage."""
        if tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes():
            return self._stored(tensor)
        return iter([np.ascontiguousarray(self.read(tensor))])

    def _stored(self, tensor: Any) -> Iterator[bytes]:
        """All bytes of the storage behind a tensor, held to its checksum at the end."""
        storage = tensor.untyped_storage()
        start = getattr(storage, "_checkpoint_offset", None)
        if start is None:
            raise EngineError("this torch cannot tell where a checkpoint's tensors lie: install torch 2.13 or later")
        size, checksum = self._records.get(start, (-1, 0))
        if size != storage.nbytes():
            raise BadRequest(f"{self.file} does not have a tensor where its contents say; {REPAIR}")
        found, left = 0, size
        with self.file.open("rb") as stream:
            stream.seek(start)
            while left:
                block = stream.read(min(tensorfile.BLOCK, left))
                if not block:
                    raise BadRequest(f"{self.file} is cut short; {REPAIR}")
                found, left = zlib.crc32(block, found), left - len(block)
                yield block
        if found != checksum:
            raise BadRequest(f"{self.file} changed since it was written (a checksum is wrong); {REPAIR}")


def _records(file: Path) -> dict[int, tuple[int, int]]:
    """(bytes, checksum) of every record of the archive by where its bytes begin; checks that none is compressed."""
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
            if len(infos) > MOST_RECORDS or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
                raise BadRequest(f"{file} is no archive as torch writes them; {REPAIR}")
            pickles = [info for info in infos if info.filename.endswith("/data.pkl")]
            if len(pickles) != 1 or pickles[0].file_size > LARGEST_PICKLE:
                raise BadRequest(f"{file} has no table of contents as torch writes them; {REPAIR}")
            archive.read(pickles[0])  # for its checksum
            return {_data_start(stream, info.header_offset): (info.file_size, info.CRC) for info in infos}
    except OSError as why:
        raise BadRequest(f"{file} cannot be read ({why.strerror}); {REPAIR}") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, ValueError, NotImplementedError, EOFError) as why:
        raise BadRequest(f"{file} is cut short, damaged or foreign ({_first_line(why)}); {REPAIR}") from None


def _data_start(stream: BinaryIO, header: int) -> int:
    """Where a record's bytes begin: behind its local header, whose name and padding have lengths of their own."""
    stream.seek(header + 26)
    lengths = stream.read(4)
    return header + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def _first_line(why: Exception) -> str:
    return (str(why).strip().splitlines() or [type(why).__name__])[0][:120].rstrip(".:")
