"""The text encoder of a gemlite pack: text_encoder-hqq-4bit with hqq's qmodel.pt, {module: {name: tensor or value}}.

A layer of axis 1 has groups along its inputs, as ours: `(q - zero) * scale` becomes that scale, and a bias of
-zero * scale, kept in float32, where the product of two float16 numbers is exact. A layer of axis 0 has its groups
across outputs, which our layout cannot say: it is stored as the 16-bit weights that hqq itself computes.
"""

from pathlib import Path
from typing import Any

import numpy as np

from engine import jsonfile, lowbit, shapes
from engine.importers.checkpoint import Checkpoint
from engine.importers.parts import Layer, Part, names
from engine.jsonfile import REPAIR
from engine.tensorfile import FLOATS, Entry
from engine.types import BadRequest

FOLDER = "text_encoder-hqq-4bit"
_BITS, _PACKING = 4, "4bit_u8"
# Keys of other programs in config.json that would mislead a reader of ours.
_DROPPED = ("quantization_config", "torch_dtype", "dtype", "quantization")
Module = dict[str, Any]


def text_encoder(folder: Path) -> Part:
    """The component in our layout, all its layers. Raises BadRequest where one is missing, misshapen or unknown."""
    config = jsonfile.read(folder / "config.json")
    checkpoint = Checkpoint(folder / "qmodel.pt")
    modules = _modules(checkpoint)
    depth, hidden = config.get("num_hidden_layers"), config.get("hidden_size")
    if type(depth) is not int or type(hidden) is not int:
        raise BadRequest(f"{folder / 'config.json'} lacks num_hidden_layers or hidden_size; {REPAIR}")
    expected = names(shapes.text_encoder(config, depth), folder / "config.json")
    layers, entries, across = [], [], 0
    for name, shape in [*expected, ("model.norm.weight", (hidden,))]:
        fqn = name.removesuffix(".weight")
        module = modules.get(fqn)
        if module is None:
            raise BadRequest(f"{checkpoint.file} lacks {fqn}; {REPAIR}")
        if "W_q" not in module:
            tensor = _tensor(checkpoint, fqn, module, "weight", shape)
            entries.append(Entry(name, checkpoint.dtype(tensor), shape, _blocks(checkpoint, tensor)))
            continue
        quantised = _Quantised(checkpoint, fqn, module, shape)
        if quantised.axis == 1:
            layers.append(quantised.layer())
            entries += layers[-1].entries()
        else:
            across += 1
            entries.append(quantised.dense())
    groups = {layer.group_size for layer in layers}
    if len(groups) > 1:
        raise BadRequest(f"{checkpoint.file} holds layers in groups of {sorted(groups)} where all are alike; {REPAIR}")
    config = {key: value for key, value in config.items() if key not in _DROPPED}
    if layers:
        config["quantization"] = {"group_size": groups.pop(), "bits": _BITS}
    target = "text_encoder-mlx-4bit" if layers else "text_encoder"
    return Part(target, {"config.json": config}, "model.safetensors", entries, layers, _remarks(across))


def _remarks(across: int) -> tuple[str, ...]:
    if not across:
        return ()
    return (f"{across} layers of the text encoder are grouped across outputs and were stored as 16-bit weights, which "
            "are larger",)  # fmt: skip


def _modules(checkpoint: Checkpoint) -> dict[str, Module]:
    """The modules by their names in a Qwen3ForCausalLM, whose head and rotary tables have no place in a pack."""
    found = checkpoint.structure
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(module, dict) for name, module in found.items()
    ):
        raise BadRequest(f"{checkpoint.file} is no list of modules, as hqq saves them; {REPAIR}")
    inner = any(name.startswith("model.") for name in found)
    return found if inner else {f"model.{name}": module for name, module in found.items()}


def _tensor(checkpoint: Checkpoint, fqn: str, module: Module, key: str, shape: tuple[int, ...], *also: str) -> Any:
    tensor, dtypes = module.get(key), also or FLOATS
    if not checkpoint.is_tensor(tensor):
        raise BadRequest(f"{checkpoint.file} lacks {key} of {fqn}; {REPAIR}")
    assert tensor is not None
    if tuple(tensor.shape) != shape or checkpoint.dtype(tensor) not in dtypes:
        found, wanted = f"{checkpoint.dtype(tensor)} {list(tensor.shape)}", f"{'/'.join(dtypes)} {list(shape)}"
        raise BadRequest(f"{checkpoint.file}: {key} of {fqn} is {found} where {wanted} is expected; {REPAIR}")
    return tensor


