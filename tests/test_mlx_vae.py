"""MLX's autoencoder against torch's and diffusers', whole and in tiles. Every pack has the same one, so one serves."""

from pathlib import Path

import numpy as np
import pytest
import torch

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from engine.mlx_backend.vae import PictureDecoder, PictureEncoder, patchify, unpatchify  # noqa: E402
from engine.packs import Pack, open_pack  # noqa: E402
from engine.torch_backend import vae as torch_vae  # noqa: E402
from engine.types import Cancelled  # noqa: E402

CLOSE = 1e-4


def silent() -> None:
    pass


@pytest.fixture(scope="module")
def pack(tiny_packs: Path) -> Pack:
    return open_pack(tiny_packs / "binary")


@pytest.fixture(scope="module")
def decoder(pack: Pack) -> PictureDecoder:
    return PictureDecoder(pack.vae, mx.float32)


@pytest.fixture(scope="module")
def theirs(pack: Pack) -> torch_vae.PictureDecoder:
    return torch_vae.PictureDecoder(pack.vae, torch.float32, torch.device("cpu"))


def relative_error(found: mx.array | np.ndarray, expected: torch.Tensor) -> float:
    one, other = np.array(found, dtype=np.float64), expected.double().numpy()
    assert one.shape == other.shape and np.linalg.norm(other) > 0
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def tokens(pack: Pack, grid: tuple[int, int]) -> np.ndarray:
    shape = (1, grid[0] * grid[1], pack.transformer.config["in_channels"])
    return np.random.default_rng(4).normal(size=shape).astype(np.float32)


def test_decoded_picture(pack: Pack, decoder: PictureDecoder, theirs: torch_vae.PictureDecoder) -> None:
    x, grid = tokens(pack, (4, 6)), (4, 6)
    expected = theirs.image(torch.from_numpy(x), grid).permute(1, 2, 0)
    assert relative_error(decoder.image(mx.array(x), grid, silent), expected) < CLOSE
    pixels = decoder.decode(mx.array(x), grid, silent)
    assert pixels.shape == (64, 96, 3)
    assert np.abs(pixels.astype(int) - theirs.decode(torch.from_numpy(x), grid, silent)).max() <= 1


def test_a_picture_decoded_in_tiles(pack: Pack, decoder: PictureDecoder, theirs: torch_vae.PictureDecoder) -> None:
    """The same tiles and statistics as torch's, and a later picture in one piece knows nothing of them."""
    x, grid = tokens(pack, (4, 8)), (4, 8)
    whole = decoder.image(mx.array(x), grid, silent)
    expected = theirs.image(torch.from_numpy(x), grid, 64).permute(1, 2, 0)
    assert relative_error(decoder.image(mx.array(x), grid, silent, 64), expected) < CLOSE
    assert np.array_equal(decoder.image(mx.array(x), grid, silent), whole)
    assert np.array_equal(decoder.image(mx.array(x), grid, silent, 128), whole)  # it fits into one tile


def test_a_cancel_between_tiles_leaves_nothing_behind(pack: Pack, decoder: PictureDecoder) -> None:
    x, grid = mx.array(tokens(pack, (4, 8))), (4, 8)
    whole = decoder.image(x, grid, silent)
    for calls in (2, 7):  # while statistics are taken, and within a tile
        left = iter([None] * calls)

        def check(left=left) -> None:  # type: ignore[no-untyped-def]
            if next(left, True):
                raise Cancelled("stop")

        with pytest.raises(Cancelled):
            decoder.image(x, grid, check, 64)
    assert np.array_equal(decoder.image(x, grid, silent), whole)


def test_patches_there_and_back() -> None:
    x = mx.arange(2 * 3 * 32).reshape(1, 6, 32)
    assert mx.array_equal(patchify(unpatchify(x, (2, 3))), x)


@torch.inference_mode()
def test_encoded_picture(pack: Pack) -> None:
    """Against diffusers' encoder, patched and normalised as its pipeline does."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

    vae = AutoencoderKLFlux2.from_config(pack.vae.config).eval()
    vae.load_state_dict({name: torch.from_numpy(np.array(pack.vae.tensors.numpy(name))) for name in pack.vae.tensors})
    pixels = np.random.default_rng(6).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    picture = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    latents = Flux2KleinPipeline._patchify_latents(vae.encode(picture).latent_dist.mode())
    scale = (vae.bn.running_var + pack.vae.config["batch_norm_eps"]).sqrt().view(1, -1, 1, 1)
    expected = ((latents - vae.bn.running_mean.view(1, -1, 1, 1)) / scale).flatten(2).transpose(1, 2)
    assert relative_error(PictureEncoder(pack.vae, mx.float32).encode(pixels, silent), expected) < CLOSE
