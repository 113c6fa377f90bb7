"""What a request is completed to, what is refused with which words, and where it runs for which reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from engine import plan
from engine.hardware import Hardware
from engine.packs import Pack, open_pack
from engine.types import BadRequest, Request
from tests.packs.writers import write_pack

CPU = Hardware("cpu", "EPYC", 8 << 30, 2, frozenset({"avx2"}), "cpu: EPYC, 2 cores")
MODERN = replace(CPU, name="AMD EPYC 9R14", features=frozenset({"avx2", "avx512_bf16"}))
INTEL = replace(MODERN, name="Intel Xeon")
AMX = replace(INTEL, features=INTEL.features | {"amx_bf16"})
CUDA = Hardware("cuda", "NVIDIA H200", 140 << 30, 16, frozenset(), "cuda: NVIDIA H200")
MAC = Hardware("mps", "Apple M4", 24 << 30, 10, frozenset(), "mps: Apple M4, Apple Silicon")


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return open_pack(write_pack(tmp_path_factory.mktemp("packs") / "tiny", "ternary"))


def request(**changes: object) -> Request:
    return replace(Request("a red circle", "tiny"), **changes)  # type: ignore[arg-type]


def test_open_fields_are_filled_from_the_pack_and_stay(pack: Pack) -> None:
    complete = plan.complete(request(), pack)
    assert (complete.width, complete.height, complete.steps) == (64, 64, 4)
    assert plan.complete(complete, pack) == complete
    asked = request(seed=5, width=96, height=64, steps=7)
    assert plan.complete(asked, pack) == asked


def test_without_a_pack_the_real_models_values_hold() -> None:
    complete = plan.complete(request(), None)
    assert (complete.width, complete.height, complete.steps) == (512, 512, 4)
    assert plan.token_side(None) == 16


def test_a_size_that_is_not_declared_but_possible_is_made(pack: Pack) -> None:
    assert plan.token_side(pack) == 16
    assert plan.complete(request(width=128, height=32), pack).width == 128
    assert plan.complete(request(width=2048, height=2048), pack).height == 2048


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n\t"}, "the prompt is empty"),
        ({"prompt": "x" * 20_001}, "has 20001 characters: give at most 20000"),
        ({"prompt": "a\udcff"}, "character 2 of the prompt"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**63}, f"seed {2**63} is out of range"),
        ({"steps": 0}, "0 steps .* 1 to 50"),
        ({"steps": 51}, "51 steps .* 1 to 50"),
        ({"width": 127, "height": 128}, "127x128 is impossible: .* multiples of 32; .* 64x64, 32x32, 96x64"),
        ({"width": 0, "height": 0}, "0x0 is impossible"),
        ({"width": -32, "height": 64}, "-32x64 is impossible"),
        ({"width": 16, "height": 16}, "16x16 is impossible"),
        ({"width": 2048, "height": 2080}, "2048x2080 is too large: at most 4194304 pixels"),
        ({"width": 64}, "width 64 alone"),
        ({"height": 96}, "height 96 alone"),
    ],
)
def test_the_impossible_is_refused_in_one_sentence(pack: Pack, changes: dict, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as refusal:
        plan.complete(request(**changes), pack)
    assert "\n" not in str(refusal.value)


def test_largest_seed_and_declared_sizes_pass(pack: Pack) -> None:
    plan.complete(request(seed=2**63 - 1), pack)
    for width, height in pack.notes.sizes:
        plan.complete(request(width=width, height=height), pack)


def test_a_small_pack_runs_in_float32_on_every_cpu(pack: Pack) -> None:
    old, modern = plan.plan(CPU, pack, request()), plan.plan(MODERN, pack, request())
    for chosen in (old, modern):
        assert (chosen.backend, chosen.device, chosen.dtype) == ("torch", "cpu", "float32")
    assert "no bfloat16 arithmetic" in old.why and old.why.startswith(CPU.reason)
    assert "are under 268 MB" in modern.why


def test_a_big_pack_runs_in_bfloat16_where_the_cpu_multiplies_it(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BIG_TRANSFORMER", pack.transformer.bytes_on_disk)
    assert plan.plan(CPU, pack, request()).dtype == "float32"
    chosen = plan.plan(MODERN, pack, request())
    assert chosen.dtype == "bfloat16" and "avx512_bf16" in chosen.why
    assert plan.plan(AMX, pack, request()).dtype == "bfloat16"
    chosen = plan.plan(INTEL, pack, request())
    assert chosen.dtype == "float32" and "faster than bfloat16" in chosen.why


def test_cuda_is_used_when_torch_can(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "torch_has_cuda", lambda: True)
    chosen = plan.plan(CUDA, pack, request())
    assert (chosen.backend, chosen.device, chosen.dtype) == ("torch", "cuda", "bfloat16")
    assert chosen.why.startswith("cuda: NVIDIA H200")
    monkeypatch.setattr(plan, "torch_has_cuda", lambda: False)
    chosen = plan.plan(CUDA, pack, request())
    assert chosen.device == "cpu" and "NVIDIA H200 is idle, because torch is a build without CUDA" in chosen.why


def test_apple_silicon_uses_mlx_where_it_is_installed(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "installed", lambda package: True)
    chosen = plan.plan(MAC, pack, request())
    assert (chosen.backend, chosen.device, chosen.dtype) == ("mlx", "mps", "bfloat16")
    assert chosen.why.startswith(MAC.reason) and 0 < chosen.working_bytes < chosen.peak_bytes
    asked = plan.plan(MAC, pack, request(), "torch")
    assert (asked.backend, asked.device) == ("torch", "cpu") and "GPU is idle, because torch was asked" in asked.why
    monkeypatch.setattr(plan, "installed", lambda package: False)
    without = plan.plan(MAC, pack, request())
    assert (without.backend, without.device) == ("torch", "cpu") and "pip install mlx" in without.why


def test_mlx_elsewhere_only_when_asked(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "installed", lambda package: True)
    assert plan.choose_backend(CPU, "auto") == "torch"
    chosen = plan.plan(CPU, pack, request(), "mlx")
    assert (chosen.backend, chosen.device, chosen.dtype) == ("mlx", "cpu", "float32") and "slow on a CPU" in chosen.why
    monkeypatch.setattr(plan, "mlx_has_cuda", lambda: False)
    assert plan.plan(CUDA, pack, request(), "mlx").device == "cpu"
    monkeypatch.setattr(plan, "mlx_has_cuda", lambda: True)
    assert plan.plan(CUDA, pack, request(), "mlx").device == "cuda"


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        (CPU, r"needs the package mlx.*cpu: EPYC.*pip install 'mlx\[cpu\]'"),
        (MAC, "needs the package mlx.*pip install mlx,"),
        (replace(CPU, reason="cpu: Intel Core i7; an Intel Mac, whose GPU MLX cannot use"), "Intel Mac.*use --backend"),
    ],
)
def test_mlx_that_is_not_there_is_refused(
    pack: Pack, monkeypatch: pytest.MonkeyPatch, hardware: Hardware, words: str
) -> None:
    monkeypatch.setattr(plan, "installed", lambda package: False)
    with pytest.raises(BadRequest, match=words):
        plan.plan(hardware, pack, request(), "mlx")


def test_what_is_installed_is_found_out_without_importing() -> None:
    assert plan.installed("numpy") and not plan.installed("no_such_package")


def test_backends_by_name(pack: Pack) -> None:
    assert plan.plan(CPU, pack, request(), "torch").backend == "torch"
    assert plan.plan(CPU, pack, request(), "fake").backend == "fake"
    with pytest.raises(BadRequest, match="unknown backend 'tpu'; known: auto, torch, mlx, fake"):
        plan.plan(CPU, pack, request(), "tpu")


@pytest.mark.parametrize(
    ("line", "has"), [("cuda: Optional[str] = None", False), ("cuda: Optional[str] = '13.0'", True), ("x = '1'", False)]
)
def test_torch_is_asked_for_cuda_without_importing_it(monkeypatch, tmp_path: Path, line: str, has: bool) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\nhip: Optional[str] = '6'\n")

    class Found:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: Found)
    assert plan.torch_has_cuda() is has


def test_what_torch_says_of_itself_agrees() -> None:
    import torch

    assert plan.torch_has_cuda() == (torch.version.cuda is not None)


def test_memory_that_suffices_changes_nothing_but_the_words(pack: Pack) -> None:
    unknown, plenty = plan.plan(replace(CPU, memory_bytes=0), pack, request()), plan.plan(CPU, pack, request())
    assert replace(unknown, why="") == replace(plenty, why="")
    assert 250e6 < plenty.peak_bytes < 500e6  # the libraries and a tiny model
    assert plenty.why.endswith("of 8.6 GB")
    assert plenty.keep_text_encoder and "stays in memory" in plenty.why


def test_big_pictures_are_decoded_in_tiles_on_a_cpu(pack: Pack) -> None:
    assert plan.plan(CPU, pack, request(width=512, height=512)).vae_tile == 0
    assert plan.plan(CPU, pack, request(width=544, height=512)).vae_tile == 512


def test_a_big_text_encoder_leaves_a_cpu_and_stays_on_a_card(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BIG_ENCODER", 1)
    monkeypatch.setattr(plan, "torch_has_cuda", lambda: True)
    chosen = plan.plan(CPU, pack, request())
    assert not chosen.keep_text_encoder and "leaves memory after each new prompt" in chosen.why
    assert chosen.hand_back
    ways, room = [], 0
    for _ in range(3):
        ways.append(plan.plan(CUDA, pack, request(width=512, height=512), available=room))
        room = ways[-1].peak_bytes - 1
    assert [(way.keep_text_encoder, way.hand_back) for way in ways] == [(True, False), (False, False), (False, True)]


def test_a_card_multiplies_a_big_pack_as_bytes_where_that_was_measured_faster(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "torch_has_cuda", lambda: True)
    rates = {"float32": 0.0, "bfloat16": 600e3, "int8": 750e3}
    assert not plan.plan(CUDA, pack, request(), rates=rates).int8  # a small one
    monkeypatch.setattr(plan, "BIG_TRANSFORMER", 1)
    chosen = plan.plan(CUDA, pack, request(), rates=rates)
    assert chosen.int8 and "int8 at 750000 GFLOP/s for the layers that bear it" in chosen.why
    slow = plan.plan(CUDA, pack, request(), rates=rates | {"int8": 0.0})
    assert not slow.int8 and "its 0 GFLOP/s are under 1.2 times the 600000" in slow.why
    assert "int8 is measured before the first picture" in plan.plan(CUDA, pack, request()).why


def test_tiles_come_before_a_refusal(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    # a tiny pack decodes with less than it denoises
    monkeypatch.setattr(plan.memory, "token_bytes", lambda *_: 1)
    monkeypatch.setattr(plan.memory, "SCRATCH", 0)
    big = request(width=2048, height=2048)
    needed = plan.plan(CPU, pack, big).peak_bytes
    tighter = plan.plan(CPU, pack, big, available=needed - 1)
    assert 0 < tighter.vae_tile < 512 and tighter.peak_bytes < needed


def test_what_cannot_fit_is_refused_with_the_largest_size_that_would(pack: Pack) -> None:
    room = plan.plan(CPU, pack, request(width=768, height=384), available=1 << 40).peak_bytes
    with pytest.raises(BadRequest) as refusal:
        plan.plan(CPU, pack, request(width=2048, height=1024), available=room)
    words = str(refusal.value)
    assert words.startswith("a 2048x1024 picture with tiny needs ") and "\n" not in words
    width, height = (int(side) for side in words.rpartition(" ")[2].split("x"))
    assert width == 2 * height and width >= 768
    plan.plan(CPU, pack, request(width=width, height=height), available=room)
    with pytest.raises(BadRequest):
        plan.plan(CPU, pack, request(width=width + 64, height=height + 32), available=room)


def test_a_machine_too_small_for_the_model_is_told_so(pack: Pack) -> None:
    with pytest.raises(BadRequest, match="no smaller size fits: close other programs or choose a smaller model"):
        plan.plan(CPU, pack, request(), available=100 << 20)
