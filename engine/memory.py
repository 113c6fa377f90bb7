"""How many bytes a picture takes, predicted before anything is loaded: weights, activations, libraries.

The formulas count the tensors that are alive at the worst moment of each phase; their constants were fitted to measured
peaks (SPEED.md), and the full-size tests hold them to 15 %. Decides nothing: `plan` does. Imports no framework.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from engine.packs import Component, Pack

WIDTH = {"float32": 4, "bfloat16": 2}
LIBRARIES = 280 << 20  # Python and torch in a CPU's resident set; a card's allocator has none
SCRATCH = 80 << 20  # expanded rows of a packed layer, the matrix library's copies, holes in the heap
# Bytes, by dimensions, from which on a dense weight isn't copied into another number format, but cast when it is used:
# a big linear layer takes much longer to multiply than to cast, and a convolution uses its weight for every pixel.
BIG_WEIGHTS = {2: 16 << 20, 4: 1 << 20}
STRIP = 1 << 26  # bytes that a card's decoder convolves at a time
SCORES = 1 << 27  # bytes of its attention's scores at a time
KEPT = 8  # answers: a pack has 1,300 tensors, and every picture asks
TILE_HALO = 4  # image tokens around a VAE tile that its convolutions look at


@dataclass(frozen=True, slots=True)
class Need:
    """Predicted bytes. `peak` is the most at any moment, libraries included; the others are the parts it is made of.
    `recorded` is what a card's graphs of steps hold (torch_backend/graph.py)."""

    libraries: int
    encoder: int
    transformer: int
    decoder: int
    encoding: int
    denoising: int
    decoding: int
    recorded: int = 0

    def peak(self, keep_text_encoder: bool, hand_back: bool = False) -> int:
        """The worst of the three phases. A kept text encoder is in memory in all of them, on a card with the graph that
        reads prompts, and there all other weights are; steps' graphs too, unless their memory is handed back before
        decoding."""
        card, recorded = self.recorded > 0, 0 if hand_back else self.recorded
        weights = self.transformer + self.decoder
        reading = self.encoder + self.encoding + (weights + recorded if card else 0)
        kept = self.encoder + (self.encoding if card else 0) if keep_text_encoder else 0
        return self.libraries + max(reading, kept + weights + max(self.denoising, recorded + self.decoding))


@lru_cache(maxsize=KEPT)
def need(
    pack: Pack,
    size: tuple[int, int],
    side: int,
    dtype: str,
    *,
    cpu: bool,
    tile: int,
    batch: int = 1,
    int8: bool = False,
) -> Need:
    """What a picture of `size` (width, height) takes; `side` pixels an image token, `tile` 0: decoded in one piece.
    `int8`: packed layers are multiplied as bytes."""
    tokens = math.prod(size) // side**2 + pack.notes.text_length
    pixels = math.prod(_edge(length, tile, TILE_HALO * side) for length in size)
    denoising = SCRATCH + batch * tokens * (int8_token_bytes(pack) if int8 else token_bytes(pack, dtype))
    if cpu:
        decoding, recorded = pixels * pixel_bytes(pack, dtype) + feature_bytes(pack, size, side, dtype), 0
    else:
        decoding = card_bytes(pack, size, side, pixels, dtype)
        recorded = SCRATCH + tokens * recorded_token_bytes(pack) if int8 else denoising
    return Need(
        libraries=LIBRARIES if cpu else 0,
        encoder=encoder_bytes(pack, dtype),
        transformer=component_bytes(pack.transformer, dtype) + (folded_bytes(pack.transformer) if int8 else 0),
        decoder=decoder_bytes(pack.vae, dtype),
        encoding=encoding_bytes(pack, dtype),
        denoising=denoising,
        decoding=decoding,
        recorded=recorded,
    )


def _edge(length: int, tile: int, halo: int) -> int:
    """The longest side of the pieces that `length` pixels are decoded in, with their halos of so many pixels."""
    pieces = math.ceil(length / tile) if tile else 1
    return min(length, math.ceil(length / pieces) + min(2, pieces - 1) * halo)


def component_bytes(component: Component, dtype: str) -> int:
    """Bytes of a component's tensors once loaded: packed layers as they lie in the file, the rest in `dtype`."""
    return sum(_loaded(component, name, dtype) for name in component.tensors)


def block_bytes(component: Component, dtype: str) -> int:
    """Those of a transformer's blocks alone: what quantisation shrinks."""
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    return sum(_loaded(component, name, dtype) for name in component.tensors if name.startswith(blocks))


