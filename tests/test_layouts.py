"""The writers of released layouts: published sizes to the byte, and one model in all of them."""

import json
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import lowbit, tensorfile
from engine.packs import open_pack
from engine.prompt import Tokenizer
from tests.packs import full, layouts
from tests.packs.content import Configs, Content, small
from tests.packs.layouts import gemlite_state, packed_entries, unpacked_entries, vae_entries
from tests.packs.torchfile import Checkpoint

QUANTISED = "transformer_blocks.0.ff.linear_in"
NOTES = '{"hidden_states": [1, 2, 3], "text_length": 64, "sizes": [[64, 64]]}'


def test_full_size_files_have_the_published_sizes() -> None:
    content = Content(Configs(), "ternary")
    assert tensorfile.size_of(unpacked_entries(content)) == 7_751_109_712
    assert tensorfile.size_of(unpacked_entries(content), {"format": "pt"}) == 7_751_109_744  # Klein's own
    assert tensorfile.size_of(vae_entries(content), {"format": "pt"}) == 168_120_878


@pytest.mark.parametrize(("variant", "bytes_"), [("ternary", 1_425_227), ("binary", 965_164)])
def test_full_size_mlx_transformers_hold_the_published_bytes(variant: str, bytes_: int) -> None:
    entries = packed_entries(Content(Configs(), variant))
    assert (len(entries), round(sum(entry.nbytes for entry in entries) / 1000)) == (369, bytes_)


@pytest.mark.parametrize(("variant", "code_bytes"), [("ternary", 920_125_440), ("binary", 460_062_720)])
def test_a_full_size_gemlite_state_has_569_entries(variant: str, code_bytes: int) -> None:
    state = gemlite_state(Checkpoint(), Content(Configs(), variant))
    kinds = Counter(name.rpartition(".")[2] for name in state)
    assert kinds == {"W_q": 100, "scales": 100, "zeros": 100, "metadata": 100, "orig_shape": 100, "weight": 69}
    assert sum(tensor.nbytes for name, tensor in state.items() if name.endswith(".W_q")) == code_bytes
    assert {tensor.dtype for name, tensor in state.items() if name.endswith(".weight")} == {torch.bfloat16}


def test_a_checkpoint_is_what_torch_saves(tmp_path: Path) -> None:
    """Filled in afterwards, checksums included: the archive reads like one that torch wrote from memory."""
    content = Content(small(), "ternary")
    full.write(tmp_path / "gemlite", "gemlite", content)
    file = tmp_path / "gemlite" / "transformer-gemlite-int2" / "state_dict.pt"
    state = torch.load(file, weights_only=True)
    again = tmp_path / "again" / "state_dict.pt"
    again.parent.mkdir()
    torch.save(state, again)
    assert file.stat().st_size == again.stat().st_size
    with zipfile.ZipFile(file) as ours, zipfile.ZipFile(again) as theirs:
        assert ours.testzip() is None  # every checksum
        names = [name for name in ours.namelist() if "/data" in name]
        assert names == [name for name in theirs.namelist() if "/data" in name]
        assert all(ours.read(name) == theirs.read(name) for name in names)


@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_all_layouts_hold_the_same_weights(variant: str, tmp_path: Path) -> None:
    """Decoded by hand from what each file holds, by the rules of the formats page."""
    content = Content(small(), variant)
    for layout in ("mlx", "gemlite", "unpacked"):
        full.write(tmp_path / layout, layout, content)
        if layout != "gemlite":
            (tmp_path / layout / "niwaki.json").write_text(NOTES)
    expected = np.concatenate(list(content.values(QUANTISED, (768, 128), content.bits)))
    unpacked = open_pack(tmp_path / "unpacked").transformer.tensors
    np.testing.assert_array_equal(unpacked.numpy(f"{QUANTISED}.weight"), expected)
    mlx = open_pack(tmp_path / "mlx").transformer.tensors
    codes = lowbit.unpack(mlx.numpy(f"{QUANTISED}.weight"), content.bits, 128)
    scales, biases = mlx.numpy(f"{QUANTISED}.scales"), mlx.numpy(f"{QUANTISED}.biases")
    np.testing.assert_array_equal(lowbit.dequantize(codes, scales, biases, 128), expected)
    state = torch.load(
        tmp_path / "gemlite" / f"transformer-gemlite-int{content.bits}" / "state_dict.pt", weights_only=True
    )
    codes = state[f"{QUANTISED}.W_q"].numpy()
    k = np.arange(128)
    per_byte = 8 // content.bits
    codes = codes[k // per_byte] >> (content.bits * (k % per_byte))[:, None] & (2**content.bits - 1)
    decoded = codes * state[f"{QUANTISED}.scales"].numpy() + state[f"{QUANTISED}.zeros"].numpy()
    np.testing.assert_array_equal(decoded.T, expected)


def test_shards_have_the_hubs_index(tmp_path: Path) -> None:
    content = Content(small(), "binary")
    layouts.write_mlx(tmp_path, content, full.write_tokenizer, shards=3)
    (tmp_path / "niwaki.json").write_text(NOTES)
    pack = open_pack(tmp_path)
    assert [file.name[-20:] for file in pack.transformer.files] == [
        f"0000{n}-of-00003.safetensors"[-20:] for n in (1, 2, 3)]
    index = json.loads((pack.text_encoder.folder / "model.safetensors.index.json").read_text("utf-8"))
    assert index["weight_map"].keys() == pack.text_encoder.tensors.keys()


def test_the_tokenizer_has_qwens_control_tokens(tmp_path: Path) -> None:
    full.write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    ids, mask, count = tokenizer.encode("two red circles", 64)
    assert ids[0, 0] == 151_644 and ids[0, count:].tolist() == [151_643] * (64 - count) and mask.sum() == count
    assert [id_ for id_ in ids[0, :count].tolist() if id_ > 151_000][1:] == [151_645, 151_644, 151_667, 151_668]


@pytest.mark.parametrize(("bits", "group"), [(1, 128), (2, 128), (4, 64)])
def test_mlx_reads_what_we_write_and_we_read_what_it_writes(bits: int, group: int) -> None:
    """Words, scales and biases as MLX means them; how it chooses codes is its own affair, what they mean is not."""
    mx = pytest.importorskip("mlx.core", reason="mlx has no wheel for this machine")
    content, shape = Content(small(), "binary" if bits == 1 else "ternary"), (96, 256)
    words = np.concatenate(list(content.code_bytes("x", shape, bits))).view("<u4")
    scales, biases = content.scales_and_biases("x", shape, bits)
    expanded = mx.dequantize(*map(mx.array, (words, scales, biases)), group_size=group, bits=bits)
    np.testing.assert_array_equal(np.array(expanded), np.concatenate(list(content.values("x", shape, bits))))

    weights = mx.array(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    theirs = mx.quantize(weights, group_size=group, bits=bits)
    codes = lowbit.unpack(np.array(theirs[0]), bits, shape[1])
    ours = lowbit.dequantize(codes, np.array(theirs[1]), np.array(theirs[2]), group)
    expected = np.array(mx.dequantize(*theirs, group_size=group, bits=bits))
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
