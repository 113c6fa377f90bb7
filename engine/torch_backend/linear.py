"""Packed layers in torch, and the one way weights enter a module.

A packed weight stays packed: codes as bytes, one scale and one bias per group of input features. For 1, 2 and 4 bits
`w = code * scale + bias` (engine/lowbit.py is the same text in NumPy). The forward pass expands one layer, uses it and
forgets it. On the CPU codes are never copied into memory: they are pages of the file.

It doesn't know which model the layers belong to.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.packs import Component, Quantization
from engine.types import EngineError

NAMES_SHOWN = 3  # of the missing or unexpected tensors, in an error sentence
REPAIR = "fetch or copy the pack again"


@cache
def code_table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The codes in every possible byte, least significant bits first: [256, 8 / bits]."""
    shifts = torch.arange(0, 8, bits, device=device)
    codes = torch.arange(256, device=device)[:, None] >> shifts & (1 << bits) - 1
    return codes.to(dtype)


def expand(codes: Tensor, scales: Tensor, biases: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """codes uint8 [N, K * bits / 8], scales and biases [N, K / group_size] -> weights [N, K] in `dtype`."""
    # int32, because torch takes a uint8 index for a mask, and int64 would be twice the bytes
    values = F.embedding(codes.int(), code_table(bits, dtype, codes.device)).view(*scales.shape, -1)
    # in place, and not by addcmul, which took two to six times as long on a CPU
    return values.mul_(scales.to(dtype)[..., None]).add_(biases.to(dtype)[..., None]).flatten(1)


class Packed(nn.Module):
    """The three tensors of a packed layer with N rows of K features; made on the meta device, assigned by `build`."""

    weight: Tensor
    scales: Tensor
    biases: Tensor

    def __init__(self, rows: int, features: int, quantization: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits = quantization.bits
        self.dtype = dtype
        groups = features // quantization.group_size
        self.register_buffer("weight", torch.empty(rows, features * self.bits // 8, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales", torch.empty(rows, groups, device="meta"))
        self.register_buffer("biases", torch.empty(rows, groups, device="meta"))


class PackedLinear(Packed):
    def forward(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., N]. The expanded weight lives for this call only."""
        return F.linear(x, expand(self.weight, self.scales, self.biases, self.bits, self.dtype))


class PackedEmbedding(Packed):
    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> [B, L, K]. Only the rows asked for are read."""
        codes, scales, biases = (part[ids.flatten()] for part in (self.weight, self.scales, self.biases))
        return expand(codes, scales, biases, self.bits, self.dtype).view(*ids.shape, -1)


def build(
    module: nn.Module,
    component: Component,
    dtype: torch.dtype,
    device: torch.device,
    *,
    prefix: str = "",
    unused: tuple[str, ...] = (),
) -> None:
    """Fill `module`, which was made on the meta device, with the tensors of `component`.

    A linear or embedding becomes packed where its `scales` exist. Floating tensors outside packed layers are cast to
    `dtype`; those inside keep the file's. `prefix` is cut off the files' names; names that then start with one of
    `unused` are left on disk. Raises EngineError when names or shapes don't fit.
    """
    tensors = {
        name: tensor
        for full_name, tensor in _mapped_tensors(component)
        if not (name := full_name.removeprefix(prefix)).startswith(unused)
    }
    packed = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    modules = dict(module.named_modules())
    for name in packed & modules.keys():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, _packed_twin(name, modules[name], component, dtype))
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        if layer in packed:
            # bytes, not uint32 words: a little-endian word holds its codes in the order of its bytes
            tensors[name] = tensor.view(torch.uint8).to(device) if kind == "weight" else tensor.to(device)
        else:
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    _refuse_misfits(module.state_dict(), tensors, component)
    module.requires_grad_(False)
    module.load_state_dict(tensors, assign=True)
    module.eval()


def _mapped_tensors(component: Component) -> Iterator[tuple[str, Tensor]]:
    for file in component.files:
        try:
            with safe_open(file, framework="pt") as tensors:  # the tensors outlive this and hold the mapping themselves
                for name in tensors.keys():  # noqa: SIM118  (a safe_open is no dict)
                    yield name, tensors.get_tensor(name)
        except (OSError, SafetensorError) as fault:
            raise EngineError(f"{file} cannot be read ({fault}); {REPAIR}") from None


def _packed_twin(name: str, layer: nn.Module, component: Component, dtype: torch.dtype) -> Packed:
    if component.quantization is None:
        raise EngineError(f"{component.folder} has {name}.scales, but its configuration names no bits; {REPAIR}")
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer.out_features, layer.in_features, component.quantization, dtype)
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(layer.num_embeddings, layer.embedding_dim, component.quantization, dtype)
    raise EngineError(f"{component.folder} has {name}.scales, but {name} is no layer that can be packed; {REPAIR}")


def _refuse_misfits(expected: dict[str, Tensor], found: dict[str, Tensor], component: Component) -> None:
    shapes = [
        f"{name} is {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if found[name].shape != expected[name].shape
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": shapes,
    }
    faults = [f"{kind} {_shortened(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise EngineError(f"tensors in {component.folder} do not fit its config.json: {'; '.join(faults)}; {REPAIR}")


def _shortened(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
