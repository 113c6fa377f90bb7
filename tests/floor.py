"""How far the engine is from the least that its arithmetic can take on this CPU.

    python -m tests.floor [PACK] [--size 512x512] [--wall] [--outs] [--plain] [--diffusers]

The floor: every packed product of a step at the best rate that any tiling of torch._int_mm reaches on the same
shapes, best of ten, and torch's own attention in the faster number format. Nothing of the engine runs while it is
timed; dense layers, norms and everything else count as nothing. In turn with it one step of the engine, all layers
admitted to int8 (whatever their error: these are speeds), with the compiled passes and with torch's: the best step
against that floor and, since a host can be twice as fast in one second as in the next and a floor's products are short
enough to find the fast ones, the median of what each step takes of the floor measured just before it. With --outs also
without linear_out and to_out in int8, with --plain with no layer in it, with --diffusers also diffusers' own
transformer with random dense weights of the same shapes in float32 and bfloat16 (of a whole model 16 and 8 GB). Without
a PACK: one double and one single block of the 4B model's width with random codes, which take a minute on two idle
cores. Processor time by default, since others may be using the machine; --wall times the wall clock, for a quiet one.
With ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 in the environment and --dtype bfloat16 a processor with AMX multiplies as
one without it, torch's products and ours; only attention goes on to use it.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

from engine import torch_backend  # noqa: F401 before torch: it says how long torch's threads spin

# isort: split
import torch
import torch.nn.functional as F

from engine.hardware import Hardware, detect
from engine.packs import Pack, open_pack
from engine.plan import token_side
from engine.torch_backend import fused, kernels, linear, remember
from engine.torch_backend.admission import HOPELESS, Admission
from engine.torch_backend.measure import measure
from engine.torch_backend.passes import TorchPasses
from engine.torch_backend.transformer import Flux2Transformer2DModel, token_ids
from studio.settings import data_dir
from tests.packs.content import TRANSFORMER_4B, Configs, Content, small
from tests.packs.full import write

ROUNDS = 9  # after a first one that warms up
TILES = (512, 1024, 1536, 3072, 1 << 20)  # outputs of one call; the last is every layer in one piece
OUTS = ("linear_out", "to_out", "to_add_out")
Clock = Callable[[], float]


def machine() -> Hardware:
    """This one; without AMX where torch's products are held to less."""
    known, held = detect(), os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX512")
    return replace(known, features=frozenset(each for each in known.features if not (held and each.startswith("amx"))))


def planned() -> torch.dtype:
    """The number format that the plan takes for a big pack on this processor."""
    rates = measure()
    return torch.bfloat16 if rates["bfloat16"] >= rates["float32"] else torch.float32


def products(config: Mapping[str, Any], tokens: tuple[int, int]) -> dict[tuple[int, int, int], int]:
    """How often a step makes the packed product [m, k] x [k, n], by (m, k, n); `tokens` (image, text)."""
    joint, width = sum(tokens), config["num_attention_heads"] * config["attention_head_dim"]
    hidden, double, single = int(width * config["mlp_ratio"]), config["num_layers"], config["num_single_layers"]
    found = {(joint, width, 3 * width + 2 * hidden): single, (joint, width + hidden, width): single}
    for m in tokens:
        for shape, count in (((m, width, width), 4), ((m, width, 2 * hidden), 1), ((m, hidden, width), 1)):
            found[shape] = found.get(shape, 0) + count * double
    return found


