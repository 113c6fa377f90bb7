"""Token ids to the states that the image transformer reads: Qwen3, cut off where it is no longer needed.

It knows no prompt and no template (engine/prompt.py does). The layers are written out here, with Qwen3's own names, as
in the MLX twin: importing the package transformers takes seconds, for which a person would wait at the first picture.
Formulas: the Qwen3 technical report, arXiv 2505.09388 (grouped queries, normalised queries and keys).

Shapes: B prompts, L tokens.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.fitting import REPAIR, sensible
from engine.packs import Component
from engine.torch_backend import linear
from engine.torch_backend.transformer import Flux2PosEmbed, Rotary
from engine.types import EngineError

Config = Mapping[str, Any]


class Qwen3Attention(nn.Module):
    def __init__(self, config: Config, head_dim: int) -> None:
        super().__init__()
        hidden, heads, kv_heads = (
            config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        bias, eps = config.get("attention_bias", False), config["rms_norm_eps"]
        self.head_dim = head_dim
        self.shared_by = heads // kv_heads  # heads of queries, for each of keys and values
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor, rotary: Rotary) -> Tensor:
        """[B, L, hidden] -> the same; `mask` bool [B, 1, L, L], true where a row may look."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        query, key = normed_and_turned(query, self.q_norm, rotary), normed_and_turned(key, self.k_norm, rotary)
        key, value = (part.repeat_interleave(self.shared_by, dim=1) for part in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Qwen3MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)).mul_(self.up_proj(x)))


class Qwen3DecoderLayer(nn.Module):
    def __init__(self, config: Config, head_dim: int) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Qwen3Attention(config, head_dim)
        self.mlp = Qwen3MLP(hidden, config["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)

    def forward(self, x: Tensor, mask: Tensor, rotary: Rotary) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nn.Module):
    """The embedding and the first `layers` layers, without the final norm: states are taken before it."""

    def __init__(self, config: Config, layers: int) -> None:
        super().__init__()
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.pos_embed = Flux2PosEmbed(config["rope_theta"], (head_dim,))
        table = config["vocab_size"], config["hidden_size"]
        # given a weight it draws none: for random numbers on the meta device torch imports its compiler, which takes
        # 0.7 to 6 seconds
        self.embed_tokens = nn.Embedding(*table, _weight=torch.empty(table))
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, head_dim) for _ in range(layers))

    def states(self, x: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """The embedding x [B, L, hidden] and mask int64 [B, L] -> x and what each layer makes of it. Nobody looks ahead
        or at padding."""
        length = x.shape[1]
        may_look = torch.ones(length, length, dtype=torch.bool, device=x.device).tril() & mask.bool()[:, None, None]
        rotary = self.pos_embed(torch.arange(length, device=x.device)[:, None])
        yield x
        for layer in self.layers:
            yield (x := layer(x, may_look, rotary))


def normed_and_turned(x: Tensor, norm: nn.RMSNorm, rotary: Rotary) -> Tensor:
    """[B, heads, L, head_dim]: on a card one pass over one prompt's, else a dozen."""
    card = linear.card_kernels() if x.is_cuda and len(x) == 1 and x.dtype == torch.bfloat16 else None
    if card is not None and card.is_power(x.shape[-1]):
        assert norm.eps is not None
        out = torch.empty_like(rows := x[0].transpose(0, 1))
        card.turn(rows, norm.weight, norm.eps, rotary, out, apart=True)
        return out.transpose(0, 1)[None]
    return turned(norm(x), rotary)


def turned(x: Tensor, rotary: Rotary) -> Tensor:
    """[B, heads, L, head_dim] turned by each token's position; a pair is a feature and the one half a head further."""
    real, imag = x.float().chunk(2, dim=-1)
    cos, sin = rotary
    return torch.cat((real * cos - imag * sin, imag * cos + real * sin), dim=-1).to(x.dtype)


class TextEncoder:
    """The first layers of a Qwen3. Of `hidden_states`, 0 is the embedding and k the output of layer k."""

    def __init__(
        self, component: Component, hidden_states: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Raises EngineError when the files have too few layers, or tensors that don't fit."""
        depth, layers = component.config["num_hidden_layers"], max(hidden_states)
        if layers > depth:
            raise EngineError(f"{component.folder} has {depth} layers, so no state {layers}; {REPAIR}")
        with sensible(component.folder), torch.device("meta"):
            self.model = Qwen3Model(component.config, layers)
        unused = ("norm.", "lm_head.", *(f"layers.{number}." for number in range(layers, depth)))
        self.files = linear.build(self.model, component, dtype, device, prefix="model.", unused=unused)
        self.hidden_states = hidden_states
        self.device = device
        self.run: Callable[..., Tensor] = self.read  # or what stands before it

    @torch.inference_mode()
    def encode(self, ids: np.ndarray, mask: np.ndarray, check: Callable[[], None]) -> Tensor:
        """ids and mask int64 [1, L] -> the wanted states side by side [1, L, states * hidden size].

        `check` is called after every layer; what it raises ends the work. Padding rows are computed as well: the image
        transformer was trained with them.
        """
        words = self.model.embed_tokens(torch.from_numpy(ids), self.device)
        return self.run(words, torch.from_numpy(mask).to(self.device), check)

    def read(self, words: Tensor, mask: Tensor, check: Callable[[], None]) -> Tensor:
        """The same of the words' embedding."""
        kept = {}
        for number, state in enumerate(self.model.states(words, mask)):
            check()
            if number in self.hidden_states:
                kept[number] = state
        return torch.cat([kept[number] for number in self.hidden_states], dim=-1)
