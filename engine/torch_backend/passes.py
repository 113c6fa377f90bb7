"""What the blocks of a transformer do to int8 tokens and low-bit weights, in torch: one method a pass.

kernels.py has the same methods compiled for processors, triton_passes.py for NVIDIA's cards. Here a pass works on a few
rows or outputs at a time, so that what its steps hand on to each other stays in the caches. Activations are rows
[M, features] of the passes' own number format; results are written where the caller says, and big ones lie in buffers
that the next block uses again.
"""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.torch_backend import int8
from engine.torch_backend.cores import Cores
from engine.torch_backend.int8 import TOKENS, Int8Tokens, Int8Weights, Scratch, Take
from engine.torch_backend.linear import OUTPUTS, PackedLinear, expand
from engine.torch_backend.transformer import Modulation, Rotary

TILE = 1536  # outputs at a time, of all cores: it divides the 4B model's layers, and more gained less than 2 %


class TorchPasses:
    """For any processor: torch's integer product, with weights' scales folded and one step for all of a token."""

    name = "torch"
    dtype = torch.float32  # of the activations
    device = torch.device("cpu")
    by_head = True  # attention reads queries, keys and values fastest head by head
    dense = staticmethod(expand)  # for a layer that is multiplied in the model's number format
    halves = False  # whether products and `turn` can write bfloat16 beside the passes' own number format

    def __init__(self) -> None:
        self.scratch = Scratch()

    def bears(self, layer: PackedLinear) -> bool:
        """One or two bits, whose biases follow from the scales."""
        fits = layer.centre is not None and layer.features // layer.scales.shape[1] % 8 == 0
        return fits and layer.weight.device.type == "cpu"

    def weights(self, layer: PackedLinear) -> Int8Weights:
        return int8.weights(layer.weight, layer.scales, layer.bits)

    def quantize(self, x: Tensor, first: Tensor | None = None) -> Int8Tokens:
        """Of rows of x or, with `first`, of rows that begin there."""
        return int8.quantize(x) if first is None else int8.quantize(first, x)

    def modulate(self, x: Tensor, modulation: Modulation, eps: float) -> Int8Tokens:
        """(1 + scale) * norm(x) + shift, quantised; the layer norm has no weights of its own."""
        width = x.shape[1]  # asked for by size: one modulation for all pictures of a batch
        scale, shift = 1 + modulation.scale.view(width).float(), modulation.shift.view(width).float()
        tokens = Int8Tokens(torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), 1))
        for start in range(0, len(x), TOKENS):
            rows = slice(start, start + TOKENS)
            int8.quantize_into(F.layer_norm(x[rows], x.shape[1:], eps=eps).mul_(scale).add_(shift), tokens, rows)
        return tokens

    def multiply(self, x: Int8Tokens, w: Int8Weights, out: Tensor) -> None:
        def tile(take: Take, rows: slice) -> None:
            int8.multiply_into(x, w, rows, out[:, rows], take)

        self._tiles(tile, len(w.words))

    def gate(self, x: Int8Tokens, w: Int8Weights, out: Tensor) -> None:
        """SwiGLU of the product: silu(first half of the outputs) * second half."""
        half = len(w.words) // 2

        def tile(take: Take, rows: slice) -> None:
            gate = out[:, rows]
            int8.multiply_into(x, w, rows, gate, take)
            value = _product(x, w, slice(half + rows.start, half + rows.stop), take)
            F.silu(gate, inplace=True)
            gate.mul_(value)

        self._tiles(tile, half)

    def add(self, x: Int8Tokens, w: Int8Weights, gate: Tensor, out: Tensor) -> None:
        """out += gate * product, with `gate` [N]."""

        def tile(take: Take, rows: slice) -> None:
            out[:, rows].addcmul_(_product(x, w, rows, take), gate[rows])

        self._tiles(tile, len(w.words))

    def turn(self, x: Tensor, weight: Tensor, eps: float, rotary: Rotary, out: Tensor) -> None:
        """RMS norm of every head, then its pairs turned by their token's angle: x and out [M, heads, size]."""
        weight, angles = weight.float(), torch.complex(rotary.cos, rotary.sin)[:, None]
        for start in range(0, len(x), TOKENS):
            rows = slice(start, start + TOKENS)
            normed = F.rms_norm(x[rows], x.shape[-1:], weight, eps)
            # as complex numbers: a third of the time that four products of every other number take
            torch.mul(_pairs(normed), angles[rows], out=_pairs(out[rows]))

    def _tiles(self, run: Callable[[Take, slice], None], outputs: int) -> None:
        """`run` on some outputs after the others, each core on its own, with scratch memory of its own."""
        wide = max(OUTPUTS, TILE // self._cores.count // OUTPUTS * OUTPUTS)
        tiles = [slice(start, min(start + wide, outputs)) for start in range(0, outputs, wide)]

        def on(core: int, rows: slice) -> None:
            run(lambda name, count, dtype: self.scratch.take(f"{name} of core {core}", count, dtype), rows)

        self._cores.share(on, tiles)

    @cached_property
    def _cores(self) -> Cores:
        return Cores(TILE // OUTPUTS)  # each has a tile of at least OUTPUTS


def _product(x: Int8Tokens, w: Int8Weights, rows: slice, take: Take) -> Tensor:
    """Some outputs of a product, in a buffer that the next one overwrites."""
    out = take("tile", len(x.values) * (rows.stop - rows.start), torch.float32).view(len(x.values), -1)
    int8.multiply_into(x, w, rows, out, take)
    return out


def _pairs(x: Tensor) -> Tensor:
    """Neighbouring features [.., size] as complex numbers [.., size / 2], where they lie."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