@lru_cache(maxsize=KEPT)
def encoder_bytes(pack: Pack, dtype: str) -> int:
    """The text encoder's layers up to the last state that is read. Of the embedding only the rows of a prompt."""
    last = max(pack.notes.hidden_states)
    return sum(
        _loaded(pack.text_encoder, name, dtype)
        for name in pack.text_encoder.tensors
        if name.startswith("model.layers.") and int(name.split(".")[2]) < last
    )


def decoder_bytes(vae: Component, dtype: str) -> int:
    """The decoding half of the autoencoder."""
    return sum(
        _loaded(vae, name, dtype) for name in vae.tensors if not name.startswith(("encoder.", "quant_conv."))
    )


def _loaded(component: Component, name: str, dtype: str) -> int:
    """Packed layers and, on a CPU, big dense ones lie in memory as they lie in the file."""
    info = component.tensors[name]
    if component.is_packed(name.rpartition(".")[0]) or info.nbytes >= BIG_WEIGHTS.get(len(info.shape), math.inf):
        return info.nbytes
    return math.prod(info.shape) * WIDTH[dtype]


def token_bytes(pack: Pack, dtype: str) -> int:
    """Activations of one token inside a single block, where they are most: the joint projection (queries, keys, values,
    both halves of the feed-forward), the feed-forward's product, attention and product side by side, and about five
    more rows: the block's input, its modulated copy, its result, and what the attention turns."""
    width, mlp = _widths(pack)
    return WIDTH[dtype] * ((3 * width + 2 * mlp) + mlp + (width + mlp) + 5 * width)


def int8_token_bytes(pack: Pack) -> int:
    """The same where layers multiply as bytes (torch_backend/fused.py), with float32 activations; a card's are
    half as wide. Most is held where a layer cannot bear it: the stream, queries, keys and values as they come and where
    the attention reads them, the feed-forward's product, and of this layer the modulated input, both halves of the
    feed-forward and one of them gated."""
    width, mlp = _widths(pack)
    return 4 * (width + (3 + 3) * width + mlp + width + 3 * mlp)


def recorded_token_bytes(pack: Pack) -> int:
    """What graphs of steps keep for a token in such layers, in bfloat16: queries, keys and values as they come and
    where the attention reads them, and one half of the feed-forward."""
    width, mlp = _widths(pack)
    return 2 * (3 * width + 3 * width + mlp)


def folded_bytes(component: Component) -> int:
    """What torch's int8 passes keep beside the packed layers: a byte for each scale and four for each row."""
    shapes = [info.shape for name, info in component.tensors.items() if name.endswith(".scales")]
    return sum(rows * (groups + 4) for rows, groups in shapes)


def _widths(pack: Pack) -> tuple[int, int]:
    """Of the transformer's stream and of its feed-forward."""
    config = pack.transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return width, int(width * config["mlp_ratio"])


def encoding_bytes(pack: Pack, dtype: str) -> int:
    """Activations of a text layer for all tokens, and the embedding's rows."""
    config = pack.text_encoder.config
    return pack.notes.text_length * WIDTH[dtype] * (4 * config["intermediate_size"] + 8 * config["hidden_size"])


def pixel_bytes(pack: Pack, dtype: str) -> int:
    """Activations of one pixel at the decoder's last level: a layer's input (still as wide as the level below), its
    normed copy and its output."""
    channels = pack.vae.config.get("decoder_block_out_channels") or pack.vae.config["block_out_channels"]
    return WIDTH[dtype] * (2 * channels[min(1, len(channels) - 1)] + 2 * channels[0])


def feature_bytes(pack: Pack, size: tuple[int, int], side: int, dtype: str) -> int:
    """What grows with the picture even when it is decoded in tiles: the whole picture at the decoder's low levels."""
    channels = pack.vae.config.get("decoder_block_out_channels") or pack.vae.config["block_out_channels"]
    latent_pixels = math.prod(size) * 4 // side**2
    return 6 * latent_pixels * WIDTH[dtype] * channels[-1]


def card_bytes(pack: Pack, size: tuple[int, int], side: int, pixels: int, dtype: str) -> int:
    """What a card takes to decode `pixels` at a time (torch_backend/decoder_card.py): at the last level a layer's input
    and its output, and between them as much as is whole, or three strips; the low levels' result waits meanwhile.
    Or the low levels themselves, with the attention's scores, their softmax and that rounded."""
    channels = pack.vae.config.get("decoder_block_out_channels") or pack.vae.config["block_out_channels"]
    last, before = (pixels * WIDTH[dtype] * channels[min(level, len(channels) - 1)] for level in (0, 1))
    features = feature_bytes(pack, size, side, dtype)
    scores = min(SCORES, 4 * (math.prod(size) * 4 // side**2) ** 2)
    return max(features // 6 + before + last + min(max(before, 2 * last), 3 * STRIP), features + 5 * scores // 2)
