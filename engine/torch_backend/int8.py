"""Packed layers multiplied as bytes: int8 weights made from the codes a few rows at a time, int8 activations per token.

Codes of one or two bits are -1, 0 and +1 (two bits) or -1 and +1 (one bit) times the scale of their group. A plain
integer product can't apply a scale in the middle of a sum, so the scales become whole numbers relative to the largest
of their row: `w8 = round(127 * scale / largest) * sign`, off by at most 1/254 of that largest scale. Activations are
rounded to 127 steps of their token's largest value. `y = (x8 @ w8) * the token's step * the row's step`.

Knows nothing of modules, nor of which layers can bear it: admission.py finds that out.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from engine.torch_backend.linear import CENTRES  # code + centre is half the sign (one bit), or the sign

STEPS = 127  # of the largest value, on either side of zero
TOKENS = 64  # quantised at a time, so that they are still in a core's cache at the second look
TINY = torch.finfo(torch.float32).tiny


class Int8Weights(NamedTuple):
    """A packed layer of N outputs and K inputs as integers: K / group_size + 4 bytes an output beside the file's own
    (29 MB for the 4B model)."""

    words: Tensor  # [N, K / 8]: the codes as they lie in the file, eight in a uint8 or uint16
    bits: int
    factors: Tensor  # int8 [N, K / group_size]
    steps: Tensor  # float32 [N]: what one unit of a row's int8 weights is worth

    def rows(self, wanted: slice) -> "Int8Weights":
        return Int8Weights(self.words[wanted], self.bits, self.factors[wanted], self.steps[wanted])


class Int8Tokens(NamedTuple):
    values: Tensor  # int8 [M, K]
    steps: Tensor  # float32 [M, 1]


class Scratch:
    """Buffers by name, each used again by whoever asks for it next."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._most: dict[str, tuple[int, torch.dtype]] = {}  # elements that were ever asked for
        self._device = device

    def take(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """`count` elements [count] with anything in them; what an earlier `take` of this name gave is overwritten."""
        self._most[name] = max(count, self._most.get(name, (0, dtype))[0]), dtype
        kept = self._buffers.get(name)
        if kept is None or len(kept) < count:
            kept = self._buffers[name] = torch.empty(count, dtype=dtype, device=self._device)
        return kept[:count]

    def grown(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """One of each name that was ever asked for, as large as it was: of `buffers` where they suffice."""
        found = dict(buffers)
        for name, (count, dtype) in self._most.items():
            if name not in found or len(found[name]) < count:
                found[name] = torch.empty(count, dtype=dtype, device=self._device)
        return found

    def exchange(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Go on with other buffers, and hand over those so far."""
        before, self._buffers = self._buffers, buffers
        return before

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers = {}

    def forget(self) -> None:
        """What was asked for until now says nothing of what will be."""
        self._most = {}


Take = Callable[[str, int, torch.dtype], Tensor]  # Scratch.take, or one for a thread


@cache
def exact() -> bool:
    """Whether torch's integer product adds up here. Without VNNI pairs of products are added in 16 bits, and what
    does not fit is lost: 64 times 127 * 127 came out as 8,160."""
    x = torch.tensor([-127, 127], dtype=torch.int8).repeat_interleave(24)[:, None].expand(-1, 64).contiguous()
    return torch.equal(torch._int_mm(x, x.t()), (x.float() @ x.float().t()).int())


def weights(codes: Tensor, scales: Tensor, bits: int) -> Int8Weights:
    """Fold the scales [N, groups] of codes uint8 [N, K * bits / 8]; biases must be CENTRES[bits] * scales."""
    scales = scales.float()
    largest = scales.abs().amax(1, keepdim=True)
    factors = (scales * (STEPS / largest.clamp_min(TINY))).round_().to(torch.int8)
    unit = -CENTRES[bits] / STEPS
    words = codes.view(torch.uint8 if bits == 1 else torch.uint16)
    return Int8Weights(words, bits, factors, (largest * unit).flatten())


def quantize(*parts: Tensor) -> Int8Tokens:
    """Float activations, side by side [M, K] -> int8, each token in steps of its own. What isn't finite gives
    nonsense."""
    count, inputs = len(parts[0]), sum(part.shape[1] for part in parts)
    tokens = Int8Tokens(torch.empty(count, inputs, dtype=torch.int8), torch.empty(count, 1))
    for start in range(0, count, TOKENS):
        rows = slice(start, start + TOKENS)
        block = [part[rows].float() for part in parts]
        quantize_into(torch.cat(block, dim=1) if len(block) > 1 else block[0], tokens, rows)
    return tokens


def quantize_into(block: Tensor, tokens: Int8Tokens, rows: slice) -> None:
    """A few tokens [n, K] become `rows` of `tokens`."""
    step = tokens.steps[rows]
    torch.maximum(block.amax(1, keepdim=True), block.amin(1, keepdim=True).neg_(), out=step)
    step.clamp_min_(TINY).div_(STEPS)
    tokens.values[rows] = (block * step.reciprocal()).round_()


def multiply_into(x: Int8Tokens, w: Int8Weights, rows: slice, out: Tensor, take: Take) -> None:
    """[M, K] tokens times some rows of the weights -> out [M, n] float32."""
    tile = expand(w, rows, take)
    sums = take("sums", len(x.values) * len(tile), torch.int32).view(len(x.values), len(tile))
    torch._int_mm(x.values, tile.t(), out=sums)
    # three passes in place: one pass of torch.mul over integers and floats takes longer than all of them
    out.copy_(sums).mul_(x.steps).mul_(w.steps[rows])


def expand(w: Int8Weights, rows: slice, take: Take) -> Tensor:
    """int8 [n, K] of some rows, in a buffer that the next call overwrites."""
    index = w.words[rows].flatten().int()
    tile = take("weights", len(index), torch.int64)
    # on one core; of rows of one number each it would be on all of them, a third as fast on each
    torch.index_select(_table(w.bits), 0, index, out=tile)
    factors = w.factors[rows]
    return tile.view(torch.int8).view(*factors.shape, -1).mul_(factors[..., None]).flatten(1)


@cache
def _table(bits: int) -> Tensor:
    """The eight signs that each possible word of 8 * bits bits stands for, as the bytes of an int64: [2^(8 * bits)]."""
    codes = torch.arange(1 << 8 * bits)[:, None] >> torch.arange(0, 8 * bits, bits) & (1 << bits) - 1
    signs = (codes + CENTRES[bits]) / -CENTRES[bits]
    return signs.to(torch.int8).view(torch.int64).flatten()
