"""Blocks in few passes against the blocks they stand for, with torch's passes and with compiled ones; what is done
where nothing can be compiled."""

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine import measured, memory, products
from engine.hardware import Hardware, detect
from engine.packs import open_pack
from engine.plan import Plan
from engine.torch_backend import fused, kernels, linear, measure
from engine.torch_backend.admission import Admission
from engine.torch_backend.kernels import FOLDED, UNITS, Codes, Kernels, Unavailable, Unit
from engine.torch_backend.model import Model
from engine.torch_backend.passes import TorchPasses
from engine.torch_backend.transformer import Flux2Transformer2DModel, token_ids
from tests.packs.content import Content, small
from tests.packs.full import write

GROUP = 128
GXX = shutil.which("g++")
GRID, TEXT = (3, 5), 13  # 28 tokens: no multiple of a panel


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(params=["torch", *(unit.name for unit in (*UNITS, FOLDED))])
def passes(request: pytest.FixtureRequest, library: Path) -> Sequence[Any]:
    if request.param == FOLDED.name:
        return [compiled(library, [FOLDED]), compiled(library)]
    if request.param != "torch":
        return [compiled(library, [unit for unit in UNITS if unit.name == request.param])]
    request.getfixturevalue("torch_products")
    return [TorchPasses()]


def compiled(library: Path, units: Sequence[Unit] = UNITS, group: int = GROUP) -> Kernels:
    try:
        return kernels.load(library, detect(), group, units)
    except Unavailable as reason:
        pytest.skip(f"no compiled passes here: {reason}")


def model(pack: Path, dtype: torch.dtype = torch.float32) -> Flux2Transformer2DModel:
    component = open_pack(pack).transformer
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(component.config)
    linear.build(transformer, component, dtype, torch.device("cpu"))
    return transformer


