"""The transformer's blocks with their packed layers as bytes, in as few passes as possible from product to product.

What transformer.py says a block computes is computed here in another order: norm, modulation and quantisation are one
pass, products end in SwiGLU or in the residual stream instead of in a tensor of their own, and whatever is big lies in
buffers that the next block uses again. Activations are in the passes' number format (float32 on a CPU, bfloat16 on a
card, as the released model has them), the residual stream too from one such block to the next; the attention runs in
the model's.

Bytes a token on a CPU for width D and feed-forward width M (the 4B model: D 3,072, M 9,216), at most at a time, in a
single block: queries, keys and values 12 D, the same turned and head after head 12 D, what the attention returns 4 D,
the feed-forward 4 M, both as bytes D + M, the residual stream 4 D. Together 147 kB, where transformer.py takes 258 kB;
104 kB with compiled passes in bfloat16, which halves the first three. torch's passes add 15 kB: integer sums, weights
and a tile of outputs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.torch_backend.admission import Admission, Int8Linear, Source
from engine.torch_backend.linear import RowBlocks
from engine.torch_backend.transformer import (
    Flux2FeedForward,
    Flux2SingleTransformerBlock,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
    Modulation,
    Rotary,
    attention,
    modulate,
)


def install(transformer: Flux2Transformer2DModel, admission: Admission) -> None:
    """Give every block whose layers all have int8 twins the forward pass of this file."""
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    fit = [all(isinstance(layer, Int8Linear) for layer in layers(block)) for block in blocks]
    for number, block in enumerate(blocks):
        if fit[number]:
            run = double_block if isinstance(block, Flux2TransformerBlock) else single_block
            # what the first block is given may be somebody's memory (remember.py); the others get it from a block
            at = Setting(admission, twin(layers(block)[0]).plain.dtype, number > 0, any(fit[number + 1 : number + 2]))
            setattr(block, "forward", partial(run, block, at))  # noqa: B010, mypy allows no other way


def layers(module: nn.Module) -> list[nn.Module]:
    """The linear layers in a module, a twin in place of what it stands before."""
    found = []
    for child in module.children():
        known = isinstance(child, Int8Linear | RowBlocks | nn.Linear)
        found += [child] if known else layers(child)
    return found


class Setting(NamedTuple):
    """Where a block stands, in a model in `dtype`."""

    admission: Admission
    dtype: torch.dtype
    ours: bool  # what it is given may be written over
    handed_on: bool  # to another such block, which takes the stream in the passes' number format

    def stream(self, x: Tensor) -> Tensor:
        """[B, T, D] -> rows [B * T, D] to write to, in the passes' number format."""
        return x.flatten(0, 1).to(self.admission.passes.dtype, copy=not self.ours)

    def result(self, rows: Tensor, like: Tensor) -> Tensor:
        return rows.view_as(like).to(rows.dtype if self.handed_on else self.dtype)

    def heads(self, batch: int, heads: int, tokens: int, size: int) -> Tensor:
        """Room for queries, keys and values, [3, B, heads, T, head_dim], in the order in which attention likes them
        and, where the passes can write it, in the model's number format."""
        admission, passes = self.admission, self.admission.passes
        dtype = self.dtype if passes.halves else passes.dtype
        if passes.by_head:
            return admission.take("joint", 3, batch, heads, tokens, size, dtype=dtype)
        return admission.take("joint", 3, batch, tokens, heads, size, dtype=dtype).transpose(2, 3)

    def attend(self, *joint: Tensor) -> Tensor:
        """Queries, keys and values, each [B, heads, T, head_dim] -> [B, T, D], all in the model's number format."""
        return attention(*(each.to(self.dtype).transpose(1, 2) for each in joint))


class Modulated(Source):
    """(1 + scale) * norm(x) + shift of rows x [M, D], which must not change before all its layers were served."""

    def __init__(self, admission: Admission, x: Tensor, norm: nn.LayerNorm, modulation: Modulation) -> None:
        super().__init__(admission, x)
        self.norm = norm
        self.modulation = modulation

    def floats(self, wanted: Any = slice(None)) -> Tensor:
        return modulate(self.norm, self.x[wanted][None], self.modulation)[0]

    def _quantized(self, passes: Any) -> Any:
        return passes.modulate(self.x, self.modulation, self.norm.eps)


class Joined(Source):
    """Rows of `first` [M, D], and of x [M, K - D] beside them, which are not copied to one place."""

    def __init__(self, admission: Admission, first: Tensor, x: Tensor) -> None:
        super().__init__(admission, x)
        self.first = first

    def floats(self, wanted: Any = slice(None)) -> Tensor:
        first = self.first[wanted]
        return torch.cat((first, self.x[wanted].to(first.dtype)), dim=1)

    def _quantized(self, passes: Any) -> Any:
        return passes.quantize(self.x, self.first)


