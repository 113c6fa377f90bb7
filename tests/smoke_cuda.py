# ruff: noqa: B023, SIM105
"""A first run on an NVIDIA card: what is right, how fast each kernel is, where a step's time goes.

    python tests/smoke_cuda.py [part ...]

Parts: check expand step decode gemm attention passes others. Prints compactly, writes the same and a profile to $OUT.
"""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # not as a module: other packages are named tests too
START = time.perf_counter()
OUT = Path(os.environ.get("OUT", "/tmp"))
WARMERS = 12

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from engine.packs import Quantization  # noqa: E402
from engine.torch_backend import fused, int8, linear, measure, vae  # noqa: E402
from engine.torch_backend import triton_passes as tp  # noqa: E402
from engine.torch_backend.admission import Admission  # noqa: E402
from engine.torch_backend.graph import Graphs  # noqa: E402
from engine.torch_backend.transformer import Flux2Transformer2DModel, Modulation, Rotary, token_ids  # noqa: E402

CUDA = torch.device("cuda")
T = tp.Tiles
CONFIGS = {  # m, n, k, warps, stages, tma
    "plain 128x128x128 w4 s3": tp.HOPPER._replace(wide=1 << 20),
    **{
        f"chunks {m}x{n}x{k} w{warps} s{stages}": tp.HOPPER._replace(chunked=T(m, n, k, warps, stages, True))
        for m, n, k, warps, stages in (
            (128, 128, 256, 8, 3), (128, 128, 256, 8, 2), (128, 128, 128, 8, 3), (128, 128, 128, 8, 4),
            (64, 128, 256, 4, 2), (64, 128, 128, 4, 4), (128, 64, 256, 4, 2), (128, 64, 128, 4, 4),
        )
    },
}  # fmt: skip
CONFIG = {
    "in_channels": 128, "out_channels": None, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6,
}  # fmt: skip
VAE = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 32, "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu", "mid_block_add_attention": True,
    "sample_size": 1024, "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": True, "use_post_quant_conv": True, "patch_size": [2, 2],
}  # fmt: skip
LOG = []


def say(*words: object) -> None:
    text = f"[{time.perf_counter() - START:5.1f}] " + " ".join(map(str, words))
    print(text, flush=True)
    LOG.append(text)


def part(run: Callable[[], None]) -> None:
    if len(sys.argv) > 1 and run.__name__ not in sys.argv[1:]:
        return
    say("==", run.__name__)
    try:
        run()
        torch.cuda.synchronize()
    except Exception:
        say("FAILED", run.__name__, traceback.format_exc(limit=-4)[-1500:])
    torch.cuda.empty_cache()


def tried(what: str, run: Callable[[], object]) -> None:
    try:
        say(what, run())
    except Exception as error:
        say(what, "FAILED", type(error).__name__, str(error).replace("\n", " ")[-300:])


