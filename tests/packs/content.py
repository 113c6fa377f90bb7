"""What a synthetic pack holds, whatever the layout: random codes, scales and dense weights, by name.

The same configuration, variant and seed give the same model in every layout. Scales are small enough in their mantissa
that no layout rounds: four bits, so that a 4-bit code's value fits bfloat16's eight and every scale and bias fits
bfloat16 and float16. Nothing is kept: a tensor is made when asked for, a large one in blocks of rows.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine import lowbit, shapes

BLOCK_ROWS = 4096
BITS = {"ternary": 2, "binary": 1, "4-bit": 4}
GROUP, ENCODER_GROUP, ENCODER_BITS = 128, 64, 4
_TERNARY_BYTES = np.array(
    [a | b << 2 | c << 4 | d << 6 for a in range(3) for b in range(3) for c in range(3) for d in range(3)], np.uint8
)
Shape = tuple[int, ...]

# The formats page, section 2, and the published config.json of Qwen3-4B and of the FLUX.2 VAE.
TRANSFORMER_4B: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-6, "guidance_embeds": False, "in_channels": 128, "joint_attention_dim": 7680, "mlp_ratio": 3.0,
    "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "out_channels": None, "patch_size": 1,
    "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip
QWEN3_4B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960,
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "tie_word_embeddings": True, "vocab_size": 151936,
}  # fmt: skip
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKLFlux2", "act_fn": "silu", "batch_norm_eps": 1e-4, "batch_norm_momentum": 0.1,
    "block_out_channels": [128, 256, 512, 512], "decoder_block_out_channels": None,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 32,
    "layers_per_block": 2, "mid_block_add_attention": True, "norm_num_groups": 32, "out_channels": 3,
    "patch_size": [2, 2], "sample_size": 1024, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": True, "use_quant_conv": True,
}  # fmt: skip


def group_of(bits: int) -> int:
    """4-bit layers have MLX's usual groups, whichever component they are in."""
    return ENCODER_GROUP if bits == 4 else GROUP


@dataclass(frozen=True)
class Configs:
    """The three configurations; by default those of Bonsai Image 4B."""

    transformer: dict[str, Any] = field(default_factory=lambda: dict(TRANSFORMER_4B))
    text_encoder: dict[str, Any] = field(default_factory=lambda: dict(QWEN3_4B))
    vae: dict[str, Any] = field(default_factory=lambda: dict(VAE))
    hidden_states: tuple[int, ...] = (9, 18, 27)


