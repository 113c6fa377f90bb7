"""An unpacked diffusers transformer: dense weights, which may be binary or ternary in all but storage.

Where every matrix of the blocks holds, in each group of 128 inputs, nothing but -s and +s, or -s, 0 and +s, it becomes
codes without any loss; one group that doesn't, and the whole transformer stays dense and is copied as it is.
"""

from pathlib import Path

import numpy as np

from engine import jsonfile, lowbit, shapes
from engine.importers.parts import Layer, Part, is_block_linear, names
from engine.jsonfile import REPAIR
from engine.tensorfile import FLOATS, Entry, Tensors, widened
from engine.types import BadRequest

FOLDER = "transformer"
GROUP = 128
_TERNARY, _BINARY = 2, 1


def tensors_of(folder: Path) -> Tensors:
    return Tensors(tuple(sorted(folder.glob("[!.]*.safetensors"))))


def looks_packed(folder: Path) -> bool:
    """Whether the first rows of the first block matrix are binary or ternary: a quick look, not a promise."""
    tensors = tensors_of(folder)
    first = next((name for name, info in tensors.items() if _can_be_packed(name, info.shape, info.dtype)), None)
    return first is not None and _bits_of(next(tensors.rows(first))) is not None


def transformer(folder: Path) -> Part | None:
    """The component in our packed layout, or None where it has to stay dense. Reads every weight once."""
    config = jsonfile.read(folder / "config.json")
    tensors = tensors_of(folder)
    scales: dict[str, np.ndarray] = {}
    bits = _BINARY
    expected = names(shapes.transformer(config), folder / "config.json")
    for name, shape in expected:
        if name not in tensors or tensors[name].shape != shape or tensors[name].dtype not in FLOATS:
            raise BadRequest(f"{folder} lacks {name} with shape {list(shape)}; {REPAIR}")
        if not is_block_linear(name, shape):
            continue
        found = _scales(tensors, name) if _can_be_packed(name, shape, tensors[name].dtype) else None
        if found is None:
            return None
        bits, scales[name] = max(bits, found[0]), found[1]
    layers = [_layer(tensors, name, bits, scales[name]) for name in scales]
    entries = [entry for layer in layers for entry in layer.entries()]
    for name, shape in expected:
        if name not in scales:
            entries.append(Entry(name, tensors[name].dtype, shape, lambda name=name: tensors.blocks(name)))  # type: ignore[misc]
    documents = {"config.json": config, "quantization_config.json": {"bits": bits, "group_size": GROUP}}
    kind = "ternary" if bits == _TERNARY else "binary"
    remark = f"all {len(layers)} block matrices were exactly {kind} in groups of {GROUP} and were packed without loss"
    tensors_name = "diffusion_pytorch_model.safetensors"
    return Part("transformer-packed-mflux", documents, tensors_name, entries, layers, (remark,))


def _can_be_packed(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    return is_block_linear(name, shape) and shape[1] % GROUP == 0 and dtype in FLOATS


def _bits_of(weights: np.ndarray) -> int | None:
    """1 where each group holds -s and +s only, 2 where it also holds 0, None where it holds anything else."""
    size = np.abs(weights.reshape(len(weights), -1, GROUP))
    peak = size.max(axis=-1, keepdims=True)
    if not np.isfinite(peak).all():
        return None
    at_peak = size == peak  # a group of zeros is at its peak, 0, everywhere
    if at_peak.all():
        return _BINARY
    return _TERNARY if (at_peak | (size == 0)).all() else None


def _scales(tensors: Tensors, name: str) -> tuple[int, np.ndarray] | None:
    """(bits, s of every group, float32) of one matrix, or None at the first row that is not low-bit."""
    bits, peaks = _BINARY, []
    for weights in tensors.rows(name):
        found = _bits_of(weights)
        if found is None:
            return None
        bits = max(bits, found)
        peaks.append(np.abs(weights.reshape(len(weights), -1, GROUP)).max(axis=-1))
    return bits, np.concatenate(peaks)


def _layer(tensors: Tensors, name: str, bits: int, scales: np.ndarray) -> Layer:
    info = tensors[name]
    n, k = info.shape

    def words() -> np.ndarray:
        made = []
        for weights in tensors.rows(name):
            codes = (np.sign(weights) + 1).astype(np.uint8) if bits == _TERNARY else (weights > 0).astype(np.uint8)
            made.append(lowbit.pack(codes, bits))
        return np.concatenate(made)

    def affine() -> tuple[np.ndarray, np.ndarray]:
        step = scales if bits == _TERNARY else 2 * scales
        return _stored(step, info.dtype), _stored(-scales, info.dtype)

    def decode(rows: np.ndarray) -> np.ndarray:
        return widened(tensors.read(name)[rows], info.dtype)

    return Layer(name.removesuffix(".weight"), (n, k), bits, GROUP, (info.dtype, info.dtype), info.file, words, affine,
                 decode)  # fmt: skip


def _stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that the dtype holds exactly, as they lie in a file."""
    if dtype == "BF16":
        return lowbit.bfloat16_bits(values)
    return values.astype(np.float16 if dtype == "F16" else np.float32)
