"""gemlite alone: our transformer, its packed layers as gemlite keeps and multiplies them. A part of `tests.cuda`."""

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cuda_bench import Bench, Part, Size, put, random_like
from tests.packs.content import GROUP

COMPILE = 80  # seconds after which gemlite is measured with the kernels that are there
TUNE = 20  # seconds in which it measures its candidates
THREADS = 3  # that compile kernels, for each of five shapes
ROW = 10  # calls of a product that are timed together, so that launching the next hides behind the last


def gemlite(bench: Bench) -> Part:
    started = time.perf_counter()
    compiling = compile_kernels(bench) if bench.cuda else []
    make = gemlite_layer(bench)
    transformer = bare_transformer(bench, lambda layer: make(*ternary(bench, layer)))
    bench.say(built_s=round(time.perf_counter() - started, 1))
    failed = finish(compiling, started + COMPILE)
    bench.say(kernels_after_s=round(time.perf_counter() - started, 1), shapes_cut_off=failed)
    bench.forget()
    yield
    with bench.quiet(), torch.inference_mode():
        hurry = Hurry(TUNE) if bench.cuda else None
        for size in bench.sizes:
            work, start = step(bench, transformer, size), time.perf_counter()
            finite = bool(work().isfinite().all())  # here it chooses among its block sizes
            tuned, passed = round(time.perf_counter() - start, 1), hurry.passed if hurry else 0
            bench.say(way="alone", size=size, step_s=bench.median(work, 5), finite=finite, tuned_s=tuned,
                      candidates_passed_over=passed)  # fmt: skip
        compare_products(bench, make)
        if bench.cuda:
            one_graph(bench, transformer)


def layers_of(bench: Bench) -> list[Size]:
    """(inputs, outputs) of all packed layers."""
    from tests.floor import products

    return [*dict.fromkeys((k, n) for _, k, n in products(bench.configs.transformer, bench.tokens(bench.sizes[-1])))]


