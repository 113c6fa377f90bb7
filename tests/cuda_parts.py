"""What `tests.cuda` measures, each part in a process of its own: see there.

A part is a generator: it prepares (imports, building, compiling), yields, and measures when it is resumed. What it
finds it says in lines of JSON on stdout; everything else that anybody prints goes to stderr.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from engine import torch_backend  # noqa: F401 before torch: it says how long torch's threads spin

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import shapes
from engine.hardware import detect
from engine.types import Picture, Request
from tests.cuda_bench import STEPS, TEXT, Bench, Part, Size, put, random_like
from tests.cuda_gemlite import gemlite, kernels

PROMPT = "a bonsai tree in a quiet ceramic studio, soft morning light"
E4M3_MAX = 448.0
BEGUN = 25  # seconds that a page was open before somebody pressed Enter
Made = tuple[float, Picture]  # and its seconds


# The floor: the same arithmetic, each product and each attention alone, by nothing but torch


def floor(bench: Bench) -> Part:
    from tests.floor import products

    yield
    with bench.quiet(), torch.inference_mode():
        card(bench)
        rates = {}
        for name in ("bf16", "int8", "float8"):
            try:
                rates[name] = rate(bench, name)
            except RuntimeError as why:  # a card or a torch without this product
                bench.say(failed=f"{name}: {why}")
        bench.say(rates={name: round(value, 1) for name, value in rates.items()}, copy_gb_s=copy_rate(bench))
        config = bench.configs.transformer
        blocks = config["num_layers"] + config["num_single_layers"]
        for size in bench.sizes:
            joint = sum(bench.tokens(size))
            heads = (1, config["num_attention_heads"], joint, config["attention_head_dim"])
            q, k, v = (random_like(bench, *heads) for _ in range(3))
            attention = bench.median(partial(F.scaled_dot_product_attention, q, k, v))
            shapes_of = products(config, bench.tokens(size))
            operations = 2e-12 * STEPS * sum(m * k * n * count for (m, k, n), count in shapes_of.items())
            attended = 4e-12 * STEPS * blocks * joint * joint * heads[1] * heads[3]
            vae, encoder = vae_tflop(bench, size), encoder_tflop(bench)
            fixed = STEPS * blocks * attention + (vae + encoder) / rates["bf16"]
            bench.say(
                size=size, products_tflop=round(operations, 2), attention_tflop=round(attended, 2),
                vae_tflop=round(vae, 2), encoder_tflop=round(encoder, 2), attention_s=STEPS * blocks * attention,
                attention_tflop_s=round(attended / (STEPS * blocks * attention), 1),
                vae_s=vae / rates["bf16"], encoder_s=encoder / rates["bf16"],
            )  # fmt: skip
            for name in rates:
                each = {shape: bench.median(product(bench, name, *shape)) for shape in shapes_of}
                total = STEPS * sum(each[shape] * count for shape, count in shapes_of.items())
                bench.say(size=size, floor=name, products_s=total, picture_s=total + fixed,
                          step_s=total / STEPS + blocks * attention)  # fmt: skip


def card(bench: Bench) -> None:
    facts: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "cores": os.cpu_count()}
    with suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    if bench.cuda:
        start = time.perf_counter()
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit,memory.used"]
        done = subprocess.run([*query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        facts |= {"card": done.stdout.strip(), "nvidia_smi_s": round(time.perf_counter() - start, 2)}
    bench.say(card=facts)


def product(bench: Bench, name: str, m: int, k: int, n: int) -> Callable[[], object]:
    """[m, k] x [k, n] of random values in a number format, through torch's own functions."""
    if name == "int8":
        x, w = (torch.randint(-127, 128, shape, dtype=torch.int8, device=bench.device) for shape in ((m, k), (n, k)))
        return lambda: torch._int_mm(x, w.t())
    a, b = random_like(bench, m, k), random_like(bench, n, k)
    if name == "bf16":
        return lambda: F.linear(a, b)
    x, scale_a = float8(a)
    w, scale_b = float8(b)
    return lambda: scaled(x, w, scale_a, scale_b.view(1, n))


def rate(bench: Bench, name: str) -> float:
    """TFLOP/s of one large product."""
    side = 256 if bench.small else 8192
    return 2e-12 * side**3 / bench.median(product(bench, name, side, side, side))