def _blocks(checkpoint: Checkpoint, tensor: Any) -> Any:
    return lambda: checkpoint.blocks(tensor)


class _Quantised:
    """One HQQ layer. Its weights [N, K], read as [N K / group, group] (axis 1) or [group, N K / group] (axis 0), are
    grouped by row or by column; the first half of those rows lies in the high four bits of W_q, the second in the low.
    """

    def __init__(self, checkpoint: Checkpoint, fqn: str, module: Module, shape: tuple[int, ...]) -> None:
        self.checkpoint, self.fqn = checkpoint, fqn
        said = {key: module.get(key) for key in ("nbits", "group_size", "axis", "packing", "shape")}
        self.axis, group = said["axis"], said["group_size"]
        known = (said["nbits"], said["packing"]) == (_BITS, _PACKING) and self.axis in (0, 1) and type(group) is int
        sized = isinstance(said["shape"], tuple | list) and tuple(said["shape"]) == shape and len(shape) == 2
        if not known or not sized or any(map(module.get, ("view_as_float", "quant_scale", "quant_zero"))):
            raise BadRequest(f"{checkpoint.file}: {fqn} is HQQ of {said}, where 4 bits in groups are known; {REPAIR}")
        assert isinstance(group, int)
        self.n, self.k = shape
        count = self.n * self.k // group if group > 0 else 0
        if not count or self.n * self.k % group or (self.axis == 1 and self.k % group):
            raise BadRequest(f"{checkpoint.file}: {fqn} has {self.k} inputs, no multiple of group {group}; {REPAIR}")
        wide, narrow = ((count, group), (count, 1)) if self.axis == 1 else ((group, count), (1, count))
        if module.get("bias") is not None or wide[0] % 2:
            raise BadRequest(f"{checkpoint.file}: {fqn} has a bias or an odd number of groups, unknown here; {REPAIR}")
        self.group = group
        self.codes = _tensor(checkpoint, fqn, module, "W_q", (wide[0] // 2, wide[1]), "U8")
        self.scale = _tensor(checkpoint, fqn, module, "scale", narrow)
        self.zero = _tensor(checkpoint, fqn, module, "zero", narrow)

    def layer(self) -> Layer:
        dtypes = self.checkpoint.dtype(self.scale), "F32"
        shape, file = (self.n, self.k), self.checkpoint.file
        return Layer(self.fqn, shape, _BITS, self.group, dtypes, file, self._words, self._affine, self._decode)

    def dense(self) -> Entry:
        """The weights as hqq computes them: in the scale's own float16, rounding as it rounds."""
        half = self.checkpoint.dtype(self.scale) == self.checkpoint.dtype(self.zero) == "F16"

        def weights() -> list[np.ndarray]:
            scale, zero = self.checkpoint.floats(self.scale), self.checkpoint.floats(self.zero)
            if not (np.isfinite(scale).all() and np.isfinite(zero).all()):
                raise BadRequest(f"{self.checkpoint.file}: {self.fqn} holds a scale that is no finite number; {REPAIR}")
            kind = np.float16 if half else np.float32
            return [((self._unpacked().astype(kind) - zero.astype(kind)) * scale.astype(kind)).reshape(self.n, self.k)]

        return Entry(f"{self.fqn}.weight", "F16" if half else "F32", (self.n, self.k), weights)

    def _unpacked(self) -> np.ndarray:
        packed = self.checkpoint.read(self.codes)
        return np.concatenate((packed >> 4, packed & 15))

    def _words(self) -> np.ndarray:
        return lowbit.pack(self._unpacked().reshape(self.n, self.k), _BITS)

    def _affine(self) -> tuple[np.ndarray, np.ndarray]:
        groups = (self.n, self.k // self.group)
        bias = -self.checkpoint.floats(self.zero) * self.checkpoint.floats(self.scale)
        return self.checkpoint.read(self.scale).reshape(groups), bias.reshape(groups)

    def _decode(self, rows: np.ndarray) -> np.ndarray:
        where = rows[:, None] * self.k + np.arange(self.k)  # among all weights in order
        row, column = np.divmod(where, self.group)
        packed = self.checkpoint.read(self.codes)
        half = len(packed)
        code = np.where(row < half, packed[row % half, column] >> 4, packed[row % half, column] & 15)
        scale, zero = self.checkpoint.floats(self.scale)[:, 0], self.checkpoint.floats(self.zero)[:, 0]
        return (code - zero[row]) * scale[row]
