"""How fast this processor or card multiplies matrices in each number format: a quarter of a second, once per machine.

Instruction sets don't tell: of two processors with avx512_bf16 one multiplied bfloat16 2.8 times faster than float32,
the other 0.6 times.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.packs import Quantization
from engine.products import FORMATS, Numbers
from engine.torch_backend import int8, triton_passes
from engine.torch_backend.linear import CENTRES, PackedLinear

TOKENS, INPUTS, OUTPUTS = 512, 2048, 1024
ROUNDS = 4
CARD_TOKENS, CARD_INPUTS, CARD_OUTPUTS = (512, 1536, 4608), 3072, 9216  # a text's and two pictures' width
HURRY = 0.2  # seconds after which a format isn't tried again: without support in hardware it takes that long once


def measure() -> Numbers:
    """GFLOP/s in each of FORMATS, 0 where torch can't or is wrong: the best of several products in turn, since other
    programs only slow them down."""
    products = {name: product for name in FORMATS if (product := _product(name)) is not None}
    best = dict.fromkeys(products, float("inf"))
    for _ in range(ROUNDS):
        for name, product in products.items():
            if best[name] == float("inf") or best[name] < HURRY:
                start = perf_counter()
                product()
                best[name] = min(best[name], perf_counter() - start)
    work = 2 * TOKENS * INPUTS * OUTPUTS / 1e9
    return {name: round(work / best[name], 1) if name in best else 0.0 for name in FORMATS}


def _product(name: str) -> Callable[[], object] | None:
    """A product in this number format, None where torch has none on this processor, or none that is right."""
    generator = torch.Generator().manual_seed(0)
    if name == "int8":
        x = torch.randint(-127, 128, (TOKENS, INPUTS), dtype=torch.int8, generator=generator)
        w = torch.randint(-127, 128, (OUTPUTS, INPUTS), dtype=torch.int8, generator=generator)
    else:
        x = torch.randn(TOKENS, INPUTS, generator=generator).to(getattr(torch, name))
        w = torch.randn(OUTPUTS, INPUTS, generator=generator).to(getattr(torch, name))

    def product() -> object:
        return torch._int_mm(x, w.t()) if name == "int8" else x @ w.t()

    try:
        product()
        return product if name != "int8" or int8.exact() else None
    except (RuntimeError, NotImplementedError):
        return None


@torch.inference_mode()
def measure_card() -> Numbers:
    """GFLOP/s of a packed layer on an NVIDIA card, over three widths: expanded and multiplied by torch in bfloat16, or
    tokens and weights made bytes and multiplied by triton_passes.py, 0 where those can't be had."""
    cuda = torch.device("cuda")
    layer = PackedLinear(nn.Linear(CARD_INPUTS, CARD_OUTPUTS, device="meta"), Quantization(2, 128), torch.bfloat16)
    layer.weight = torch.full((CARD_OUTPUTS, CARD_INPUTS // 4), 0b10_01_00_10, dtype=torch.uint8, device=cuda)
    layer.scales = torch.ones(CARD_OUTPUTS, CARD_INPUTS // 128, dtype=torch.bfloat16, device=cuda)
    layer.biases, layer.centre = layer.scales * CENTRES[2], CENTRES[2]
    given = [torch.randn(count, CARD_INPUTS, dtype=torch.bfloat16, device=cuda) for count in CARD_TOKENS]
    work = 2 * sum(CARD_TOKENS) * CARD_INPUTS * CARD_OUTPUTS / 1e9
    found = dict.fromkeys(FORMATS, 0.0)
    found["bfloat16"] = work / sum(_seconds(partial(_expanded, layer, x)) for x in given)
    if not triton_passes.fault():
        passes = triton_passes.TritonPasses(cuda)
        w = passes.weights(layer)
        found["int8"] = work / sum(_seconds(partial(_as_bytes, passes, w, x)) for x in given)
    return {name: round(rate, 1) for name, rate in found.items()}


def _expanded(layer: PackedLinear, x: Tensor) -> Tensor:
    return F.linear(x, layer.rows(slice(None)))


def _as_bytes(passes: triton_passes.TritonPasses, w: int8.Int8Weights, x: Tensor) -> None:
    passes.multiply(passes.quantize(x), w, torch.empty(len(x), CARD_OUTPUTS, dtype=x.dtype, device=x.device))


def _seconds(run: Callable[[], object]) -> float:
    """Of a call on the card, the best of a few graphs of a few calls, so that launching them isn't measured."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(ROUNDS):
            run()
    times = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000 / ROUNDS)
    return min(times)
