"""Write tiny packs with random weights, file for file in the layouts of the real ones.

`write_pack(folder, "ternary" | "binary" | "dense", dims)` builds diffusers' and transformers' own modules from a
configuration, so names and shapes are theirs, and quantises with engine.lowbit. The dense pack holds exactly the values
that the ternary one stands for; encoder, VAE and tokenizer are the same bytes in all three.
Knows nothing of how a pack is read.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
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

from engine import lowbit

VARIANTS = ("ternary", "binary", "dense")
WORDS = ("a", "two", "three", "red", "blue", "green", "circle", "circles", "square", "squares", "on", "background",
         "left", "right", "of", "and", "the", "लाल", "वृत्त", "வட்டம்")
_BITS = {"ternary": 2, "binary": 1}
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
    _write_transformer(folder, variant, dims)
    _write_text_encoder(folder / "text_encoder-mlx-4bit", dims)
    _write_vae(folder / "vae", dims)
    _write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(folder / "model_index.json", {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0.dev0"})
    _write_json(folder / "manifest.json", {"format": "niwaki-test", "variant": variant})
    write_notes(folder, variant, dims)
    return folder


def write_notes(folder: Path, variant: str, dims: Dims) -> None:
    """Write niwaki.json with the sizes and hashes of everything that lies in `folder` now."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "niwaki.json"
    }
    _write_json(folder / "niwaki.json", {
        "id": f"tiny-{variant}", "label": f"Tiny {variant} test pack", "demo": True, "sizes": dims.sizes, "steps": 4,
        "text_length": dims.text_length, "hidden_states": dims.states, "vocabulary": WORDS,
        "languages": ["en", "hi", "ta"], "provenance": {"made_by": "tests/packs/writers.py", "seed": dims.seed},
        "files": files,
    })


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
    _write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "padding_side": "right", "model_max_length": 131072, "chat_template": _CHAT_TEMPLATE,
    })


def pack_tensors(
    state: Mapping[str, torch.Tensor], names: set[str], bits: int, group_size: int
) -> dict[str, torch.Tensor]:
    """The state with every `<fqn>.weight` of `names` replaced by its codes, scales and biases, the rest in bfloat16."""
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name not in names:
            packed[name] = _bfloat16(tensor)
            continue
        codes, scales, biases = _quantize(tensor, bits, group_size)
        fqn = name.removesuffix(".weight")
        packed[f"{fqn}.weight"] = torch.from_numpy(lowbit.pack(codes, bits))
        packed[f"{fqn}.scales"] = torch.from_numpy(scales).bfloat16()
        packed[f"{fqn}.biases"] = torch.from_numpy(biases).bfloat16()
    return packed


def block_linears(state: Mapping[str, torch.Tensor]) -> set[str]:
    """The weights that the released packs quantise: every matrix inside a transformer block."""
    return {name for name, tensor in state.items()
            if name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and tensor.ndim == 2}


def _quantize(tensor: torch.Tensor, bits: int, group_size: int) -> lowbit.Quantized:
    weights = tensor.float().numpy()
    if bits == 1:
        return lowbit.quantize_binary(weights, group_size)
    if bits == 2:
        return lowbit.quantize_ternary(weights, group_size)
    return lowbit.quantize_affine(weights, bits, group_size)


def _write_transformer(folder: Path, variant: str, dims: Dims) -> None:
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
    names = block_linears(state)
    if variant == "dense":
        for name in names:
            codes, scales, biases = _quantize(state[name], 2, dims.group_size)
            state[name] = torch.from_numpy(lowbit.dequantize(codes, scales, biases, dims.group_size))
        target, tensors = folder / "transformer", {name: _bfloat16(tensor) for name, tensor in state.items()}
    else:
        bits = _BITS[variant]
        target, tensors = folder / "transformer-packed-mflux", pack_tensors(state, names, bits, dims.group_size)
        _write_json(target / "quantization_config.json", {"bits": bits, "group_size": dims.group_size})
    _write_json(target / "config.json", {"_class_name": "Flux2Transformer2DModel", **config})
    save_file(tensors, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_text_encoder(folder: Path, dims: Dims) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config: dict[str, Any] = {
        "model_type": "qwen3", "attention_bias": False, "head_dim": 32, "hidden_act": "silu",
        "hidden_size": dims.hidden, "intermediate_size": dims.intermediate, "max_position_embeddings": 40960,
        "num_attention_heads": 4, "num_hidden_layers": dims.layers, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000, "tie_word_embeddings": True, "vocab_size": dims.vocabulary,
    }
    with torch.random.fork_rng():
        torch.manual_seed(dims.seed + 1)
        state = Qwen3ForCausalLM(Qwen3Config(**config)).state_dict()
    del state["lm_head.weight"]  # tied to the embedding, and never used
    names = {name for name, tensor in state.items() if tensor.ndim == 2}
    _write_json(folder / "config.json", {
        "architectures": ["Qwen3ForCausalLM"], **config, "quantization": {"group_size": 64, "bits": 4},
    })
    save_file(pack_tensors(state, names, 4, 64), folder / "model.safetensors", metadata={"format": "mlx"})


def _write_vae(folder: Path, dims: Dims) -> None:
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
    _write_json(folder / "config.json", {"_class_name": "AutoencoderKLFlux2", **config})
    save_file({name: _bfloat16(tensor) for name, tensor in state.items()},
              folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _bfloat16(tensor: torch.Tensor) -> torch.Tensor:
    """Floats as bfloat16; counters (the batch norm's number of batches) as they are."""
    return tensor.bfloat16().contiguous() if tensor.is_floating_point() else tensor.contiguous()


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0, "time_shift_type": "exponential",
    "use_dynamic_shifting": True,
}
