"""Decoding in tiles against decoding in one piece: how far apart, no seams, bounded memory, stopping between tiles."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from engine import memory
from engine.catalog import SHIPPED
from engine.packs import Component, open_pack
from engine.torch_backend import autoencoder, decoder_card, vae
from engine.torch_backend.vae import PictureDecoder, mosaic, spans
from engine.types import Cancelled
from tests.packs.writers import Dims, write_pack
from tests.peak import PeakMemory

SIDE = 16  # pixels of an image token


def silent() -> None:
    pass


def decoder_of(component: Component, dtype: torch.dtype = torch.float32) -> PictureDecoder:
    return PictureDecoder(component, dtype, torch.device("cpu"))


def painted(size: int) -> torch.Tensor:
    """A picture [1, 3, size, size] with slopes, edges, a bright corner, and texture in its lower half only."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size] / size
    picture = np.stack([x, y, 1 - x * y]) * 1.2 - 0.6
    for _ in range(25):
        across, down, radius = rng.random(3) * [1, 1, 0.12]
        picture[:, (x - across) ** 2 + (y - down) ** 2 < radius**2] = rng.uniform(-1, 1, 3)[:, None]
    picture += 0.15 * np.sin(x * 200) * (y > 0.4)
    return torch.tensor(picture[None], dtype=torch.float32).clamp(-1, 1)


@pytest.fixture(scope="module")
def trained() -> tuple[PictureDecoder, torch.Tensor]:
    """The seedling's decoder, sensitive with its two big groups a norm, and the tokens of a 1024 x 1024 picture."""
    from diffusers import AutoencoderKLFlux2
    from safetensors.torch import load_file

    component = open_pack(SHIPPED / "seedling-dense").vae
    whole = AutoencoderKLFlux2.from_config(component.config)
    whole.load_state_dict(load_file(component.files[0]))
    with torch.inference_mode():
        latents = whole.encode(painted(1024)).latent_dist.mode()
    tokens = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT.contiguous()
    scale = (whole.bn.running_var + component.config["batch_norm_eps"]).sqrt()
    return decoder_of(component), (tokens - whole.bn.running_mean) / scale


def seam(apart: np.ndarray, border: int, axis: int) -> float:
    """How far the difference jumps across a border, in units of its largest jump within 16 pixels on either side."""
    jumps = np.abs(np.diff(apart, axis=axis)).mean(axis=tuple({0, 1, 2} - {axis}))
    return jumps[border - 1] / max(*jumps[border - 17 : border - 1], *jumps[border : border + 16])


