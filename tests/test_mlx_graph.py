"""Kernels and bytes of a denoising step of the 4B model, held to 1.5 times the floor; and that the counter counts."""

import re
from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from engine.mlx_backend import fused, transformer  # noqa: E402
from tests import mlx_graph  # noqa: E402

TINY = mlx_graph.CONFIG | {
    "attention_head_dim": 64, "axes_dims_rope": [16] * 4, "in_channels": 64, "joint_attention_dim": 192,
    "num_attention_heads": 2, "num_layers": 2, "num_single_layers": 3,
}  # fmt: skip
MOST = 1.5
OPERANDS = {"silu": 1, "swiglu": 2, "gated": 3, "affine": 3, "rotate": 4}
PUBLISHED = {1: 965.164, 2: 1425.227}  # decimal MB of the released packed transformers


@pytest.mark.parametrize("bits", [1, 2])
def test_a_step_of_the_4b_model_at_512(bits: int) -> None:
    found = mlx_graph.count(mlx_graph.CONFIG, bits, (32, 32), 512)
    assert found.weights / 1e6 == pytest.approx(PUBLISHED[bits], abs=1e-3)  # every weight once, and none unpacked
    assert found.kernels["QuantizedMatmul"] == 100 - 2 * 2 * 5
    assert found.kernels["ScaledDotProductAttention"] == 25
    assert found.ratio < MOST and found.total < MOST * found.needed


def test_joining_saves_the_products_it_says() -> None:
    joined, apart = (mlx_graph.count(TINY, 2, (4, 4), 8, joined) for joined in (True, False))
    assert apart.kernels["QuantizedMatmul"] - joined.kernels["QuantizedMatmul"] == 2 * 2 * 2
    assert joined.weights == apart.weights


def test_waste_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra pass over the activations, a weight read twice, a copy: each is counted."""
    before = mlx_graph.count(TINY, 1, (4, 4), 8)
    call = transformer.Flux2FeedForward.__call__
    monkeypatch.setattr(transformer.Flux2FeedForward, "__call__", lambda self, x: call(self, x + 1))
    passed = mlx_graph.count(TINY, 1, (4, 4), 8)
    assert passed.kernels["Add"] - before.kernels["Add"] == 2 * 2
    assert passed.activations > before.activations and passed.floor == before.floor
    monkeypatch.setattr(transformer.Flux2FeedForward, "__call__", lambda self, x: call(self, x) + call(self, x))
    assert mlx_graph.count(TINY, 1, (4, 4), 8).weights > before.weights

    def turned(self: transformer.Flux2FeedForward, x: mx.array) -> mx.array:
        return call(self, x.swapaxes(1, 2).flatten(1).reshape(x.shape))

    monkeypatch.setattr(transformer.Flux2FeedForward, "__call__", turned)
    assert mlx_graph.count(TINY, 1, (4, 4), 8).activations > before.activations


@pytest.mark.parametrize("name", OPERANDS)
def test_a_fused_function_is_one_kernel(name: str, tmp_path: Path) -> None:
    """In the graph that mx.compile makes of it, which is the same on every device."""
    operands = [mx.zeros((1, 3, 2, 4, 2)) for _ in range(OPERANDS[name])]
    out = mx.compile(getattr(fused, name).__wrapped__)(*operands)
    mx.export_to_dot(str(tmp_path / "graph"), out)
    labels = re.findall(r'label ="(\w+)"', (tmp_path / "graph").read_text())
    nodes = [label for label in labels if label not in ("Full", "Broadcast")]
    assert len(nodes) == 1 and nodes[0].startswith("Compiled")
