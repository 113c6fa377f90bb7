"""The MLX backend at the width of the 4B model: what opening reads, one block of each kind, and the memory planned."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from mlx.utils import tree_flatten  # noqa: E402

from engine import lowbit, memory_mlx, shapes, tensorfile  # noqa: E402
from engine.mlx_backend import backend, linear  # noqa: E402
from engine.mlx_backend.transformer import Flux2Transformer2DModel, token_ids  # noqa: E402
from engine.packs import Component, Quantization  # noqa: E402
from tests.mlx_graph import CONFIG  # noqa: E402

BITS, GROUP = 1, 128
FULL = CONFIG | {"patch_size": 1}
ONE_OF_EACH = FULL | {"num_layers": 1, "num_single_layers": 1}
LARGEST_LAYER = 27_648 * 3072 * 4  # float32 bytes of to_qkv_mlp_proj, expanded
PACKED = ("transformer_blocks.", "single_transformer_blocks.")


def silent() -> None:
    pass


def entries(config: dict[str, Any]) -> Iterator[tensorfile.Entry]:
    """The tensors of a released binary MLX transformer of this configuration, with random codes."""
    rng = np.random.default_rng(2)

    def entry(name: str, dtype: str, shape: tuple[int, ...], values: Any) -> tensorfile.Entry:
        return tensorfile.Entry(name, dtype, shape, lambda: iter([values()]))

    def half(shape: tuple[int, ...], centre: float, spread: float) -> Any:
        some = rng.normal(centre, spread, 1 << 16).astype(np.float32)  # repeated: 195 million would take a while
        return lambda: np.resize(lowbit.bfloat16_bits(some), shape)

    for name, shape in shapes.transformer(config):
        if not name.startswith(PACKED) or len(shape) == 1:
            yield entry(name, "BF16", shape, half(shape, *((1, 0.2) if len(shape) == 1 else (0, 0.02))))
            continue
        rows, features = shape
        words, groups = (rows, features * BITS // 32), (rows, features // GROUP)
        layer = name.removesuffix(".weight")
        yield entry(name, "U32", words, lambda words=words: rng.integers(0, 2**32, words, dtype=np.uint32))
        yield entry(f"{layer}.scales", "BF16", groups, half(groups, 0.04, 0.01))
        yield entry(f"{layer}.biases", "BF16", groups, half(groups, -0.02, 0.005))


def component(folder: Path, config: dict[str, Any]) -> Component:
    files = (folder / "diffusion_pytorch_model.safetensors",)
    return Component(folder, config, Quantization(BITS, GROUP), tensorfile.Tensors(files))


def test_a_full_size_pack_opens_without_being_read(tmp_path: Path) -> None:
    """965 MB of which no page is touched: the file is one big hole, and only what is used takes memory."""
    all_of_them: Iterable[tensorfile.Entry] = list(entries(FULL))
    start, _ = tensorfile.header(all_of_them)
    with (tmp_path / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(start)
        file.truncate(tensorfile.size_of(all_of_them))
    before = mx.get_active_memory()
    transformer = Flux2Transformer2DModel.from_config(FULL)
    linear.build(transformer, component(tmp_path, FULL), mx.bfloat16)
    assert sum(tensor.nbytes for _, tensor in tree_flatten(transformer.parameters())) == 965_164_032
    assert mx.get_active_memory() - before < 1e6
    layer = transformer.single_transformer_blocks[19].attn.to_out
    mx.eval(layer(mx.ones((1, 12_288), dtype=mx.bfloat16)))
    used = sum(tensor.nbytes for _, tensor in tree_flatten(layer.parameters()))
    assert used <= mx.get_active_memory() - before < 1.2 * used


@pytest.mark.slow
def test_one_block_of_each_kind_at_full_width(tmp_path: Path) -> None:
    import torch

    from engine.torch_backend import linear as torch_linear
    from engine.torch_backend import transformer as torch_text

    tensorfile.write(tmp_path / "diffusion_pytorch_model.safetensors", list(entries(ONE_OF_EACH)))
    part = component(tmp_path, ONE_OF_EACH)
    rng = np.random.default_rng(5)
    x, text = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 4, 128), (1, 4, 7680)))
    with torch.device("meta"):
        theirs = torch_text.Flux2Transformer2DModel.from_config(ONE_OF_EACH)
    torch_linear.build(theirs, part, torch.float32, torch.device("cpu"))
    ids = torch_text.token_ids(4, (2, 2), "cpu")
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(x), torch.from_numpy(text), torch.tensor([0.9]), *ids, silent).numpy()
    del theirs

    ours = Flux2Transformer2DModel.from_config(ONE_OF_EACH)
    linear.build(ours, part, mx.float32)
    backend.read(ours, silent)
    attention = ours.transformer_blocks[0].attn
    assert linear.join(attention.to_q, attention.to_k, attention.to_v)
    mx.clear_cache()
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    found = ours(mx.array(x), mx.array(text), mx.array([0.9]), *token_ids(4, (2, 2)), silent)
    mx.eval(found)
    assert np.linalg.norm(np.array(found) - expected) / np.linalg.norm(expected) < 1e-4
    planned = memory_mlx.weight_bytes(part, "float32") + memory_mlx.EXPANDED_CPU * memory_mlx.largest_layer(part)
    planned += memory_mlx.denoising_bytes(SimpleNamespace(transformer=part), 8, "float32", cpu=True)  # type: ignore[arg-type]
    assert mx.get_peak_memory() <= planned and weights > 0.9 * memory_mlx.weight_bytes(part, "float32")
    assert mx.get_peak_memory() - weights < 0.05 * LARGEST_LAYER  # the activations of 8 tokens, and no layer expanded
