"""The streaming safetensors writer against the library's own reader and writer."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import tensorfile
from engine.tensorfile import Entry, Tensors
from engine.types import EngineError

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4),
    "a.weight": torch.arange(5, dtype=torch.bfloat16),
    "codes": torch.arange(7, dtype=torch.uint8),
    "words": torch.arange(4).to(torch.uint32),
    "count": torch.tensor(9),
    "scales": torch.ones(2, 2, dtype=torch.float16),
}
NAMES = {"b.weight": "BF16", "a.weight": "BF16", "codes": "U8", "words": "U32", "count": "I64", "scales": "F16"}


def entries() -> list[Entry]:
    def parts(tensor: torch.Tensor):  # type: ignore[no-untyped-def]
        data = bytes(tensor.flatten().view(torch.uint8).numpy())
        return lambda: (data[:3], np.frombuffer(data[3:], np.uint8))

    return [Entry(name, NAMES[name], tuple(tensor.shape), parts(tensor)) for name, tensor in TENSORS.items()]


def test_the_library_reads_what_was_written_and_would_write_as_many_bytes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    record = tensorfile.write(ours, entries(), {"format": "pt"})
    save_file(TENSORS, theirs, metadata={"format": "pt"})
    loaded = load_file(ours)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) and loaded[name].dtype == TENSORS[name].dtype for name in NAMES)
    assert Tensors((ours,)).keys() == TENSORS.keys()
    assert ours.stat().st_size == theirs.stat().st_size == tensorfile.size_of(entries(), {"format": "pt"})
    assert record == {"bytes": ours.stat().st_size, "sha256": hashlib.sha256(ours.read_bytes()).hexdigest()}


def test_bfloat16_alone_is_byte_for_byte_the_librarys_file(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    tensorfile.write(ours, [entry for entry in entries() if entry.dtype == "BF16"])
    save_file({name: tensor for name, tensor in TENSORS.items() if NAMES[name] == "BF16"}, theirs)
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_tensor_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="tensor x gave 3 bytes .* instead of 4"):
        tensorfile.write(tmp_path / "x.safetensors", [Entry("x", "U8", (4,), lambda: (b"123",))])