def compile_kernels(bench: Bench) -> list[subprocess.Popen[bytes]]:
    """All candidates of gemlite's own choice of block sizes, into Triton's cache on disk: a process for each shape,
    since each shape compiles a dozen kernels anew. They do for every number of tokens here."""
    command = [sys.executable, "-m", "tests.cuda_parts", "kernels", "--device", bench.device]
    command += ["--small"] if bench.small else []
    return [
        subprocess.Popen([*command, "--layer", *map(str, pair)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for pair in layers_of(bench)
    ]


def finish(processes: list[subprocess.Popen[bytes]], end: float) -> int:
    """Wait until `end` at most; how many were killed or had failed."""
    failed = 0
    for process in processes:
        try:
            failed += process.wait(max(0.1, end - time.perf_counter())) != 0
        except subprocess.TimeoutExpired:
            process.kill()
            failed += 1
    return failed


def kernels(bench: Bench) -> Part:
    """The kernels of one shape, by several threads, without starting one on the card."""
    from gemlite.core import GEMLITE_TRITON_KERNELS
    from triton import AsyncCompileMode

    def compile_only(kernel: Any, *args: Any, warmup: bool, **named: Any) -> None:
        kernel.warmup(*args, **named)

    for kernel in (kernel for each in GEMLITE_TRITON_KERNELS for kernel in each.kernel):
        kernel.run = partial(compile_only, kernel)
    layer = gemlite_layer(bench)(*ternary(bench, nn.Linear(*bench.layer, bias=False, device="meta")))
    x = random_like(bench, sum(bench.tokens(bench.sizes[-1])), bench.layer[0], dtype=torch.float16)
    with torch.inference_mode(), AsyncCompileMode(ThreadPoolExecutor(THREADS)):
        layer(x)
    yield


class Hurry:
    """Triton's choice among candidates in a tenth of the time that it would take; after `seconds` it takes the best of
    those that it has measured."""

    def __init__(self, seconds: float) -> None:
        from gemlite.core import GEMLITE_TRITON_KERNELS

        self._end = time.perf_counter() + seconds
        self.passed = 0
        for kernel in (kernel for each in GEMLITE_TRITON_KERNELS for kernel in each.kernel):
            kernel.do_bench = self._measure

    def _measure(self, call: Callable[[], object], quantiles: Any) -> Any:
        from triton.testing import do_bench

        if time.perf_counter() < self._end:
            return do_bench(call, warmup=3, rep=12, quantiles=quantiles)
        self.passed += 1
        return [float("inf")] * len(quantiles)


def ternary(bench: Bench, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Random codes of a layer, one a byte, and scales of groups of 128 inputs."""
    codes = torch.randint(0, 3, layer.weight.shape, dtype=torch.uint8, device=bench.device)
    groups = layer.in_features // GROUP
    scales = torch.rand(layer.out_features, groups, device=bench.device) + 0.5
    return codes, (scales * layer.in_features**-0.5).half()


def gemlite_layer(bench: Bench) -> Callable[[Tensor, Tensor], nn.Module]:
    """What makes a layer of codes and scales: 2 bits, bytes along the inputs, float16, as released."""
    if not bench.cuda:
        return Stand
    from gemlite.helper import A16Wn

    maker = A16Wn(device=bench.device + ":0", dtype=torch.float16, packing_bitwidth=8)
    return lambda codes, scales: maker.from_weights(codes, scales, torch.ones_like(scales), 2, GROUP)


class Stand(nn.Module):
    """What a layer of gemlite's computes, by torch alone."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        weight = (codes.view(*scales.shape, -1).float() - 1) * scales[..., None].float()
        self.register_buffer("weight", weight.flatten(1).to(scales.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def bare_transformer(bench: Bench, twin: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Our modules with `twin`s for packed layers and random dense weights in float16, as gemlite's packs are run."""
    from engine.torch_backend.transformer import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(bench.configs.transformer)
    put(model.transformer_blocks, twin)
    put(model.single_transformer_blocks, twin)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_meta:
                value = torch.ones(weight.shape, device=bench.device, dtype=torch.float16)
                if weight.ndim > 1:
                    value.normal_(std=weight.shape[1] ** -0.5)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model.eval()


def step(bench: Bench, transformer: nn.Module, size: Size) -> Callable[[], Tensor]:
    from engine.torch_backend.transformer import token_ids

    config, (image, text) = bench.configs.transformer, bench.tokens(size)
    half = {"dtype": torch.float16}
    hidden = random_like(bench, 1, image, config["in_channels"], **half)
    words = random_like(bench, 1, text, config["joint_attention_dim"], **half)
    sigma, ids = torch.full((1,), 0.9, device=bench.device), token_ids(text, bench.grid(size), bench.device)
    return lambda: transformer(hidden, words, sigma, *ids, lambda: None)


def one_graph(bench: Bench, transformer: nn.Module) -> None:
    """The same steps replayed as our engine replays its own, so that launching from Python doesn't count."""
    from engine.torch_backend.graph import Graphs

    graphs = Graphs(transformer, lambda: True, None, lambda words: bench.say(failed=words))
    for size in bench.sizes:
        bench.say(way="alone, one graph", size=size, step_s=bench.median(step(bench, graphs, size), 5))


def in_a_row(work: Callable[[], object]) -> None:
    for _ in range(ROW):
        work()


def compare_products(bench: Bench, make: Callable[[Tensor, Tensor], nn.Module]) -> None:
    """gemlite's products against a layer expanded, then multiplied by cuBLAS, and cuBLAS alone; milliseconds."""
    from engine.torch_backend.linear import CENTRES, expand
    from tests.floor import products

    config = bench.configs.transformer
    for m, k, n in dict.fromkeys(shape for size in bench.sizes for shape in products(config, bench.tokens(size))):
        parts = ternary(bench, nn.Linear(k, n, bias=False, device="meta"))
        layer, plain = make(*parts), Stand(*parts)
        codes = torch.randint(0, 171, (n, k // 4), dtype=torch.uint8, device=bench.device)
        scales, w = random_like(bench, n, k // GROUP), random_like(bench, n, k)
        x, x16 = random_like(bench, m, k), random_like(bench, m, k, dtype=torch.float16)

        def expanded(x: Tensor = x, codes: Tensor = codes, scales: Tensor = scales) -> Tensor:
            return F.linear(x, expand(codes, scales, -scales, 2, bench.dtype, CENTRES[2]))

        ways = {"gemlite": partial(layer, x16), "expand": expanded, "cublas": partial(F.linear, x, w)}
        took = {name: bench.median(partial(in_a_row, work)) / ROW for name, work in ways.items()}
        times = {f"{name}_ms": round(1e3 * seconds, 3) for name, seconds in took.items()}
        off = (layer(x16).float() - plain(x16).float()).norm() / plain(x16).float().norm()
        bench.say(product=[m, k, n], **times, off=round(off.item(), 5))