def velocity(transformer: Flux2Transformer2DModel, batch: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    random, device = torch.Generator().manual_seed(5), next(transformer.parameters()).device
    text = torch.randn(1, TEXT, transformer.context_embedder.in_features, generator=random)
    image = torch.randn(batch, GRID[0] * GRID[1], transformer.x_embedder.in_features, generator=random)
    text, image = text.to(device, dtype).expand(batch, -1, -1), image.to(device, dtype)
    sigma = torch.full((1,), 0.8, device=device)
    with torch.inference_mode():
        return transformer(image, text, sigma, *token_ids(TEXT, GRID, device), lambda: None)


def off(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    return float((ours - theirs).norm() / theirs.norm())


def with_int8(pack: Path, passes: Sequence[Any], fuse: bool = True, dtype: torch.dtype = torch.float32) -> Admission:
    """An Admission of a loaded transformer, which it carries as `model`."""
    transformer = model(pack, dtype)
    admission = Admission(transformer, passes)
    if fuse:
        fused.install(transformer, admission)
    admission.model = transformer  # type: ignore[attr-defined]
    return admission


def test_what_torchs_passes_keep_is_what_the_plan_counts(tiny_packs: Path) -> None:
    pack = open_pack(tiny_packs / "ternary")
    folded = [layer.ways[0][1] for layer in with_int8(pack.folder, [TorchPasses()]).layers.values()]
    kept = sum(weights.factors.nbytes + weights.steps.nbytes for weights in folded)
    plain, whole = (memory.need(pack, (64, 64), 16, "float32", cpu=True, tile=0, int8=on) for on in (False, True))
    assert whole.transformer - plain.transformer == kept > 0 and whole.denoising < plain.denoising


@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_fused_blocks_compute_what_blocks_compute(tiny_packs: Path, variant: str, passes: Sequence[Any]) -> None:
    exact = velocity(model(tiny_packs / variant))
    fast = with_int8(tiny_packs / variant, passes)
    slow = with_int8(tiny_packs / variant, passes, fuse=False)
    fast_velocity, slow_velocity = velocity(fast.model), velocity(slow.model)  # type: ignore[attr-defined]
    assert 1e-5 < off(fast_velocity, exact) < 0.02
    # the same integers but for a rounding here and there; a missing scale, gate or norm is off by far more
    assert off(fast_velocity, slow_velocity) < 2e-3
    assert fast.errors().keys() == slow.errors().keys() and all(0 < error < 0.02 for error in fast.errors().values())


def test_refused_layers_compute_as_before(tiny_packs: Path, passes: Sequence[Any]) -> None:
    admission = with_int8(tiny_packs / "ternary", passes)
    admission.bound = -1.0
    assert off(velocity(admission.model), velocity(model(tiny_packs / "ternary"))) < 1e-5  # type: ignore[attr-defined]


def test_pictures_of_a_batch_are_those_one_by_one(tiny_packs: Path, passes: Sequence[Any]) -> None:
    admission = with_int8(tiny_packs / "ternary", passes)
    admission.trial = False
    together, alone = velocity(admission.model, 3), velocity(admission.model)  # type: ignore[attr-defined]
    assert off(together[:1], alone) < 1e-5 and off(together[1:2], alone) > 0.01


def test_scales_may_go_where_layers_are_admitted_and_stay_where_not(
    tiny_packs: Path, passes: Sequence[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, after the trial (Admission._spare)."""
    admission = with_int8(tiny_packs / "ternary", passes)
    refused, *others = admission.layers.values()
    before = velocity(admission.model)  # type: ignore[attr-defined]
    refused.errors = {way.name: 1.0 for way, _ in refused.ways}
    with monkeypatch.context() as pretending:
        pretending.setattr(admission.passes, "device", SimpleNamespace(type="cuda"))
        admission.settle()
    assert len(refused.plain.scales) and not any(len(layer.plain.scales) for layer in others)
    assert 0 < off(velocity(admission.model), before) < 0.02  # type: ignore[attr-defined]


def test_a_model_in_bfloat16_keeps_its_format(tiny_packs: Path, passes: Sequence[Any]) -> None:
    admission = with_int8(tiny_packs / "ternary", passes, dtype=torch.bfloat16)
    result = velocity(admission.model, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    assert result.dtype == torch.bfloat16
    assert off(result, velocity(model(tiny_packs / "ternary"))) < 0.04


@pytest.fixture(scope="module")
def deep_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ternary, three blocks of each kind."""
    folder = tmp_path_factory.mktemp("deep")
    configs = small(num_layers=3, num_single_layers=3)
    write(folder, "mlx", Content(configs, "ternary"))
    (folder / "niwaki.json").write_text(json.dumps({"hidden_states": configs.hidden_states, "text_length": 32}))
    return folder


@pytest.mark.parametrize("unfused", [(), (0,), (2,), (3,), (1, 4)])
def test_between_fused_blocks_the_stream_keeps_the_passes_format_and_elsewhere_the_models(
    deep_pack: Path, passes: Sequence[Any], monkeypatch: pytest.MonkeyPatch, unfused: tuple[int, ...]
) -> None:
    transformer = model(deep_pack, torch.bfloat16)
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    plain = [layer for number in unfused for layer in blocks[number].modules()]
    for way in passes:
        bears = way.bears
        monkeypatch.setattr(way, "bears", lambda layer, bears=bears: bears(layer) and layer not in plain)
    admission = Admission(transformer, passes)
    fused.install(transformer, admission)
    given: list[torch.dtype] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    result = velocity(transformer, dtype=torch.bfloat16)
    handed_on = [{number - 1, number}.isdisjoint(unfused) for number in range(1, len(blocks))]
    assert given == [torch.bfloat16, *(torch.float32 if ours else torch.bfloat16 for ours in handed_on)]
    assert result.dtype == torch.bfloat16
    assert off(result, velocity(model(deep_pack))) < 0.04
    joint = admission.scratch._buffers["joint"].dtype
    assert joint == (torch.bfloat16 if admission.passes.halves else torch.float32)
    assert all(layer.plain.expand == layer.ways[0][0].dense for layer in admission.layers.values())


def test_a_text_encoder_of_four_bits_reads_as_bytes(tiny_packs: Path, library: Path, tmp_path: Path) -> None:
    compiled(library)
    pack = open_pack(tiny_packs / "ternary")

    def states(admit: bool) -> tuple[torch.Tensor, Admission | None]:
        reader = Model(pack.folder)
        reader.load_encoder(Plan("torch", "cpu", "float32", "", keep_text_encoder=True))
        if admit:
            reader.admit_reading(tmp_path, detect())
        ids, mask, _ = reader.tokenizer.encode("two red circles", pack.notes.text_length)
        answer = reader.embed("", ids, mask, Plan("torch", "cpu", "float32", ""), lambda: None)
        return answer, reader.reading

    exact, _ = states(admit=False)
    tried, reading = states(admit=True)
    assert reading and not reading.trial and len(reading.layers) == 7 * max(pack.notes.hidden_states)
    assert 1e-5 < off(tried, exact) < 0.02
    assert products.errors(tmp_path, pack, "compiled", "text_encoder") == reading.errors()
    assert all(0 < error < products.BOUND for error in reading.errors().values())
    again, later = states(admit=True)
    assert torch.equal(again, tried) and later and later.errors() == reading.errors()


def test_buffers_are_given_back(tiny_packs: Path) -> None:
    admission = with_int8(tiny_packs / "ternary", [TorchPasses()])
    velocity(admission.model)  # type: ignore[attr-defined]
    assert admission.scratch._buffers
    admission.clear()
    assert not admission.scratch._buffers


@pytest.mark.parametrize(("bits", "group"), [(1, 128), (2, 128), (4, 64), (4, 128)])
def test_all_units_give_the_same_bits(bits: int, group: int, library: Path) -> None:
    random = torch.Generator().manual_seed(bits)
    tokens, inputs, outputs = 35, 7 * group, 200  # a rest of panels, an odd number of groups, a rest of a strip
    codes = torch.randint(0, 256, (outputs, inputs * bits // 8), dtype=torch.uint8, generator=random)
    scales, biases = torch.randn(2, outputs, 7, generator=random)
    w, x = Codes(codes, scales, biases if bits == 4 else None, bits), torch.randn(tokens, inputs, generator=random)
    answers = []
    for unit in UNITS:
        kernel = compiled(library, [unit], group)
        answers.append(torch.full((tokens, outputs), float("nan")))
        kernel.multiply(kernel.quantize(x), w, answers[-1])
    assert torch.equal(*answers) and answers[0].isfinite().all()


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("segments", [1, 3, 7])  # of a part, a whole part, two parts and a rest
def test_folded_scales_are_off_by_little(bits: int, segments: int, library: Path) -> None:
    exact, several = compiled(library), compiled(library, [FOLDED])
    # in one thread, so that strips of one call wait for each other
    folded = Kernels(several._library, several.compiler, several.unit, GROUP, 1)
    random = torch.Generator().manual_seed(bits)
    # a rest of panels, of a strip, and of the strips that are multiplied together
    tokens, groups, outputs = 1571, segments * folded.fold, 500
    codes = torch.randint(0, 256, (outputs, groups * GROUP * bits // 8), dtype=torch.uint8, generator=random)
    codes &= ~(codes >> 1 & 0b01010101) if bits == 2 else 0xFF  # no code of 3
    w = Codes(codes, torch.rand(outputs, groups, generator=random) + 0.5, None, bits)
    x = torch.randn(tokens, groups * GROUP, generator=random)
    answers = []
    for kernel in (exact, folded):
        answers.append(torch.full((tokens, outputs), float("nan")))
        kernel.multiply(kernel.quantize(x), w, answers[-1])
    assert 1e-3 < off(answers[1], answers[0]) < 0.012
    first = torch.full((40, outputs), float("nan"))
    folded.multiply(folded.quantize(x[:40]), w, first)
    assert torch.equal(first, answers[1][:40])


def test_what_can_not_be_folded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = SimpleNamespace(compiler="g++ 99", unit=UNITS[0], name="compiled")

    def load(folder: Path, hardware: Hardware, group: int, units: Sequence[Unit] = UNITS) -> SimpleNamespace:
        if units is not UNITS:
            raise Unavailable("they disagree")
        return exact

    monkeypatch.setattr(kernels, "load", load)
    assert kernels.chosen(tmp_path, detect(), GROUP) == [exact]
    (finding,) = measured.recall(tmp_path).values()
    assert finding["sentence"].endswith("compiled by g++ 99 for AMX, no groups folded: they disagree")


def test_int8_is_measured_as_it_will_be_multiplied(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.torch_backend.int8.exact", lambda: False)
    assert measure.measure()["int8"] == 0
    rates = measure.measure(compiled(library), GROUP)
    assert set(rates) == set(products.FORMATS) and rates["int8"] > 0


@pytest.mark.parametrize("units", [UNITS, [FOLDED]], ids=["exact", "folded"])
def test_threads_change_nothing(units: Sequence[Unit], library: Path) -> None:
    codes, scales = torch.randint(0, 256, (200, 128), dtype=torch.uint8), torch.rand(200, 4)
    x, w = torch.randn(50, 512), Codes(codes & 0b10101010, scales, None, 2)
    answers = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            kernel = compiled(library, units)
        finally:
            torch.set_num_threads(before)
        out = torch.full((50, 100), float("nan"))
        kernel.gate(kernel.quantize(x), w, out)
        answers.append(out)
    assert torch.equal(*answers) and answers[0].isfinite().all()


def test_a_library_is_built_once_and_must_agree(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = compiled(tmp_path / "first")
    (built,) = (tmp_path / "first").iterdir()
    time = built.stat().st_mtime_ns
    compiled(tmp_path / "first")
    assert [path.stat().st_mtime_ns for path in built.parent.iterdir()] == [time]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "AGREE", 1e-9)  # nobody agrees so closely
        with pytest.raises(Unavailable, match="% off"):
            kernels.load(library, detect(), GROUP)
    (tmp_path / built.name).write_bytes(b"no library")
    with pytest.raises(Unavailable, match="can't be loaded"):
        kernels.load(tmp_path, detect(), GROUP, [kernel.unit])


def test_a_unit_that_fails_gives_way_to_the_next(tmp_path: Path) -> None:
    kernel = compiled(tmp_path / "good")
    if kernel.unit is UNITS[-1]:
        pytest.skip("this processor has the instructions for the last unit alone")
    (built,) = (tmp_path / "good").iterdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / built.name).write_bytes(b"no library")
    assert compiled(tmp_path / "bad").unit is UNITS[UNITS.index(kernel.unit) + 1]


@pytest.fixture
def fast() -> Hardware:
    """This machine, said to have what the passes are written for; only for what fails before anything of them runs."""
    return replace(detect(), features=frozenset({"avx512_vnni"}))


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is all of PATH, and no compiler from PyPI."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(kernels, "ZIG", "not_installed")
    yield folder


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.skipif(os.uname().sysname != "Linux", reason="the passes are for Linux")
def test_whatever_is_missing_is_said_and_torch_takes_over(compilers: Path, fast: Hardware, tmp_path: Path) -> None:
    def reason(hardware: Hardware = fast, group: int = GROUP) -> str:
        assert kernels.chosen(tmp_path, hardware, group) == []
        finding = measured.recall(tmp_path)[f"int8 passes on {hardware.name}, groups of {group}"]
        words = f"int8 passes for groups of {group} in torch, without compiled ones: "
        assert finding["sentence"].startswith(words)
        assert not (tmp_path / "kernels").exists() or not list((tmp_path / "kernels").iterdir())
        return finding["sentence"]

    assert "AVX-512 VNNI" in reason(replace(fast, features=frozenset({"avx2"})))
    assert "groups of 32 to 1024 inputs in steps of 32, and this model has 24" in reason(group=24)
    assert "no C++ compiler was found" in reason()
    script(compilers / "g++", 'test "$1" = --version && echo "g++ 99" && exit; echo "kernels.cpp: no" >&2; exit 1')
    assert "g++ 99 can't build them: kernels.cpp: no" in reason()
    script(compilers / "g++", 'test "$1" = --version && echo "g++ 99" && exit; kill -9 $$')
    assert "g++ 99 can't build them: no message" in reason()


def test_a_compiler_that_cannot_build_them_is_not_the_last_one(
    compilers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package with a compiler is one of ours, for ziglang has 400 MB, and its compiler is g++."""
    if GXX is None or "avx512_vnni" not in detect().features:
        pytest.skip("g++ or AVX-512 VNNI is missing")
    monkeypatch.setattr(kernels, "ZIG", "another_zig")
    site = tmp_path / "site"
    main, told = site / "another_zig" / "__main__.py", site / "another_zig-9.9.dist-info" / "METADATA"
    for file in (main, told):
        file.parent.mkdir(parents=True)
    told.write_text("Metadata-Version: 2.1\nName: another_zig\nVersion: 9.9\n")
    main.write_text(f"""
import os, subprocess, sys
assert sys.argv[1:4] == ["c++", *{kernels.WITHOUT_LIBRARIES}] and os.environ["ZIG_GLOBAL_CACHE_DIR"]
sys.exit(subprocess.call(["{GXX}", *sys.argv[4:]], env={{"PATH": "/usr/bin:/bin"}}))
""")
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(site)
    script(compilers / "g++", 'test "$1" = --version && echo "g++ 99" && exit; exit 1')
    assert [compiler.version for compiler in kernels.compilers()] == ["g++ 99", "zig 9.9"]
    assert kernels.load(tmp_path / "built", detect(), GROUP).compiler == "zig 9.9"


@pytest.mark.parametrize("unit", (*UNITS, FOLDED), ids=lambda unit: unit.file)
def test_the_passes_need_nothing_of_the_library_of_cxx(unit: Unit, tmp_path: Path) -> None:
    """zig would build its own first."""
    if GXX is None or unit.feature not in detect().features:
        pytest.skip(f"g++ or {unit.feature} is missing")
    without = ["-nostdinc++", "-nodefaultlibs", "-Wl,-z,defs", "-lc", "-lm"]
    source = [f'-DUNIT="{unit.file}"', str(kernels.SOURCE), "-o", str(tmp_path / "passes.so")]
    subprocess.run([GXX, *kernels.FLAGS.split(), "-O1", *source, *without], check=True)
