"""The passes of passes.py on an NVIDIA card: bfloat16 activations, int8 tokens and weights, kernels in Triton or Gluon.

A layer's weights are made from its codes for every product, in one buffer that all layers share: on an H200 that takes
a twelfth of a 1024 x 1024 picture's products, a fifth at 512 x 512, and memory stays at what the pack takes. Nothing is
tuned on the user's time: the tiles of a product follow from the card's generation and the product's size. Using this
needs triton; triton_check.py is asked whether it can be used.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.torch_backend import int8
from engine.torch_backend.int8 import Int8Tokens, Int8Weights, Scratch
from engine.torch_backend.linear import PackedLinear, expand
from engine.torch_backend.transformer import Modulation, Rotary
from engine.torch_backend.triton_card import launch, processors

EXPANDED = (8, 8)  # rows, and groups of each, whose weights a program makes bytes
HEADS = 32  # a program norms and turns, if there are so many
HALVED = 32  # groups whose weights a program makes bfloat16
REGISTERS = 168  # a thread's, of which 384 have all that a processor has; gluon_kernels.py shares them out
NARROWER = 1.06  # times as long an output takes in tiles half as wide
QUANTIZED = 2048  # inputs of a token that a program rounds, where a few share a step


class Tiles(NamedTuple):
    """How a product is divided: programs of `m` tokens by `n` outputs (at least 128), `k` inputs at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool
    band: int = 8

    def number(self, tokens: int, outputs: int) -> int:
        return -(-tokens // self.m) * -(-outputs // self.n)


class Ways(NamedTuple):
    """`plain` where a token has one step. From WIDE inputs on, where SwiGLU's outliers are, it has one for every
    `chunked.k` of them: with one alone a fifth of the layers would be off by more than they may. With `fetched` warps
    of their own fetch for those that multiply (gluon_kernels.py), so many inputs at a time, and programs stay; then
    `narrow` is for products that leave processors idle at the end of `plain`."""

    plain: Tiles
    chunked: Tiles
    wide: int = 4096
    fetched: int = 0
    narrow: Tiles | None = None


HOPPER = Ways(
    Tiles(128, 256, 128, 4, 4, True), Tiles(128, 128, 256, 4, 7, True), 4096, 128, Tiles(128, 128, 128, 4, 7, True)
)
HOPPER_IN_TRITON = Ways(Tiles(128, 128, 128, 4, 3, True), Tiles(128, 128, 256, 8, 3, True))  # if Gluon has changed
EARLIER = Ways(Tiles(128, 128, 64, 8, 3, False), Tiles(128, 128, 128, 8, 3, False))  # 100 kB shared, no descriptors


class TritonPasses:
    """See TorchPasses for what each method does. Codes, factors and steps are those of int8.py."""

    name = "triton"
    dtype = torch.bfloat16
    by_head = False  # attention reads tokens as they lie
    dense = staticmethod(expand)
    halves = False  # everything is bfloat16

    def __init__(self, device: torch.device, ways: Ways, programs: int = 0) -> None:
        """`programs` that stay, where they do; 0: one for each processor of the card."""
        self.device = device
        self.programs = programs or (processors(device) if device.type == "cuda" else 1)
        self.scratch = Scratch(device)
        self.ways = ways

    def bears(self, layer: PackedLinear) -> bool:
        """One or two bits, whose biases follow from the scales."""
        fits = layer.centre is not None and is_power(layer.features // layer.scales.shape[1])
        return fits and layer.features % 64 == 0 and layer.weight.device.type == self.device.type

    def weights(self, layer: PackedLinear) -> Int8Weights:
        return int8.weights(layer.weight, layer.scales, layer.bits)

    def quantize(self, x: Tensor, first: Tensor | None = None) -> Int8Tokens:
        first, split = (x, 0) if first is None else (first, first.shape[1])
        count, width = len(x), split + x.shape[1]
        chunk = self.ways.chunked.k
        one = width < self.ways.wide or width % chunk > 0
        tokens = self._empty(count, width, 1 if one else width // chunk)
        row = _row(width) if one else _row(max(chunk, min(QUANTIZED, width)))
        launch(
            kernels().tokens, (count, -(-width // row["BLOCK"])), x, first, *tokens, x.stride(0), first.stride(0),
            split, count, width, CHUNK=row["BLOCK"] if one else chunk, **row,
        )  # fmt: skip
        return tokens

    def modulate(self, x: Tensor, modulation: Modulation, eps: float) -> Int8Tokens:
        count, width = x.shape
        tokens = self._empty(count, width, 1)
        scale, shift = (part.view(width) for part in (modulation.scale, modulation.shift))
        launch(kernels().modulated, (count,), x, scale, shift, *tokens, x.stride(0), count, width, eps, **_row(width))
        return tokens

    def multiply(self, x: Int8Tokens, w: Int8Weights, out: Tensor) -> None:
        self._product("PLAIN", x, w, out, out)

    def gate(self, x: Int8Tokens, w: Int8Weights, out: Tensor) -> None:
        self._product("GATED", x, w, out, out)

    def add(self, x: Int8Tokens, w: Int8Weights, gate: Tensor, out: Tensor) -> None:
        self._product("ADDED", x, w, out, gate)

    def turn(self, x: Tensor, weight: Tensor, eps: float, rotary: Rotary, out: Tensor) -> None:
        turn(x, weight, eps, rotary, out)

    def _product(self, end: str, x: Int8Tokens, w: Int8Weights, out: Tensor, gate: Tensor) -> None:
        count, inputs = x.values.shape
        outputs = len(w.words) // (2 if end == "GATED" else 1)
        chunked = x.steps.shape[1] > 1
        assert not (chunked and end == "GATED")  # what is gated comes from a norm
        if self.ways.fetched:
            self._fetched_product(end, x, w, out, gate, outputs)
            return
        tiles = self.ways.chunked if chunked else self.ways.plain
        weights = self.expand(w, "IN_TURNS" if end == "GATED" else "STORED", tiles.n // 2)
        values, wide = x.values, weights
        if tiles.tma:
            values, wide = descriptor(values, tiles.m, tiles.k), descriptor(wide, tiles.n, tiles.k)
        launch(
            kernels().chunked_product if chunked else kernels().product, (tiles.number(count, len(weights)),),
            values, wide, x.steps, w.steps, gate, out, count, outputs, inputs, out.stride(0),
            END=constant(end), TMA=tiles.tma, M=tiles.m, N=tiles.n, K=tiles.k, BAND=tiles.band,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip

    def _fetched_product(
        self, end: str, x: Int8Tokens, w: Int8Weights, out: Tensor, gate: Tensor, outputs: int
    ) -> None:
        (count, inputs), chunks, k = x.values.shape, x.steps.shape[1], self.ways.fetched
        weights = self.expand(w, "PAIRS_BY_THREAD" if end == "GATED" else "BY_THREAD")
        tiles = self.ways.chunked if chunks > 1 else self._division(count, len(weights))
        launch(
            gluon().product, (min(tiles.number(count, len(weights)), self.programs),),
            swizzled(x.values, tiles.m // 2, k), swizzled(weights, tiles.n, k), x.steps, w.steps, gate, out,
            count, outputs, inputs, out.stride(0), END=constant(end), M=tiles.m, N=tiles.n, K=k,
            CHUNK=tiles.k if chunks > 1 else 0, STAGES=tiles.stages, BAND=tiles.band,
            num_warps=tiles.warps, maxnreg=REGISTERS,
        )  # fmt: skip

    def _division(self, count: int, width: int) -> Tiles:
        """How a product of so many tokens is divided, by the rounds that all programs need for it."""
        wide, narrow = self.ways.plain, self.ways.narrow
        if narrow is None:
            return wide
        least, less = (-(-tiles.number(count, width) // self.programs) * tiles.n for tiles in (wide, narrow))
        return narrow if NARROWER * less < least else wide

    def expand(self, w: Int8Weights, order: str = "STORED", tile: int = 1) -> Tensor:
        """int8 [places, K] in a buffer that the next call overwrites: N rows in an order of triton_kernels.output_at,
        IN_TURNS by `tile`; a few are added, of anything, to make that even."""
        rows, groups = w.factors.shape
        inputs = w.words[0].nbytes * 8 // w.bits
        outputs = rows // 2 if order in ("IN_TURNS", "PAIRS_BY_THREAD") else rows
        even = {"STORED": 1, "IN_TURNS": tile, "BY_THREAD": 32, "PAIRS_BY_THREAD": 32}[order]
        places = -(-outputs // even) * even * (rows // outputs)
        out = self.scratch.take("weights", places * inputs // 4, torch.int32)
        some, each = EXPANDED
        launch(
            kernels().int8_weights, (-(-places // some), -(-groups // each)),
            w.words.view(torch.uint8), w.factors, out, places, outputs, groups, ORDER=constant(order), BITS=w.bits,
            GROUP=inputs // groups, TILE=tile, ROWS=some, GROUPS=each, num_warps=4,
        )  # fmt: skip
        return out.view(torch.int8).view(places, inputs)

    def _empty(self, count: int, inputs: int, chunks: int) -> Int8Tokens:
        """Steps [count, chunks], those of a chunk side by side."""
        values = torch.empty(count, inputs, dtype=torch.int8, device=self.device)
        return Int8Tokens(values, torch.empty(chunks, count, device=self.device).t())


def is_power(size: int) -> bool:
    """Whether Triton can make a range of so many, or of half or a quarter of it."""
    return size >= 4 and size & (size - 1) == 0


def half_weights(codes: Tensor, scales: Tensor, biases: Tensor, bits: int, centre: float | None) -> Tensor:
    """See linear.expand: bfloat16 [N, K], each weight rounded once."""
    rows, groups = scales.shape
    inputs = codes.shape[1] * 8 // bits
    out = torch.empty(rows, inputs, dtype=torch.bfloat16, device=codes.device)
    launch(
        kernels().half_weights, (-(-rows * groups // HALVED),), codes, scales, biases, out.view(torch.int64),
        rows * groups, centre or 0.0, CENTRED=centre is not None, BITS=bits, GROUP=inputs // groups, GROUPS=HALVED,
        num_warps=4,
    )  # fmt: skip
    return out


def turn(x: Tensor, weight: Tensor, eps: float, rotary: Rotary, out: Tensor, *, apart: bool = False) -> None:
    """RMS norm of every head of x [M, heads, size] and its rotation, in out; see triton_kernels.turned."""
    count, heads, size = x.shape
    if not apart:
        x, weight, out = (each.view(torch.int32) for each in (x, weight, out))
    launch(
        kernels().turned, (count,), x, weight, rotary.cos, rotary.sin, out, x.stride(0), out.stride(0), out.stride(1),
        heads, eps, SIZE=size, HEADS=max(HEADS, 1 << (heads - 1).bit_length()), APART=apart, num_warps=4,
    )  # fmt: skip


@cache
def kernels() -> Any:
    from engine.torch_backend import triton_kernels

    return triton_kernels


def constant(name: str) -> int:
    """Of those that triton_kernels.py has names for."""
    return int(getattr(kernels(), name).value)


@cache
def gluon() -> Any:
    from engine.torch_backend import gluon_kernels

    return gluon_kernels


def swizzled(x: Tensor, rows: int, columns: int) -> Any:
    """Bytes as a descriptor that Gluon takes."""
    from triton.experimental.gluon.language import NVMMASharedLayout, int8
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout.get_default_for([rows, columns], int8)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def descriptor(x: Tensor, rows: int, columns: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def _row(width: int) -> dict[str, int]:
    """How a program takes a whole row."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(8, max(4, block // 1024))}
