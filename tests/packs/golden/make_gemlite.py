"""How gemlite.npz was made: bytes of gemlite's own pack(), on a CPU, with CUDA and triton stubbed.

    pip download --no-deps gemlite==0.6.0.post2 && tar xzf gemlite-*.tar.gz
    python tests/packs/golden/make_gemlite.py gemlite-0.6.0.post2

gemlite does not import without triton and a card, and the tests must not need it. What is stubbed is never reached:
kernels are compiled and a card is asked only when a layer runs; pack() is plain torch.
"""

import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

N, K, GROUP = 8, 256, 128


def main(source: str) -> None:
    for name in ("triton", "triton.language", "triton.testing", "triton.runtime", "triton.language.extra"):
        sys.modules[name] = MagicMock(name=name)
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: MagicMock(multi_processor_count=132)
    torch.cuda.get_device_name = lambda *_: "stub"
    torch.cuda.current_device = lambda: 0
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)
    sys.path.insert(0, source)
    from gemlite.core import DType, GemLiteLinearTriton

    rng = np.random.default_rng(0)
    kept = {}
    for bits in (1, 2):
        codes = rng.integers(0, 3 if bits == 2 else 2, (N, K), np.uint8)
        s = rng.uniform(0.01, 0.1, (N, K // GROUP)).astype(np.float32)
        scales, zero = (s, 1.0) if bits == 2 else (2 * s, 0.5)
        kept |= {f"{bits}.codes": np.packbits(codes.reshape(-1, 1) >> np.arange(2) & 1), f"{bits}.s": s}
        for mode, fused in ((4, True), (3, False)):
            layer = GemLiteLinearTriton(bits, GROUP, K, N, input_dtype=DType.FP16, output_dtype=DType.FP16)
            zeros = torch.full((N, K // GROUP), zero)
            layer.pack(
                torch.from_numpy(codes), torch.from_numpy(scales), zeros, fma_mode=fused, packing_bitwidth=8
            )
            for key in ("W_q", "scales", "zeros", "metadata", "orig_shape"):
                kept[f"{bits}.{mode}.{key}"] = getattr(layer, key).detach().numpy()
    np.savez_compressed(Path(__file__).with_name("gemlite.npz"), **kept)


main(sys.argv[1])
