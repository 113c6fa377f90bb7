"""How far the engine is from the least that its arithmetic can take on this CPU.

    python -m tests.floor PACK [--size 512x512] [--seconds] [--plain]

The floor: every packed product of a step at the best rate that any tiling of torch._int_mm reaches on the same
shapes, best of five, and torch's own attention in the faster number format. Nothing of the engine runs while it is
timed; dense layers, norms and everything else count as nothing. Then one step of the engine, all layers admitted to
int8 (whatever their error: these are speeds), with --plain also with none. Processor time by default, since others may
be using the machine; --seconds times the wall clock, for a quiet one.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.packs import Pack, open_pack
from engine.plan import token_side
from engine.torch_backend import linear, remember
from engine.torch_backend.admission import Admission
from engine.torch_backend.transformer import Flux2Transformer2DModel, token_ids

ROUNDS = 5
TILES = (512, 1024, 1536, 3072, 1 << 20)  # outputs of one call; the last is every layer in one piece


def floor(pack: Pack, tokens: tuple[int, int], clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of a step's `products` and `attention` at their best; `tokens` (image, text)."""
    config, joint = pack.transformer.config, sum(tokens)
    heads, size = config["num_attention_heads"], config["attention_head_dim"]
    width, hidden = heads * size, int(heads * size * config["mlp_ratio"])
    double, single = config["num_layers"], config["num_single_layers"]
    products = {(joint, width, 3 * width + 2 * hidden): single, (joint, width + hidden, width): single}
    for count in tokens:
        for shape, times in (((count, width, width), 4), ((count, width, 2 * hidden), 1), ((count, hidden, width), 1)):
            products[shape] = products.get(shape, 0) + times * double
    seconds = sum(times * _product(shape, clock) for shape, times in products.items())
    return {"products": seconds, "attention": (double + single) * _attention(joint, heads, size, clock)}


def _product(shape: tuple[int, int, int], clock: Callable[[], float]) -> float:
    """Seconds of the fastest tiling of one product of M tokens, K inputs, N outputs."""
    m, k, n = shape
    x, w = torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
    best = float("inf")
    for tile in sorted({min(tile, n) for tile in TILES}):
        out = torch.empty(m, tile, dtype=torch.int32)

        def run(tile: int = tile, out: torch.Tensor = out) -> None:
            for start in range(0, n - tile + 1, tile):
                torch._int_mm(x, w[start : start + tile].t(), out=out)

        best = min(best, _best(run, clock) * n / (n // tile * tile))
    return best


def _attention(tokens: int, heads: int, size: int, clock: Callable[[], float]) -> float:
    times = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (torch.randn(1, heads, tokens, size).to(dtype) for _ in range(3))
        times.append(_best(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), clock))  # type: ignore[misc]
    return min(times)


def _best(run: Callable[[], object], clock: Callable[[], float], rounds: int = ROUNDS) -> float:
    times = []
    for _ in range(rounds + 1):
        start = clock()
        run()
        times.append(clock() - start)
    return min(times[1:])


@torch.inference_mode()
def engine(
    pack: Pack, grid: tuple[int, int], dtype: torch.dtype, clock: Callable[[], float], plain: bool
) -> dict[str, float]:
    """Seconds of one step of the engine: `int8` with every layer admitted, if `plain` also with none."""
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(pack.transformer.config)
    linear.build(transformer, pack.transformer, dtype, torch.device("cpu"))
    remember.install(transformer)
    image = torch.randn(1, grid[0] * grid[1], pack.transformer.config["in_channels"]).to(dtype)
    text = torch.randn(1, pack.notes.text_length, pack.transformer.config["joint_attention_dim"]).to(dtype)
    ids = token_ids(text.shape[1], grid, "cpu")

    def step() -> None:
        transformer(image, text, torch.ones(1), *ids, lambda: None)

    admission = Admission(transformer)
    admission.trial = False
    seconds = {"int8": _best(step, clock, 1)}
    admission.bound = -1.0
    return seconds | ({"plain": _best(step, clock, 1)} if plain else {})


def main() -> None:
    parser = argparse.ArgumentParser(description="One step of the engine against the floor of its arithmetic.")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the activations")
    parser.add_argument("--seconds", action="store_true", help="wall clock instead of processor time")
    parser.add_argument("--plain", action="store_true", help="also a step with no layer in int8")
    args = parser.parse_args()
    pack, clock = open_pack(args.pack), time.perf_counter if args.seconds else time.process_time
    width, height = (int(side) // token_side(pack) for side in args.size.split("x"))
    least = floor(pack, (width * height, pack.notes.text_length), clock)
    ours = engine(pack, (height, width), getattr(torch, args.dtype), clock, args.plain)
    total = sum(least.values())
    facts = {"size": args.size, "threads": torch.get_num_threads(), "floor_s": round(total, 2)}
    facts |= {f"{name}_floor_s": round(value, 2) for name, value in least.items()}
    facts |= {f"{name}_step_s": round(value, 2) for name, value in ours.items()}
    print(json.dumps(facts | {"ratio": round(ours["int8"] / total, 3)}))


if __name__ == "__main__":
    main()
