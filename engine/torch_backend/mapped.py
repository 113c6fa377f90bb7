"""A component's tensors as pages of its files: nothing is copied, and what was read can be given back.

Mapped pages count as resident memory once they were touched, and the system takes them back only when it runs short. So
whoever is done with a model for a while says `release`; the next access finds the pages in the file cache, or on disk.
"""

import math
import mmap
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from engine.fitting import REPAIR
from engine.packs import Component
from engine.tensorfile import TensorInfo
from engine.types import EngineError

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip


class MappedFiles:
    """The mappings live as long as this object or any of its tensors. Writing to such a tensor ends the process."""

    def __init__(self, component: Component) -> None:
        """Raises EngineError for a file that can't be read."""
        self._infos = component.tensors
        self._maps: dict[str, mmap.mmap] = {}
        for path in component.files:
            try:
                with path.open("rb") as file:
                    self._maps[str(path)] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as fault:
                raise EngineError(f"{path} cannot be read ({fault}); {REPAIR}") from None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor, in the file's dtype and shape. Reads nothing yet."""
        for name, info in self._infos.items():
            yield name, self._tensor(info)

    def _tensor(self, info: TensorInfo) -> Tensor:
        dtype, count = _DTYPES[info.dtype], math.prod(info.shape)
        if count == 0:  # torch makes no tensor of no bytes
            return torch.empty(info.shape, dtype=dtype)
        source = self._maps[str(info.file)]
        if info.offset + info.nbytes > len(source):
            raise EngineError(f"{info.file} changed while it was in use; {REPAIR}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "not writable": nobody writes to weights
            flat = torch.frombuffer(source, dtype=dtype, count=count, offset=info.offset)
        return flat.view(info.shape)

    def release(self) -> None:
        """Give every page back; the tensors stay usable. Does nothing on Windows, which has no such call."""
        if sys.platform != "win32":
            for source in self._maps.values():
                source.madvise(mmap.MADV_DONTNEED)