def ms(run: Callable[[], object], repeat: int = 10) -> float:
    """Milliseconds a call, from a graph of several, so that no launch is timed: the median of 5."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            run()
    graph.replay()
    times = []
    for _ in range(5):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / repeat)
    return sorted(times)[2]


def packed(outputs: int, inputs: int, bits: int = 2) -> linear.PackedLinear:
    layer = linear.PackedLinear(
        nn.Linear(inputs, outputs, bias=False, device="meta"), Quantization(bits, 128), torch.bfloat16
    )
    codes = torch.randint(0, 256, (outputs, inputs * bits // 8), dtype=torch.uint8, device=CUDA)
    if bits == 2:
        codes &= ~(codes & (codes >> 1) & 0x55)
    layer.weight = codes
    layer.scales = ((torch.rand(outputs, inputs // 128, device=CUDA) + 0.5) * (1.5 / inputs) ** 0.5).bfloat16()
    layer.biases = layer.scales * (linear.CENTRES[bits] if bits < 4 else -8)
    layer.find_centre()
    return layer.requires_grad_(False)


def tokens(count: int, inputs: int) -> int8.Int8Tokens:
    return int8.Int8Tokens(
        torch.randint(-127, 128, (count, inputs), dtype=torch.int8, device=CUDA), torch.rand(count, 1, device=CUDA)
    )


def warm(number: int) -> None:
    """Compile every n-th kernel into the cache, so that the cores share that."""
    if number == 0:
        tp.fault()
        return
    for config in list(CONFIGS.values())[number - 1 :: WARMERS - 1]:
        for end in ("multiply", "add"):
            try:
                product(tp.TritonPasses(CUDA, config), end, 256, 512, 12288)()
            except Exception:
                pass
    try:
        ours = tp.TritonPasses(CUDA)
        product(ours, ("multiply", "gate", "add")[number % 3], 256, 512, 3072)()
        for width in (3072, 9216, 12288):
            ours.quantize(torch.zeros(4, width, device=CUDA, dtype=torch.bfloat16))
    except Exception:
        pass


def product(passes: tp.TritonPasses, end: str, count: int, outputs: int, inputs: int) -> Callable[[], None]:
    layer = packed(outputs, inputs)
    x = passes.quantize(torch.randn(count, inputs, device=CUDA).bfloat16())
    w = passes.weights(layer)
    kept = passes.expand(w, passes.ways.plain.n // 2 if end == "gate" else 0).clone()
    passes.expand = lambda *_, kept=kept: kept  # type: ignore[method-assign]
    out = torch.zeros(count, outputs // 2 if end == "gate" else outputs, dtype=torch.bfloat16, device=CUDA)
    gate = torch.rand(outputs, device=CUDA).bfloat16()
    return lambda: passes.add(x, w, gate, out) if end == "add" else getattr(passes, end)(x, w, out)


def check() -> None:
    say("fault:", repr(tp.fault()))
    for name, config in CONFIGS.items():
        tried(f"  check {name}:", lambda config=config: tp.check(CUDA, config) or "ok")
    say("  measured for the plan:", measure.measure_card())
    passes = tp.TritonPasses(CUDA)
    for width in (9216, 12288):  # what comes from SwiGLU, and of one chunk a product in whole numbers
        x = (F.silu(torch.randn(1536, width, device=CUDA)) * torch.randn(1536, width, device=CUDA)).bfloat16()
        layer = packed(3072, width)
        given, w = passes.quantize(x), passes.weights(layer)
        again = passes.quantize(x)
        out, exact = (torch.empty(1536, 3072, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
        passes.multiply(given, w, out)
        exact = tp.worth(given).double() @ (passes.expand(w).double() * w.steps.double()[:, None]).t()
        plain = F.linear(x.float(), layer.rows(slice(None)).float())
        away, itself = (float((out.double() - each).norm() / each.norm()) for each in (plain, exact))
        repeats = torch.equal(given.values, again.values)
        say(f"  {width} inputs after SwiGLU, {given.steps.shape[1]} steps: off {away:.2%}, against its own numbers in "
            f"float64 {itself:.3%}, quantising repeats {repeats}")
    for count, outputs, inputs in ((1536, 3072, 12288), (4608, 27648, 3072), (513, 3072, 3072)):
        layer, x = packed(outputs, inputs), tokens(count, inputs)
        w = passes.weights(layer)
        dense = (layer.rows(slice(None)).float() / w.steps[:, None]).round().to(torch.int8)
        ours = passes.expand(w)
        folded = int((ours.int() - dense.int()).abs().max())
        sums = torch._int_mm(x.values, ours.t()) if count > 16 else None
        exact = sums.float() * x.steps * w.steps
        out = torch.empty(count, outputs, dtype=torch.bfloat16, device=CUDA)
        passes.multiply(x, w, out)
        same = torch.equal(out, exact.bfloat16())
        half = torch.empty(count, outputs // 2, dtype=torch.bfloat16, device=CUDA)
        passes.gate(x, w, half)
        plain = F.silu(exact[:, : outputs // 2]) * exact[:, outputs // 2 :]
        off = float((half.float() - plain).norm() / plain.norm())
        again = half.clone()
        passes.gate(x, w, half)
        say(
            f"  {count}x{outputs}x{inputs}: int8 weights off by {folded} of 127 (<= 1 is right), product equal {same}, "
            f"SwiGLU off {off:.4%}, repeats {torch.equal(again, half)}"
        )


def expand() -> None:
    passes = tp.TritonPasses(CUDA)
    for bits in (1, 2, 4):
        layer = packed(27648, 3072, bits)
        read = layer.weight.nbytes + layer.scales.nbytes
        time_ = ms(lambda layer=layer: layer.rows(slice(None)))
        size = read + 2 * 27648 * 3072
        slow = ms(lambda layer=layer: torch_expand(layer), 2)
        text = f"  {bits} bit 27648x3072 -> bf16 {time_:.3f} ms {size / time_ / 1e9:.2f} TB/s (torch ops {slow:.3f} ms)"
        if bits < 4:
            w = passes.weights(layer)
            for turns in (0, 128):
                time_ = ms(lambda w=w, turns=turns: passes.expand(w, turns))
                size = layer.weight.nbytes + w.factors.nbytes + 27648 * 3072
                text += f"; int8{' turns' if turns else ''} {time_:.3f} ms {size / time_ / 1e9:.2f} TB/s"
        say(text)


def torch_expand(layer: linear.PackedLinear) -> Tensor:
    table = linear.code_table(layer.bits, torch.bfloat16, layer.centre or 0.0, CUDA)
    words = table.index_select(0, layer.weight.flatten().int())
    values = (torch.view_as_real(words) if words.is_complex() else words).view(torch.bfloat16)
    return values.view(*layer.scales.shape, -1).mul_(layer.scales[..., None])


SHAPES = ((4608, 27648, 3072), (4608, 3072, 12288), (1536, 27648, 3072), (1536, 3072, 12288), (1536, 3072, 3072))


def gemm() -> None:
    """TOPS of the product alone."""
    for count, outputs, inputs in (*SHAPES, (4608, 3072, 9216)):
        work = 2 * count * outputs * inputs / 1e9
        say(f"  M {count} N {outputs} K {inputs}, TOPS:")
        for name, config in CONFIGS.items() if inputs > 4096 else [("plain", tp.HOPPER)]:
            cells = []
            for end in ("multiply", "add" if outputs == 3072 else "gate"):
                try:
                    time_ = ms(product(tp.TritonPasses(CUDA, config), end, count, outputs, inputs))
                    cells.append(f"{end} {work / time_:.0f}")
                except Exception as error:
                    cells.append(f"{end} FAILED {type(error).__name__} {str(error)[:80]}")
            say(f"    {name}: {', '.join(cells)}")


def others() -> None:
    """What torch reaches on the same products, and what float8 rounds away."""
    for count, outputs, inputs in SHAPES:
        work = 2 * count * outputs * inputs / 1e9
        x = torch.randn(count, inputs, device=CUDA)
        w = torch.randn(outputs, inputs, device=CUDA)
        a, b = x.bfloat16(), w.bfloat16()
        a8, b8 = (x * 30).to(torch.int8), (w * 30).to(torch.int8)
        words = [f"bf16 {work / ms(lambda a=a, b=b: F.linear(a, b)):.0f}"]
        words.append(f"_int_mm {work / ms(lambda a8=a8, b8=b8: torch._int_mm(a8, b8.t())):.0f}")
        try:
            fa, fb = rowwise(x), rowwise(w)

            def scaled(fa=fa, fb=fb) -> Tensor:
                return torch._scaled_mm(
                    fa[0], fb[0].t(), scale_a=fa[1], scale_b=fb[1].t(), out_dtype=torch.bfloat16, use_fast_accum=True
                )

            exact = x @ w.t()
            weight_exact = F.linear(fa[0].float() * fa[1], w)
            words.append(
                f"fp8 rowwise {work / ms(scaled):.0f} off {off(scaled(), exact):.2%}, "
                f"by activations alone {off(weight_exact, exact):.2%}"
            )
        except Exception as error:
            words.append(f"fp8 rowwise FAILED {str(error)[:200]}")
        try:
            words.append(blockwise(x, w, work))
        except Exception as error:
            words.append(f"fp8 1x128 FAILED {type(error).__name__} {str(error)[:200]}")
        say(f"  M {count} N {outputs} K {inputs}, T(FL)OPS: {', '.join(words)}")


def off(ours: Tensor, exact: Tensor) -> float:
    return float((ours.float() - exact.float()).norm() / exact.float().norm())


def rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn), scale


def blockwise(x: Tensor, w: Tensor, work: float) -> str:
    from torch.nn.functional import ScalingType, scaled_mm

    def blocks(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = x.unflatten(1, (-1, 128))
        scale = parts.abs().amax(-1, keepdim=True) / 448
        column_major = scale.squeeze(-1).t().contiguous().t()
        return (parts / scale).to(torch.float8_e4m3fn).flatten(1), column_major

    (a, sa), (b, sb) = blocks(x), blocks(w)
    kind = ScalingType.BlockWise1x128

    def run() -> Tensor:
        return scaled_mm(a, b.t(), sa, kind, sb, kind, output_dtype=torch.bfloat16)

    return f"fp8 1x128 {work / ms(run):.0f} off {off(run(), x @ w.t()):.2%}"


def attention() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for count in (1536, 4608):
        work = 4 * count * count * 3072 / 1e9
        wide = torch.randn(1, count, 3, 24, 128, device=CUDA, dtype=torch.bfloat16)
        layouts = {
            "tokens first": [wide[:, :, i].contiguous().transpose(1, 2) for i in range(3)],
            "values in rows of 3 D": [
                *(wide[:, :, i].contiguous().transpose(1, 2) for i in range(2)), wide[:, :, 2].transpose(1, 2)
            ],
            "heads first": [wide[:, :, i].transpose(1, 2).contiguous() for i in range(3)],
        }  # fmt: skip
        for name, qkv in layouts.items():
            cells = []
            for backend in (None, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
                try:

                    def run(qkv=qkv) -> Tensor:
                        return F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)

                    if backend is None:
                        time_ = ms(run)
                    else:
                        with sdpa_kernel(backend):
                            time_ = ms(run)
                    kind = "default" if backend is None else backend.name.split("_")[0].lower()
                    cells.append(f"{kind} {time_:.3f} ms {work / time_:.0f} TFLOP/s")
                except Exception as error:
                    cells.append(f"{backend} FAILED {str(error)[:100]}")
            view = F.scaled_dot_product_attention(*qkv).transpose(1, 2).is_contiguous()
            say(f"  T {count} {name}: {', '.join(cells)}; result lies by token: {view}")


def passes() -> None:
    ours = tp.TritonPasses(CUDA)
    for count in (1536, 4608):
        x, wide = (torch.randn(count, width, device=CUDA).bfloat16() for width in (3072, 12288))
        modulation = Modulation(*(torch.randn(1, 1, 3072, device=CUDA).bfloat16() for _ in range(3)))
        heads = torch.randn(count, 3, 24, 128, device=CUDA).bfloat16()
        turned = torch.empty(count, 24, 128, device=CUDA).bfloat16()
        angle, weight = torch.randn(count, 64, device=CUDA), torch.randn(128, device=CUDA).bfloat16()
        rotary = Rotary(angle.cos(), angle.sin())
        cells = []
        for name, size, run in (
            ("quantize 3072", 3 * x.numel(), lambda: ours.quantize(x)),
            ("quantize 12288", 3 * wide.numel(), lambda: ours.quantize(wide)),
            ("modulate", 3 * x.numel(), lambda: ours.modulate(x, modulation, 1e-6)),
            ("turn", 4 * x.numel(), lambda: ours.turn(heads[:, 1], weight, 1e-6, rotary, turned)),
            ("copy into wide", 4 * x.numel(), lambda: wide[:, :3072].copy_(x)),
        ):
            time_ = ms(run)
            cells.append(f"{name} {time_ * 1000:.0f} us {size / time_ / 1e9:.2f} TB/s")
        say(f"  M {count}: {', '.join(cells)}")


def whole() -> Flux2Transformer2DModel:
    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(CONFIG)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "transformer_blocks" in name:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, packed(layer.out_features, layer.in_features))
    for name, value in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        made = torch.ones(value.shape) if value.ndim == 1 else torch.randn(value.shape, device=CUDA) * 0.02
        setattr(model.get_submodule(parent), child, nn.Parameter(made.to(CUDA, torch.bfloat16), requires_grad=False))
    return model.eval()


@torch.inference_mode()
def step() -> None:
    torch.manual_seed(0)
    model = whole()
    say(f"  model {torch.cuda.memory_allocated() / 1e9:.2f} GB")
    inputs = {}
    for side in (32, 64):
        image = torch.randn(1, side * side, 128, device=CUDA).bfloat16()
        text = torch.randn(1, 512, 7680, device=CUDA).bfloat16()
        timestep = torch.full((1,), 0.8, device=CUDA)
        inputs[side] = (image, text, timestep, *token_ids(512, (side, side), CUDA), lambda: None)
    before = {}
    for side in (32, 64):
        before[side] = model(*inputs[side])
        say(f"  side {side} plain: {timed(lambda side=side: model(*inputs[side]))}")
    for side in (32, 64):
        graphs = Graphs(model, lambda: True, None, say)
        same = [off(graphs(*inputs[side]), before[side]) for _ in range(3)]
        say(f"  side {side} plain as one graph: {timed(lambda side=side, run=graphs: run(*inputs[side]))}, off {same}")
        graphs.clear()
    admission = Admission(model, passes=tp.TritonPasses(CUDA))
    fused.install(model, admission)
    for side in (32, 64):
        admission.trial = True
        model(*inputs[side])
        errors = admission.errors()
        worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
        refused = sum(error > 0.02 for error in errors.values())
        say(f"  side {side}: {len(errors)} layers, mean {mean:.2%}, worst {errors[worst]:.2%} {worst}, "
            f"refused {refused}")
    admission.settle()
    graphs = Graphs(model, lambda: not admission.trial, admission.scratch, say)
    for side in (32, 64):
        torch.cuda.reset_peak_memory_stats()
        after = model(*inputs[side])
        say(f"  side {side} int8 against plain: off {off(after, before[side]):.2%}")
        say(f"  side {side} int8: {timed(lambda side=side: model(*inputs[side]))}; "
            f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
        admission.clear()
        graphs(*inputs[side])
        start = time.perf_counter()
        first = graphs(*inputs[side])
        torch.cuda.synchronize()
        took = time.perf_counter() - start
        say(f"  side {side} captured and run in {took:.3f} s; the same {torch.equal(first, after)}")
        admission.clear()
        rubbish = torch.full((1 << 28,), -1, device=CUDA, dtype=torch.int32)  # who takes memory that is not theirs
        say(f"  side {side} int8 as one graph: {timed(lambda side=side: graphs(*inputs[side]))}; the same "
            f"{torch.equal(graphs(*inputs[side]), after)}; holds {torch.cuda.memory_allocated() / 1e9 - 1.07:.2f} GB")
        del rubbish
        other = (*(torch.randn_like(each) for each in inputs[side][:2]), inputs[side][2] / 2, *inputs[side][3:])
        say(f"  side {side} other inputs in the graph, the same: {torch.equal(graphs(*other), model(*other))}")
    graphs.clear()
    for side in (64, 32):
        tried("", lambda side=side: profiled(lambda: model(*inputs[side]), side))


@torch.inference_mode()
def decode() -> None:
    """The decoder with random weights, in the order of channels and in torch's own."""
    def build(module: nn.Module, *_: object, **__: object) -> None:
        for part in module.modules():
            for kept in (part._parameters, part._buffers):
                for name, value in kept.items():
                    if value is not None:
                        made = torch.ones(value.shape) if value.ndim < 2 else torch.randn(value.shape, device=CUDA)
                        made = made.to(CUDA, torch.bfloat16) / max(1, value[0].numel() if value.ndim > 1 else 1) ** 0.5
                        kept[name] = nn.Parameter(made, requires_grad=False) if kept is part._parameters else made

    given_build, linear.build = linear.build, build
    component = SimpleNamespace(config=VAE, folder="")
    own, order = vae.SharedGroupNorm.forward, vae.channels_last
    for words in ("channels last", "as torch has them"):
        made = vae.PictureDecoder(component, torch.bfloat16, CUDA)
        if words != "channels last":
            vae.channels_last = lambda x: x.contiguous()
            vae.SharedGroupNorm.forward = lambda self, x: self.norm(x)
            made.vae.decoder.to(memory_format=torch.contiguous_format)
        for side in (32, 64):
            given = torch.randn(1, side * side, 128, device=CUDA)
            torch.cuda.reset_peak_memory_stats()
            say(f"  {words} {side * 16}: {timed(lambda given=given, side=side: made.image(given, (side, side)))}; "
                f"peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    vae.SharedGroupNorm.forward, vae.channels_last, linear.build = own, order, given_build


def timed(run: Callable[[], object]) -> str:
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    whole, launched = [], []
    for _ in range(5):
        start = time.perf_counter()
        run()
        launched.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - start)
    return f"{min(whole) * 1000:.1f} ms a step, {min(launched) * 1000:.1f} ms until all is launched"


