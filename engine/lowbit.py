"""What the 1-, 2- and 4-bit codes mean, in NumPy: quantise, pack, unpack, expand. The readable truth.

One rule serves every width: `w[n, k] = code[n, k] * scale[n, k // g] + bias[n, k // g]`, with g consecutive inputs in a
group. Codes lie along the input axis, least significant bits first, in little-endian uint32 words, one row per output.
Ternary: codes 0, 1, 2 mean -s, 0, +s (scale s, bias -s). Binary: 0, 1 mean -s, +s (scale 2s, bias -s).
Knows nothing of files, layers or models.
"""

import numpy as np

from engine.types import BadRequest

WORD_BITS = 32
BITS = (1, 2, 4)
_SMALLEST_SCALE = 1e-7  # of an affine group whose values are all alike

Quantized = tuple[np.ndarray, np.ndarray, np.ndarray]
"""codes uint8 [out, in], scales and biases float32 [out, in / group_size], exact in bfloat16."""


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """Finite float values as the uint16 bit patterns of the nearest bfloat16 (ties to even), same shape."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16).reshape(np.shape(values))


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 values of uint16 bfloat16 bit patterns, same shape; exact."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    """Finite float values rounded to what bfloat16 can hold, as float32."""
    return from_bfloat16(bfloat16_bits(values))


def quantize_ternary(w: np.ndarray, group_size: int) -> Quantized:
    """Round float weights [out, in] to -s, 0, +s per group, with s the group's mean magnitude (as in BitNet b1.58).

    A group that already holds nothing but -s, 0 and +s keeps its s, so ternary weights come through unchanged.
    Raises BadRequest where `in` is not a multiple of `group_size`, or a weight is not finite.
    """
    groups = _groups(w, group_size)
    size = np.abs(groups)
    peak = size.max(axis=-1)
    ternary_already = ((size == 0) | (size == peak[..., None])).all(axis=-1)
    scales = as_bfloat16(np.where(ternary_already, peak, size.mean(axis=-1)))
    codes = np.clip(np.rint(groups / _divisor(scales)), -1, 1) + 1
    return codes.astype(np.uint8).reshape(w.shape), scales, -scales


def quantize_binary(w: np.ndarray, group_size: int) -> Quantized:
    """Round float weights [out, in] to -s, +s per group, with s the group's mean magnitude; zero counts as positive.

    Raises BadRequest where `in` is not a multiple of `group_size`, or a weight is not finite.
    """
    groups = _groups(w, group_size)
    half = as_bfloat16(np.abs(groups).mean(axis=-1))
    return (groups >= 0).astype(np.uint8).reshape(w.shape), 2 * half, -half


def quantize_affine(w: np.ndarray, bits: int, group_size: int) -> Quantized:
    """Round float weights [out, in] to 2**bits even steps per group, by the rule of MLX's affine mode.

    The end of the range with the larger magnitude is the bias; the step is nudged so that zero falls on a code. Codes
    are chosen against the bfloat16 scale and bias, which is what a reader will multiply with. Not for ternary weights:
    four steps from min to max lose them. Raises BadRequest as `quantize_ternary` does.
    """
    groups = _groups(w, group_size)
    top = 2**bits - 1
    low, high = groups.min(axis=-1), groups.max(axis=-1)
    low_is_larger = np.abs(low) > np.abs(high)
    edge = np.where(low_is_larger, low, high)
    step = np.maximum((high - low) / top, _SMALLEST_SCALE)
    step = np.where(low_is_larger, step, -step)  # no product with an int: float64 would break ties another way than MLX
    steps_to_zero = np.rint(edge / step)
    holds_zero = steps_to_zero != 0
    scales = as_bfloat16(np.where(holds_zero, edge / np.where(holds_zero, steps_to_zero, 1), step))
    biases = as_bfloat16(np.where(holds_zero, edge, 0))
    codes = np.clip(np.rint((groups - biases[..., None]) / _divisor(scales)), 0, top)
    return codes.astype(np.uint8).reshape(w.shape), scales, biases


def dequantize(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, group_size: int) -> np.ndarray:
    """The float32 weights [out, in] that codes [out, in] with scales and biases [out, in / group_size] stand for."""
    rows, k = codes.shape
    groups = codes.reshape(rows, k // group_size, group_size).astype(np.float32)
    return (groups * scales[..., None] + biases[..., None]).astype(np.float32, copy=False).reshape(rows, k)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [out, in] -> little-endian uint32 words [out, in * bits / 32].

    Raises BadRequest where a row does not fill whole words, or a code needs more than `bits` bits.
    """
    rows, k = codes.shape
    if bits not in BITS or k * bits % WORD_BITS:
        raise BadRequest(
            f"a row of {k} codes of {bits} bits does not fill whole words; use 1, 2 or 4 bits and 32 n inputs"
        )
    if codes.size and int(codes.max()) >> bits:
        raise BadRequest(f"code {int(codes.max())} does not fit {bits} bits; quantise with the same number of bits")
    per_byte = 8 // bits
    packed = np.zeros((rows, k // per_byte), dtype=np.uint8)
    for place in range(per_byte):  # byte by byte: a uint32 copy of every code would be four times the memory
        packed |= codes[:, place::per_byte].astype(np.uint8, copy=False) << np.uint8(bits * place)
    return packed.view("<u4")


def unpack(words: np.ndarray, bits: int, k: int) -> np.ndarray:
    """Words [out, k * bits / 32] -> codes uint8 [out, k], the inverse of `pack`.

    Raises BadRequest where the width of the words does not match `k`.
    """
    if bits not in BITS or words.shape[1] * WORD_BITS != k * bits:
        raise BadRequest(
            f"{words.shape[1]} words a row are not {k} codes of {bits} bits, as the config says; fetch the pack again"
        )
    per_byte = 8 // bits
    packed = np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
    codes = np.empty((words.shape[0], k), dtype=np.uint8)
    for place in range(per_byte):
        codes[:, place::per_byte] = (packed >> np.uint8(bits * place)) & np.uint8(2**bits - 1)
    return codes


def words_fault(words: np.ndarray, bits: int) -> str | None:
    """What is wrong with a layer's packed words, as the end of a sentence, or None."""
    if bits == 2 and (words & (words >> np.uint32(1)) & np.uint32(0x55555555)).any():  # both bits of a slot set
        return "holds code 3, which no ternary weight has"
    return None


def affine_fault(scales: np.ndarray, biases: np.ndarray, bits: int) -> str | None:
    """What is wrong with a layer's float32 scales and biases, as the end of a sentence, or None."""
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        return "holds a scale or a bias that is not a finite number"
    if bits == 2 and not np.array_equal(biases, -scales):
        return "holds a bias that is not minus its scale, so its weights are not ternary"
    return None


def _groups(w: np.ndarray, group_size: int) -> np.ndarray:
    """Weights [out, in] as float32 [out, in / group_size, group_size], refused where that cannot be."""
    rows, k = w.shape
    if group_size < 1 or k % group_size:
        raise BadRequest(
            f"a layer of {k} inputs does not split into groups of {group_size}; leave it dense or change the group size"
        )
    groups = np.asarray(w, dtype=np.float32).reshape(rows, k // group_size, group_size)
    if not np.isfinite(groups).all():
        raise BadRequest(f"a {rows} x {k} layer holds a weight that is not a finite number; fetch the source again")
    return groups


def _divisor(scales: np.ndarray) -> np.ndarray:
    """Scales [out, groups] as [out, groups, 1], with 1 for 0: a group of zeros has scale 0, and still needs codes."""
    return np.where(scales == 0, 1, scales)[..., None]
