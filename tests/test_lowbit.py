"""The meaning of the codes, against arithmetic written out by hand and against torch's bfloat16."""

import numpy as np
import pytest
import torch

from engine import lowbit
from engine.types import BadRequest


def random_weights(rows: int = 6, k: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, k)).astype(np.float32)


def test_words_hold_codes_least_significant_bits_first() -> None:
    codes = np.zeros((1, 32), np.uint8)
    codes[0, [0, 1, 8, 31]] = 1
    assert lowbit.pack(codes, 1).tolist() == [[0x80000103]]
    codes[0, :4] = [1, 2, 0, 1]
    codes[0, 4:] = 0
    assert lowbit.pack(codes, 2).tolist() == [[0b01_00_10_01, 0]]
    codes[0, :9] = [1, 2, 3, 4, 5, 6, 7, 15, 9]
    assert lowbit.pack(codes, 4).tolist() == [[0xF7654321, 9, 0, 0]]


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_unpack_inverts_pack(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, 192), dtype=np.uint8)
    words = lowbit.pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (5, 192 * bits // 32)
    np.testing.assert_array_equal(lowbit.unpack(words, bits, 192), codes)


def test_pack_takes_codes_that_do_not_lie_side_by_side() -> None:
    codes = np.random.default_rng(0).integers(0, 4, (64, 5), dtype=np.uint8)
    np.testing.assert_array_equal(lowbit.unpack(lowbit.pack(codes.T, 2), 2, 64), codes.T)


def test_bfloat16_rounds_as_torch_does() -> None:
    values = np.random.default_rng(0).normal(0, 1, 4096).astype(np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0, -0.0, 3e38, 1e-40], np.float32)
    values = np.concatenate([values, ties])
    np.testing.assert_array_equal(lowbit.as_bfloat16(values), torch.from_numpy(values).bfloat16().float().numpy())


def test_ternary_holds_minus_s_zero_and_s() -> None:
    w = random_weights()
    codes, scales, biases = lowbit.quantize_ternary(w, 128)
    assert codes.max() == 2 and scales.shape == (6, 2)
    np.testing.assert_array_equal(biases, -scales)
    np.testing.assert_allclose(scales, np.abs(w).reshape(6, 2, 128).mean(-1), rtol=2**-8)
    back = lowbit.dequantize(codes, scales, biases, 128).reshape(6, 2, 128)
    s = scales[..., None]
    w = w.reshape(6, 2, 128)
    np.testing.assert_array_equal(back, np.where(np.abs(w) <= s / 2, 0, np.sign(w) * s))


def test_binary_holds_minus_s_and_s() -> None:
    w = random_weights()
    codes, scales, biases = lowbit.quantize_binary(w, 128)
    np.testing.assert_array_equal(scales, -2 * biases)
    back = lowbit.dequantize(codes, scales, biases, 128).reshape(6, 2, 128)
    np.testing.assert_array_equal(back, np.sign(w).reshape(6, 2, 128) * -biases[..., None])


def test_binary_counts_zero_as_positive() -> None:
    w = np.array([[0, -0.5] * 64], np.float32)
    assert lowbit.quantize_binary(w, 128)[0].tolist() == [[1, 0] * 64]


@pytest.mark.parametrize("bits", [1, 2])
def test_weights_that_are_already_low_bit_come_through_unchanged(bits: int) -> None:
    """Also where few weights of a group are not zero: their mean magnitude is far below s."""
    quantize = lowbit.quantize_ternary if bits == 2 else lowbit.quantize_binary
    rng = np.random.default_rng(bits)
    s = lowbit.as_bfloat16(rng.uniform(0.01, 0.1, (4, 2, 1)))
    signs = np.where(rng.random((4, 2, 128)) < 0.5, -1, 1) * (rng.random((4, 2, 128)) < 0.1 if bits == 2 else 1)
    w = (signs * s).reshape(4, 256).astype(np.float32)
    codes, scales, biases = quantize(w, 128)
    np.testing.assert_array_equal(lowbit.dequantize(codes, scales, biases, 128), w)