def profiled(run: Callable[[], object], side: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        torch.cuda.synchronize()
    events = [each for each in found.key_averages() if each.device_type.name == "CUDA"]
    events.sort(key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in events)
    say(f"  side {side}: {total / 1000:.2f} ms on the card, {sum(each.count for each in events)} kernels")
    for each in events[:15]:
        say(f"    {each.self_device_time_total / 1000:7.3f} ms {each.count:4d} x {each.key[:90]}")
    (OUT / f"profile{side}.txt").write_text(found.key_averages().table(sort_by="self_cuda_time_total", row_limit=60))


def main() -> None:
    if sys.argv[1:2] == ["--warm"]:
        return warm(int(sys.argv[2]))
    import triton

    say(torch.__version__, "triton", triton.__version__, torch.cuda.get_device_name(), sys.version.split()[0])
    command = [sys.executable, __file__, "--warm"]
    warmers = [subprocess.Popen([*command, str(i)], stderr=subprocess.DEVNULL) for i in range(WARMERS)]
    for each in warmers:
        try:
            each.wait(max(1, 60 - (time.perf_counter() - START)))
        except subprocess.TimeoutExpired:
            each.kill()
    say("kernels compiled")
    for run in (check, expand, step, decode, gemm, attention, passes, others):
        part(run)
    say("done")
    (OUT / "smoke.txt").write_text("\n".join(LOG))


if __name__ == "__main__":
    main()
