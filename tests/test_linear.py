"""Packed layers against the NumPy truth, how much of them is ever expanded, and what `build` refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from engine import lowbit
from engine.packs import Component, Quantization, Tensors
from engine.torch_backend import linear
from engine.torch_backend.linear import PackedEmbedding, PackedLinear, StoredEmbedding, StoredLinear, build
from engine.types import EngineError
from tests.peak import PeakMemory

GROUP, ROWS, FEATURES = 64, 48, 128
CPU = torch.device("cpu")


class Net(nn.Module):
    """One layer of every kind that `build` meets."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ROWS, FEATURES)
        self.layers = nn.ModuleList([nn.Linear(FEATURES, FEATURES, bias=False) for _ in range(3)])
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.norm(x)


def packed_tensors(name: str, rows: int, bits: int, seed: int) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Random codes, scales and biases of one layer as tensors, and the weights that they mean."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 3 if bits == 2 else 2**bits, (rows, FEATURES), dtype=np.uint8)
    scales, biases = (lowbit.as_bfloat16(rng.normal(size=(rows, FEATURES // GROUP))) for _ in range(2))
    return {
        f"{name}.weight": torch.from_numpy(lowbit.pack(codes, bits)),
        f"{name}.scales": torch.from_numpy(scales).bfloat16(),
        f"{name}.biases": torch.from_numpy(biases).bfloat16(),
    }, lowbit.dequantize(codes, scales, biases, GROUP)


def component(folder: Path, tensors: dict[str, torch.Tensor], bits: int | None) -> Component:
    save_file(tensors, folder / "model.safetensors")
    quantization = Quantization(bits, GROUP) if bits else None
    return Component(folder, {}, quantization, Tensors((folder / "model.safetensors",)))


def net_tensors(bits: int) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """A Net with a packed embedding and two packed linears; layers.1 stays dense, as in a real pack some do."""
    tensors: dict[str, torch.Tensor] = {"layers.1.weight": torch.randn(FEATURES, FEATURES).bfloat16()}
    weights: dict[str, np.ndarray] = {}
    for seed, name in enumerate(("embed", "layers.0", "layers.2")):
        parts, weights[name] = packed_tensors(name, ROWS if name == "embed" else FEATURES, bits, seed)
        tensors |= parts
    tensors |= {"norm.weight": torch.ones(FEATURES).bfloat16(), "norm.bias": torch.zeros(FEATURES).bfloat16()}
    return tensors, weights


def meta_net() -> Net:
    with torch.device("meta"):
        return Net()


def built(folder: Path, bits: int, dtype: torch.dtype = torch.float32) -> tuple[Net, dict[str, np.ndarray]]:
    tensors, weights = net_tensors(bits)
    net = meta_net()
    build(net, component(folder, tensors, bits), dtype, CPU)
    return net, weights


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_linear_and_embedding_mean_what_lowbit_says(tmp_path: Path, bits: int) -> None:
    net, weights = built(tmp_path, bits)
    x = torch.randn(3, 5, FEATURES)
    assert isinstance(net.layers[0], PackedLinear) and isinstance(net.embed, PackedEmbedding)
    torch.testing.assert_close(net.layers[0](x), x @ torch.from_numpy(weights["layers.0"]).T, rtol=1e-6, atol=1e-5)
    ids = torch.tensor([[0, 7, 47, 7]])
    assert torch.equal(net.embed(ids), torch.from_numpy(weights["embed"])[ids])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bfloat16(tmp_path: Path, bits: int) -> None:
    """With 1 and 2 bits the product is exact and only the sum is rounded; with 4 both are."""
    net, weights = built(tmp_path, bits, torch.bfloat16)
    expected, found = torch.from_numpy(weights["embed"]), net.embed(torch.arange(ROWS)).float()
    largest_product = 15 * net.embed.scales.float().abs().repeat_interleave(GROUP, dim=1)
    rounding = torch.finfo(torch.bfloat16).eps / 2 * (expected.abs() + (2 * largest_product if bits == 4 else 0))
    assert ((found - expected).abs() <= rounding).all()
    assert isinstance(net.layers[1], nn.Linear) and net.layers[1].weight.dtype == torch.bfloat16


def test_codes_stay_in_the_file(tmp_path: Path) -> None:
    net, _ = built(tmp_path, 2)
    before = net.layers[0].weight[0, 0].item()
    path = tmp_path / "model.safetensors"
    info = Tensors((path,))["layers.0.weight"]
    with path.open("r+b") as file:  # the same inode, so a mapping sees the change and a copy doesn't
        file.seek(info.offset)
        file.write(bytes([before ^ 1]))
    assert net.layers[0].weight[0, 0].item() == before ^ 1


@torch.inference_mode()
def test_one_layer_is_expanded_at_a_time(tmp_path: Path) -> None:
    """An expanded layer is the largest thing here by far; two of them alive at once would show."""
    net, _ = built(tmp_path, 1)
    ids = torch.tensor([[1, 2]])
    net(ids)  # makes the code table, which is kept
    with PeakMemory() as memory:
        net(ids)
    expanded = FEATURES * FEATURES * 4
    packed = FEATURES * FEATURES // 8 * 4  # the codes as int32
    assert expanded <= memory.peak <= expanded + packed + 16 * 1024
    for tensor in net.layers[0].state_dict().values():
        assert tensor.nbytes <= FEATURES * FEATURES // 8


def test_rows_are_expanded_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, weights = built(tmp_path, 2)
    x = torch.randn(3, 5, FEATURES)
    expected = x @ torch.from_numpy(weights["layers.0"]).T
    monkeypatch.setattr(linear, "OUTPUTS", 10)
    monkeypatch.setattr(linear, "BLOCK", 25 * FEATURES)  # blocks of 20 rows, the last one shorter
    with torch.inference_mode(), PeakMemory() as memory:
        found = net.layers[0](x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    assert memory.peak < FEATURES * FEATURES * 4 * 0.6  # of the expanded layer; 20 of 128 rows and the result


@pytest.mark.parametrize(("bits", "centre"), [(1, -0.5), (2, -1.0)])
def test_biases_that_follow_from_the_scales_are_not_read(tmp_path: Path, bits: int, centre: float) -> None:
    tensors, _ = net_tensors(bits)
    for name in ("layers.0", "layers.2"):
        tensors[f"{name}.biases"] = tensors[f"{name}.scales"] * centre
    tensors["layers.2.biases"][0, 0] += 1
    net = meta_net()
    build(net, component(tmp_path, tensors, bits), torch.float32, CPU)
    assert (net.layers[0].centre, net.layers[2].centre) == (centre, None)
    short = net.layers[0].rows(slice(None))
    net.layers[0].centre = None
    assert torch.equal(short, net.layers[0].rows(slice(None)))


def test_big_dense_layers_keep_the_files_number_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.BIG_WEIGHTS, 2, 1)
    tensors = {
        "embed.weight": torch.randn(ROWS, FEATURES).half(),
        "norm.weight": torch.ones(FEATURES).bfloat16(),
        "norm.bias": torch.zeros(FEATURES).bfloat16(),
    } | {f"layers.{number}.weight": torch.randn(FEATURES, FEATURES).bfloat16() for number in range(3)}
    net, cast = meta_net(), Net()
    build(net, component(tmp_path, tensors, None), torch.float32, CPU)
    assert isinstance(net.embed, StoredEmbedding) and net.embed.weight.dtype == torch.float16
    assert isinstance(net.layers[0], StoredLinear) and net.layers[0].weight.dtype == torch.bfloat16
    assert net.norm.weight.dtype == torch.float32
    cast.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    ids = torch.tensor([[1, 2, 40]])
    torch.testing.assert_close(net(ids), cast(ids))
    build(meta := meta_net(), component(tmp_path, tensors, None), torch.bfloat16, CPU)
    assert isinstance(meta.layers[0], nn.Linear)  # nothing to cast, so nothing to keep


def test_big_convolutions_keep_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.BIG_WEIGHTS, 4, 1)
    tensors = {"0.weight": torch.randn(4, 3, 3, 3).bfloat16(), "0.bias": torch.randn(4).bfloat16()}
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1))
    build(net, component(tmp_path, tensors, None), torch.float32, CPU)
    assert net[0].weight.dtype == torch.bfloat16 and net[0].bias.dtype == torch.float32
    x = torch.randn(1, 3, 8, 8)
    expected = torch.nn.functional.conv2d(x, tensors["0.weight"].float(), tensors["0.bias"].float(), 2, 1)
    torch.testing.assert_close(net(x), expected)


def resident(file: Path) -> int:
    """Bytes of a mapped file that lie in this process's memory."""
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    return sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in maps if str(file) in part)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what of a mapping is in memory")
def test_pages_are_given_back_and_come_again(tmp_path: Path) -> None:
    weight = torch.randn(FEATURES, 8 * 1024)
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8 * 1024, FEATURES, bias=False))
    files = build(net, component(tmp_path, {"0.weight": weight}, None), torch.float32, CPU)
    file = tmp_path / "model.safetensors"
    assert resident(file) < 1 << 20  # opened, not read
    assert torch.equal(net[0].weight, weight) and resident(file) >= weight.nbytes
    files.release()
    assert resident(file) == 0
    assert torch.equal(net[0].weight, weight)
    del net, files
    assert resident(file) == 0 and str(file) not in Path("/proc/self/maps").read_text()


