"""The transformer of a gemlite pack: transformer-gemlite-int1 or -int2 with its state_dict.pt.

A gemlite column is byte for byte a row of ours, so codes are transposed and nothing else; scales and zeros likewise.
What a layer's `zeros` mean is said by its metadata[10]: 4 is `code * scale + zero`, 3 is `(code - zero) * scale`.
The text encoder beside it is HQQ's (hqq.py).
"""

from pathlib import Path
from typing import Any

import numpy as np

from engine import jsonfile, lowbit, shapes
from engine.importers.checkpoint import Checkpoint
from engine.importers.parts import Layer, Part, is_block_linear, names
from engine.jsonfile import REPAIR
from engine.tensorfile import FLOATS, Entry
from engine.types import BadRequest

FOLDERS = ("transformer-gemlite-int2", "transformer-gemlite-int1")
_FUSED, _SHIFTED = 4, 3  # metadata[10], gemlite's W_group_mode
_IGNORED = ("enable_time_sign_embed", "musubi_block_swap_device", "musubi_blocks_to_swap")
_LAYER_KEYS = ("W_q", "scales", "zeros", "metadata", "orig_shape", "meta_scale")
Names = list[tuple[str, tuple[int, ...]]]


def transformer(folder: Path) -> Part:
    """The component in our layout. Raises BadRequest where a tensor is missing, misshapen, or of a foreign kind."""
    config = jsonfile.read(folder / "config.json")
    checkpoint = Checkpoint(folder / "state_dict.pt")
    state, file = checkpoint.structure, checkpoint.file
    if not isinstance(state, dict) or not all(map(checkpoint.is_tensor, state.values())):
        raise BadRequest(f"{file} is no flat list of tensors, as gemlite's packs are; {REPAIR}")
    layers, entries, used = [], [], set()
    for name, shape in names(shapes.transformer(config), folder / "config.json"):
        fqn = name.removesuffix(".weight")
        if f"{fqn}.W_q" in state:
            layers.append(_layer(checkpoint, fqn, shape))
            entries += layers[-1].entries()
            used |= {f"{fqn}.{key}" for key in _LAYER_KEYS}
        else:
            entries.append(_dense(checkpoint, name, shape))
            used.add(name)
    if foreign := sorted(state.keys() - used):
        raise BadRequest(f"{file} holds {foreign[0]}, which this model has no place for; {REPAIR}")
    kinds = {(layer.bits, layer.group_size) for layer in layers}
    if len(kinds) != 1:
        raise BadRequest(f"{file} holds layers of {sorted(kinds)} bits and group size where all are alike; {REPAIR}")
    bits, group_size = kinds.pop()
    documents = {
        "config.json": {key: value for key, value in config.items() if key not in _IGNORED},
        "quantization_config.json": {"bits": bits, "group_size": group_size},
    }
    return Part("transformer-packed-mflux", documents, "diffusion_pytorch_model.safetensors", entries, layers)


def _dense(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Entry:
    tensor = _tensor(checkpoint, name, shape, FLOATS)
    return Entry(name, checkpoint.dtype(tensor), shape, lambda: checkpoint.blocks(tensor))


def _tensor(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> Any:
    """A tensor of the flat state: there, of this shape, of one of these dtypes."""
    tensor = checkpoint.structure.get(name)
    if tensor is None:
        raise BadRequest(f"{checkpoint.file} lacks {name}; {REPAIR}")
    if tuple(tensor.shape) != shape or checkpoint.dtype(tensor) not in dtypes:
        found, wanted = f"{checkpoint.dtype(tensor)} {list(tensor.shape)}", f"{'/'.join(dtypes)} {list(shape)}"
        raise BadRequest(f"{checkpoint.file}: {name} is {found} where config.json implies {wanted}; {REPAIR}")
    return tensor


def _layer(checkpoint: Checkpoint, fqn: str, shape: tuple[int, ...]) -> Layer:
    """One quantised linear [N, K]; gemlite's own tensors are [K / .., N]."""
    if not is_block_linear(f"{fqn}.weight", shape):
        raise BadRequest(f"{checkpoint.file} has quantised {fqn}, which the released packs leave dense; {REPAIR}")
    bits, group, mode = _metadata(checkpoint, fqn)
    n, k = shape
    if k % group or k * bits % lowbit.WORD_BITS:
        raise BadRequest(f"{checkpoint.file}: {fqn} has {k} inputs, no multiple of group {group}; {REPAIR}")
    grouped = (k // group, n)
    zeros_shape = tuple(getattr(checkpoint.structure.get(f"{fqn}.zeros"), "shape", grouped))
    one_zero = mode == _SHIFTED and zeros_shape == ()  # gemlite keeps an integer zero as a single number
    codes = _tensor(checkpoint, f"{fqn}.W_q", (k * bits // 8, n), ("U8",))
    scale = _tensor(checkpoint, f"{fqn}.scales", grouped, FLOATS)
    zero = _tensor(checkpoint, f"{fqn}.zeros", () if one_zero else grouped, (*FLOATS, "I32") if one_zero else FLOATS)

    def words() -> np.ndarray:
        return np.ascontiguousarray(checkpoint.read(codes).T).view("<u4")

    def affine() -> tuple[np.ndarray, np.ndarray]:
        if mode == _FUSED:
            return checkpoint.read(scale).T, checkpoint.read(zero).T
        return checkpoint.read(scale).T, -(checkpoint.floats(zero) * checkpoint.floats(scale)).T

    def decode(rows: np.ndarray) -> np.ndarray:
        places = np.arange(k)
        packed = checkpoint.read(codes)[:, rows][places * bits // 8]
        code = packed >> (places * bits % 8).astype(np.uint8)[:, None] & (2**bits - 1)
        s = checkpoint.floats(scale)[:, rows][places // group]
        z = np.broadcast_to(checkpoint.floats(zero), grouped)[:, rows][places // group]
        return (code * s + z if mode == _FUSED else (code - z) * s).T

    dtypes = checkpoint.dtype(scale), checkpoint.dtype(zero) if mode == _FUSED else "F32"
    return Layer(fqn, (n, k), bits, group, dtypes, checkpoint.file, words, affine, decode)


def _metadata(checkpoint: Checkpoint, fqn: str) -> tuple[int, int, int]:
    """Bits, group size and the meaning of `zeros`. Raises BadRequest for anything that our rule does not cover."""
    tensor = checkpoint.structure.get(f"{fqn}.metadata")
    given = checkpoint.read(tensor).tolist() if tensor is not None else None
    if not isinstance(given, list) or len(given) < 11:
        raise BadRequest(f"{checkpoint.file} lacks the twelve numbers of {fqn}.metadata; {REPAIR}")
    scaled_activations, bits, group, _, per_item, *_, channel_scale, mode = given[:11]
    if mode not in (_FUSED, _SHIFTED):
        raise BadRequest(f"{checkpoint.file}: {fqn} has weight mode {mode} where only 3 and 4 are known; {REPAIR}")
    if bits not in (1, 2) or group < 1 or per_item != 8 // bits or scaled_activations or channel_scale:
        raise BadRequest(f"{checkpoint.file}: {fqn}.metadata is {given}, which is no 1- or 2-bit layer; {REPAIR}")
    return bits, group, mode
