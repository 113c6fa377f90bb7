"""Write tiny packs with random weights, file for file in the layouts of the real ones.

`write_pack(folder, "ternary" | "binary" | "dense", dims)` builds diffusers' and transformers' own modules from a
configuration, so names and shapes are theirs, and lets engine.seedling.export write them. The dense pack holds exactly
the values that the ternary one stands for; encoder, VAE and tokenizer are the same bytes in all three.
Knows nothing of how a pack is read.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from engine.seedling import export
from engine.seedling.quantize import ternary

VARIANTS = ("ternary", "binary", "dense")
WORDS = ("a", "two", "three", "red", "blue", "green", "circle", "circles", "square", "squares", "on", "background",
         "left", "right", "of", "and", "the", "लाल", "वृत्त", "வட்டம்")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Dims:
    """The sizes of a tiny pack. Inputs of block linears must be multiples of `group_size`, of encoder linears of 64."""

    heads: int = 2
    head_dim: int = 64
    double_blocks: int = 1
    single_blocks: int = 1
    group_size: int = 128
    hidden: int = 64
    layers: int = 4
    states: tuple[int, ...] = (1, 2, 3)
    intermediate: int = 128
    vocabulary: int = 512
    text_length: int = 64
    latent_channels: int = 16
    vae_channels: tuple[int, ...] = (8, 8, 16, 16)
    vae_decoder_channels: tuple[int, ...] | None = (8, 8, 8, 16)
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (32, 32), (96, 64))
    seed: int = 7


def write_packs(root: Path, dims: Dims | None = None) -> Path:
    """Write `root`/ternary, `root`/binary and `root`/dense; returns `root`."""
    for variant in VARIANTS:
        write_pack(root / variant, variant, dims)
    return root


def write_pack(folder: Path, variant: str, dims: Dims | None = None) -> Path:
    """Write one pack into `folder` (made if missing) and return it. The same dims always give the same bytes."""
    dims = dims or Dims()
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder / "tokenizer")
    export.write_transformer(folder, variant, _transformer(variant, dims), dims.group_size)
    export.write_encoder(folder, _text_encoder(dims))
    export.write_vae(folder, _vae(dims))
    export.write_frame(folder, variant)
    export.write_notes(folder, {
        "id": f"tiny-{variant}", "label": f"Tiny {variant} test pack", "demo": True, "sizes": dims.sizes, "steps": 4,
        "text_length": dims.text_length, "hidden_states": dims.states, "vocabulary": WORDS,
        "languages": ["en", "hi", "ta"], "provenance": {"made_by": "tests/packs/writers.py", "seed": dims.seed},
    })
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer like Qwen's, trained on a few words: control tokens lie after the trained vocabulary,
    and, as in Qwen3, the two thinking tokens are added tokens without being "special"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user\nassistant\n\n", *WORDS] * 3, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    export.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "padding_side": "right", "model_max_length": 131072, "chat_template": _CHAT_TEMPLATE,
    })


def _transformer(variant: str, dims: Dims) -> export.Part:
    from diffusers import Flux2Transformer2DModel

    config = {
        "attention_head_dim": dims.head_dim, "axes_dims_rope": [dims.head_dim // 4] * 4, "eps": 1e-6,
        "guidance_embeds": False, "in_channels": 4 * dims.latent_channels,
        "joint_attention_dim": len(dims.states) * dims.hidden, "mlp_ratio": 3.0, "num_attention_heads": dims.heads,
        "num_layers": dims.double_blocks, "num_single_layers": dims.single_blocks, "out_channels": None,
        "patch_size": 1, "rope_theta": 2000, "timestep_guidance_channels": 256,
    }
    with torch.random.fork_rng():
        torch.manual_seed(dims.seed)
        transformer: Any = Flux2Transformer2DModel(**config)  # Any: diffusers' lazy module hides its base class
        state = transformer.state_dict()
    if variant == "dense":
        for name in export.block_weights(state):
            state[name] = ternary(state[name], dims.group_size)
    return export.Part(config, state)


def _text_encoder(dims: Dims) -> export.Part:
    from transformers import Qwen3Config, Qwen3Model

    config: dict[str, Any] = {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 32, "hidden_act": "silu",
        "hidden_size": dims.hidden, "intermediate_size": dims.intermediate, "max_position_embeddings": 40960,
        "num_attention_heads": 4, "num_hidden_layers": dims.layers, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "tie_word_embeddings": True, "vocab_size": dims.vocabulary,
    }
    with torch.random.fork_rng():
        torch.manual_seed(dims.seed + 1)
        return export.Part(config, Qwen3Model(Qwen3Config(**config)).state_dict())


def _vae(dims: Dims) -> export.Part:
    from diffusers import AutoencoderKLFlux2

    levels = len(dims.vae_channels)
    config = {
        "act_fn": "silu", "batch_norm_eps": 1e-4, "block_out_channels": dims.vae_channels,
        "decoder_block_out_channels": dims.vae_decoder_channels, "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": 3, "latent_channels": dims.latent_channels, "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": math.gcd(8, *dims.vae_channels), "out_channels": 3, "patch_size": [2, 2], "sample_size": 64,
        "up_block_types": ["UpDecoderBlock2D"] * levels, "use_post_quant_conv": True, "use_quant_conv": True,
    }
    with torch.random.fork_rng():
        torch.manual_seed(dims.seed + 2)
        vae: Any = AutoencoderKLFlux2(**config)
        state = vae.state_dict()
        state["bn.running_mean"] = 0.3 * torch.randn_like(state["bn.running_mean"])
        state["bn.running_var"] = 0.5 + torch.rand_like(state["bn.running_var"])
    return export.Part(config, state)
