"""The passes of passes.py on an NVIDIA card: bfloat16 activations, int8 tokens and weights, kernels written in Triton.

A layer's weights are made from its codes for every product, in one buffer that all layers share: on an H100 that takes
a twelfth of a 1024 x 1024 picture's products, a fifth at 512 x 512, and memory stays at what the pack takes. Nothing is
tuned on the user's time: the tiles of a product follow from the card's generation and the product's size. Importing
this needs triton; `chosen` is asked where that may be missing.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import measured
from engine.hardware import Hardware
from engine.torch_backend import int8
from engine.torch_backend.int8 import Int8Tokens, Int8Weights, Scratch
from engine.torch_backend.linear import PackedLinear
from engine.torch_backend.transformer import Modulation, Rotary, apply_rotary_emb

AGREE = 1e-2  # |ours - exact| / |exact| of a whole pass in bfloat16, which alone rounds away 0.2 %
EXPANDED = (4, 8)  # rows, and groups of each, whose weights a program makes bytes
HALVED = 32  # groups whose weights a program makes bfloat16
REGISTERS = 168  # a thread's, of which 384 have all that a processor has; gluon_kernels.py shares them out
NARROWER = 1.06  # times as long an output takes in tiles half as wide
QUANTIZED = 1024  # inputs of a token that a program rounds, where a few share a step


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
HOPPER_IN_TRITON = Ways(Tiles(128, 128, 128, 4, 3, True), Tiles(128, 128, 256, 8, 3, True))  # where Gluon has changed
EARLIER = Ways(Tiles(128, 128, 64, 8, 3, False), Tiles(128, 128, 128, 8, 3, False))  # 100 kB shared, no descriptors


class TritonPasses:
    """See TorchPasses for what each method does. Codes, factors and steps are those of int8.py."""

    name = "triton"
    dtype = torch.bfloat16
    by_head = False  # attention reads tokens as they lie
    joins = True
    halves = False  # everything is bfloat16

    def __init__(self, device: torch.device, ways: Ways, programs: int = 0) -> None:
        """`programs` that stay, where they do; 0: one for each processor of the card."""
        self.device = device
        self.programs = programs or (processors(device) if device.type == "cuda" else 1)
        self.scratch = Scratch(device)
        self.ways = ways

    def bears(self, layer: PackedLinear) -> bool:
        """One or two bits, whose biases follow from the scales."""
        fits = layer.centre is not None and layer.features // layer.scales.shape[1] % 4 == 0
        return fits and layer.features % 64 == 0 and layer.weight.device.type == self.device.type

    def weights(self, layer: PackedLinear) -> Int8Weights:
        return int8.weights(layer.weight, layer.scales, layer.bits)

    def quantize(self, x: Tensor, first: Tensor | None = None) -> Int8Tokens:
        """Of rows of x or, with `first`, of rows that begin there."""
        first, split = (x, 0) if first is None else (first, first.shape[1])
        count, width = len(x), split + x.shape[1]
        chunk = self.ways.chunked.k
        one = width < self.ways.wide or width % chunk > 0
        tokens = self._empty(count, width, 1 if one else width // chunk)
        row = _row(width) if one else _row(max(chunk, min(QUANTIZED, width)))
        launch(
            "tokens", (count, -(-width // row["BLOCK"])), x, first, *tokens, x.stride(0), first.stride(0), split,
            count, width, CHUNK=row["BLOCK"] if one else chunk, **row,
        )  # fmt: skip
        return tokens

    def modulate(self, x: Tensor, modulation: Modulation, eps: float) -> Int8Tokens:
        count, width = x.shape
        tokens = self._empty(count, width, 1)
        scale, shift = (part.view(width) for part in (modulation.scale, modulation.shift))
        launch("modulated", (count,), x, scale, shift, *tokens, x.stride(0), count, width, eps, **_row(width))
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
            "chunked_product" if chunked else "product", (tiles.number(count, len(weights)),),
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
        gluon().product[(min(tiles.number(count, len(weights)), self.programs),)](
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
            "int8_weights", (-(-places // some), -(-groups // each)), w.words.view(torch.uint8), w.factors, out, places,
            outputs, groups, ORDER=constant(order), BITS=w.bits, GROUP=inputs // groups, TILE=tile, ROWS=some,
            GROUPS=each, num_warps=4,
        )  # fmt: skip
        return out.view(torch.int8).view(places, inputs)

    def _empty(self, count: int, inputs: int, chunks: int) -> Int8Tokens:
        """Steps [count, chunks], those of a chunk side by side."""
        values = torch.empty(count, inputs, dtype=torch.int8, device=self.device)
        return Int8Tokens(values, torch.empty(chunks, count, device=self.device).t())


def chosen(data_dir: Path, hardware: Hardware) -> list[TritonPasses]:
    """The passes where this card can have them, else none; `doctor` says so, or why not."""
    ways, why = found()
    words = f"int8 passes in Triton: {'they agree with torch' if ways else why}"
    if ways and why:
        words += f"; those with warps that fetch are not used, because {why}"
    key = f"int8 passes on {hardware.name}"
    if measured.recall(data_dir).get(key) != {"sentence": words}:
        measured.keep(data_dir, key, {"sentence": words})
    return [TritonPasses(torch.device("cuda"), ways)] if ways else []


def fault() -> str:
    """Why no kernel can be used on this card, as the second half of a sentence; "" where they can."""
    ways, why = found()
    return "" if ways else why


@cache
def found() -> tuple[Ways | None, str]:
    """The best ways that agree with torch on this card, and why the last of the better ones don't."""
    why = ""
    for ways in (HOPPER, HOPPER_IN_TRITON) if is_hopper(torch.device("cuda")) else (EARLIER,):
        refused = refusal(partial(check, ways=ways))
        if not refused:
            return ways, why
        why = refused
    return None, why