def test_prefix_and_unused(tmp_path: Path) -> None:
    tensors, _ = net_tensors(4)
    renamed = {f"model.{name}": tensor for name, tensor in tensors.items()} | {"lm_head.weight": torch.zeros(1)}
    net = meta_net()
    build(net, component(tmp_path, renamed, 4), torch.float32, CPU, prefix="model.", unused=("lm_head.",))
    assert not any(tensor.is_meta for tensor in net.state_dict().values())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("norm.bias"), "missing norm.bias"),
        (lambda t: t.pop("layers.2.biases"), "missing layers.2.biases"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda t: t.update({"layers.9.scales": torch.zeros(1, 1)}), "unexpected layers.9.scales"),
        (lambda t: t.update({"layers.1.weight": torch.zeros(2, 3)}), r"layers.1.weight is \[2, 3\] instead of \[128"),
        (lambda t: t.update({"layers.0.scales": torch.zeros(128, 1)}), r"layers.0.scales is \[128, 1\] instead of"),
        (lambda t: t.update({"norm.scales": torch.zeros(1, 1)}), "norm is no layer that can be packed"),
        (lambda t: t.clear(), "missing embed.weight, layers.0.weight, layers.1.weight and 3 more"),
    ],
)
def test_tensors_that_do_not_fit_are_named_in_one_sentence(tmp_path: Path, spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    tensors, _ = net_tensors(2)
    spoil(tensors)
    with pytest.raises(EngineError, match=words) as refused:
        build(meta_net(), component(tmp_path, tensors, 2), torch.float32, CPU)
    assert str(tmp_path) in str(refused.value) and "fetch or copy the pack again" in str(refused.value)


def test_scales_without_declared_bits(tmp_path: Path) -> None:
    tensors, _ = net_tensors(2)
    with pytest.raises(EngineError, match="names no bits"):
        build(meta_net(), component(tmp_path, tensors, None), torch.float32, CPU)


def test_a_file_that_vanished(tmp_path: Path) -> None:
    part = component(tmp_path, net_tensors(2)[0], 2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(EngineError, match="cannot be read"):
        build(meta_net(), part, torch.float32, CPU)
