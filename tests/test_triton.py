"""What a card computes in Triton against torch: on a card for real, elsewhere interpreted in NumPy.

Triton comes with torch for CUDA. On the CPU build it is 641 MB that nothing else needs, so tests/ doesn't install it:
`pip install --target FOLDER triton==3.6.0`, then `PYTHONPATH=FOLDER python -m pytest tests/test_triton.py`.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.packs import open_pack
from engine.torch_backend import fused, int8
from engine.torch_backend.admission import Admission
from tests.test_fused import model, off, velocity
from tests.test_tiles import decoder_of

if importlib.util.find_spec("triton") is None:
    pytest.skip("the package triton is missing: it comes with torch for CUDA", allow_module_level=True)

from engine.torch_backend import decoder_card, triton_card, triton_check
from engine.torch_backend.autoencoder import GroupNorm, channels_last
from engine.torch_backend.triton_card import Wrong
from engine.torch_backend.triton_passes import Tiles, TritonPasses, Ways
from engine.torch_backend.vae import PictureDecoder

ON_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
# many tiles, with a rest in every direction
SMALL = Ways(Tiles(16, 128, 64, 4, 3, True), Tiles(16, 128, 128, 4, 3, True), wide=256)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in NumPy where there is no card (conftest.py)."""
    if ON_CARD:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # NumPy 2.4 makes no number of an array of one, which Triton 3.6 asks of it
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


@pytest.mark.parametrize("tma", [True, False])
def test_every_pass_agrees_with_torch(tma: bool) -> None:
    if ON_CARD and not triton_card.is_hopper(DEVICE) and tma:
        pytest.skip("this card has no descriptors")
    triton_check.check(DEVICE, Ways(SMALL.plain._replace(tma=tma), SMALL.chunked._replace(tma=tma), 1 << 20), group=64)


def test_a_pass_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = TritonPasses.multiply
    monkeypatch.setattr(TritonPasses, "add", lambda self, x, w, gate, out: plain(self, x, w, out))
    with pytest.raises(Wrong, match="a gated sum is .*% off"):
        triton_check.check(DEVICE, SMALL, group=64)


def test_what_cannot_be_compiled_ahead_stands_in_nobodys_way() -> None:
    """It fails again, and says why, when it is used; other kernels can be compiled ahead after it."""
    from triton.runtime import _async_compile

    for _ in range(2):
        with triton_card._compiling():
            mode = _async_compile.active_mode.get()
            mode.submit("kernel", lambda: 1 / 0, print)
        assert _async_compile.active_mode.get() is None and not triton_card._ahead


def test_a_thread_of_a_hopper_card_has_neighbours() -> None:
    """Of 32 places, wgmma's fragment gives one thread of four the pairs 2 q and 2 q + 1 of every eight; of 64, in a
    gated product, eight gates and their values."""
    codes = torch.randint(0, 256, (128, 32), dtype=torch.uint8, device=DEVICE)
    codes &= ~(codes & (codes >> 1) & 0x55)
    weights = int8.weights(codes, torch.rand(128, 1, device=DEVICE) + 0.5, 2)
    passes = TritonPasses(DEVICE, SMALL)
    orders = ("STORED", "BY_THREAD", "PAIRS_BY_THREAD")
    stored, by_thread, pairs = (passes.expand(weights, order).clone() for order in orders)
    for q in range(4):
        mine = [8 * eight + 2 * q + pair for eight in range(4) for pair in range(2)]
        assert torch.equal(by_thread[32:][mine], stored[32 + 8 * q : 32 + 8 * q + 8])
        mine = [8 * eight + 2 * q for eight in range(8)]
        assert torch.equal(pairs[64:][mine], stored[32 + 8 * q : 32 + 8 * q + 8])
        values = [place + 1 for place in mine]
        assert torch.equal(pairs[64:][values], stored[64 + 32 + 8 * q : 64 + 32 + 8 * q + 8])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_fused_blocks_compute_what_blocks_compute(tiny_packs: Path, variant: str) -> None:
    exact = velocity(model(tiny_packs / variant))
    transformer = model(tiny_packs / variant, torch.bfloat16).to(DEVICE)
    admission = Admission(transformer, [TritonPasses(DEVICE, SMALL)])
    fused.install(transformer, admission)
    ours = velocity(transformer, dtype=torch.bfloat16)
    assert ours.dtype == torch.bfloat16 and off(ours, exact) < 0.01
    assert len(admission.layers) == 14 and all(1e-4 < error < 0.02 for error in admission.errors().values())
    admission.settle()
    together, alone = (velocity(transformer, batch, torch.bfloat16) for batch in (3, 1))
    assert off(together[:1], alone) == 0 and off(together[1:2], alone) > 0.01


