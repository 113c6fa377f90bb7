"""The FLUX.2 transformer in torch, for inference: image and text tokens in, velocity out.

It knows nothing of packs, quantisation, schedules or pictures. Class, attribute and parameter names are diffusers', so
released tensors load by name, and the MLX twin lines up with this file class by class. Guidance embeddings, reference
images and training are left out: the models here are distilled and text-only.

Shapes: B pictures, L text tokens, S image tokens, T = L + S, D = heads * head_dim.
Formulas: arXiv 2302.05442 (parallel blocks), 2104.09864 (rotary positions), 2212.09748 (adaptive layer norm).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.types import EngineError

TIMESTEP_SCALE = 1000.0  # sigma is 0..1; the sinusoids were made for 0..1000
TIMESTEP_MAX_PERIOD = 10_000.0
CONFIG_KEYS = frozenset({
    "in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "timestep_guidance_channels", "mlp_ratio", "axes_dims_rope", "rope_theta", "eps",
})  # fmt: skip


class Rotary(NamedTuple):
    """The angles of every token, as cosines and sines, each float32 [T, head_dim / 2]."""

    cos: Tensor
    sin: Tensor


class Flux2PosEmbed(nn.Module):
    """Positions on several axes (of a picture time, row, column, text index) [T, axes] -> Rotary."""

    def __init__(self, theta: float, axes_dim: Sequence[int]) -> None:
        super().__init__()
        self.theta = theta
        self.axes_dim = axes_dim

    def forward(self, ids: Tensor) -> Rotary:
        angles = []
        for axis, dim in enumerate(self.axes_dim):
            # float64, because an angle of many radians in float32 would lose the digits that cos and sin keep
            exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
            angles.append(torch.outer(ids[:, axis].double(), self.theta**-exponent))
        angle = torch.cat(angles, dim=-1)
        return Rotary(angle.cos().float(), angle.sin().float())


def apply_rotary_emb(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each neighbouring pair of features by its token's angle: x [B, T, heads, head_dim] in and out."""
    real, imag = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    return torch.stack((real * cos - imag * sin, imag * cos + real * sin), dim=-1).flatten(-2).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Full attention, padding included, as in training: three [B, T, heads, head_dim] -> [B, T, D]."""
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)


class Flux2SwiGLU(nn.Module):
    """silu(first half) * second half: [.., 2 M] -> [.., M]."""

    def forward(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(value)  # in place: at 1024 x 1024 each half is 170 MB in float32


class Flux2FeedForward(nn.Module):
    def __init__(self, dim: int, mult: float) -> None:
        super().__init__()
        hidden = int(dim * mult)
        self.linear_in = nn.Linear(dim, hidden * 2, bias=False)
        self.act_fn = Flux2SwiGLU()
        self.linear_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(self.act_fn(self.linear_in(x)))


class Flux2Attention(nn.Module):
    """Joint attention of the double blocks: each stream has its own projections, both attend to both."""

    def __init__(self, dim: int, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        inner = heads * head_dim
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.norm_q = nn.RMSNorm(head_dim, eps=eps)
        self.norm_k = nn.RMSNorm(head_dim, eps=eps)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim, bias=False)])  # a list of one: released as `to_out.0`
        self.add_q_proj = nn.Linear(dim, inner, bias=False)
        self.add_k_proj = nn.Linear(dim, inner, bias=False)
        self.add_v_proj = nn.Linear(dim, inner, bias=False)
        self.norm_added_q = nn.RMSNorm(head_dim, eps=eps)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=eps)
        self.to_add_out = nn.Linear(inner, dim, bias=False)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Image [B, S, D] and text [B, L, D] -> the same two, attended. Text comes first in the joint sequence."""
        heads = (-1, self.head_dim)
        query = self.norm_q(self.to_q(hidden_states).unflatten(-1, heads))
        key = self.norm_k(self.to_k(hidden_states).unflatten(-1, heads))
        value = self.to_v(hidden_states).unflatten(-1, heads)
        text_query = self.norm_added_q(self.add_q_proj(encoder_hidden_states).unflatten(-1, heads))
        text_key = self.norm_added_k(self.add_k_proj(encoder_hidden_states).unflatten(-1, heads))
        text_value = self.add_v_proj(encoder_hidden_states).unflatten(-1, heads)
        out = attention(
            apply_rotary_emb(torch.cat((text_query, query), dim=1), rotary),
            apply_rotary_emb(torch.cat((text_key, key), dim=1), rotary),
            torch.cat((text_value, value), dim=1),
        )
        text, image = out.split((encoder_hidden_states.shape[1], hidden_states.shape[1]), dim=1)
        return self.to_out[0](image), self.to_add_out(text)


