"""Quantisation-aware training: layers compute with their low-bit values while full-precision weights behind them learn.

The rules are engine.lowbit's, in torch because they run at every step; a test holds the two equal bit for bit. Only the
last bit of a mean may differ, since it depends on the order of the sum: an export starts from the values made here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

TRANSFORMER_GROUP, ENCODER_GROUP, ENCODER_BITS = 128, 64, 4


def _stored(x: Tensor) -> Tensor:
    """Rounded to what the file keeps."""
    return x.bfloat16().float()


def ternary(w: Tensor, group_size: int = TRANSFORMER_GROUP) -> Tensor:
    groups = w.reshape(-1, group_size)
    scale = _stored(groups.abs().mean(1, keepdim=True))
    codes = (groups / scale.clamp(min=1e-30)).round().clamp(-1, 1)  # a group of zeros stays zero
    return (codes * scale).view_as(w)


def binary(w: Tensor, group_size: int = TRANSFORMER_GROUP) -> Tensor:
    groups = w.reshape(-1, group_size)
    scale = _stored(groups.abs().mean(1, keepdim=True))
    return torch.where(groups >= 0, scale, -scale).view_as(w)


def affine4(w: Tensor) -> Tensor:
    groups = w.reshape(-1, ENCODER_GROUP)
    top = 2**ENCODER_BITS - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    low_is_larger = low.abs() > high.abs()
    edge = torch.where(low_is_larger, low, high)
    step = ((high - low) / top).clamp(min=1e-7) * torch.where(low_is_larger, 1.0, -1.0)
    steps_to_zero = (edge / step).round()
    scale = _stored(torch.where(steps_to_zero != 0, edge / steps_to_zero, step))
    bias = _stored(torch.where(steps_to_zero != 0, edge, torch.zeros_like(edge)))
    return (((groups - bias) / scale).round().clamp(0, top) * scale + bias).view_as(w)


class _StraightThrough(torch.autograd.Function):
    """Quantised forward, identity backward. Returns exactly the quantised values, never w + (q - w), which rounds."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, rule: Callable[[Tensor], Tensor]) -> Tensor:
        return rule(w)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class FakeQuantized(nn.Module):
    """A parametrisation: what the layer sees is the quantised weight."""

    def __init__(self, rule: Callable[[Tensor], Tensor]):
        super().__init__()
        self.rule = rule

    def forward(self, w: Tensor) -> Tensor:
        return _StraightThrough.apply(w, self.rule)


def is_block_linear(name: str) -> bool:
    """The linears that the released packs quantise: all inside the blocks. The nine outer projections stay dense."""
    return name.startswith(("transformer_blocks.", "single_transformer_blocks."))


def quantize_transformer(transformer: nn.Module, rule: Callable[[Tensor], Tensor]) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and is_block_linear(name):
            parametrize.register_parametrization(module, "weight", FakeQuantized(rule))


def quantize_encoder(encoder: nn.Module) -> None:
    for module in encoder.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            parametrize.register_parametrization(module, "weight", FakeQuantized(affine4))


def plain_name(name: str) -> str:
    """The usual name of a full-precision weight that stands behind a quantised one."""
    return name.replace(".parametrizations.weight.original", ".weight")


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """The state with full-precision weights under their usual names."""
    return {plain_name(name): value for name, value in module.state_dict().items()}


def load_plain(module: nn.Module, state: dict[str, Tensor]) -> None:
    """The inverse of `plain_state`, strict."""
    names = {plain_name(name): name for name in module.state_dict()}
    module.load_state_dict({names[name]: value for name, value in state.items()})
