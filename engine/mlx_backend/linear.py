"""Packed layers in MLX, and the one way weights enter a module.

A packed weight stays packed: MLX's own kernels multiply with the words as they lie in the file, `w = code * scale +
bias` (engine/lowbit.py is the same text in NumPy). Only where a measurement on this machine says that many rows are
faster so (tuning.py) is a layer expanded, one at a time. Files are read when a tensor is first used.

It doesn't know which model the layers belong to.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from engine.fitting import REPAIR, refuse_misfits
from engine.packs import Component, Quantization
from engine.types import EngineError

PROBE_ROWS = 64  # enough to reach the kernels that a picture uses


def multiply(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int
) -> mx.array:
    """x [.., K] times the packed weights [N, K]: [.., N]."""
    return mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits)


def expand(weight: mx.array, scales: mx.array, biases: mx.array, bits: int, group_size: int) -> mx.array:
    """Words uint32 [.., K * bits / 32], scales and biases [.., K / group_size] -> weights [.., K] in their dtype."""
    return mx.dequantize(weight, scales, biases, group_size=group_size, bits=bits)


class Packed(nn.Module):
    """The three tensors of a packed layer with N rows of K features; assigned by `build`."""

    def __init__(self, rows: int, features: int, quantization: Quantization) -> None:
        super().__init__()
        self.bits = quantization.bits
        self.group_size = quantization.group_size
        groups = features // quantization.group_size
        self.weight = mx.zeros((rows, features * self.bits // 32), dtype=mx.uint32)
        self.scales = mx.zeros((rows, groups))
        self.biases = mx.zeros((rows, groups))


class PackedLinear(Packed):
    """`expand_from` rows on, the weight is expanded for the call instead of being multiplied packed; None: never."""

    expand_from: int | None = None
    joint: "PackedLinear | None" = None  # set on the first of several layers that `join` laid into one

    def __call__(self, x: mx.array) -> mx.array:
        """[.., K] -> [.., N]."""
        if self.expand_from is None or x.size // x.shape[-1] < self.expand_from:
            return multiply(x, self.weight, self.scales, self.biases, self.bits, self.group_size)
        out = x @ expand(self.weight, self.scales, self.biases, self.bits, self.group_size).T
        mx.eval(out)  # now: MLX would otherwise expand the next layers as well, before this one's weight is dropped
        return out


class PackedEmbedding(Packed):
    def __call__(self, ids: mx.array) -> mx.array:
        """Token ids [B, L] -> [B, L, K]. Only the rows asked for are expanded."""
        return expand(self.weight[ids], self.scales[ids], self.biases[ids], self.bits, self.group_size)


def join(*layers: nn.Module) -> bool:
    """Lay packed layers that read the same input into one, if that gives the same bits; returns whether it did.

    `side_by_side` then multiplies once. The layers keep their tensors, as views of the joint ones.
    """
    first = layers[0]
    if not isinstance(first, PackedLinear):
        return False
    parts = {name: mx.concatenate([layer[name] for layer in layers]) for name in ("weight", "scales", "biases")}
    rows, features = parts["weight"].shape[0], first.weight.shape[1] * 32 // first.bits
    joint = PackedLinear(rows, features, Quantization(first.bits, first.group_size))
    joint.expand_from = first.expand_from
    joint.update(parts)
    x = mx.cos(mx.arange(PROBE_ROWS * features).reshape(PROBE_ROWS, features)).astype(first.scales.dtype)
    together, apart = joint(x), mx.concatenate([layer(x) for layer in layers], axis=-1)
    if not mx.array_equal(together, apart).item():  # a kernel may sum in another order for another number of rows
        return False
    start = 0
    for layer in layers:
        end = start + layer.weight.shape[0]
        layer.update({name: part[start:end] for name, part in parts.items()})
        mx.eval(layer.parameters())
        start = end
    vars(first)["joint"] = joint  # beside the module's own dictionary: it is no parameter
    return True


def side_by_side(x: mx.array, *layers: nn.Module) -> list[mx.array]:
    """What each of `layers` makes of x, in one multiplication where `join` has joined them."""
    joint = getattr(layers[0], "joint", None)
    if joint is None:
        return [layer(x) for layer in layers]
    return list(mx.split(joint(x), len(layers), axis=-1))


def build(
    module: nn.Module,
    component: Component,
    dtype: mx.Dtype,
    *,
    prefix: str = "",
    unused: tuple[str, ...] = (),
    expand_from: Mapping[int, int | None] | None = None,
    layout: Callable[[mx.array], mx.array] = lambda tensor: tensor,
) -> None:
    """Fill `module` with the tensors of `component`; nothing is read from the files yet.

    A linear or embedding becomes packed where its `scales` exist. Floating tensors are cast to `dtype`, scales and
    biases too, as every product would do anew. `prefix` is cut off the files' names; names that then start with one of
    `unused` are left on disk. `expand_from` says per number of bits from how many rows on a layer is expanded, `layout`
    turns dense tensors into MLX's order. Raises EngineError when names or shapes don't fit.
    """
    tensors = {
        name: tensor
        for full_name, tensor in _lazy_tensors(component)
        if not (name := full_name.removeprefix(prefix)).startswith(unused)
    }
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    modules: dict[str, Any] = dict(module.named_modules())
    twins = [(name, _packed_twin(name, modules[name], component)) for name in packed & modules.keys()]
    for _, twin in twins:
        if isinstance(twin, PackedLinear) and expand_from is not None:
            twin.expand_from = expand_from.get(twin.bits)
    module.update_modules(tree_unflatten(twins))
    for name, tensor in tensors.items():
        if name.rpartition(".")[0] not in packed:
            tensor = layout(tensor)
        tensors[name] = tensor.astype(dtype) if mx.issubdtype(tensor.dtype, mx.floating) else tensor
    expected = {name: tensor.shape for name, tensor in dict(tree_flatten(module.parameters())).items()}
    refuse_misfits(expected, {name: tensor.shape for name, tensor in tensors.items()}, component.folder)
    module.load_weights(list(tensors.items()))


def _lazy_tensors(component: Component) -> Iterator[tuple[str, mx.array]]:
    for file in component.files:
        try:
            tensors = mx.load(str(file))
        except RuntimeError as fault:
            raise EngineError(f"{file} cannot be read ({fault}); {REPAIR}") from None
        assert isinstance(tensors, dict)  # as mx.load gives for every safetensors file
        yield from tensors.items()


def _packed_twin(name: str, layer: nn.Module, component: Component) -> Packed:
    if component.quantization is None:
        raise EngineError(f"{component.folder} has {name}.scales, but its configuration names no bits; {REPAIR}")
    if not isinstance(layer, nn.Linear | nn.Embedding):
        raise EngineError(f"{component.folder} has {name}.scales, but {name} is no layer that can be packed; {REPAIR}")
    kind = PackedLinear if isinstance(layer, nn.Linear) else PackedEmbedding
    rows, features = layer.weight.shape
    return kind(rows, features, component.quantization)
