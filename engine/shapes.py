"""The names and shapes of the tensors that a configuration implies, as diffusers and transformers would make them.

Knows no files and no codes. A missing or senseless key raises what Python raises: KeyError, TypeError and so on.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def transformer(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes [out, in] of diffusers' Flux2Transformer2DModel without guidance embedding; no bias anywhere."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    mlp = int(width * config["mlp_ratio"])
    yield "x_embedder.weight", (width, config["in_channels"])
    yield "context_embedder.weight", (width, config["joint_attention_dim"])
    yield "time_guidance_embed.timestep_embedder.linear_1.weight", (width, config["timestep_guidance_channels"])
    yield "time_guidance_embed.timestep_embedder.linear_2.weight", (width, width)
    yield "double_stream_modulation_img.linear.weight", (6 * width, width)
    yield "double_stream_modulation_txt.linear.weight", (6 * width, width)
    yield "single_stream_modulation.linear.weight", (3 * width, width)
    yield "norm_out.linear.weight", (2 * width, width)
    yield "proj_out.weight", (config["patch_size"] ** 2 * (config.get("out_channels") or config["in_channels"]), width)
    for block in (f"transformer_blocks.{i}" for i in range(config["num_layers"])):
        for linear in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            yield f"{block}.attn.{linear}.weight", (width, width)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            yield f"{block}.attn.{norm}.weight", (head,)
        for stream in ("ff", "ff_context"):
            yield f"{block}.{stream}.linear_in.weight", (2 * mlp, width)
            yield f"{block}.{stream}.linear_out.weight", (width, mlp)
    for block in (f"single_transformer_blocks.{i}" for i in range(config["num_single_layers"])):
        yield f"{block}.attn.to_qkv_mlp_proj.weight", (3 * width + 2 * mlp, width)
        yield f"{block}.attn.to_out.weight", (width, width + mlp)
        yield f"{block}.attn.norm_q.weight", (head,)
        yield f"{block}.attn.norm_k.weight", (head,)


def text_encoder(config: Mapping[str, Any], last_state: int) -> Shapes:
    """Names and shapes of the Qwen3 layers that state `last_state` needs; a pack may leave out those after it."""
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in (f"model.layers.{i}" for i in range(last_state)):
        yield f"{layer}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.self_attn.q_norm.weight", (head,)
        yield f"{layer}.self_attn.k_norm.weight", (head,)
        yield f"{layer}.mlp.gate_proj.weight", (mlp, hidden)
        yield f"{layer}.mlp.up_proj.weight", (mlp, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, mlp)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)


def vae(config: Mapping[str, Any]) -> Shapes:
    """The latent statistics and both ends of the FLUX.2 decoder; what lies between is checked by whoever builds it."""
    latent = config["latent_channels"]
    channels = list(config["block_out_channels"])
    channels = config.get("decoder_block_out_channels") or channels
    for statistic in ("running_mean", "running_var"):
        yield f"bn.{statistic}", (math.prod(config["patch_size"]) * latent,)
    yield "decoder.conv_in.weight", (channels[-1], latent, 3, 3)
    yield "decoder.conv_out.weight", (config["out_channels"], channels[0], 3, 3)
