"""Write a torch checkpoint of any size in little memory: torch lays out the file, we fill in the tensors afterwards.

`torch.save` under `skip_data` writes the pickle and leaves room for the storages, so container and pickle are torch's
own. Knows nothing of what the tensors mean.
"""

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Fill = dict[int, Callable[[], Iterator[np.ndarray]]]


class Checkpoint:
    """Collects tensors that hold nothing yet, then writes a structure made of them."""

    def __init__(self) -> None:
        self._fills: list[tuple[Tensor, Callable[[], Iterator[np.ndarray]]]] = []

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype, parts: Callable[[], Iterator[np.ndarray]]) -> Tensor:
        """A tensor whose bytes `parts` will yield when the file is written. torch.empty touches no memory."""
        tensor = torch.empty(shape, dtype=dtype)
        self._fills.append((tensor, parts))
        return tensor

    def save(self, structure: Any, file: Path) -> None:
        """`structure` must hold every tensor that was made, once each, in the order in which they were made."""
        with torch.serialization.skip_data():
            torch.save(structure, file)
        with zipfile.ZipFile(file) as archive:
            infos = [info for info in archive.infolist() if "/data/" in info.filename]
            directory = archive.start_dir
        infos.sort(key=lambda info: int(info.filename.rpartition("/")[2]))  # storages are numbered as they are met
        assert len(infos) == len(self._fills)
        checksums = {}
        with file.open("r+b") as stream:
            for info, (tensor, parts) in zip(infos, self._fills, strict=True):
                assert info.file_size == tensor.nbytes, info.filename
                stream.seek(info.header_offset)
                local = struct.unpack("<4s5H3I2H", stream.read(30))
                stream.seek(local[-2] + local[-1], 1)
                checksum, written = 0, 0
                for part in parts():
                    data = np.ascontiguousarray(part).tobytes()
                    stream.write(data)
                    checksum, written = zlib.crc32(data, checksum), written + len(data)
                assert written == tensor.nbytes, info.filename
                stream.write(b"PK\x07\x08" + struct.pack("<I", checksum))  # the descriptor behind the data
                checksums[info.filename.encode()] = checksum
            self._write_directory(stream, directory, checksums)

    def _write_directory(self, stream: Any, position: int, checksums: dict[bytes, int]) -> None:
        """Enter the checksums into the archive's table of contents."""
        while True:
            stream.seek(position)
            entry = stream.read(46)
            if entry[:4] != b"PK\x01\x02":
                return
            name, extra, comment = struct.unpack("<3H", entry[28:34])
            filename = stream.read(name)
            if filename in checksums:
                stream.seek(position + 16)
                stream.write(struct.pack("<I", checksums[filename]))
            position += 46 + name + extra + comment
