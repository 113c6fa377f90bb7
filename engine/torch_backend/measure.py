"""How fast this processor multiplies matrices in each number format: a quarter of a second, once per machine.

Instruction sets don't tell: of two processors with avx512_bf16 one multiplied bfloat16 2.8 times faster than float32,
the other 0.6 times.
"""

from collections.abc import Callable
from time import perf_counter

import torch

from engine.products import FORMATS, Numbers
from engine.torch_backend import int8

TOKENS, INPUTS, OUTPUTS = 512, 2048, 1024
ROUNDS = 4
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
