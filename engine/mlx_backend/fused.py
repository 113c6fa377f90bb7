"""Arithmetic between the matrix products, each function one kernel on a GPU.

mx.compile turns a chain of elementwise operations into one kernel that reads each operand once. On the CPU it would
call a C++ compiler in the middle of a picture, and fail where there is none, so there the plain operations run: the
same numbers, only slower. (mlx.nn's own silu is compiled always, hence ours.)
"""

from collections.abc import Callable
from functools import wraps

import mlx.core as mx


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """`function`, made of elementwise operations and views, as one kernel where the default device is a GPU."""
    compiled = mx.compile(function)  # traces at the first call, so importing this module computes nothing

    @wraps(function)
    def call(*operands: mx.array) -> mx.array:
        return (compiled if mx.default_device() == mx.gpu else function)(*operands)

    return call


@fused
def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


@fused
def swiglu(gate: mx.array, value: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * value


@fused
def gated(x: mx.array, gate: mx.array, change: mx.array) -> mx.array:
    """The end of a residual branch."""
    return x + gate * change


@fused
def affine(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """x * scale + shift in float32, and back to the dtype of `x`."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@fused
def rotate(pairs: mx.array, swapped: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn (a, b) to (a cos - b sin, b cos + a sin): `swapped` is (b, a), and `sin` carries the signs (-, +).

    In float32, and back to the dtype of `pairs`.
    """
    turned = pairs.astype(mx.float32) * cos + swapped.astype(mx.float32) * sin
    return turned.astype(pairs.dtype)