class Flux2ParallelSelfAttention(nn.Module):
    """Attention and feed-forward side by side, with one projection in and one out (the single blocks)."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.inner_dim = heads * head_dim
        self.mlp_hidden_dim = int(dim * mlp_ratio)
        self.to_qkv_mlp_proj = nn.Linear(dim, self.inner_dim * 3 + self.mlp_hidden_dim * 2, bias=False)
        self.mlp_act_fn = Flux2SwiGLU()
        self.norm_q = nn.RMSNorm(head_dim, eps=eps)
        self.norm_k = nn.RMSNorm(head_dim, eps=eps)
        self.to_out = nn.Linear(self.inner_dim + self.mlp_hidden_dim, dim, bias=False)

    def forward(self, hidden_states: Tensor, rotary: Rotary) -> Tensor:
        qkv, mlp = self.to_qkv_mlp_proj(hidden_states).split((self.inner_dim * 3, self.mlp_hidden_dim * 2), dim=-1)
        query, key, value = qkv.unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        # one expression, so that turned queries and keys are gone before the feed-forward takes its memory
        attended = attention(
            apply_rotary_emb(self.norm_q(query), rotary), apply_rotary_emb(self.norm_k(key), rotary), value
        )
        return self.to_out(torch.cat((attended, self.mlp_act_fn(mlp)), dim=-1))


class Modulation(NamedTuple):
    """What the timestep does to one sub-block, each [B, 1, D]: gate * f((1 + scale) * norm(x) + shift)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Flux2Modulation(nn.Module):
    """Timestep embedding [B, D] -> one Modulation per sub-block. All blocks of a kind share it."""

    def __init__(self, dim: int, mod_param_sets: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim * 3 * mod_param_sets, bias=False)
        self.mod_param_sets = mod_param_sets

    def forward(self, temb: Tensor) -> tuple[Modulation, ...]:
        parts = self.linear(F.silu(temb)).unsqueeze(1).chunk(3 * self.mod_param_sets, dim=-1)
        return tuple(Modulation(*parts[3 * i : 3 * i + 3]) for i in range(self.mod_param_sets))


def modulate(norm: nn.LayerNorm, x: Tensor, modulation: Modulation) -> Tensor:
    return (1 + modulation.scale) * norm(x) + modulation.shift


class Flux2TransformerBlock(nn.Module):
    """A double block: image and text keep their own weights and meet in the attention."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.norm1_context = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.attn = Flux2Attention(dim, heads, head_dim, eps)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.ff = Flux2FeedForward(dim, mlp_ratio)
        self.norm2_context = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.ff_context = Flux2FeedForward(dim, mlp_ratio)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        mod_img: tuple[Modulation, ...],
        mod_txt: tuple[Modulation, ...],
        rotary: Rotary,
    ) -> tuple[Tensor, Tensor]:
        """Image [B, S, D] and text [B, L, D] -> the same two."""
        (img_attn, img_ff), (txt_attn, txt_ff) = mod_img, mod_txt
        image, text = self.attn(
            modulate(self.norm1, hidden_states, img_attn),
            modulate(self.norm1_context, encoder_hidden_states, txt_attn),
            rotary,
        )
        hidden_states = hidden_states + img_attn.gate * image
        encoder_hidden_states = encoder_hidden_states + txt_attn.gate * text
        image = self.ff(modulate(self.norm2, hidden_states, img_ff))
        text = self.ff_context(modulate(self.norm2_context, encoder_hidden_states, txt_ff))
        return hidden_states + img_ff.gate * image, encoder_hidden_states + txt_ff.gate * text


class Flux2SingleTransformerBlock(nn.Module):
    """A single block: text and image as one sequence [B, T, D] with shared weights."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)
        self.attn = Flux2ParallelSelfAttention(dim, heads, head_dim, mlp_ratio, eps)

    def forward(self, hidden_states: Tensor, mod: tuple[Modulation, ...], rotary: Rotary) -> Tensor:
        (single,) = mod
        return hidden_states + single.gate * self.attn(modulate(self.norm, hidden_states, single), rotary)


