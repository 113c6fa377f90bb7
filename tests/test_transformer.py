"""Our transformer against diffusers' own on random weights: same names, same velocity; and how it stops."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel as Reference

from engine.torch_backend.transformer import Flux2Transformer2DModel, token_ids
from engine.types import Cancelled, EngineError

CONFIG = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 32, "axes_dims_rope": [8, 8, 8, 8], "eps": 1e-6,
    "guidance_embeds": False, "in_channels": 16, "joint_attention_dim": 48, "mlp_ratio": 3.0, "num_attention_heads": 2,
    "num_layers": 2, "num_single_layers": 3, "out_channels": None, "patch_size": 1, "rope_theta": 2000,
    "timestep_guidance_channels": 256, "musubi_blocks_to_swap": 0,
}  # fmt: skip
TEXT, GRID = 7, (4, 6)


def silent() -> None:
    pass


@pytest.fixture(scope="module")
def reference() -> Reference:
    torch.manual_seed(1)
    model = Reference(**{key: value for key, value in CONFIG.items() if not key.startswith(("_", "musubi"))}).eval()
    for name, parameter in model.named_parameters():
        if "norm_" in name and parameter.ndim == 1:  # ones at first, which would hide a norm that is not applied
            parameter.data.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def ours(reference: Reference) -> Flux2Transformer2DModel:
    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(CONFIG)
    model.load_state_dict(reference.state_dict(), assign=True)
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    img_ids, txt_ids = token_ids(TEXT, GRID, "cpu")
    return {
        "hidden_states": torch.randn(1, GRID[0] * GRID[1], 16), "encoder_hidden_states": torch.randn(1, TEXT, 48),
        "timestep": torch.tensor([0.884]), "img_ids": img_ids, "txt_ids": txt_ids,
    }  # fmt: skip


def test_names_are_diffusers(reference: Reference, ours: Flux2Transformer2DModel) -> None:
    expected = {name: tensor.shape for name, tensor in reference.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected


def test_every_shape_of_the_4b_model() -> None:
    config = CONFIG | {
        "attention_head_dim": 128, "axes_dims_rope": [32] * 4, "in_channels": 128, "joint_attention_dim": 7680,
        "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20,
    }  # fmt: skip
    with torch.device("meta"):
        tensors = Flux2Transformer2DModel.from_config(config).state_dict()
    assert len(tensors) == 169
    assert sum(tensor.numel() for tensor in tensors.values()) == 3_680_501_760 + 195_042_816
    assert tensors["single_transformer_blocks.19.attn.to_qkv_mlp_proj.weight"].shape == (27648, 3072)


@torch.inference_mode()
def test_velocity_equals_diffusers(
    reference: Reference, ours: Flux2Transformer2DModel, inputs: dict[str, torch.Tensor]
) -> None:
    expected = reference(**inputs, return_dict=False)[0]
    found = ours(**inputs, check=silent)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-5


@torch.inference_mode()
def test_positions_equal_the_pipelines(inputs: dict[str, torch.Tensor]) -> None:
    from diffusers import Flux2KleinPipeline

    latents = torch.empty(1, 16, *GRID)
    assert torch.equal(Flux2KleinPipeline._prepare_latent_ids(latents)[0], inputs["img_ids"])
    assert torch.equal(Flux2KleinPipeline._prepare_text_ids(inputs["encoder_hidden_states"])[0], inputs["txt_ids"])


@torch.inference_mode()
@pytest.mark.parametrize("after", range(5))
def test_check_is_asked_before_every_block(
    ours: Flux2Transformer2DModel, inputs: dict[str, torch.Tensor], after: int
) -> None:
    blocks_done, asked = [], 0
    hooks = [
        block.register_forward_hook(lambda *_: blocks_done.append(1))
        for block in (*ours.transformer_blocks, *ours.single_transformer_blocks)
    ]

    def check() -> None:
        nonlocal asked
        if asked == after:
            raise Cancelled("stop")
        asked += 1

    with pytest.raises(Cancelled):
        ours(**inputs, check=check)
    for hook in hooks:
        hook.remove()
    assert len(blocks_done) == after


@pytest.mark.parametrize("change", [{"guidance_embeds": True}, {"patch_size": 2}])
def test_another_kind_of_model_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(EngineError, match=next(iter(change))):
        Flux2Transformer2DModel.from_config(CONFIG | change)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(EngineError, match=r"config\.json lacks mlp_ratio, rope_theta;"):
        Flux2Transformer2DModel.from_config({k: v for k, v in CONFIG.items() if k not in ("rope_theta", "mlp_ratio")})
