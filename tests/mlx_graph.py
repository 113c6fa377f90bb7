"""How many kernels one denoising step of the 4B model dispatches on a Mac's GPU, and how many bytes they read, counted
from MLX's own graph of it. `python -m tests.mlx_graph` prints the numbers of SPEED.md; nothing is computed.

A kernel reads each operand once. What Metal must copy first is read from mlx's source: a norm copies rows that don't
lie one after another, a product rows with gaps, a reshape what no strides describe; attention takes any layout whose
features lie together, and writes heads beside each other. The floor: every weight read once, and every result of a
product, a norm or an attention read once by whoever needs it, with all other arithmetic done on the way.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten
from numpy.lib.stride_tricks import as_strided

from engine.mlx_backend import transformer
from engine.mlx_backend.linear import PackedLinear
from engine.packs import Quantization

CONFIG = {
    "attention_head_dim": 128, "axes_dims_rope": [32] * 4, "eps": 1e-6, "in_channels": 128, "mlp_ratio": 3.0,
    "joint_attention_dim": 7680, "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20,
    "out_channels": None, "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip
FUSED = ("gated", "rotate", "silu", "swiglu")  # each one kernel, as tests/test_mlx_graph.py holds
FAST = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm", "scaled_dot_product_attention": "ScaledDotProductAttention"}
ONE_KERNEL = ("Fused", *FAST.values())  # on a GPU; the CPU's graph would spell them out
TAG = 1009  # the length of an array that nothing else is as long as
VIEWS = {"Transpose", "Slice", "Split", "ExpandDims", "Squeeze", "Broadcast", "Flatten", "Unflatten", "Reshape"}
NORMS = {"RMSNorm", "LayerNorm"}
HEAVY = {"QuantizedMatmul", "Matmul", "ScaledDotProductAttention", *NORMS}
STREAMS = ("to_q", "add_q_proj")


@dataclass
class Count:
    """Kernels by name, and bytes read: of weights, and of everything that depends on the picture."""

    kernels: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    activations: int = 0
    floor: int = 0

    @property
    def total(self) -> int:
        return self.kernels.total()

    @property
    def needed(self) -> int:
        """Kernels of the floor: what moves nothing but a copy, or happens once a step, is not among them."""
        return sum(self.kernels[kind] for kind in (*HEAVY, "Fused"))

    @property
    def ratio(self) -> float:
        return (self.weights + self.activations) / (self.weights + self.floor)


def packed_model(config: dict[str, Any], bits: int, joined: bool = True) -> transformer.Flux2Transformer2DModel:
    """The transformer with its blocks' linears packed, none of its arrays computed."""
    model = transformer.Flux2Transformer2DModel.from_config(config)
    quantization = Quantization(bits, 128)

    def twin(name: str, layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.Linear) or not name.startswith(("transformer_blocks", "single_transformer_blocks")):
            return layer
        return PackedLinear(*layer.weight.shape, quantization)

    model.update_modules(tree_unflatten([(name, twin(name, each)) for name, each in leaves(model)]))
    model.apply(lambda tensor: tensor.astype(mx.bfloat16) if tensor.dtype == mx.float32 else tensor)
    for block in model.transformer_blocks if joined else []:
        for name in STREAMS:
            first = block.attn[name]
            rows, words = first.weight.shape
            joint = PackedLinear(3 * rows, words * 32 // bits, quantization)
            joint.apply(lambda tensor: tensor.astype(mx.bfloat16) if tensor.dtype == mx.float32 else tensor)
            vars(first)["joint"] = joint
    return model


def leaves(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """What is one kernel there appears in the graph as one node, and nothing is computed between the blocks."""
    places = {(transformer, name): "Fused" for name in FUSED} | {(mx.fast, name): kind for name, kind in FAST.items()}
    before = {place: getattr(*place) for place in places} | {(transformer, "Queue"): transformer.Queue}
    try:
        for place, kind in places.items():
            setattr(*place, stand_in(kind))
        transformer.Queue = type("Lazy", (), {"put": lambda self, *results: None})
        yield
    finally:
        for place, function in before.items():
            setattr(*place, function)


def stand_in(kind: str) -> Callable[..., mx.array]:
    """A node that has the operands of a kernel and the first one's shape; what it is, a tag of odd length says."""

    def call(first: mx.array, *rest: object, **_: object) -> mx.array:
        operands = [each for each in rest if isinstance(each, mx.array)]
        return mx.depends(first, [*operands, mx.zeros(TAG + ONE_KERNEL.index(kind), dtype=mx.int8)])

    return call


def events(
    model: transformer.Flux2Transformer2DModel, grid: tuple[int, int], text: int
) -> tuple[list[dict[str, Any]], set[str]]:
    """The graph of one step as MLX exports it, node by node, and the names of its weights in it."""
    img_ids, txt_ids = transformer.token_ids(text, grid)
    config_in = model.x_embedder.weight.shape[1]
    joints = {
        f"{number}.{name}": vars(block.attn[name])["joint"]
        for number, block in enumerate(model.transformer_blocks)
        for name in STREAMS
        if vars(block.attn[name]).get("joint") is not None
    }
    weights = {f"model.{name}": tensor for name, tensor in tree_flatten(model.parameters())}
    for key, joint in joints.items():
        weights |= {f"joint.{key}.{name}": tensor for name, tensor in tree_flatten(joint.parameters())}

    def step(x: mx.array, embeddings: mx.array, timestep: mx.array, **tensors: mx.array) -> mx.array:
        inside = {name.removeprefix("model."): each for name, each in tensors.items() if name.startswith("model.")}
        model.load_weights(list(inside.items()))
        for key, joint in joints.items():
            joint.update({name: tensors[f"joint.{key}.{name}"] for name in ("weight", "scales", "biases")})
        return model(x, embeddings, timestep, img_ids, txt_ids, lambda: None)

    seen: list[dict[str, Any]] = []
    x = mx.zeros((1, grid[0] * grid[1], config_in), dtype=mx.bfloat16)
    embeddings = mx.zeros((1, text, model.context_embedder.weight.shape[1]), dtype=mx.bfloat16)
    with as_on_a_gpu():
        mx.export_function(seen.append, step, x, embeddings, mx.zeros(1), **weights)
    named = next(event["keywords"] for event in seen if event["type"] == "keyword_inputs")
    return seen, {each[1] for each in named}


def count(config: dict[str, Any], bits: int, grid: tuple[int, int], text: int, joined: bool = True) -> Count:
    seen, weights = events(packed_model(config, bits, joined), grid, text)
    return Walk(weights).over(seen)


class Walk:
    """Follows every array as strides over the buffer that holds it; strides alone, nothing is allocated."""

    def __init__(self, weights: set[str]) -> None:
        self.weights = weights
        self.found = Count()
        self.views: dict[str, np.ndarray] = {}
        self.owner: dict[str, str] = {}
        self.itemsize: dict[str, int] = {}

    def over(self, seen: list[dict[str, Any]]) -> Count:
        for event in seen:
            if event["type"] == "inputs":
                for name, shape, dtype in event["inputs"]:
                    self.fresh(name, shape, dtype)
            elif event["type"] == "constants":
                for name, array in event["constants"]:
                    self.fresh(name, array.shape, array.dtype)
            elif event["type"] == "primitive":
                self.node(event)
        return self.found

    def fresh(self, name: str, shape: tuple[int, ...], dtype: mx.Dtype, strides: tuple[int, ...] | None = None) -> None:
        shape = tuple(shape)
        strides = strides or tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        self.views[name] = as_strided(np.zeros(1, np.int8), shape, strides)
        self.owner[name], self.itemsize[name] = name, dtype.size

    def node(self, event: dict[str, Any]) -> None:
        kind, inputs = event["name"], [each[0] for each in event["inputs"]]
        if kind == "Depends":
            *inputs, tag = inputs
            kind = ONE_KERNEL[self.views[tag].size - TAG]
        if kind in VIEWS and self.viewed(kind, event, inputs[0]):
            return
        if kind == "Concatenate":  # one copy kernel an input
            for name in inputs:
                self.kernel(kind, [name])
        else:
            copied = [self.copied(kind, name) for name in inputs]
            self.kernel(kind, inputs)
            self.found.kernels["Copy"] += sum(copied)
            self.found.activations += sum(self.size(name) for name, twice in zip(inputs, copied, strict=True) if twice)
        for name, shape, dtype in event["outputs"][: 1 if kind in ONE_KERNEL else None]:
            strides = None
            if kind == "ScaledDotProductAttention":
                _, heads, _, features = shape
                strides = (math.prod(shape), features, heads * features, 1)
            self.fresh(name, shape, dtype, strides)
            if kind in HEAVY or kind == "Fused":
                self.found.floor += self.size(name)

    def viewed(self, kind: str, event: dict[str, Any], source: str) -> bool:
        """Give the outputs strides over the input's buffer; False where only a copy can have them."""
        for number, (name, shape, _) in enumerate(event["outputs"]):
            view = self.view(kind, self.views[source], event["arguments"], tuple(shape), number)
            if view is None:
                return False
            self.views[name], self.owner[name], self.itemsize[name] = view, self.owner[source], self.itemsize[source]
        return True

    @staticmethod
    def view(kind: str, x: np.ndarray, arguments: list[Any], shape: tuple[int, ...], number: int) -> np.ndarray | None:
        if kind == "Transpose":
            return x.transpose(arguments[0])
        if kind == "Broadcast":
            return np.broadcast_to(x, shape)
        if kind == "Slice":
            start, _, step = arguments
            strides = tuple(each * by for each, by in zip(x.strides, step, strict=True))
            return as_strided(x, shape, strides)
        if kind == "Split":
            return as_strided(x, shape, x.strides)
        try:
            return x.reshape(shape, copy=False)
        except ValueError:
            return None

    def copied(self, kind: str, name: str) -> bool:
        """Whether Metal copies this operand before the kernel proper."""
        x = self.views[name]
        if name in self.weights or x.ndim < 2:
            return False
        if kind in NORMS:
            return not x.flags.c_contiguous
        if kind in ("QuantizedMatmul", "Matmul"):
            rows = x if x.strides[-1] == 1 else x.swapaxes(-1, -2)
            return rows.strides[-1] != 1 or rows.strides[-2] != rows.shape[-1]
        return kind == "ScaledDotProductAttention" and x.strides[-1] != 1

    def kernel(self, kind: str, inputs: list[str]) -> None:
        self.found.kernels[kind] += 1
        for name in {self.owner[each]: each for each in inputs}.values():  # two views of one buffer are read together
            if self.owner[name] in self.weights:
                self.found.weights += self.size(name)
            else:
                self.found.activations += self.size(name)

    def size(self, name: str) -> int:
        """Bytes under an array, a broadcast one's counted once."""
        x = self.views[name]
        return math.prod(n for n, stride in zip(x.shape, x.strides, strict=True) if stride) * self.itemsize[name]


def main(say: Callable[[str], None] = print) -> None:
    for bits, name in ((2, "ternary"), (1, "binary")):
        for joined in (True, False):
            found = count(CONFIG, bits, (32, 32), 512, joined)
            kinds = ", ".join(f"{number} {kind}" for kind, number in found.kernels.most_common())
            say(
                f"{name}, Q K V {'joined' if joined else 'apart'}: {found.total} kernels, {found.needed} in the floor; "
                f"read {found.weights / 1e9:.3f} GB of weights and {found.activations / 1e9:.3f} GB of activations, "
                f"{found.floor / 1e9:.3f} GB in the floor: {found.ratio:.2f} x ({kinds})"
            )


if __name__ == "__main__":
    main()
