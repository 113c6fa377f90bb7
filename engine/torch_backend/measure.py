"""How fast this processor or card multiplies packed layers in each number format: half a second, once per machine.

Instruction sets don't tell: of two processors with avx512_bf16 one multiplied bfloat16 2.8 times faster than float32,
the other 0.6 times. Nor do bare products: with AMX they are as fast in bfloat16 as in int8, layers 2.5 times slower.
"""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from engine.packs import Quantization
from engine.products import FORMATS, Numbers
from engine.torch_backend import int8, triton_check
from engine.torch_backend.linear import CENTRES, PackedLinear
from engine.torch_backend.passes import TorchPasses
from engine.torch_backend.triton_passes import TritonPasses

TOKENS, INPUTS, OUTPUTS = 512, 3072, 1536
ROUNDS = 4
CARD_TOKENS, CARD_OUTPUTS = (512, 1536, 4608), 9216  # a text's and two pictures' width
HURRY = 0.2  # seconds after which a format isn't tried again: without support in hardware it takes that long once
CPU = torch.device("cpu")


@torch.inference_mode()
def measure(passes: Any = None, group_size: int = 128) -> Numbers:
    """GFLOP/s of a ternary layer in each of FORMATS, 0 where torch can't or is wrong: the best of several products in
    turn, since other programs only slow them down. int8 by `passes` (passes.py; torch's where there are none)."""
    x = torch.randn(TOKENS, INPUTS, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], object]] = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        ways[name] = partial(_layer(OUTPUTS, group_size, dtype, CPU), x.to(dtype))
    if passes is not None or int8.exact():
        ways["int8"] = _as_bytes(passes or TorchPasses(), _layer(OUTPUTS, group_size, torch.float32, CPU), x)
    best = {name: float("inf") for name, product in ways.items() if _possible(product)}
    for _ in range(ROUNDS):
        for name, seconds in best.items():
            if seconds == float("inf") or seconds < HURRY:
                start = perf_counter()
                ways[name]()
                best[name] = min(seconds, perf_counter() - start)
    work = 2 * TOKENS * INPUTS * OUTPUTS / 1e9
    return {name: round(work / best[name], 1) if name in best else 0.0 for name in FORMATS}


def _possible(product: Callable[[], object]) -> bool:
    """Whether torch has this product on this processor."""
    try:
        product()
    except (RuntimeError, NotImplementedError):
        return False
    return True


@torch.inference_mode()
def measure_card() -> Numbers:
    """GFLOP/s of a packed layer on an NVIDIA card, over three widths: expanded and multiplied by torch in bfloat16, or
    tokens and weights made bytes and multiplied by triton_passes.py, 0 where those can't be had."""
    cuda = torch.device("cuda")
    layer = _layer(CARD_OUTPUTS, 128, torch.bfloat16, cuda)
    given = [torch.randn(count, INPUTS, dtype=torch.bfloat16, device=cuda) for count in CARD_TOKENS]
    work = 2 * sum(CARD_TOKENS) * INPUTS * CARD_OUTPUTS / 1e9
    found = dict.fromkeys(FORMATS, 0.0)
    found["bfloat16"] = work / sum(_seconds(partial(layer, x)) for x in given)
    if ways := triton_check.found()[0]:
        passes = TritonPasses(cuda, ways)
        found["int8"] = work / sum(_seconds(_as_bytes(passes, layer, x)) for x in given)
    return {name: round(rate, 1) for name, rate in found.items()}


def _layer(outputs: int, group_size: int, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    """A ternary layer of INPUTS features."""
    layer = PackedLinear(nn.Linear(INPUTS, outputs, device="meta"), Quantization(2, group_size), dtype)
    layer.weight = torch.full((outputs, INPUTS // 4), 0b10_01_00_10, dtype=torch.uint8, device=device)
    layer.scales = torch.ones(outputs, INPUTS // group_size, dtype=torch.bfloat16, device=device)
    layer.biases, layer.centre = layer.scales * CENTRES[2], CENTRES[2]
    return layer


def _as_bytes(passes: Any, layer: PackedLinear, x: Tensor) -> Callable[[], None]:
    """The product of a layer and x [M, K] by int8 passes."""
    w, outputs = passes.weights(layer), len(layer.weight)

    def run() -> None:
        passes.multiply(passes.quantize(x), w, torch.empty(len(x), outputs, dtype=x.dtype, device=x.device))

    return run


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
