"""MLX's packed layers against the NumPy truth, what is expanded and when, joined layers, and what `build` refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from mlx import nn  # noqa: E402

from engine import lowbit  # noqa: E402
from engine.mlx_backend import fused, linear  # noqa: E402
from engine.mlx_backend.linear import PackedEmbedding, PackedLinear, build  # noqa: E402
from engine.packs import Component, Quantization, Tensors  # noqa: E402
from engine.types import EngineError  # noqa: E402

GROUP, ROWS, FEATURES = 64, 48, 128


class Net(nn.Module):
    """One layer of every kind that `build` meets; layers.1 stays dense, as in a real pack some do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, FEATURES)
        self.layers = [nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(4)]
        self.norm = nn.LayerNorm(FEATURES)


def packed_tensors(name: str, rows: int, bits: int, seed: int) -> tuple[dict[str, mx.array], np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3 if bits == 2 else 2**bits, (rows, FEATURES), dtype=np.uint8)
    scales, biases = (lowbit.as_bfloat16(rng.normal(size=(rows, FEATURES // GROUP))) for _ in range(2))
    return {
        f"{name}.weight": mx.array(lowbit.pack(codes, bits)),
        f"{name}.scales": mx.array(scales).astype(mx.bfloat16),
        f"{name}.biases": mx.array(biases).astype(mx.bfloat16),
    }, lowbit.dequantize(codes, scales, biases, GROUP)


def net_tensors(bits: int) -> tuple[dict[str, mx.array], dict[str, np.ndarray]]:
    dense = np.random.default_rng(9).normal(size=(FEATURES, FEATURES))
    tensors = {"layers.1.weight": mx.array(dense).astype(mx.bfloat16)}
    weights: dict[str, np.ndarray] = {}
    for seed, name in enumerate(("embed", "layers.0", "layers.2", "layers.3")):
        parts, weights[name] = packed_tensors(name, ROWS if name == "embed" else FEATURES, bits, seed)
        tensors |= parts
    return tensors | {"norm.weight": mx.ones(FEATURES), "norm.bias": mx.zeros(FEATURES)}, weights


def component(folder: Path, tensors: dict[str, mx.array], bits: int | None) -> Component:
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    quantization = Quantization(bits, GROUP) if bits else None
    return Component(folder, {}, quantization, Tensors((folder / "model.safetensors",)))


def built(folder: Path, bits: int, **options: object) -> tuple[Net, dict[str, np.ndarray]]:
    tensors, weights = net_tensors(bits)
    net = Net()
    build(net, component(folder, tensors, bits), mx.float32, **options)
    return net, weights


def inputs(rows: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(1, rows, FEATURES)).astype(np.float32)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("expand_from", [None, 8])
def test_linear_and_embedding_mean_what_lowbit_says(tmp_path: Path, bits: int, expand_from: int | None) -> None:
    net, weights = built(tmp_path, bits, expand_from={bits: expand_from})
    assert isinstance(net.layers[0], PackedLinear) and isinstance(net.embed, PackedEmbedding)
    assert net.layers[0].expand_from == expand_from
    x = inputs(10)
    np.testing.assert_allclose(net.layers[0](mx.array(x)), x @ weights["layers.0"].T, rtol=1e-5, atol=1e-4)
    ids = np.array([[0, 7, 47, 7]])
    np.testing.assert_allclose(net.embed(mx.array(ids)), weights["embed"][ids], rtol=1e-6, atol=1e-6)


def test_packed_words_stay_as_in_the_file(tmp_path: Path) -> None:
    net, _ = built(tmp_path, 1)
    words = Tensors((tmp_path / "model.safetensors",)).numpy("layers.0.weight")
    assert net.layers[0].weight.dtype == mx.uint32 and np.array_equal(np.array(net.layers[0].weight), words)
    assert net.layers[0].scales.dtype == mx.float32 and net.layers[1].weight.dtype == mx.float32


def test_nothing_is_read_before_it_is_used(tmp_path: Path) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    net, _ = built(tmp_path, 2)
    assert mx.get_active_memory() - before < 4096
    mx.eval(net.parameters())
    assert mx.get_active_memory() - before > FEATURES * FEATURES * 4


def peak_of(net: Net, rows: int, *numbers: int) -> int:
    """The most bytes that these layers' products held at a time, asked for together."""
    x = mx.array(inputs(rows))
    mx.eval(x)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval([net.layers[number](x) for number in numbers])
    return mx.get_peak_memory() - before


def test_wide_inputs_are_expanded_one_layer_at_a_time(tmp_path: Path) -> None:
    net, _ = built(tmp_path, 1, expand_from={1: 8})
    mx.eval(net.parameters())
    expanded = FEATURES * FEATURES * 4
    assert peak_of(net, 7, 0) < 0.5 * expanded
    one = peak_of(net, 8, 0)  # on the CPU twice the layer: MLX makes it there in several operations
    assert one >= expanded
    assert peak_of(net, 8, 0, 2, 3) < one + 0.5 * expanded


@pytest.mark.parametrize("bits", [1, 2])
def test_joined_layers_give_the_same_bits_in_one_product(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = built(tmp_path, bits)
    three = (net.layers[0], net.layers[2], net.layers[3])
    x = mx.array(inputs(5))
    apart = linear.side_by_side(x, *three)
    mx.eval(net.parameters(), apart)
    names, before = set(dict(nn.utils.tree_flatten(net.parameters()))), mx.get_active_memory()
    assert linear.join(*three)
    assert set(dict(nn.utils.tree_flatten(net.parameters()))) == names
    assert mx.get_active_memory() - before < 4096  # views of the joint tensors, no second copy
    products = []
    multiply = linear.multiply
    monkeypatch.setattr(linear, "multiply", lambda *layer: products.append(1) or multiply(*layer))
    together = linear.side_by_side(x, *three)
    assert len(products) == 1
    assert all(mx.array_equal(one, other) for one, other in zip(together, apart, strict=True))
    assert mx.array_equal(net.layers[2](x), apart[1])


def test_layers_are_not_joined_where_the_bits_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = built(tmp_path, 2)
    three = (net.layers[0], net.layers[2], net.layers[3])
    multiply = linear.multiply

    def another_order(x: mx.array, weight: mx.array, *rest: object) -> mx.array:
        return multiply(x, weight, *rest) * (1 + 1e-7 * (weight.shape[0] > FEATURES))

    monkeypatch.setattr(linear, "multiply", another_order)
    assert not linear.join(*three)
    assert net.layers[0].joint is None and len(linear.side_by_side(mx.array(inputs(2)), *three)) == 3
    assert not linear.join(net.layers[1], net.layers[1])  # dense


def test_prefix_unused_and_layout(tmp_path: Path) -> None:
    tensors, _ = net_tensors(4)
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"lm_head.weight": mx.zeros(1)}
    net = Net()
    part = component(tmp_path, renamed, 4)
    build(net, part, mx.float32, prefix="model.", unused=("lm_head.",), layout=lambda t: t * 2)
    assert mx.array_equal(net.norm.weight, mx.full(FEATURES, 2.0))
    assert mx.array_equal(net.layers[0].scales, tensors["layers.0.scales"].astype(mx.float32))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("norm.bias"), "missing norm.bias"),
        (lambda t: t.pop("layers.2.biases"), "missing layers.2.biases"),
        (lambda t: t.update(extra=mx.zeros(1)), "unexpected extra"),
        (lambda t: t.update({"layers.9.scales": mx.zeros((1, 1))}), "unexpected layers.9.scales"),
        (lambda t: t.update({"layers.1.weight": mx.zeros((2, 3))}), r"layers.1.weight is \[2, 3\] instead of \[128"),
        (lambda t: t.update({"layers.0.scales": mx.zeros((128, 1))}), r"layers.0.scales is \[128, 1\] instead of"),
        (lambda t: t.update({"norm.scales": mx.zeros((1, 1))}), "norm is no layer that can be packed"),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_sentence(tmp_path: Path, spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    tensors, _ = net_tensors(2)
    spoil(tensors)
    with pytest.raises(EngineError, match=words) as refused:
        build(Net(), component(tmp_path, tensors, 2), mx.float32)
    assert str(tmp_path) in str(refused.value) and "fetch or copy the pack again" in str(refused.value)


def test_scales_without_declared_bits_and_a_file_that_vanished(tmp_path: Path) -> None:
    part = component(tmp_path, net_tensors(2)[0], None)
    with pytest.raises(EngineError, match="names no bits"):
        build(Net(), part, mx.float32)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        build(Net(), part, mx.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["silu", "swiglu", "gated", "affine", "rotate"])
def test_one_kernel_and_many_give_the_same(name: str) -> None:
    """mx.compile is used on GPUs alone; here the CPU's C++ compiler stands in for it."""
    if shutil.which("g++") is None:
        pytest.skip("mx.compile needs a C++ compiler on the CPU, and g++ is missing")
    function = getattr(fused, name)
    shape = (1, 3, 2, 4, 2)
    count = {"silu": 1, "swiglu": 2, "gated": 3, "affine": 3, "rotate": 4}[name]
    operands = [mx.array(part) for part in np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)]
    plain, compiled = function(*operands), mx.compile(function.__wrapped__)(*operands)
    np.testing.assert_allclose(compiled, plain, rtol=1e-6, atol=1e-6)
