"""How many bytes a picture takes in MLX's allocator, predicted from shapes before anything is loaded.

As memory.py for torch, with MLX's own habits: the embedding is read whole; everything but packed words is in the number
format computed with; and its CPU build spells out what a GPU does in one kernel. The CPU's factors were fitted to
measured peaks, the GPU's are estimates: no Metal GPU has been measured. Decides nothing, imports no framework.
"""

import math
from collections.abc import Callable

from engine.memory import TILE_HALO, WIDTH, Need
from engine.packs import Component, Pack

EXPANDED_CPU = 12  # bytes of a weight while a packed layer is expanded: its codes as words, and two copies of the value
TOKEN_WIDTHS = {True: 50, False: 28}  # rows as wide as the model that a token has in a single block: CPU, GPU
PIXEL_CPU, CHANNEL_CPU = 1600, 85  # bytes a pixel, and a pixel and channel: a convolution lays out nine neighbours
PIXEL_CHANNELS_GPU = 6  # values a pixel and channel: a layer's input, normed, activated, convolved, and added


def need(pack: Pack, size: tuple[int, int], side: int, dtype: str, *, cpu: bool, tile: int) -> Need:
    """What a picture of `size` (width, height) takes; `side` pixels an image token, `tile` 0: decoded in one piece."""
    tokens = math.prod(size) // side**2 + pack.notes.text_length
    edge = math.prod(size) if not tile else min(math.prod(size), (tile + 2 * TILE_HALO * side) ** 2)
    expanded = EXPANDED_CPU if cpu else WIDTH[dtype]
    return Need(
        libraries=0,
        encoder=encoder_bytes(pack, dtype),
        transformer=weight_bytes(pack.transformer, dtype),
        decoder=weight_bytes(pack.vae, dtype, lambda name: not name.startswith(("encoder.", "quant_conv."))),
        encoding=expanded * largest_layer(pack.text_encoder) + encoding_bytes(pack, dtype, cpu),
        denoising=expanded * largest_layer(pack.transformer) + denoising_bytes(pack, tokens, dtype, cpu),
        decoding=edge * pixel_bytes(pack, dtype, cpu),
    )


def encoder_bytes(pack: Pack, dtype: str) -> int:
    """The embedding and the layers up to the last state that is read."""
    last = max(pack.notes.hidden_states)

    def read(name: str) -> bool:
        return name.startswith("model.embed") or name.startswith("model.layers.") and int(name.split(".")[2]) < last

    return weight_bytes(pack.text_encoder, dtype, read)


def weight_bytes(component: Component, dtype: str, read: Callable[[str], bool] = lambda name: True) -> int:
    """The tensors whose names are read: packed words as they lie, everything else in `dtype`."""
    return sum(
        info.nbytes if info.dtype == "U32" else math.prod(info.shape) * WIDTH[dtype]
        for name, info in component.tensors.items()
        if read(name)
    )


def largest_layer(component: Component) -> int:
    """Weights in the largest packed layer, 0 where none is packed."""
    if component.quantization is None:
        return 0
    words = [info.nbytes for name, info in component.tensors.items() if info.dtype == "U32" and "embed" not in name]
    return max(words, default=0) * 8 // component.quantization.bits


def encoding_bytes(pack: Pack, dtype: str, cpu: bool) -> int:
    """Activations of a text layer for all tokens; on a CPU the attention's scores too, and their softmax."""
    config, length = pack.text_encoder.config, pack.notes.text_length
    rows = length * WIDTH[dtype] * (4 * config["intermediate_size"] + 12 * config["hidden_size"])
    return rows + (3 * 4 * config["num_attention_heads"] * length**2 if cpu else 0)


def denoising_bytes(pack: Pack, tokens: int, dtype: str, cpu: bool) -> int:
    """Activations inside a single block, where they are most, with the block before still there."""
    heads, width = pack.transformer.config["num_attention_heads"], pack.transformer.config["attention_head_dim"]
    rows = tokens * WIDTH[dtype] * TOKEN_WIDTHS[cpu] * heads * width
    return rows + (3 * 4 * heads * tokens**2 if cpu else 0)


def pixel_bytes(pack: Pack, dtype: str, cpu: bool) -> int:
    """Activations of one pixel at the decoder's last level, whose first layer is as wide as the level below."""
    channels = pack.vae.config.get("decoder_block_out_channels") or pack.vae.config["block_out_channels"]
    widest = channels[min(1, len(channels) - 1)]
    return PIXEL_CPU + widest * CHANNEL_CPU if cpu else widest * PIXEL_CHANNELS_GPU * WIDTH[dtype]
