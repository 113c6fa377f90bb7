"""The predicted bytes: sums that agree with the files, and formulas that move the way memory does."""

from pathlib import Path

import pytest

from engine import memory
from engine.packs import Pack, open_pack


@pytest.fixture(scope="module")
def packs(tiny_packs: Path) -> dict[str, Pack]:
    return {variant: open_pack(tiny_packs / variant) for variant in ("ternary", "binary", "dense")}


def need(pack: Pack, size: tuple[int, int] = (64, 64), **changes: object) -> memory.Need:
    return memory.need(pack, size, 16, **{"dtype": "float32", "cpu": True, "tile": 0} | changes)  # type: ignore[arg-type]


def test_packed_layers_stay_packed_in_memory(packs: dict[str, Pack]) -> None:
    dense, ternary, binary = (
        memory.component_bytes(packs[variant].transformer, "float32") for variant in ("dense", "ternary", "binary")
    )
    # The same parameters: dense ones take 4 bytes, packed ones 2/8 or 1/8 and 4/128 for scale and bias.
    pack = packs["ternary"].transformer
    codes = [name.removesuffix(".scales") for name in pack.tensors if name.endswith(".scales")]
    packed = sum(pack.tensors[f"{name}.weight"].nbytes * 4 for name in codes)
    assert dense - ternary == pytest.approx(packed * (4 - 2 / 8 - 4 / 128))
    assert ternary - binary == pytest.approx(packed / 8)
    assert memory.component_bytes(packs["dense"].transformer, "bfloat16") == dense / 2


def test_only_the_layers_that_are_read_count(packs: dict[str, Pack]) -> None:
    """The tiny encoder has four layers and its last state is the third's."""
    pack = packs["ternary"]
    tensors = pack.text_encoder.tensors.items()
    read = tuple(f"model.layers.{number}." for number in range(3))
    assert memory.encoder_bytes(pack, "bfloat16") == sum(info.nbytes for name, info in tensors if name.startswith(read))


def test_more_pixels_need_more_until_tiles_bound_them(packs: dict[str, Pack]) -> None:
    pack = packs["ternary"]
    small, big = need(pack, (1024, 1024)), need(pack, (2048, 2048))
    assert big.decoding == pytest.approx(4 * small.decoding)
    assert big.denoising > 2 * small.denoising
    tiled, tiled_big = need(pack, (1024, 1024), tile=256), need(pack, (2048, 2048), tile=256)
    assert tiled.decoding < small.decoding / 3
    assert tiled_big.decoding < big.decoding / 6


def test_keeping_the_text_encoder_costs_its_bytes(packs: dict[str, Pack]) -> None:
    needed = need(packs["ternary"], (1024, 1024))
    assert needed.peak(True) - needed.peak(False) == needed.encoder
    assert need(packs["ternary"], cpu=False).libraries == 0


def test_a_card_holds_its_weights_and_recorded_steps_unless_they_are_handed_back(packs: dict[str, Pack]) -> None:
    cpu, card = (need(packs["ternary"], (1024, 1024), cpu=cpu) for cpu in (True, False))
    assert card.decoding > card.denoising > 0
    rest = cpu.peak(False) - cpu.libraries - cpu.decoding
    assert card.peak(False, hand_back=True) == rest + card.decoding
    assert card.peak(False) == rest + card.decoding + card.denoising
    assert card.peak(True) == card.peak(False) + card.encoder + card.encoding
    reading = need(packs["ternary"], (16, 16), cpu=False)
    weights = reading.transformer + reading.decoder + reading.recorded
    bytes_too = need(packs["ternary"], (1024, 1024), cpu=False, int8=True, dtype="bfloat16")
    assert memory.SCRATCH < bytes_too.recorded < bytes_too.denoising
    assert reading.peak(False) == reading.encoder + reading.encoding + weights
