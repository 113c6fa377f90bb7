"""Our MLX parts against mlx-vlm's FLUX.2, written by other people: same random weights, same answers.

Only where mlx-vlm's files lie: `pip install --no-deps mlx-vlm`. What it depends on is heavy and not needed, since its
packages are entered without running their __init__. Its Bonsai runtime (models/bonsai) needs Metal and cannot run here.
"""

import importlib
import importlib.util
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from mlx import nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from engine.mlx_backend import text_encoder, transformer, vae  # noqa: E402

pytestmark = pytest.mark.slow
CLOSE = 1e-4
GRID, TEXT = (4, 6), 7
CONFIG = {
    "attention_head_dim": 64, "axes_dims_rope": [16] * 4, "eps": 1e-6, "in_channels": 16, "joint_attention_dim": 48,
    "mlp_ratio": 3.0, "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 2, "out_channels": None,
    "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip
VAE = {
    "block_out_channels": [32, 32, 64, 64], "decoder_block_out_channels": [32, 32, 32, 64], "in_channels": 3,
    "latent_channels": 32, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "patch_size": [2, 2],
}  # fmt: skip
QWEN = {
    "head_dim": 32, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "vocab_size": 96,
}  # fmt: skip


@pytest.fixture(scope="module")
def vlm() -> Iterator[Callable[[str], Any]]:
    """Imports a module of mlx_vlm.models.flux2 by the rest of its name."""
    found = importlib.util.find_spec("mlx_vlm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("mlx-vlm is not installed: pip install --no-deps mlx-vlm")
    if shutil.which("g++") is None:
        pytest.skip("mlx-vlm's activations are compiled, which needs g++ on the CPU")
    root = Path(found.submodule_search_locations[0])
    before = set(sys.modules)
    for name in ("mlx_vlm", "mlx_vlm.models", "mlx_vlm.models.flux2"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    importlib.import_module("mlx_vlm.models.flux2.constants").ModelConfig.precision = mx.float32
    yield lambda name: importlib.import_module(f"mlx_vlm.models.flux2.{name}")
    for name in set(sys.modules) - before:
        del sys.modules[name]


def share(theirs: nn.Module, ours: nn.Module, renamed: dict[str, str]) -> None:
    """Give both the same random weights; `renamed` turns their names into ours, by regular expressions."""
    rng = np.random.default_rng(3)
    for module in (theirs, ours):
        module.apply(lambda tensor: tensor.astype(mx.float32) if mx.issubdtype(tensor.dtype, mx.floating) else tensor)
    weights = {}
    for name, tensor in tree_flatten(theirs.parameters()):
        norm = "norm" in name or name.endswith("running_var")
        values = rng.uniform(0.5, 1.5, tensor.shape) if norm else rng.normal(0, 0.08, tensor.shape)
        weights[name] = mx.array(values.astype(np.float32))
    theirs.load_weights(list(weights.items()))
    mine = {}
    for name, tensor in weights.items():
        for one, other in renamed.items():
            name = re.sub(one, other, name)
        mine[name] = tensor
    ours.load_weights([(name, mine[name]) for name, _ in tree_flatten(ours.parameters())])


def relative_error(found: mx.array, expected: mx.array) -> float:
    one, other = np.array(found, dtype=np.float64), np.array(expected, dtype=np.float64)
    assert one.shape == other.shape and np.linalg.norm(other) > 0
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def random(*shape: int) -> mx.array:
    return mx.array(np.random.default_rng(8).normal(size=shape).astype(np.float32))


def silent() -> None:
    pass


def test_transformer(vlm: Callable[[str], Any]) -> None:
    known = {key: value for key, value in CONFIG.items() if key not in ("eps", "out_channels")}
    theirs = vlm("transformer.transformer").Flux2Transformer(**known)
    ours = transformer.Flux2Transformer2DModel.from_config(CONFIG)
    share(theirs, ours, {r"(^transformer.*to_out)": r"\1.0", r"(embed)\.(linear)": r"\1.timestep_embedder.\2"})
    x, text, timestep = random(1, GRID[0] * GRID[1], 16), random(1, TEXT, 48), mx.array([0.717])
    img_ids, txt_ids = transformer.token_ids(TEXT, GRID)
    expected = theirs(x, text, timestep, mx.array(img_ids), mx.array(txt_ids))
    assert relative_error(ours(x, text, timestep, img_ids, txt_ids, silent), expected) < CLOSE


def test_text_encoder(vlm: Callable[[str], Any]) -> None:
    theirs = vlm("qwen.text_encoder").Qwen3TextEncoder(num_hidden_layers=3, **QWEN)
    ours = text_encoder.Qwen3Model(QWEN, 3)
    frequencies = theirs.rotary_emb.inv_freq
    share(theirs, ours, {})
    theirs.rotary_emb.inv_freq = frequencies
    ids, mask = np.arange(12)[None] % 5, np.array([[1] * 9 + [0] * 3])
    expected = theirs.get_prompt_embeds(mx.array(ids), mx.array(mask), (1, 2, 3))
    encoder = text_encoder.TextEncoder.__new__(text_encoder.TextEncoder)  # without files
    encoder.model, encoder.hidden_states = ours, (1, 2, 3)
    assert relative_error(encoder.encode(ids, mask, silent), expected) < CLOSE


def test_autoencoder(vlm: Callable[[str], Any]) -> None:
    theirs = vlm("vae.vae").Flux2VAE(
        tuple(VAE["decoder_block_out_channels"]),
        include_encoder=True,
        encoder_block_out_channels=tuple(VAE["block_out_channels"]),
    )
    decoder, encoder = vae.AutoencoderKLFlux2(VAE, "decoder"), vae.AutoencoderKLFlux2(VAE, "encoder")
    for half in (decoder, encoder):
        share(theirs, half, {r"\.to_out\.": ".to_out.0."})
    z = random(1, *GRID, 32)
    expected = theirs.decode(z.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    assert relative_error(decoder.decoder(decoder.post_quant_conv(z), silent), expected) < CLOSE
    picture = random(1, 32, 48, 3)
    expected = theirs.encode(picture.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
    found = encoder.quant_conv(encoder.encoder(picture, silent))[..., :32]
    assert relative_error(found, expected) < CLOSE


def test_schedule(vlm: Callable[[str], Any]) -> None:
    from engine import schedule

    for tokens, steps in ((256, 4), (1024, 4), (4096, 4), (4056, 8)):
        theirs = vlm("scheduler").FlowMatchEulerDiscreteScheduler(image_seq_len=tokens, num_inference_steps=steps)
        np.testing.assert_allclose(np.array(theirs.sigmas), schedule.sigmas(tokens, steps), rtol=1e-5, atol=1e-6)