class Floor:
    """Best seconds of every product of a step, and of its attention, so far and in the last round; `tokens` (image,
    text)."""

    def __init__(self, pack: Pack, tokens: tuple[int, int], clock: Clock) -> None:
        config, joint = pack.transformer.config, sum(tokens)
        self._clock = clock
        self._heads = (1, config["num_attention_heads"], joint, config["attention_head_dim"])
        self._blocks = config["num_layers"] + config["num_single_layers"]
        self._products = products(config, tokens)
        self._best: dict[object, float] = {}
        self._last: dict[object, float] = {}

    def measure(self) -> None:
        """One more round of everything."""
        self._last = {}
        for m, k, n in self._products:
            x, w = torch.ones(m, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
            for tile in sorted({min(tile, n) for tile in TILES}):
                out = torch.empty(m, tile, dtype=torch.int32)
                start = self._clock()
                for first in range(0, n - tile + 1, tile):
                    torch._int_mm(x, w[first : first + tile].t(), out=out)
                self._note((m, k, n), (self._clock() - start) * n / (n // tile * tile))
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(self._heads).to(dtype) for _ in range(3))
            start = self._clock()
            F.scaled_dot_product_attention(q, k, v)
            self._note("attention", self._clock() - start)

    def _note(self, what: object, seconds: float) -> None:
        for known in (self._best, self._last):
            known[what] = min(known.get(what, seconds), seconds)

    def seconds(self, last: bool = False) -> dict[str, float]:
        known = self._last if last else self._best
        products = sum(known[shape] * count for shape, count in self._products.items())
        return {"products": products, "attention": known["attention"] * self._blocks}


class Engine:
    """A step of the engine in one of its ways: 'compiled' or 'torch' for the int8 passes, 'plain' for none, 'outs' for
    compiled passes that linear_out and to_out are kept out of, whose inputs have the outliers."""

    def __init__(self, pack: Pack, grid: tuple[int, int], dtype: torch.dtype, clock: Clock, way: str) -> None:
        """Raises kernels.Unavailable for passes that can't be compiled here."""
        self._clock = clock
        quantization = pack.transformer.quantization
        assert quantization is not None
        passes: Sequence[Any] = [TorchPasses()]
        if way in ("compiled", "outs"):
            passes = kernels.chosen(data_dir(), machine(), quantization.group_size)
            if not passes:
                raise kernels.Unavailable("app.py doctor says why")
        with torch.device("meta"):
            self._transformer = Flux2Transformer2DModel.from_config(pack.transformer.config)
        linear.build(self._transformer, pack.transformer, dtype, torch.device("cpu"))
        remember.install(self._transformer)
        if way != "plain":
            admission = Admission(self._transformer, passes)
            admission.trial = False
            for name, layer in admission.layers.items():
                if way == "outs" and name.removesuffix(".0").endswith(OUTS):
                    layer.errors = {passes.name: HOPELESS for passes in admission.ways}
            fused.install(self._transformer, admission)
        image = torch.randn(1, grid[0] * grid[1], pack.transformer.config["in_channels"]).to(dtype)
        text = torch.randn(1, pack.notes.text_length, pack.transformer.config["joint_attention_dim"]).to(dtype)
        self._inputs = (image, text, torch.ones(1), *token_ids(text.shape[1], grid, "cpu"), lambda: None)
        self.seconds: list[float] = []

    @torch.inference_mode()
    def measure(self) -> None:
        start = self._clock()
        self._transformer(*self._inputs)
        self.seconds.append(self._clock() - start)


class Diffusers:
    """A step of diffusers' own transformer, dense, with random weights."""

    def __init__(self, pack: Pack, grid: tuple[int, int], dtype: torch.dtype, clock: Clock) -> None:
        from diffusers import Flux2Transformer2DModel as Dense

        config = {**pack.transformer.config, "guidance_embeds": False}
        with torch.device("meta"):
            model = Dense.from_config(config).to(dtype)
        self._model = model.to_empty(device="cpu").eval()
        for weight in self._model.parameters():
            weight.data.normal_(std=0.02)
        image = torch.randn(1, grid[0] * grid[1], config["in_channels"]).to(dtype)
        text = torch.randn(1, pack.notes.text_length, config["joint_attention_dim"]).to(dtype)
        img_ids, txt_ids = token_ids(text.shape[1], grid, "cpu")
        self._inputs = {
            "hidden_states": image, "encoder_hidden_states": text, "timestep": torch.ones(1).to(dtype),
            "img_ids": img_ids[None], "txt_ids": txt_ids[None], "guidance": None,
        }  # fmt: skip
        self._clock = clock
        self.seconds: list[float] = []

    @torch.inference_mode()
    def measure(self) -> None:
        start = self._clock()
        self._model(**self._inputs)
        self.seconds.append(self._clock() - start)


def blocks(folder: Path) -> Path:
    """A ternary pack with one block of each kind in full width, everything else tiny; 0.3 GB."""
    tiny = small()
    fit = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 192, "in_channels": 64}
    configs = Configs(TRANSFORMER_4B | fit, tiny.text_encoder, tiny.vae, tiny.hidden_states)
    write(folder, "mlx", Content(configs, "ternary"))
    (folder / "niwaki.json").write_text(json.dumps({"hidden_states": tiny.hidden_states, "text_length": 512}))
    return folder


def compare(pack: Pack, grid: tuple[int, int], dtype: torch.dtype, clock: Clock, ways: list[str]) -> dict[str, float]:
    """Seconds of floor and engine, taken in turn, and their ratios."""
    floor = Floor(pack, (grid[0] * grid[1], pack.notes.text_length), clock)
    engines: dict[str, Engine | Diffusers] = {}
    for way in ways:
        try:
            if way.startswith("diffusers"):
                engines[way] = Diffusers(pack, grid, getattr(torch, way.partition("_")[2]), clock)
            else:
                engines[way] = Engine(pack, grid, dtype, clock, way)
        except kernels.Unavailable as reason:
            print(f"no compiled passes: {reason}")
    floors = []
    for _ in range(1 + ROUNDS):
        floor.measure()
        floors.append(sum(floor.seconds(last=True).values()))
        for engine in engines.values():
            engine.measure()
    parts = floor.seconds()
    total = sum(parts.values())
    facts = {"floor_s": total} | {f"{name}_floor_s": value for name, value in parts.items()}
    for way, engine in engines.items():
        best, *ratios = min(engine.seconds), *map(truediv, engine.seconds[1:], floors[1:])
        facts |= {f"{way}_step_s": best, f"{way}_ratio": best / total, f"{way}_ratio_by_turn": median(ratios)}
    return {name: round(value, 3) for name, value in facts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="One step of the engine against the floor of its arithmetic.")
    parser.add_argument("pack", type=Path, nargs="?", help="a pack's folder (two blocks of the 4B model's width)")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the activations (the plan's)")
    parser.add_argument("--wall", action="store_true", help="wall clock instead of processor time")
    parser.add_argument("--outs", action="store_true", help="also a step with linear_out and to_out kept out of int8")
    parser.add_argument("--plain", action="store_true", help="also a step with no layer in int8")
    parser.add_argument("--diffusers", action="store_true", help="also diffusers with dense weights")
    args = parser.parse_args()
    ways = ["compiled", "torch", *(["outs"] if args.outs else []), *(["plain"] if args.plain else [])]
    ways += ["diffusers_float32", "diffusers_bfloat16"] if args.diffusers else []
    with tempfile.TemporaryDirectory() as folder:
        pack = open_pack(args.pack or blocks(Path(folder)))
        side = token_side(pack) if args.pack else 16  # the tiny autoencoder of two blocks has smaller tokens
        width, height = (int(length) // side for length in args.size.split("x"))
        clock = time.perf_counter if args.wall else time.process_time
        dtype = getattr(torch, args.dtype) if args.dtype else planned()
        facts = compare(pack, (height, width), dtype, clock, ways)
    print(json.dumps({"size": args.size, "dtype": str(dtype), "threads": torch.get_num_threads(), **facts}))


if __name__ == "__main__":
    main()
