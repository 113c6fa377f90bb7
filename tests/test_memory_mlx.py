"""The predicted memory of MLX: against what its allocator counts on the CPU, and sums of the real model by hand."""

from pathlib import Path

import pytest

from engine import memory_mlx, plan
from engine.hardware import Hardware
from engine.packs import open_pack
from engine.types import Picture, Request

MAC = Hardware("mps", "Apple M4", 24 << 30, 10, frozenset(), "mps: Apple M4, Apple Silicon")
CPU = Hardware("cpu", "test processor", 0, 1, frozenset(), "cpu: test processor")


@pytest.mark.parametrize("variant", ["ternary", "dense"])
def test_the_peak_stays_within_the_plan(tiny_packs: Path, tmp_path: Path, variant: str) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")
    from engine.mlx_backend.backend import MlxBackend

    request = Request("two red circles", str(tiny_packs / variant), width=96, height=64, steps=1)
    decided = plan.plan(CPU, open_pack(tiny_packs / variant), request, "mlx")
    mx.clear_cache()
    others = mx.get_active_memory()  # of other tests in this process
    *_, picture = MlxBackend(CPU, tmp_path).generate(request, lambda: False)
    assert isinstance(picture, Picture)
    assert 0.1 * decided.peak_bytes < picture.peak_memory_bytes - others <= decided.peak_bytes


def test_parts_of_a_tiny_pack(tiny_packs: Path) -> None:
    pack = open_pack(tiny_packs / "ternary")
    half = memory_mlx.need(pack, (64, 64), 16, "bfloat16", cpu=False, tile=0)
    exact = memory_mlx.need(pack, (64, 64), 16, "float32", cpu=False, tile=0)
    words = sum(info.nbytes for info in pack.transformer.tensors.values() if info.dtype == "U32")
    assert exact.transformer - words == 2 * (half.transformer - words) and half.libraries == 0
    assert half.transformer == sum(info.nbytes for info in pack.transformer.tensors.values())  # as it lies in the file
    on_cpu = memory_mlx.need(pack, (64, 64), 16, "float32", cpu=True, tile=0)
    assert on_cpu.decoding > exact.decoding and on_cpu.denoising > exact.denoising


def test_tiles_bound_the_decoding(tiny_packs: Path) -> None:
    pack = open_pack(tiny_packs / "binary")
    whole, tiled, larger = (
        memory_mlx.need(pack, size, 16, "bfloat16", cpu=False, tile=tile)
        for size, tile in (((1024, 1024), 0), ((1024, 1024), 256), ((2048, 2048), 256))
    )
    assert tiled.decoding < whole.decoding / 4 and larger.decoding == tiled.decoding


def test_a_mac_decodes_big_pictures_in_tiles(tiny_packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "installed", lambda package: True)
    pack = open_pack(tiny_packs / "binary")
    small, big = (plan.plan(MAC, pack, Request("a", "tiny", width=side, height=side)) for side in (512, 1024))
    assert (small.backend, small.vae_tile, big.vae_tile) == ("mlx", 0, 512)
