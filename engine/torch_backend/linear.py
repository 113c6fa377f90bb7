"""Packed layers in torch, and the one way weights enter a module.

A packed weight stays packed: codes as bytes, one scale and one bias per group of input features. For 1, 2 and 4 bits
`w = code * scale + bias` (engine/lowbit.py is the same text in NumPy). The forward pass expands some rows, uses them
and forgets them. On the CPU codes are never copied into memory: they are pages of the file, and so are big dense layers
in another number format than the one computed with.

It doesn't know which model the layers belong to.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.fitting import REPAIR, refuse_misfits
from engine.memory import BIG_WEIGHTS
from engine.packs import Component, Quantization
from engine.torch_backend.mapped import MappedFiles
from engine.types import EngineError

BLOCK = 1 << 21  # weights that a CPU expands at a time: 8 MB in float32, few enough to stay in its caches
OUTPUTS = 64  # their number is a multiple of this: with 170 instead of 192 oneDNN takes half as long again for each
# The codes of one byte, as one word: torch moves a word of 16 bytes as fast as one of 2.
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128, 32: torch.complex128}
# Where bias = centre * scale in every group, `(code + centre) * scale` is exact and one pass shorter.
CENTRES = {1: -0.5, 2: -1.0}


@cache
def code_table(bits: int, dtype: torch.dtype, centre: float, device: torch.device) -> Tensor:
    """`code + centre` for the codes in every possible byte, least significant bits first: [256] words (or [256, 2])."""
    codes = torch.arange(256, device=device)[:, None] >> torch.arange(0, 8, bits, device=device) & (1 << bits) - 1
    values = (codes + centre).to(dtype)
    words = values.view(_WORDS[values[0].nbytes])
    return words.squeeze(1)


def expand(
    codes: Tensor, scales: Tensor, biases: Tensor, bits: int, dtype: torch.dtype, centre: float | None = None
) -> Tensor:
    """codes uint8 [N, K * bits / 8], scales and biases [N, K / group_size] -> weights [N, K] in `dtype`.

    `centre` is given where `biases == centre * scales`, and saves reading them.
    """
    group = codes.shape[1] * 8 // bits // scales.shape[1]
    if codes.is_cuda and dtype == torch.bfloat16 and (card := card_kernels()) is not None and card.is_power(group):
        return card.half_weights(codes, scales, biases, bits, centre)
    table = code_table(bits, dtype, centre or 0.0, codes.device)
    # int32, because torch takes a uint8 index for a mask, and int64 would be twice the bytes
    words = table.index_select(0, codes.flatten().int())
    values = (torch.view_as_real(words) if words.is_complex() else words).view(dtype).view(*scales.shape, -1)
    # in place, and not by addcmul, which took two to six times as long on a CPU
    values.mul_(scales.to(dtype)[..., None])
    if centre is None:
        values.add_(biases.to(dtype)[..., None])
    return values.flatten(1)


@cache
def card_kernels() -> Any:
    """The module that does in one pass on a card what torch does in several, None where that can't be."""
    if importlib.util.find_spec("triton") is None:
        return None
    from engine.torch_backend import triton_check, triton_passes

    return None if triton_check.fault() else triton_passes


class RowBlocks(nn.Module):
    """A linear layer whose weight is made some rows at a time. Subclasses have `weight` and say what its rows mean."""

    weight: Tensor

    def __init__(self, features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.features = features
        self.dtype = dtype

    def rows(self, wanted: slice) -> Tensor:
        """[n, K] in the number format computed with."""
        raise NotImplementedError

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """[.., K] -> [.., N], or the outputs `rows` alone. Expanded rows live for their own product only."""
        first, last, _ = rows.indices(self.weight.shape[0])
        count = last - first
        step = max(OUTPUTS, BLOCK // self.features // OUTPUTS * OUTPUTS) if x.device.type == "cpu" else count
        if count <= step:
            return F.linear(x, self.rows(rows))
        flat = x.reshape(-1, self.features)
        out = x.new_empty(flat.shape[0], count)
        for start in range(0, count, step):
            stop = min(start + step, count)
            out[:, start:stop] = F.linear(flat, self.rows(slice(first + start, first + stop)))
        return out.view(*x.shape[:-1], count)


class StoredLinear(RowBlocks):
    """A dense layer that stays in the file's number format."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, dtype)
        self.register_buffer("weight", torch.empty(layer.out_features, layer.in_features, device="meta"))

    def rows(self, wanted: slice) -> Tensor:
        return self.weight[wanted].to(self.dtype)


class StoredConv2d(nn.Conv2d):
    """A dense convolution that stays in the file's number format."""

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype) -> None:
        names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode".split()
        same: dict[str, Any] = {name: getattr(layer, name) for name in names}
        super().__init__(**same, bias=layer.bias is not None, device="meta")
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight.to(self.dtype), self.bias)