@pytest.mark.parametrize("bits", [2, 4])
def test_affine_is_within_half_a_step_and_keeps_zero(bits: int) -> None:
    w = random_weights(k=128) + np.float32(0.02)
    w[:, 5] = 0
    codes, scales, biases = lowbit.quantize_affine(w, bits, 64)
    assert codes.max() == 2**bits - 1
    back = lowbit.dequantize(codes, scales, biases, 64)
    step = np.abs(scales).repeat(64, axis=1)
    low_or_high = np.abs(biases).repeat(64, axis=1)
    # half a step; where the nudged range ends short of the smaller end, up to one; plus what bfloat16 rounds away
    assert (np.abs(back - w) <= step * 1.0 + low_or_high * 2**-7).all()
    assert np.sqrt(np.mean((back - w) ** 2)) < 0.4 * step.mean()
    assert (np.abs(back[:, 5]) <= low_or_high[:, 5] * 2**-6).all()


def test_affine_follows_mlx_on_a_group_worked_by_hand() -> None:
    """-0.75 has the larger magnitude: the bias. The step (0.5 + 0.75) / 15 puts zero 9 steps up, so it is 0.75 / 9."""
    w = np.zeros((1, 64), np.float32)
    w[0, :3] = [-0.75, 0.5, 0.25]
    codes, scales, biases = lowbit.quantize_affine(w, 4, 64)
    assert biases.tolist() == [[-0.75]]
    assert scales[0, 0] == lowbit.as_bfloat16(np.array(0.75 / 9))
    assert codes[0, :4].tolist() == [0, 15, 12, 9]


@pytest.mark.parametrize("value", [0.0, 0.25, -0.25])
def test_a_group_of_equal_values_survives_every_width(value: float) -> None:
    w = np.full((2, 128), value, np.float32)
    for quantized in (
        lowbit.quantize_ternary(w, 128), lowbit.quantize_binary(w, 128), lowbit.quantize_affine(w, 4, 128)
    ):
        np.testing.assert_allclose(lowbit.dequantize(*quantized, 128), w, atol=1e-6)


def test_scales_are_what_bfloat16_holds() -> None:
    w = random_weights(k=128)
    for _, scales, biases in (
        lowbit.quantize_ternary(w, 64), lowbit.quantize_binary(w, 64), lowbit.quantize_affine(w, 4, 64)
    ):
        for values in (scales, biases):
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, lowbit.as_bfloat16(values))


@pytest.mark.parametrize("quantize", [lowbit.quantize_ternary, lowbit.quantize_binary])
def test_refuses_inputs_that_do_not_fill_groups(quantize: object) -> None:
    assert callable(quantize)
    with pytest.raises(BadRequest, match=r"192 inputs .* groups of 128"):
        quantize(random_weights(k=192), 128)


def test_refuses_weights_that_are_no_numbers() -> None:
    w = random_weights()
    w[3, 7] = np.nan
    with pytest.raises(BadRequest, match="not a finite number"):
        lowbit.quantize_ternary(w, 128)


def test_refuses_what_does_not_fit_words() -> None:
    with pytest.raises(BadRequest, match="20 codes of 1 bits"):
        lowbit.pack(np.zeros((1, 20), np.uint8), 1)
    with pytest.raises(BadRequest, match="3 bits"):
        lowbit.pack(np.zeros((1, 32), np.uint8), 3)
    with pytest.raises(BadRequest, match="code 2 does not fit 1 bits"):
        lowbit.pack(np.full((1, 32), 2, np.uint8), 1)
    with pytest.raises(BadRequest, match="3 words a row are not 64 codes"):
        lowbit.unpack(np.zeros((1, 3), np.uint32), 1, 64)