def picture(channels: int, height: int, width: int, mean: float = 0) -> torch.Tensor:
    """Random features bfloat16 [1, channels, height, width]."""
    x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0)) + mean
    return channels_last(x.bfloat16().to(DEVICE))


def test_what_is_between_convolutions_agrees_with_torch() -> None:
    decoder_card.check(DEVICE)


def test_a_wrong_norm_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_card.Fused, "statistics", lambda self, x, groups: decoder_card.Plain().statistics(x, 1))
    with pytest.raises(Wrong, match="a variance is .*% off"):
        decoder_card.check(DEVICE)


@pytest.mark.parametrize(
    ("channels", "groups", "height", "width"),
    [(128, 32, 37, 53), (96, 32, 16, 16), (16, 2, 1, 1), (24, 8, 3, 50), (384, 32, 9, 9), (128, 1, 130, 130)],
)
def test_statistics_of_groups(channels: int, groups: int, height: int, width: int) -> None:
    x = picture(channels, height, width, 100)  # bfloat16 has steps of a half there
    mean, variance = decoder_card.Fused().statistics(x, groups)
    grouped = x.double().reshape(groups, -1)
    each = channels // groups
    assert (mean - grouped.mean(1).repeat_interleave(each)).abs().max() < 1e-4
    assert (variance - grouped.var(1, correction=0).repeat_interleave(each)).abs().max() < 1e-4


def test_a_norm_in_place_with_recorded_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_card, "passes", decoder_card.Fused)
    x = picture(128, 5, 7)
    norm = GroupNorm(32, 128).to(DEVICE, torch.bfloat16).requires_grad_(False)
    norm.statistics = torch.linspace(-1, 1, 128, device=DEVICE), torch.linspace(0.5, 2, 128, device=DEVICE)
    mean, variance = (each[:, None, None] for each in norm.statistics)
    exact = torch.nn.functional.silu((x.float() - mean) * (variance + norm.eps).rsqrt())
    out = decoder_card.normalising(norm, x)(x, True)
    assert out.data_ptr() == x.data_ptr() and off(out.float(), exact) < 0.004


@pytest.mark.parametrize("tile", [0, 32])
def test_the_decoder_by_its_kernels(tiny_packs: Path, monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    """In float32 where they are interpreted, which cuts numbers to bfloat16 where a card rounds them."""
    component = open_pack(tiny_packs / "dense").vae
    dtype, bound = (torch.bfloat16, 0.02) if ON_CARD else (torch.float32, 1e-5)
    tokens = torch.randn(1, 4 * 3, 64, generator=torch.Generator().manual_seed(0))
    exact = decoder_of(component).image(tokens, (4, 3), tile)
    monkeypatch.setattr(decoder_card, "on_card", lambda x: True)
    monkeypatch.setattr(decoder_card, "passes", decoder_card.Fused)
    monkeypatch.setattr(decoder_card, "STRIP", 1 << 14)
    ours = PictureDecoder(component, dtype, DEVICE).image(tokens.to(DEVICE), (4, 3), tile)
    assert off(ours.cpu(), exact) < bound
