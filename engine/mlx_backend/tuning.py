"""Questions to the machine, asked before the first picture: does mlx multiply packed weights rightly here, and when is
it faster to expand them.

Both are asked with small matrices of random codes. It knows no model.
"""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import mlx.core as mx
import numpy as np

from engine import lowbit, measured
from engine.mlx_backend.linear import expand, multiply
from engine.types import EngineError

VERSION: str = mx.__version__  # type: ignore[attr-defined]  # mlx's type stubs leave it out
NEEDED = (0, 32, 4)  # the first mlx whose kernels read 1-bit weights; older ones refuse them
SIDE = {mx.cpu: 512, mx.gpu: 3072}  # of the square layer that is timed; a GPU must be given enough to do
ROWS = (16, 64, 256, 1024)  # a text of 512 and a picture of 1,024 tokens lie behind the last
WORTH = 1.25  # expanding must win clearly, or the packed kernel stays: it needs less memory, and clocks are noisy
TRIES = 5
PATIENCE = 0.1  # seconds for one product of so many rows; a CPU that is slower has shown what it can
TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 0.1}  # the CPU's kernels even sum in bfloat16; noise is off by far more


def check_version(version: str = VERSION) -> None:
    """Raise EngineError for an mlx that is too old."""
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
    if numbers < NEEDED:
        needed = ".".join(map(str, NEEDED))
        raise EngineError(
            f"mlx {version} is too old to read 1-bit weights: pip install --upgrade 'mlx>={needed}', or use "
            "--backend torch"
        )


def check_products(bits: int, group_size: int, dtype: mx.Dtype) -> None:
    """Raise EngineError unless this mlx multiplies a small packed layer as NumPy does.

    Some builds of mlx give gray noise instead of pictures on some chips (seen on M5): their kernels were miscompiled,
    and nothing else tells.
    """
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 3 if bits == 2 else 2**bits, (96, 4 * group_size), dtype=np.uint8)
    scales, biases = (lowbit.as_bfloat16(rng.normal(size=(96, 4))) for _ in range(2))
    weights = lowbit.dequantize(codes, scales, biases, group_size)
    packed = (mx.array(lowbit.pack(codes, bits)), mx.array(scales).astype(dtype), mx.array(biases).astype(dtype))
    for rows in (1, 96):  # a vector and a matrix take different kernels
        x = mx.array(rng.normal(size=(rows, codes.shape[1])).astype(np.float32)).astype(dtype)
        expected = np.array(x.astype(mx.float32)) @ weights.T
        found = multiply(x, *packed, bits, group_size)
        error = np.abs(np.array(found.astype(mx.float32)) - expected).max() / np.abs(expected).max()
        if not error < TOLERANCE[dtype]:  # `not <`, so that a NaN is refused as well
            raise EngineError(
                f"mlx {VERSION} multiplies {bits}-bit weights wrongly on {device_name()} (off by "
                f"{error:.2g}), which would give gray noise: pip install --upgrade --force-reinstall mlx, update the "
                "system, or use --backend torch"
            )


def device_name() -> str:
    return str(mx.device_info().get("device_name") or mx.default_device())


def expand_from(bits: int, group_size: int, dtype: mx.Dtype, data_dir: Path) -> int | None:
    """From how many rows on a packed layer is faster when it is expanded first (None: never); measured once, kept."""
    key = f"mlx {VERSION}, {device_name()}, {bits} bits in groups of {group_size}, {dtype_name(dtype)}"
    known = measured.recall(data_dir).get(key)
    if known is not None and isinstance(known.get("expand_from"), int | None):
        return known["expand_from"]
    rows, sentence = measure(bits, group_size, dtype)
    measured.keep(data_dir, key, {"expand_from": rows, "sentence": f"{key}: {sentence}"})
    return rows


def measure(bits: int, group_size: int, dtype: mx.Dtype) -> tuple[int | None, str]:
    """The fewest of `ROWS` from which expanding is clearly faster, and the finding as a sentence."""
    rng = np.random.default_rng(0)
    side = SIDE[mx.default_device().type]
    weight = mx.array(rng.integers(0, 2**32, (side, side * bits // 32), dtype=np.uint32))
    scales = mx.ones((side, side // group_size), dtype=dtype)
    layer = (weight, scales, scales, bits, group_size)
    mx.eval(weight, scales)
    for rows in ROWS:
        x = mx.ones((rows, side), dtype=dtype)
        mx.eval(x)

        def packed(x: mx.array = x) -> mx.array:
            return multiply(x, *layer)

        def expanded(x: mx.array = x) -> mx.array:
            return x @ expand(*layer).T

        slow, fast = seconds(packed), seconds(expanded)
        if slow > WORTH * fast:
            return rows, f"layers are expanded from {rows} rows on ({fast * 1e3:.1f} ms instead of {slow * 1e3:.1f})"
        if slow > PATIENCE:
            break
    return None, f"layers are multiplied packed ({slow * 1e3:.1f} ms for {rows} rows, expanded {fast * 1e3:.1f})"


def seconds(work: Callable[[], mx.array]) -> float:
    """The shortest of a few runs, after one that may compile; of slow ones fewer."""
    mx.eval(work())
    times: list[float] = []
    while len(times) < TRIES and sum(times) < PATIENCE:
        start = perf_counter()
        mx.eval(work())
        times.append(perf_counter() - start)
    return min(times)


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