class TimestepEmbedding(nn.Module):
    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim, bias=False)
        self.linear_2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Flux2TimestepGuidanceEmbeddings(nn.Module):
    """Sigma [B] -> [B, D], through sinusoids with the cosines first."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.timestep_embedder = TimestepEmbedding(in_channels, dim)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        half = self.in_channels // 2
        index = torch.arange(half, dtype=torch.float32, device=timestep.device)
        # float32 until the sinusoids are made: in bfloat16 a timestep of 958 would be read as 960
        angle = TIMESTEP_SCALE * timestep.float()[:, None] * torch.exp(-math.log(TIMESTEP_MAX_PERIOD) * index / half)
        return self.timestep_embedder(torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype))


class AdaLayerNormContinuous(nn.Module):
    """The last norm. Its linear gives (scale, shift) in this order; Black Forest Labs' own file has them swapped."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim * 2, bias=False)
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=eps)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(temb)).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift


class Flux2Transformer2DModel(nn.Module):
    """Made by `from_config` under `torch.device("meta")`; tensors are assigned afterwards, nothing is initialised."""

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None,
        num_layers: int,
        num_single_layers: int,
        attention_head_dim: int,
        num_attention_heads: int,
        joint_attention_dim: int,
        timestep_guidance_channels: int,
        mlp_ratio: float,
        axes_dims_rope: Sequence[int],
        rope_theta: int,
        eps: float,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        block = (dim, num_attention_heads, attention_head_dim, mlp_ratio, eps)
        self.pos_embed = Flux2PosEmbed(rope_theta, axes_dims_rope)
        self.time_guidance_embed = Flux2TimestepGuidanceEmbeddings(timestep_guidance_channels, dim)
        self.double_stream_modulation_img = Flux2Modulation(dim, mod_param_sets=2)
        self.double_stream_modulation_txt = Flux2Modulation(dim, mod_param_sets=2)
        self.single_stream_modulation = Flux2Modulation(dim, mod_param_sets=1)
        self.x_embedder = nn.Linear(in_channels, dim, bias=False)
        self.context_embedder = nn.Linear(joint_attention_dim, dim, bias=False)
        self.transformer_blocks = nn.ModuleList([Flux2TransformerBlock(*block) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList(
            [Flux2SingleTransformerBlock(*block) for _ in range(num_single_layers)]
        )
        self.norm_out = AdaLayerNormContinuous(dim, eps)
        self.proj_out = nn.Linear(dim, out_channels or in_channels, bias=False)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Flux2Transformer2DModel":
        """`config` is the released config.json; keys that inference does not need are ignored.

        Raises EngineError when a needed key is missing, or for a model of another kind (guidance, patches).
        """
        missing = sorted(CONFIG_KEYS - config.keys())
        if missing:
            raise EngineError(f"the transformer's config.json lacks {', '.join(missing)}; fetch or copy the pack again")
        if config.get("guidance_embeds") or config.get("patch_size", 1) != 1:
            raise EngineError(
                "the transformer's config.json asks for guidance_embeds or a patch_size other than 1, which Niwaki "
                "does not run; use a FLUX.2 Klein or Bonsai Image model"
            )
        return cls(**{key: config[key] for key in CONFIG_KEYS})

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        check: Callable[[], None],
    ) -> Tensor:
        """Velocity [B, S, C] at noise level `timestep` (sigma, 0..1, float32 [B]).

        hidden_states [B, S, C] and encoder_hidden_states [B, L, joint_attention_dim] in the weights' dtype; img_ids
        [S, 4] and txt_ids [L, 4] integer positions. `check` is called before every block; what it raises ends the work.
        """
        temb = self.time_guidance_embed(timestep, hidden_states.dtype)
        mod_img = self.double_stream_modulation_img(temb)
        mod_txt = self.double_stream_modulation_txt(temb)
        mod_single = self.single_stream_modulation(temb)
        rotary = self.pos_embed(torch.cat((txt_ids, img_ids)))

        hidden_states = self.x_embedder(hidden_states)
        encoder_hidden_states = self.context_embedder(encoder_hidden_states)
        for block in self.transformer_blocks:
            check()
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states, mod_img, mod_txt, rotary)
        text_tokens = encoder_hidden_states.shape[1]
        hidden_states = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        for block in self.single_transformer_blocks:
            check()
            hidden_states = block(hidden_states, mod_single, rotary)
        return self.proj_out(self.norm_out(hidden_states[:, text_tokens:], temb))


def token_ids(length: int, grid: tuple[int, int], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Positions (img_ids [rows * columns, 4], txt_ids [length, 4]) on the axes (time, row, column, text index)."""
    rows, columns = grid
    zero = torch.zeros(1, dtype=torch.int64)
    img = torch.cartesian_prod(zero, torch.arange(rows), torch.arange(columns), zero)
    txt = torch.cartesian_prod(zero, zero, zero, torch.arange(length))
    return img.to(device), txt.to(device)