def refusal(check: Callable[[torch.device], None]) -> str:
    """Why the kernels that `check` compiles and compares can't be used on this card, as the second half of a sentence;
    "" where they agree with torch."""
    if importlib.util.find_spec("triton") is None:
        return "not without the package triton, which comes with torch for CUDA on Linux"
    try:
        check(torch.device("cuda"))
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:  # of a compiler, a driver or a card that nobody has tried: the picture is not lost
        return f"they can't be compiled here ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    return ""


class Wrong(Exception):
    """Which pass does not agree with torch, and by how much."""


def half_weights(codes: Tensor, scales: Tensor, biases: Tensor, bits: int, centre: float | None) -> Tensor:
    """See linear.expand: bfloat16 [N, K], each weight rounded once."""
    rows, groups = scales.shape
    inputs = codes.shape[1] * 8 // bits
    out = torch.empty(rows, inputs, dtype=torch.bfloat16, device=codes.device)
    launch(
        "half_weights", (-(-rows * groups // HALVED),), codes, scales, biases, out.view(torch.int64), rows * groups,
        centre or 0.0, CENTRED=centre is not None, BITS=bits, GROUP=inputs // groups, GROUPS=HALVED, num_warps=4,
    )  # fmt: skip
    return out


def turn(x: Tensor, weight: Tensor, eps: float, rotary: Rotary, out: Tensor, *, apart: bool = False) -> None:
    """RMS norm of every head of x [M, heads, size] and its rotation, in out; see triton_kernels.turned."""
    count, heads, size = x.shape
    if not apart:
        x, weight, out = (each.view(torch.int32) for each in (x, weight, out))
    launch(
        "turned", (count,), x, weight, rotary.cos, rotary.sin, out, x.stride(0), out.stride(0), out.stride(1), heads,
        eps, SIZE=size, HEADS=1 << (heads - 1).bit_length(), APART=apart, num_warps=4,
    )  # fmt: skip


def launch(name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    getattr(kernels(), name)[grid](*arguments, **constants)


@cache
def kernels() -> Any:
    from engine.torch_backend import triton_kernels

    return triton_kernels


def constant(name: str) -> int:
    """Of those that triton_kernels.py has names for."""
    return int(getattr(kernels(), name).value)


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether it has what Hopper brought: descriptors and 227 kB of shared memory."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major == 9  # interpreted it has


def _row(width: int) -> dict[str, int]:
    """How a program takes a whole row."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(8, max(4, block // 1024))}


@torch.inference_mode()
def check(device: torch.device, ways: Ways, group: int = 128) -> None:
    """Every pass on small random tensors against torch, with a rest in every size; but for the widths of rows it
    compiles what the 4B model needs. Raises Wrong."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device)

    # two programs for a dozen tiles, whole chunks, and a rest of tokens and outputs
    passes, chunked = (TritonPasses(device, each, programs=2) for each in (ways, ways._replace(wide=0)))
    count, inputs, outputs = 2 * ways.plain.m + 13, 6 * group, 416
    x = (normal(count, inputs) * normal(count, 1).exp()).bfloat16()
    modulation = Modulation(*(normal(width).bfloat16() for width in (inputs, inputs, outputs)))
    normed = F.layer_norm(x.float(), (inputs,), eps=1e-6) * (1 + modulation.scale.float()) + modulation.shift.float()
    for bits, centre in ((1, -0.5), (2, -1.0), (4, None)):
        codes = torch.randint(0, 256, (outputs, inputs * bits // 8), generator=random, dtype=torch.uint8).to(device)
        if bits == 2:
            codes &= ~(codes & (codes >> 1) & 0x55)  # no code 3
        scales = ((normal(outputs, inputs // group).abs() + 0.5) * normal(outputs, inputs // group).sign()).bfloat16()
        biases = normal(outputs, inputs // group).bfloat16() if centre is None else scales * centre
        dense = exact_weights(codes, scales, biases, bits)
        held("a layer in bfloat16", half_weights(codes, scales, biases, bits, centre), dense)
        if centre is not None:
            check_products(passes, chunked, int8.weights(codes, scales, bits), dense, x, modulation.gate)
    for source, tokens, bound in (
        (x, passes.quantize(x), 2 * AGREE), (normed, passes.modulate(x, modulation, 1e-6), 2 * AGREE),
        (x, chunked.quantize(x), AGREE), (x, chunked.quantize(x[:, group:], x[:, :group]), AGREE),
    ):  # fmt: skip
        held("quantising", worth(tokens), source, bound)
    heads, angles, weight = normal(count, 3, 128).bfloat16(), normal(count, 64), normal(128).bfloat16()
    rotary, turned = Rotary(angles.cos(), angles.sin()), torch.empty_like(heads)
    passes.turn(heads, weight, 1e-6, rotary, turned)
    plain = F.rms_norm(heads.float(), (128,), weight.float(), 1e-6)
    held("a rotation", turned, apply_rotary_emb(plain[None], rotary)[0])
    turn(heads, weight, 1e-6, rotary, turned, apart=True)
    mixed = plain.unflatten(-1, (2, 64)).transpose(-1, -2).flatten(-2)  # the pairs side by side
    exact = apply_rotary_emb(mixed[None], rotary)[0].unflatten(-1, (64, 2)).transpose(-1, -2).flatten(-2)
    held("a rotation of halves", turned, exact)


def check_products(
    passes: TritonPasses, chunked: TritonPasses, w: Int8Weights, dense: Tensor, x: Tensor, gate: Tensor
) -> None:
    """Every end of a product of x [M, K] and `w`, whose weights are `dense` [N, K], with one step a token and more."""
    held("a layer in int8", passes.expand(w).float() * w.steps[:, None], dense)
    tokens, parts = passes.quantize(x), chunked.quantize(x)
    exact, in_parts = (worth(each) @ dense.T for each in (tokens, parts))
    out = torch.zeros(exact.shape, dtype=torch.bfloat16, device=x.device)
    passes.multiply(tokens, w, out)
    held("a product", out, exact)
    chunked.multiply(parts, w, out)
    held("a product in chunks", out, in_parts)
    chunked.add(parts, w, gate, out.fill_(1))
    held("a gated sum in chunks", out, 1 + gate.float() * in_parts)
    passes.add(tokens, w, gate, out.fill_(1))
    held("a gated sum", out, 1 + gate.float() * exact)
    half, (left, right) = out[:, : out.shape[1] // 2].contiguous(), exact.tensor_split(2, dim=1)
    passes.gate(tokens, w, half)
    held("SwiGLU", half, F.silu(left) * right, 2 * AGREE)


def held(what: str, ours: Tensor, exact: Tensor, bound: float = AGREE) -> None:
    off = float((ours.float() - exact.float()).norm() / exact.float().norm())
    if not off <= bound:
        raise Wrong(f"{what} is {off:.2%} off")


def worth(tokens: Int8Tokens) -> Tensor:
    """The activations that tokens stand for, float32 [M, K]."""
    count, chunks = tokens.steps.shape
    return (tokens.values.view(count, chunks, -1).float() * tokens.steps[..., None]).flatten(1)


def exact_weights(codes: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """The weights that a layer stands for, float32 [N, K], without a kernel of ours."""
    places = torch.arange(0, 8, bits, device=codes.device)
    each = (codes[..., None].int() >> places & (1 << bits) - 1).flatten(1).float()
    spread = [part.float().repeat_interleave(each.shape[1] // scales.shape[1], 1) for part in (scales, biases)]
    return each * spread[0] + spread[1]