def double_block(
    block: Flux2TransformerBlock,
    at: Setting,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    mod_img: tuple[Modulation, ...],
    mod_txt: tuple[Modulation, ...],
    rotary: Rotary,
) -> tuple[Tensor, Tensor]:
    """See Flux2TransformerBlock.forward."""
    (img_attn, img_ff), (txt_attn, txt_ff) = mod_img, mod_txt
    admission, attn = at.admission, block.attn
    (batch, tokens, dim), length = hidden_states.shape, encoder_hidden_states.shape[1]
    image, text = at.stream(hidden_states), at.stream(encoder_hidden_states)
    joint = at.heads(batch, dim // attn.head_dim, length + tokens, attn.head_dim)
    angles = [Rotary(*parts) for parts in zip(*(each.tensor_split([length]) for each in rotary), strict=True)]

    source = Modulated(admission, text, block.norm1_context, txt_attn)
    norms = (attn.norm_added_q, attn.norm_added_k)
    project(source, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), norms, angles[0], joint[:, :, :, :length])
    source = Modulated(admission, image, block.norm1, img_attn)
    project(source, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), angles[1], joint[:, :, :, length:])
    text_out, image_out = (part.reshape(-1, dim) for part in at.attend(*joint).tensor_split([length], dim=1))
    twin(attn.to_add_out).add_to(text, Source(admission, text_out), txt_attn.gate)
    twin(attn.to_out[0]).add_to(image, Source(admission, image_out), img_attn.gate)

    feed(block.ff, Modulated(admission, image, block.norm2, img_ff), image, img_ff.gate)
    feed(block.ff_context, Modulated(admission, text, block.norm2_context, txt_ff), text, txt_ff.gate)
    return at.result(image, hidden_states), at.result(text, encoder_hidden_states)


def single_block(
    block: Flux2SingleTransformerBlock,
    at: Setting,
    hidden_states: Tensor,
    mod: tuple[Modulation, ...],
    rotary: Rotary,
) -> Tensor:
    """See Flux2SingleTransformerBlock.forward."""
    (single,) = mod
    admission, attn, (batch, tokens, dim) = at.admission, block.attn, hidden_states.shape
    hidden, proj = at.stream(hidden_states), twin(attn.to_qkv_mlp_proj)
    given = Modulated(admission, hidden, block.norm, single)
    joint = at.heads(batch, dim // attn.head_dim, tokens, attn.head_dim)
    projected = admission.take("projected", len(hidden), 3 * dim, dtype=joint.dtype)
    wide = admission.take("wide", len(hidden), attn.mlp_hidden_dim)
    proj.put(given, projected, slice(0, 3 * dim))
    proj.gate_to(given, wide, slice(3 * dim, None))

    values = place(admission, projected, (attn.norm_q, attn.norm_k), rotary, joint)
    if admission.passes.by_head:
        joint[2] = values
        values = joint[2]
    attended = at.attend(joint[0], joint[1], values).view(-1, dim)
    twin(attn.to_out).add_to(hidden, Joined(admission, attended, wide), single.gate)
    return at.result(hidden, hidden_states)


def project(source: Source, layers: Sequence[Any], norms: Sequence[Any], rotary: Rotary, out: Tensor) -> None:
    """Queries, keys and values of one stream into their part of out; see `place`."""
    dim = out.shape[2] * out.shape[4]
    projected = source.admission.take("projected", len(source.x), 3 * dim, dtype=out.dtype)
    for number, layer in enumerate(layers):
        twin(layer).put(source, projected[:, number * dim : (number + 1) * dim])
    out[2] = place(source.admission, projected, norms, rotary, out)


def place(admission: Admission, projected: Tensor, norms: Sequence[Any], rotary: Rotary, out: Tensor) -> Tensor:
    """Rows [B * tokens, 3 D], queries, keys and values: the first two, normed and turned, into out [3, B, heads,
    tokens, head_dim]. Returns the values in that shape, where they are."""
    parts = projected.view(out.shape[1], out.shape[3], 3, out.shape[2], out.shape[4])
    for number, norm in enumerate(norms):
        for x, place in zip(parts[:, :, number], out[number], strict=True):
            admission.passes.turn(x, norm.weight, norm.eps, rotary, place.transpose(0, 1))
    return parts[:, :, 2].transpose(1, 2)


def feed(ff: Flux2FeedForward, source: Source, hidden: Tensor, gate: Tensor) -> None:
    """hidden += gate * feed-forward(source)."""
    admission, layer = source.admission, twin(ff.linear_in)
    wide = admission.take("wide", len(hidden), layer.outputs // 2)
    layer.gate_to(source, wide)
    twin(ff.linear_out).add_to(hidden, Source(admission, wide), gate)


def twin(layer: nn.Module) -> Int8Linear:
    assert isinstance(layer, Int8Linear)  # `install` saw to it
    return layer
