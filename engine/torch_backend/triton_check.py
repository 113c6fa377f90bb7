"""Which of triton_passes.py's ways this card can have: those that agree with torch on small random tensors.

What is launched here is what the 4B model launches, so that nothing is left to compile for the first picture.
"""

from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import measured
from engine.hardware import Hardware
from engine.torch_backend import int8
from engine.torch_backend.int8 import Int8Tokens, Int8Weights
from engine.torch_backend.transformer import Modulation, Rotary, apply_rotary_emb
from engine.torch_backend.triton_card import AGREE, held, is_hopper, refusal
from engine.torch_backend.triton_passes import (
    EARLIER,
    HOPPER,
    HOPPER_IN_TRITON,
    TritonPasses,
    Ways,
    half_weights,
    turn,
)


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
        refused = refusal(repr(ways), partial(check, ways=ways))
        if not refused:
            return ways, why
        why = refused
    return None, why


@torch.inference_mode()
def check(device: torch.device, ways: Ways, group: int = 128) -> None:
    """Every pass, with a rest in every size. Raises Wrong."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device)

    count, inputs, outputs = 2 * ways.plain.m + 13, 6 * group, 416  # whole chunks, and a rest of tokens and outputs
    x, gate = (normal(count, inputs) * normal(count, 1).exp()).bfloat16(), normal(outputs).bfloat16()
    for bits, centre in ((1, -0.5), (2, -1.0), (4, None)):
        codes = torch.randint(0, 256, (outputs, inputs * bits // 8), generator=random, dtype=torch.uint8).to(device)
        if bits == 2:
            codes &= ~(codes & (codes >> 1) & 0x55)  # no code 3
        scales = ((normal(outputs, inputs // group).abs() + 0.5) * normal(outputs, inputs // group).sign()).bfloat16()
        biases = normal(outputs, inputs // group).bfloat16() if centre is None else scales * centre
        dense = exact_weights(codes, scales, biases, bits)
        held("a layer in bfloat16", half_weights(codes, scales, biases, bits, centre), dense)
        if centre is not None:
            narrow, in_chunks = ways._replace(plain=ways.narrow or ways.plain), ways._replace(wide=0)
            for each in dict.fromkeys((ways, narrow, in_chunks)):
                check_products(each, int8.weights(codes, scales, bits), dense, x, gate)
    check_tokens(ways, (normal(count, 24 * group) * normal(count, 1).exp()).bfloat16(), group)
    check_turning(normal(count, 24, 128).bfloat16(), normal(count, 64), normal(128).bfloat16())


def check_products(ways: Ways, w: Int8Weights, dense: Tensor, x: Tensor, gate: Tensor) -> None:
    """Every end of a product of x [M, K] and `w`, whose weights are `dense` [N, K]; two programs make a dozen tiles."""
    passes = TritonPasses(x.device, ways._replace(narrow=None), programs=2)
    chunks = "" if ways.wide else " in chunks"
    held("a layer in int8", passes.expand(w).float() * w.steps[:, None], dense)
    tokens = passes.quantize(x)
    exact = worth(tokens) @ dense.T
    out = torch.zeros(exact.shape, dtype=torch.bfloat16, device=x.device)
    passes.multiply(tokens, w, out)
    held(f"a product{chunks}", out, exact)
    passes.add(tokens, w, gate, out.fill_(1))
    held(f"a gated sum{chunks}", out, 1 + gate.float() * exact)
    if not chunks:  # what is gated comes from a norm
        half, (left, right) = out[:, : out.shape[1] // 2].contiguous(), exact.tensor_split(2, dim=1)
        passes.gate(tokens, w, half)
        held("SwiGLU", half, F.silu(left) * right, 2 * AGREE)


def check_tokens(ways: Ways, x: Tensor, split: int) -> None:
    """Every way to make rows x [M, K] int8."""
    passes, chunked = (TritonPasses(x.device, each) for each in (ways, ways._replace(wide=0)))
    shift, scale = x[0], x[1]
    normed = F.layer_norm(x.float(), x.shape[1:], eps=1e-6) * (1 + scale.float()) + shift.float()
    for source, tokens, bound in (
        (x, passes.quantize(x), 2 * AGREE), (normed, passes.modulate(x, Modulation(shift, scale, x), 1e-6), 2 * AGREE),
        (x, chunked.quantize(x), AGREE), (x, chunked.quantize(x[:, split:], x[:, :split]), AGREE),
    ):  # fmt: skip
        held("quantising", worth(tokens), source, bound)


def check_turning(heads: Tensor, angles: Tensor, weight: Tensor) -> None:
    """Both ways to norm and turn heads [M, heads, size] by angles [M, size / 2]."""
    rotary, turned = Rotary(angles.cos(), angles.sin()), torch.empty_like(heads)
    turn(heads, weight, 1e-6, rotary, turned)
    plain = F.rms_norm(heads.float(), heads.shape[-1:], weight.float(), 1e-6)
    held("a rotation", turned, apply_rotary_emb(plain[None], rotary)[0])
    turn(heads, weight, 1e-6, rotary, turned, apart=True)
    mixed = plain.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)  # the pairs side by side
    exact = apply_rotary_emb(mixed[None], rotary)[0].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    held("a rotation of halves", turned, exact)


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