def test_tiles_are_close_to_one_piece_and_have_no_seam(
    trained: tuple[PictureDecoder, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, tokens = trained
    whole = decoder.image(tokens, (32, 32)).permute(1, 2, 0).numpy()
    tiled = decoder.image(tokens, (32, 32), 512).permute(1, 2, 0).numpy()
    assert whole.std() * 127.5 > 30 and np.abs(tiled - whole).mean() * 127.5 < 2
    assert max(seam(tiled - whole, 512, axis) for axis in (0, 1)) < 1.2
    again = decoder.image(tokens, (32, 32)).permute(1, 2, 0).numpy()
    assert np.array_equal(again, whole)  # no tile's statistics stay behind
    monkeypatch.setattr(vae, "TILE_HALO", 0)  # without its surroundings a tile's border shows
    cut = decoder.image(tokens, (32, 32), 512).permute(1, 2, 0).numpy()
    assert max(seam(cut - whole, 512, axis) for axis in (0, 1)) > 2


def test_a_picture_no_larger_than_a_tile_is_decoded_in_one_piece(trained: tuple[PictureDecoder, torch.Tensor]) -> None:
    decoder, tokens = trained
    part = tokens.unflatten(1, (32, 32))[:, :16, :8].reshape(1, 128, -1)
    assert np.array_equal(decoder.decode(part, (16, 8), silent), decoder.decode(part, (16, 8), silent, 512))


@pytest.mark.slow
def test_bfloat16_tiles(trained: tuple[PictureDecoder, torch.Tensor]) -> None:
    _, tokens = trained
    decoder = decoder_of(open_pack(SHIPPED / "seedling-dense").vae, torch.bfloat16)
    apart = np.abs(decoder.decode(tokens, (32, 32), silent, 512).astype(int) - decoder.decode(tokens, (32, 32), silent))
    assert apart.mean() < 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PictureDecoder:
    return decoder_of(open_pack(write_pack(tmp_path_factory.mktemp("packs") / "tiny", "binary", Dims())).vae)


def peak(decoder: PictureDecoder, size: int, tile: int) -> int:
    grid = (size // SIDE, size // SIDE)
    tokens = torch.randn(1, math.prod(grid), 64)
    with PeakMemory() as memory:
        decoder.decode(tokens, grid, silent, tile)
    return memory.peak - 3 * 4 * size**2  # the finished picture itself


def test_memory_is_bounded_by_the_tile(tiny: PictureDecoder) -> None:
    one, four = peak(tiny, 256, 0), peak(tiny, 512, 0)
    assert four > 3 * one
    tiled, tiled_four = peak(tiny, 256, 64), peak(tiny, 512, 64)
    assert tiled_four < 0.4 * four
    assert tiled_four < 2 * tiled


def test_every_tile_asks_whether_to_stop(tiny: PictureDecoder) -> None:
    tokens = torch.randn(1, 32 * 32, 64)
    calls: list[int] = []

    def stop_at(count: int) -> None:
        calls.append(1)
        if len(calls) == count:
            raise Cancelled("stopped")

    tiny.decode(tokens, (32, 32), lambda: stop_at(0), 128)
    upper = 4  # blocks, of each tile and of the pass for the statistics, after the block in the middle
    assert len(calls) == 1 + upper + 16 * upper
    calls.clear()
    with pytest.raises(Cancelled):
        tiny.decode(tokens, (32, 32), lambda: stop_at(3 * upper), 128)
    assert len(calls) == 3 * upper
    assert all(norm.statistics is None for norm in tiny._norms)


@pytest.mark.parametrize("channels", [(8, 8, 16, 16), (8, 8, 8, 16, 16)])
def test_a_tile_sees_what_its_convolutions_do(
    channels: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same statistics everywhere, tiles are the whole picture, however many levels there are."""
    dims = Dims(vae_channels=channels, vae_decoder_channels=channels)
    decoder = decoder_of(open_pack(write_pack(tmp_path / "pack", "binary", dims)).vae)

    def fixed(*_: object) -> None:
        for norm in decoder._norms:
            norm.statistics = torch.zeros(norm.num_channels), torch.ones(norm.num_channels)

    monkeypatch.setattr(decoder, "_record_statistics", fixed)
    torch.manual_seed(0)
    features, decoder._check = torch.randn(1, channels[-1], 40, 40), silent
    fixed()
    with torch.inference_mode():
        whole = decoder._high_levels(features)[0]
        apart = (decoder._tiled(features, 20) - whole).abs().max() / whole.abs().max()
        monkeypatch.setattr(vae, "TILE_HALO", 2)  # what 64 pixels are of five levels
        cut = (decoder._tiled(features, 20) - whole).abs().max() / whole.abs().max()
    assert apart < 1e-5 < cut


@pytest.mark.parametrize("strip", [1 << 12, 1 << 14, 1 << 30])
def test_a_card_decodes_the_same_in_strips(tiny: PictureDecoder, monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    """By torch alone, without Triton (test_triton.py), on the CPU; from single rows to everything at once."""
    tokens = torch.randn(1, 6 * 4, 64, generator=torch.Generator().manual_seed(0))
    whole = tiny.image(tokens, (6, 4))
    monkeypatch.setattr(decoder_card, "on_card", lambda x: True)
    monkeypatch.setattr(decoder_card, "passes", decoder_card.Plain)
    monkeypatch.setattr(decoder_card, "STRIP", strip)
    monkeypatch.setattr(decoder_card, "SCORES", strip)  # of 96 pixels with all: 37 kB
    assert (tiny.image(tokens, (6, 4)) - whole).abs().max() < 1e-4 * whole.abs().max()


class Alive(TorchDispatchMode):
    """The most bytes alive of what was made in it, counted on the device `meta`, where nothing has values."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = call(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            storage = StorageWeakRef(made.untyped_storage())
            self.storages[storage.cdata] = storage, made.untyped_storage().nbytes()
        self.storages = {key: each for key, each in self.storages.items() if not each[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return made


class Lean(decoder_card.Plain):
    """Makes what the kernels make, and nothing else."""

    def statistics(self, x: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(x.shape[1]), torch.empty(x.shape[1])

    def normed(self, x: torch.Tensor, norm: Any, found: Any, silu: bool, spent: bool) -> torch.Tensor:
        return x if spent else torch.empty_like(x)

    def add(self, x: torch.Tensor, bias: Any, beside: Any, out: torch.Tensor) -> torch.Tensor:
        return out


@pytest.mark.parametrize(("side", "most"), [(1024, 1.1e9), (512, 0.36e9)])
def test_the_real_decoder_on_a_card_takes_what_is_predicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, most: float
) -> None:
    pack = open_pack(write_pack(tmp_path / "pack", "binary", Dims()))
    config = pack.vae.config | {
        "block_out_channels": [128, 256, 512, 512], "decoder_block_out_channels": None, "norm_num_groups": 32,
        "latent_channels": 32, "layers_per_block": 2,
    }  # fmt: skip
    pack = replace(pack, vae=replace(pack.vae, config=config))
    monkeypatch.setattr(decoder_card, "on_card", lambda x: True)
    monkeypatch.setattr(decoder_card, "passes", Lean)
    latents = torch.empty(1, 32, side // 8, side // 8, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        decoder = autoencoder.Decoder(config).to(torch.bfloat16, memory_format=torch.channels_last)
        with torch.no_grad(), Alive() as alive:
            decoder.high_levels(decoder.low_levels(latents, silent), silent)
    predicted = memory.need(pack, (side, side), SIDE, "bfloat16", cpu=False, tile=0).decoding
    assert 0.9 < alive.peak / predicted < 1.02 and alive.peak < most


def test_attention_in_strips() -> None:
    query, key, value = torch.randn(3, 77, 512, generator=torch.Generator().manual_seed(0)) * 3
    exact = torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None])[0]
    assert (decoder_card.attended(query, key, value) - exact).abs().max() < 1e-4


def test_spans_cover_everything_once() -> None:
    for length, most in ((64, 64), (65, 64), (7, 3), (128, 48), (1, 5)):
        pieces = spans(length, most)
        assert [stop for _, stop in pieces[:-1]] == [start for start, _ in pieces[1:]]
        assert pieces[0][0] == 0 and pieces[-1][1] == length
        assert all(0 < stop - start <= most for start, stop in pieces)


def test_a_mosaic_takes_patches_from_everywhere() -> None:
    assert mosaic(16, 1).tolist() == list(range(16))
    assert mosaic(32, 2).tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31]
    assert len(mosaic(128, 3)) in range(40, 48)


def test_statistics_for_a_card_are_the_group_norms() -> None:
    x = autoencoder.channels_last(torch.randn(1, 32, 9, 7, generator=torch.Generator().manual_seed(0)) + 3)
    mean, variance = decoder_card.Plain().statistics(x, 8)
    ours = torch.nn.functional.batch_norm(x, mean, variance, eps=1e-6)
    assert (ours - torch.nn.functional.group_norm(x, 8, eps=1e-6)).abs().max() < 1e-4