class StoredEmbedding(nn.Module):
    """A dense table in the file's number format, of which only the rows asked for are read."""

    weight: Tensor

    def __init__(self, layer: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("weight", torch.empty(layer.num_embeddings, layer.embedding_dim, device="meta"))

    def forward(self, ids: Tensor, device: torch.device | None = None) -> Tensor:
        return F.embedding(ids, self.weight).to(device, self.dtype)


def _packed_parts(module: nn.Module, rows: int, features: int, quantization: Quantization) -> None:
    """The three tensors of a packed layer; made on the meta device, assigned by `build`."""
    groups = features // quantization.group_size
    codes = torch.empty(rows, features * quantization.bits // 8, dtype=torch.uint8, device="meta")
    module.register_buffer("weight", codes)
    module.register_buffer("scales", torch.empty(rows, groups, device="meta"))
    module.register_buffer("biases", torch.empty(rows, groups, device="meta"))


class PackedLinear(RowBlocks):
    scales: Tensor
    biases: Tensor

    def __init__(self, layer: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> None:
        super().__init__(layer.in_features, dtype)
        self.bits = quantization.bits
        self.centre: float | None = None
        self.expand: Callable[..., Tensor] = expand  # or what does it in one pass (admission.py)
        _packed_parts(self, layer.out_features, layer.in_features, quantization)

    def find_centre(self) -> None:
        """Look whether the biases follow from the scales, as ternary and binary ones do. Reads both once."""
        centre = CENTRES.get(self.bits)
        if centre is not None and torch.equal(self.biases, self.scales * centre):
            self.centre = centre

    def drop_scales(self) -> None:
        """For a layer that somebody else multiplies from now on, with scales of his own."""
        self.scales = self.biases = self.scales[:0].clone()

    def rows(self, wanted: slice) -> Tensor:
        codes, scales, biases = self.weight[wanted], self.scales[wanted], self.biases[wanted]
        return self.expand(codes, scales, biases, self.bits, self.dtype, self.centre)


class PackedEmbedding(nn.Module):
    weight: Tensor
    scales: Tensor
    biases: Tensor

    def __init__(self, layer: nn.Embedding, quantization: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = quantization.bits
        self.dtype = dtype
        _packed_parts(self, layer.num_embeddings, layer.embedding_dim, quantization)

    def forward(self, ids: Tensor, device: torch.device | None = None) -> Tensor:
        """Token ids [B, L] -> [B, L, K] on `device`. Only the rows asked for are read, each once: most of a prompt is
        padding. By NumPy, because torch wakes its threads for this, on 16 cores for milliseconds."""
        each, places = np.unique(ids.numpy(), return_inverse=True)
        codes, scales, biases = (taken(part, each).to(device) for part in (self.weight, self.scales, self.biases))
        rows = expand(codes, scales, biases, self.bits, self.dtype)
        return rows[torch.from_numpy(places).view(ids.shape).to(device)]


def taken(table: Tensor, rows: np.ndarray) -> Tensor:
    """Some rows of a table of any dtype in main memory."""
    return torch.from_numpy(table.view(torch.uint8).numpy()[rows]).view(table.dtype)


def build(
    module: nn.Module,
    component: Component,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prefix: str = "",
    unused: tuple[str, ...] = (),
) -> MappedFiles:
    """Fill `module`, which was made on the meta device, with the tensors of `component`; returns their files.

    A linear or embedding becomes packed where its `scales` exist. Other floating tensors are cast to `dtype`, except
    that big layers on a CPU keep the file's, as the parts of packed ones do. Embeddings stay on the CPU: of 200 MB a
    prompt needs some rows. `prefix` is cut off the files' names; names that then start with one of `unused` are left on
    disk. Raises EngineError when names or shapes don't fit.
    """
    files = MappedFiles(component)
    tensors = {
        name: tensor
        for full_name, tensor in files.items()
        if not (name := full_name.removeprefix(prefix)).startswith(unused)
    }
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    kept = _put_twins(module, tensors, packed, component, dtype, device)
    embeddings = {name for name, layer in module.named_modules() if isinstance(layer, PackedEmbedding)}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer in packed:
            where = torch.device("cpu") if layer in embeddings else device
            # bytes, not uint32 words: a little-endian word holds its codes in the order of its bytes
            tensors[name] = tensor.view(torch.uint8).to(where) if kind == "weight" else tensor.to(where)
        elif name not in kept:
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    refuse_misfits(expected, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, component.folder)
    module.requires_grad_(False)
    module.load_state_dict(tensors, assign=True)
    module.eval()
    for part in module.modules():
        if isinstance(part, PackedLinear):
            part.find_centre()
    files.release()  # what was cast or looked at has been copied; what is used in place comes back when it is used
    return files


def _put_twins(
    module: nn.Module,
    tensors: dict[str, Tensor],
    packed: set[str],
    component: Component,
    dtype: torch.dtype,
    device: torch.device,
) -> set[str]:
    """Replace the layers that stay as the file has them; returns the names of the big dense weights among theirs."""
    kept = set()
    for name, layer in list(module.named_modules()):
        weight = tensors.get(f"{name}.weight")
        if name in packed:
            twin = _packed_twin(name, layer, component, dtype)
        elif weight is not None and stays(layer, weight, dtype, device):
            twin = _STORED[type(layer)](layer, dtype)
            kept.add(f"{name}.weight")
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, twin)
    return kept


def stays(layer: nn.Module, weight: Tensor, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a dense layer is better left as the file has it, and cast when it is used: an embedding, or on a CPU a
    big one that would be copied into another number format."""
    if isinstance(layer, nn.Embedding):
        return True
    big = type(layer) in _STORED and weight.nbytes >= BIG_WEIGHTS.get(weight.ndim, math.inf)
    return big and device.type == "cpu" and weight.dtype != dtype


_STORED: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: StoredLinear,
    nn.Embedding: StoredEmbedding,
    nn.Conv2d: StoredConv2d,
}


def _packed_twin(name: str, layer: nn.Module, component: Component, dtype: torch.dtype) -> nn.Module:
    if component.quantization is None:
        raise EngineError(f"{component.folder} has {name}.scales, but its configuration names no bits; {REPAIR}")
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer, component.quantization, dtype)
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(layer, component.quantization, dtype)
    raise EngineError(f"{component.folder} has {name}.scales, but {name} is no layer that can be packed; {REPAIR}")
