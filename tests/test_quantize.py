"""What training computes with is what the files hold: the torch rules against engine.lowbit, bit for bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine import lowbit
from engine.seedling import export, quantize

GROUP, ENCODER_GROUP = quantize.TRANSFORMER_GROUP, quantize.ENCODER_GROUP


def affine(w: np.ndarray, group_size: int) -> lowbit.Quantized:
    return lowbit.quantize_affine(w, quantize.ENCODER_BITS, group_size)


Rule = tuple[Callable[[Tensor], Tensor], Callable[[np.ndarray, int], lowbit.Quantized], int]
RULES: dict[str, Rule] = {
    "ternary": (quantize.ternary, lowbit.quantize_ternary, GROUP),
    "binary": (quantize.binary, lowbit.quantize_binary, GROUP),
    "affine": (quantize.affine4, affine, ENCODER_GROUP),
}


def random(scale: float = 1.0) -> np.ndarray:
    """Normal weights on so coarse a grid that the sum of a group is exact, whatever the order it is summed in."""
    return (scale * np.rint(256 * np.random.default_rng(0).standard_normal((40, 512))) / 256).astype(np.float32)


def groups_of_zeros() -> np.ndarray:
    w = random()
    w[::3, :GROUP] = 0
    w[1] = 0
    return w


def one_sided() -> np.ndarray:
    """Groups of one sign, where an affine group does not hold zero, and groups of a single value."""
    w = np.abs(random()) + 3
    w[::2] *= -1
    w[0], w[1, :GROUP] = 0.375, -0.375
    return w


def outliers() -> np.ndarray:
    w = random()
    w[:, ::GROUP] = 512
    return w


WEIGHTS = {
    "random": random(), "tiny": random(2**-20), "large": random(2**20), "zeros": groups_of_zeros(),
    "one-sided": one_sided(), "outliers": outliers(), "halves, full of ties": np.round(2 * random()) / 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_rules_equal_lowbit_bit_for_bit(rule: str, kind: str) -> None:
    fake, exact, group_size = RULES[rule]
    codes, scales, biases = exact(WEIGHTS[kind], group_size)
    expected = lowbit.dequantize(codes, scales, biases, group_size)
    np.testing.assert_array_equal(fake(torch.from_numpy(WEIGHTS[kind])).numpy(), expected)


@pytest.mark.parametrize(("rule", "most"), [("ternary", 3), ("binary", 2), ("affine", 16)])
def test_a_group_has_few_values(rule: str, most: int) -> None:
    fake, _, group_size = RULES[rule]
    for weights in WEIGHTS.values():
        groups = fake(torch.from_numpy(weights)).reshape(-1, group_size).numpy()
        assert max(len(np.unique(group)) for group in groups) <= most


@pytest.mark.parametrize(("variant", "most"), [("ternary", 3), ("binary", 2)])
def test_exported_groups_are_what_training_saw(variant: str, most: int) -> None:
    name = "transformer_blocks.0.attn.to_q.weight"
    state = {name: torch.from_numpy(random()), "x_embedder.weight": torch.from_numpy(random())}
    assert export.block_weights(state) == {name}
    bits = export.BITS[variant]
    out = export.packed(state, {name}, bits, GROUP)
    fqn = name.removesuffix(".weight")
    assert set(out) == {name, f"{fqn}.scales", f"{fqn}.biases", "x_embedder.weight"}
    codes = lowbit.unpack(out[name].numpy(), bits, 512)
    scales, biases = (out[f"{fqn}.{part}"].float().numpy() for part in ("scales", "biases"))
    values = lowbit.dequantize(codes, scales, biases, GROUP)
    assert max(len(np.unique(group)) for group in values.reshape(-1, GROUP)) <= most
    np.testing.assert_array_equal(values, RULES[variant][0](state[name]).numpy())
    assert out["x_embedder.weight"].dtype == torch.bfloat16


class Tiny(nn.Module):
    """Names like the transformer's: one linear inside the blocks, one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(GROUP, 8, bias=False)
        self.transformer_blocks = nn.ModuleList([nn.Linear(GROUP, 8, bias=False)])


def test_only_block_linears_are_quantised_and_the_state_keeps_its_names() -> None:
    torch.manual_seed(0)
    module = Tiny()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    quantize.quantize_transformer(module, quantize.ternary)
    outer, inner = module.x_embedder, module.transformer_blocks[0]
    assert torch.equal(outer.weight, before["x_embedder.weight"])
    assert torch.equal(inner.weight, quantize.ternary(before["transformer_blocks.0.weight"]))
    after = quantize.plain_state(module)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_gradients_go_straight_to_the_weights_behind() -> None:
    layer = Tiny()
    quantize.quantize_transformer(layer, quantize.binary)
    x = torch.randn(4, GROUP, generator=torch.Generator().manual_seed(0))
    layer.transformer_blocks[0](x).sum().backward()
    (behind,) = layer.transformer_blocks[0].parameters()
    assert behind.grad is not None
    torch.testing.assert_close(behind.grad, x.sum(0).expand(8, -1))