def copy_rate(bench: Bench) -> float:
    source = torch.randint(0, 255, (1 << (20 if bench.small else 31),), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    return round(2e-9 * source.nbytes / bench.median(lambda: target.copy_(source)), 1)


def vae_tflop(bench: Bench, size: Size) -> float:
    from diffusers import AutoencoderKLFlux2
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(bench.configs.vae).eval()
        latents = torch.empty(1, bench.configs.vae["latent_channels"], *(2 * side for side in bench.grid(size)))
    with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as counted:
        vae.decode(latents)
    return counted.get_total_flops() / 1e12


def encoder_tflop(bench: Bench) -> float:
    config, layers = bench.configs.text_encoder, max(bench.configs.hidden_states)
    weights = sum(
        shape[0] * shape[1]
        for name, shape in shapes.text_encoder(config, layers)
        if len(shape) == 2 and "embed" not in name
    )
    return TEXT * (2 * weights + 4 * layers * TEXT * config["num_attention_heads"] * config["head_dim"]) / 1e12


# Ours, as the page and the command meet it


def ours(bench: Bench, int8: bool | None) -> Part:
    from engine.torch_backend.backend import TorchBackend, use_cores

    gc.freeze()
    machine = detect()
    use_cores(machine)
    yield
    backend = TorchBackend(machine, bench.work / f"data-{bench.part}", int8)
    number = iter(range(1000))

    def picture(size: Size, words: str | None = None) -> Made:
        seed = next(number)
        request = Request(words or f"{PROMPT}, number {seed}", str(bench.pack), seed, *size, STEPS)
        start = time.perf_counter()
        made = next(a for a in backend.generate(request, lambda: False) if isinstance(a, Picture))
        return time.perf_counter() - start, made

    with bench.quiet():
        for size in bench.sizes:
            first, second = picture(size), picture(size)
            runs = [picture(size) for _ in range(bench.count)]
            keep(bench, size, first[1])
            told(bench, "warm", size, runs, first=first, second=second)
        decide = backend._decide
        backend._decide = lambda pack, request: replace(decide(pack, request), keep_text_encoder=False)
        for size in bench.sizes:
            words = f"{PROMPT} and {size}"
            told(bench, "encoder leaves", size, [picture(size, words)])
            told(bench, "encoder gone", size, [picture(size, words) for _ in range(3)])


def told(bench: Bench, way: str, size: Size, runs: list[Made], **others: Made) -> None:
    def middle(name: str) -> float:
        return statistics.median(getattr(made.seconds, name) for _, made in runs)

    made = runs[-1][1]
    facts: dict[str, Any] = {}
    for name, (seconds, one) in others.items():
        facts |= {f"{name}_s": seconds, f"{name}_load_s": one.seconds.load, f"{name}_denoise_s": one.seconds.denoise}
    if bench.cuda:
        facts["reserved_bytes"] = torch.cuda.max_memory_reserved()
    bench.say(
        way=way, size=size, picture_s=statistics.median(seconds for seconds, _ in runs), runs=len(runs),
        least_s=min(seconds for seconds, _ in runs), most_s=max(seconds for seconds, _ in runs),
        encode_s=middle("encode"), step_s=middle("denoise") / STEPS, decode_s=middle("decode"),
        peak_bytes=max(one.peak_memory_bytes for _, one in runs), dtype=made.dtype, reason=made.reason,
        mean=round(float(made.pixels.mean()), 1), deviation=round(float(made.pixels.std()), 1), **facts,
    )  # fmt: skip


def keep(bench: Bench, size: Size, made: Picture) -> None:
    """The first picture of every way has the same seed and prompt, so two ways can be compared."""
    np.save(bench.work / f"{bench.part}-{size[0]}.npy", made.pixels)
    for other in bench.work.glob(f"*-{size[0]}.npy"):
        if (name := other.name.rpartition("-")[0]) != bench.part:
            off = float(np.square(np.load(other).astype(np.float64) - made.pixels).mean())
            bench.say(size=size, psnr_against=name, psnr=round(10 * float(np.log10(255**2 / max(1e-9, off))), 1))


def cold(bench: Bench) -> Part:
    """`python app.py generate`: first without Triton's kernels on disk and without a data folder, then with both, then
    also with the files that Python compiles, which some machines forbid it to keep. Then as on the page, whose engine
    begins a while before somebody presses Enter: again with nothing cached, from Enter on."""
    from tests import cold as start

    yield
    os.environ["TRITON_CACHE_DIR"] = str(bench.work / "triton-of-cold")
    data = bench.work / "data-of-cold"
    data.mkdir(exist_ok=True)
    start.warm(bench.pack)
    size = "x".join(map(str, bench.sizes[-1]))
    with bench.quiet():
        bench.say(imported_s=round(start.imported(), 2))
        for run in ("nothing cached", "kernels cached", "Python's files too"):
            if run.startswith("Python"):
                os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
                os.environ["PYTHONPYCACHEPREFIX"] = str(bench.work / "compiled-by-python")
                start.started(bench.pack, size, data, whole=True)
            bench.say(way=run, size=bench.sizes[-1], **start.started(bench.pack, size, data, whole=True))
        os.environ["TRITON_CACHE_DIR"] = str(bench.work / "triton-of-page")
        bench.say(way="begun before", size=bench.sizes[-1], **from_enter(bench))


def from_enter(bench: Bench) -> dict[str, float]:
    """The seconds from Enter to step 0, to step 1 and to the picture, where the engine began in time."""
    from engine.worker import Worker

    worker = Worker("torch", data_dir=bench.work / "data-of-page")
    worker.begin()
    time.sleep(5 if bench.small else BEGUN)
    enter = time.perf_counter()
    answers = worker.run(Request(PROMPT, str(bench.pack), 0, *bench.sizes[-1], STEPS))
    after = [round(time.perf_counter() - enter, 2) for _ in answers]
    worker.close()
    return {"ready_s": after[0], "step_s": after[1], "picture_s": after[-1]}


# Peers: diffusers' own pipeline with dense random weights of the same shapes


def peer(bench: Bench, in_float8: bool) -> Part:
    pipe = pipeline(bench)
    if in_float8:
        for block in (pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks):
            put(block, Float8Linear)
    else:
        whole(bench, pipe, bench.sizes[0])  # what can go wrong without a compiler goes wrong here
    compiled = compile_parts(bench, pipe)
    bench.forget()
    yield
    kept = {module: vars(module).get("_compiled_call_impl") for module in compiled}
    with bench.quiet():
        for way in ("compiled",) if in_float8 else ("eager", "compiled"):
            for module, call in kept.items():
                module._compiled_call_impl = call if way == "compiled" else None
            for size in bench.sizes:
                measure_peer(bench, pipe, way, size)
        without_encoder(bench, pipe)


def pipeline(bench: Bench) -> Any:
    import diffusers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from tests.packs.full import FIRST_SPECIAL, write_tokenizer
    from tests.packs.layouts import SCHEDULER
    from tests.packs.writers import _CHAT_TEMPLATE

    configs, folder = bench.configs, bench.work / f"tokenizer-{bench.part}"
    write_tokenizer(folder, min(FIRST_SPECIAL, configs.text_encoder["vocab_size"] - 26))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<|endoftext|>", eos_token="<|im_end|>",
        padding_side="right", chat_template=_CHAT_TEMPLATE,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(bench.dtype)
    try:
        with torch.device(bench.device):
            transformer = diffusers.Flux2Transformer2DModel.from_config(configs.transformer)
            vae = diffusers.AutoencoderKLFlux2.from_config(configs.vae)
            encoder = Qwen3ForCausalLM(Qwen3Config(**configs.text_encoder))
    finally:
        torch.set_default_dtype(before)
    for part in (transformer, vae, encoder):
        part.eval().requires_grad_(False)
        fill(part)
    pipe = diffusers.Flux2KleinPipeline(
        diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER), vae, encoder, tokenizer, transformer,
        is_distilled=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fill(module: nn.Module) -> None:
    """Random weights that keep activations in a sane range; norms are ones."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=weight[0].numel() ** -0.5)
        else:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)


def compile_parts(bench: Bench, pipe: Any) -> list[nn.Module]:
    """The transformer's blocks and the decoder, for each size; the modules that are compiled from now on."""
    started = time.perf_counter()
    torch._dynamo.config.recompile_limit = 64
    options: dict[str, Any] = {"dynamic": False, "backend": bench.compiler}
    pipe.transformer.compile_repeated_blocks(fullgraph=True, **options)
    pipe.vae.decoder.compile(**options)
    for size in bench.sizes:
        first = bench.seconds(lambda size=size: whole(bench, pipe, size), 1)[0]
        bench.say(size=size, compile_s=round(first, 1))
        whole(bench, pipe, size)
    bench.say(compiled_after_s=round(time.perf_counter() - started, 1))
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks, pipe.vae.decoder]


