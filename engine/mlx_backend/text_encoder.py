"""Token ids to the states that the image transformer reads: Qwen3, cut off where it is no longer needed.

It knows no prompt and no template (engine/prompt.py does). The layers are written out here, with Qwen3's own names,
because mlx-lm's come with the package transformers, which a Mac does not need otherwise.
Formulas: the Qwen3 technical report, arXiv 2505.09388 (grouped queries, normalised queries and keys).
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from engine.fitting import REPAIR, sensible
from engine.mlx_backend import linear
from engine.mlx_backend.fused import swiglu
from engine.packs import Component
from engine.types import EngineError


class Qwen3Attention(nn.Module):
    def __init__(self, config: Mapping[str, Any], head_dim: int) -> None:
        super().__init__()
        hidden, heads, kv_heads = (
            config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        bias = config.get("attention_bias", False)
        self.head_dim = head_dim
        self.rope_theta = float(config["rope_theta"])
        self.q_proj = nn.Linear(hidden, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=config["rms_norm_eps"])
        self.k_norm = nn.RMSNorm(head_dim, eps=config["rms_norm_eps"])

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """[B, L, hidden] -> the same; `mask` bool [B, 1, L, L], true where a row may look."""
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        query, key, value = (mx.unflatten(part, -1, (-1, self.head_dim)) for part in projected)
        query, key = (self._turned(part) for part in (self.q_norm(query), self.k_norm(key)))
        scale = self.head_dim**-0.5
        out = mx.fast.scaled_dot_product_attention(query, key, value.transpose(0, 2, 1, 3), scale=scale, mask=mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).flatten(2))

    def _turned(self, x: mx.array) -> mx.array:
        """[B, L, heads, head_dim] -> [B, heads, L, head_dim], turned by each token's position."""
        return mx.fast.rope(
            x.transpose(0, 2, 1, 3), self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=0
        )


class Qwen3MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Qwen3DecoderLayer(nn.Module):
    def __init__(self, config: Mapping[str, Any], head_dim: int) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Qwen3Attention(config, head_dim)
        self.mlp = Qwen3MLP(hidden, config["intermediate_size"])
        self.input_layernorm = nn.RMSNorm(hidden, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=eps)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3Model(nn.Module):
    """The embedding and the first `layers` layers, without the final norm: states are taken before it."""

    def __init__(self, config: Mapping[str, Any], layers: int) -> None:
        super().__init__()
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = [Qwen3DecoderLayer(config, head_dim) for _ in range(layers)]


class TextEncoder:
    """The first layers of a Qwen3. Of `hidden_states`, 0 is the embedding and k the output of layer k."""

    def __init__(
        self,
        component: Component,
        hidden_states: tuple[int, ...],
        dtype: mx.Dtype,
        expand_from: Mapping[int, int | None] | None = None,
    ) -> None:
        """Raises EngineError when the files have too few layers, or tensors that don't fit."""
        depth, layers = component.config["num_hidden_layers"], max(hidden_states)
        if layers > depth:
            raise EngineError(f"{component.folder} has {depth} layers, so no state {layers}; {REPAIR}")
        with sensible(component.folder):
            self.model = Qwen3Model(component.config, layers)
        unused = ("norm.", "lm_head.", *(f"layers.{number}." for number in range(layers, depth)))
        linear.build(self.model, component, dtype, prefix="model.", unused=unused, expand_from=expand_from)
        self.hidden_states = hidden_states

    def encode(self, ids: np.ndarray, mask: np.ndarray, check: Callable[[], None]) -> mx.array:
        """ids and mask int64 [1, L] -> the wanted states side by side [1, L, states * hidden size].

        `check` is called after every layer; what it raises ends the work. Padding rows are computed as well: the image
        transformer was trained with them.
        """
        length = ids.shape[1]
        causal = np.tril(np.ones((length, length), dtype=bool))
        may_look = mx.array(causal & mask.astype(bool)[:, None, None, :])
        x = self.model.embed_tokens(mx.array(ids.astype(np.int32)))
        states = {0: x}
        for number, layer in enumerate(self.model.layers, start=1):
            x = layer(x, may_look)
            mx.eval(x)  # a layer at a time, so that a cancel needn't wait for all of them
            check()
            if number in self.hidden_states:
                states[number] = x
        return mx.concatenate([states[number] for number in self.hidden_states], axis=-1)