def small(**transformer: Any) -> Configs:
    """A model of the same family of about a megabyte. Arguments replace keys of the transformer's configuration."""
    return Configs(
        TRANSFORMER_4B
        | {"attention_head_dim": 64, "axes_dims_rope": [16] * 4, "num_attention_heads": 2, "num_layers": 1,
           "num_single_layers": 1, "in_channels": 64, "joint_attention_dim": 192} | transformer,
        QWEN3_4B
        | {"head_dim": 32, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
           "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 512},
        VAE
        | {"block_out_channels": [8, 8, 16, 16], "decoder_block_out_channels": [8, 8, 8, 16], "latent_channels": 16,
           "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64},
        (1, 2, 3),
    )  # fmt: skip


@dataclass(frozen=True)
class Content:
    """Random weights for `configs`; `variant` is one of BITS. Arrays are float32 unless said otherwise."""

    configs: Configs
    variant: str
    seed: int = 0

    @property
    def bits(self) -> int:
        return BITS[self.variant]

    @property
    def group(self) -> int:
        """Inputs that share a scale in the transformer."""
        return group_of(self.bits)

    def transformer(self) -> Iterator[tuple[str, Shape, bool]]:
        """(name of the weight, shape, whether the released packs quantise it)."""
        for name, shape in shapes.transformer(self.configs.transformer):
            yield name, shape, "transformer_blocks." in name and len(shape) == 2

    def text_encoder(self) -> Iterator[tuple[str, Shape, bool]]:
        """All layers and the final norm, as released; the head is the embedding."""
        layers = self.configs.text_encoder["num_hidden_layers"]
        for name, shape in shapes.text_encoder(self.configs.text_encoder, layers):
            yield name, shape, len(shape) == 2
        yield "model.norm.weight", (self.configs.text_encoder["hidden_size"],), False

    def vae(self) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of diffusers' own autoencoder."""
        import torch
        from diffusers import AutoencoderKLFlux2

        with torch.device("meta"):
            vae: Any = AutoencoderKLFlux2.from_config(self.configs.vae)
        for name, tensor in vae.state_dict().items():
            yield name, tuple(tensor.shape)

    def code_bytes(self, fqn: str, shape: Shape, bits: int) -> Iterator[np.ndarray]:
        """Packed codes in blocks of rows, uint8 [rows, K * bits / 8], least significant bits first along K."""
        width = shape[1] * bits // 8
        for rng, rows in self._blocks(f"{fqn}.weight", shape[0]):
            if bits == 2:
                yield _TERNARY_BYTES[rng.integers(0, len(_TERNARY_BYTES), (rows, width), np.uint8)]
            else:
                yield np.frombuffer(rng.bytes(rows * width), np.uint8).reshape(rows, width)

    def steps(self, fqn: str, shape: Shape, group: int) -> np.ndarray:
        """One magnitude per group [N, K / group]: eight to fifteen times a power of two, about 1 / sqrt(K)."""
        rng = self._rng(f"{fqn}.scales")
        power = 2.0 ** np.round(np.log2(1 / np.sqrt(shape[1])) - 3.5)
        return (rng.integers(8, 16, (shape[0], shape[1] // group)) * power).astype(np.float32)

    def scales_and_biases(self, fqn: str, shape: Shape, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """What `w = code * scale + bias` needs: ternary s and -s, binary 2s and -s, 4 bits s / 4 and -zero * scale."""
        if bits == 4:
            scales = self.steps(fqn, shape, group_of(bits)) / 4
            return scales, -self.zeros(fqn, shape) * scales
        steps = self.steps(fqn, shape, group_of(bits))
        return (steps if bits == 2 else 2 * steps), -steps

    def zeros(self, fqn: str, shape: Shape) -> np.ndarray:
        """The code that stands for zero in each group of a 4-bit layer: 7, 7.5 or 8."""
        return self._rng(f"{fqn}.zeros").choice(np.float32([7, 7.5, 8]), (shape[0], shape[1] // ENCODER_GROUP))

    def values(self, fqn: str, shape: Shape, bits: int) -> Iterator[np.ndarray]:
        """The weights that a packed layer stands for, in blocks of rows [rows, K]."""
        scales, biases = self.scales_and_biases(fqn, shape, bits)
        group, start = shape[1] // scales.shape[1], 0
        for block in self.code_bytes(fqn, shape, bits):
            rows = slice(start, start + len(block))
            codes = lowbit.unpack(block.view("<u4"), bits, shape[1])
            yield lowbit.dequantize(codes, scales[rows], biases[rows], group)
            start += len(block)

    def dense(self, name: str, shape: Shape) -> np.ndarray:
        """A weight that no pack quantises, exact in bfloat16 and float16; it keeps activations in a sane range."""
        if name.endswith("num_batches_tracked"):
            return np.zeros(shape, np.int64)
        if name.endswith("bias") or name.endswith("running_mean"):
            return np.zeros(shape, np.float32)
        if len(shape) == 1:  # norms and variances
            return np.ones(shape, np.float32)
        power = 2.0 ** np.round(np.log2(1 / np.sqrt(np.prod(shape[1:]))) - 6)
        return (self._rng(name).integers(-127, 128, shape, np.int8) * np.float32(power)).astype(np.float32)

    def _rng(self, *key: object) -> np.random.Generator:
        return np.random.default_rng([self.seed, zlib.crc32(repr(key).encode())])

    def _blocks(self, name: str, count: int) -> Iterator[tuple[np.random.Generator, int]]:
        for start in range(0, count, BLOCK_ROWS):
            yield self._rng(name, start), min(BLOCK_ROWS, count - start)