def whole(bench: Bench, pipe: Any, size: Size, **more: Any) -> np.ndarray:
    """A picture from the prompt's text to bytes in main memory."""
    words = {} if more else {"prompt": f"{PROMPT}, number {time.perf_counter_ns()}"}
    image = pipe(
        **words, **more, width=size[0], height=size[1], num_inference_steps=STEPS, guidance_scale=1.0, output_type="pt",
        text_encoder_out_layers=bench.configs.hidden_states,
    ).images[0]  # fmt: skip
    return (image.float() * 255).round_().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def measure_peer(bench: Bench, pipe: Any, way: str, size: Size) -> None:
    from engine.torch_backend.transformer import token_ids

    pixels = whole(bench, pipe, size)
    bench.forget()
    whole(bench, pipe, size)
    runs = bench.seconds(lambda: whole(bench, pipe, size))
    peak, config = bench.peak(), bench.configs.transformer
    with torch.no_grad():
        states = bench.configs.hidden_states
        encode = statistics.median(bench.seconds(lambda: pipe.encode_prompt(PROMPT, text_encoder_out_layers=states)))
        latents = random_like(bench, 1, config["in_channels"] // 4, *(2 * side for side in bench.grid(size)))
        decode = statistics.median(bench.seconds(lambda: pipe.vae.decode(latents, return_dict=False)[0].float().cpu()))
        image, text = bench.tokens(size)
        img_ids, txt_ids = token_ids(text, bench.grid(size), bench.device)
        inputs = {
            "hidden_states": random_like(bench, 1, image, config["in_channels"]), "guidance": None,
            "encoder_hidden_states": random_like(bench, 1, text, config["joint_attention_dim"]),
            "timestep": torch.full((1,), 0.9, device=bench.device, dtype=bench.dtype),
            "img_ids": img_ids[None], "txt_ids": txt_ids[None], "return_dict": False,
        }  # fmt: skip
        step = bench.median(lambda: pipe.transformer(**inputs))
    bench.say(
        way=way, size=size, picture_s=statistics.median(runs), runs=len(runs), least_s=min(runs), most_s=max(runs),
        encode_s=encode, step_s=step, decode_s=decode, peak_bytes=peak, deviation=round(float(pixels.std()), 1),
    )  # fmt: skip


def without_encoder(bench: Bench, pipe: Any) -> None:
    with torch.no_grad():
        embeddings, _ = pipe.encode_prompt(PROMPT, text_encoder_out_layers=bench.configs.hidden_states)
    pipe.register_modules(text_encoder=None)
    for size in bench.sizes:
        whole(bench, pipe, size, prompt_embeds=embeddings)
        bench.forget()
        runs = bench.seconds(lambda size=size: whole(bench, pipe, size, prompt_embeds=embeddings))
        bench.say(way="encoder gone", size=size, picture_s=statistics.median(runs), peak_bytes=bench.peak())


class Float8Linear(nn.Module):
    """A dense layer as e4m3: a scale for each output made ahead, one for each token when it comes."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight, scale = float8(layer.weight.data)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.view(1, -1))

    def forward(self, x: Tensor) -> Tensor:
        tokens, scale = float8(x.reshape(-1, x.shape[-1]))
        return scaled(tokens, self.weight, scale, self.scale).view(*x.shape[:-1], -1)


def float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as e4m3, and their scales float32 [M, 1]."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def scaled(x: Tensor, w: Tensor, scale_a: Tensor, scale_b: Tensor) -> Tensor:
    if x.device.type == "cpu":  # where torch has no such product by rows
        return ((x.float() * scale_a) @ (w.float().t() * scale_b)).bfloat16()
    return torch._scaled_mm(
        x, w.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=True
    )


PARTS: dict[str, Callable[[Bench], Part]] = {  # in the order in which they measure
    "floor": floor,
    "int8": partial(ours, int8=True),
    "dense": partial(peer, in_float8=False),
    "cold": cold,
    "float8": partial(peer, in_float8=True),
    "plain": partial(ours, int8=False),
    "gemlite": gemlite,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--small", action="store_true", help="tiny models, to try the bench itself")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--compiler", default="inductor", help="the backend of torch.compile")
    parser.add_argument("--pictures", type=int, default=5, help="warm pictures of each way, of which the median counts")
    parser.add_argument("--pause", default="", help="stop the processes with this in their command lines while timing")
    parser.add_argument("--work", type=Path, help="a folder for pack, caches and data (a temporary one)")
    parser.add_argument("--pack", type=Path, help="a pack that is there already (one is written)")


def main() -> None:
    parser = argparse.ArgumentParser(description="One part of tests.cuda; started by it.")
    parser.add_argument("part", choices=(*PARTS, "kernels"))
    parser.add_argument("--layer", type=int, nargs=2, help="of kernels: inputs and outputs")
    arguments(parser)
    args = parser.parse_args()
    rows = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench = Bench(args, rows)
    torch.manual_seed(0)
    part = (PARTS | {"kernels": kernels})[args.part](bench)
    started = time.perf_counter()
    next(part)
    bench.say(ready_after_s=round(time.perf_counter() - started, 1))
    if sys.stdin.readline():
        next(part, None)
    rows.flush()
    os._exit(0)  # compilers' helpers would take seconds to end


if __name__ == "__main__":
    main()
