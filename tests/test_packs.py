"""Opening pack folders: what a sound one says, and that every damage ends in one sentence with a way out."""

import json
import math
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import lowbit, packs
from engine.packs import Notes, Quantization, open_pack, verify_pack
from engine.shapes import transformer
from engine.tensorfile import Tensors
from engine.types import BadRequest

PACKED = "transformer-packed-mflux"
WEIGHTS = f"{PACKED}/diffusion_pytorch_model.safetensors"
CONFIG, BITS = f"{PACKED}/config.json", f"{PACKED}/quantization_config.json"
LAYER = "transformer_blocks.0.attn.to_q"
# Flux2Transformer2DModel of the 4B model: the formats page, section 2
REAL_TRANSFORMER = {
    "attention_head_dim": 128, "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "mlp_ratio": 3.0,
    "in_channels": 128, "out_channels": None, "patch_size": 1, "joint_attention_dim": 7680,
    "timestep_guidance_channels": 256,
}


@pytest.fixture
def ternary(tiny_packs: Path, tmp_path: Path) -> Path:
    """A ternary pack of its own, to damage."""
    return Path(shutil.copytree(tiny_packs / "ternary", tmp_path / "ternary"))


def change_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


def drop_json(file: Path, key: str) -> None:
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text("utf-8")).items() if k != key}), "utf-8")


def change_tensors(file: Path, changes: dict[str, Callable[[torch.Tensor], torch.Tensor] | None]) -> None:
    """Rewrite tensors by name; None removes one."""
    tensors = load_file(file)
    for name, change in changes.items():
        old = tensors.pop(name)
        if change:
            tensors[name] = change(old.clone())
    save_file(tensors, file)


def write_safetensors(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


@pytest.mark.parametrize(
    ("variant", "quantization"),
    [("ternary", Quantization(2, 128)), ("binary", Quantization(1, 128)), ("dense", None)],
)
def test_a_pack_says_what_it_is(tiny_packs: Path, variant: str, quantization: Quantization | None) -> None:
    pack = open_pack(str(tiny_packs / variant))
    assert (pack.id, pack.variant) == (f"tiny-{variant}", variant)
    assert pack.transformer.quantization == quantization
    assert pack.transformer.is_packed(LAYER) == (quantization is not None)
    assert pack.text_encoder.quantization == Quantization(4, 64)
    assert pack.vae.quantization is None
    assert pack.tokenizer == tiny_packs / variant / "tokenizer"
    assert pack.notes.sizes[0] == (64, 64) and pack.notes.hidden_states == (1, 2, 3) and pack.notes.demo
    assert pack.notes.vocabulary and "லால" not in pack.notes.vocabulary and "लाल" in pack.notes.vocabulary
    assert pack.transformer.bytes_on_disk == sum(file.stat().st_size for file in pack.transformer.files) > 0


def test_packed_layers_stand_for_the_dense_weights(tiny_packs: Path) -> None:
    packed, dense = (open_pack(tiny_packs / variant).transformer.tensors for variant in ("ternary", "dense"))
    layers = [name.removesuffix(".scales") for name in packed if name.endswith(".scales")]
    assert len(layers) == 14  # 12 in a double block, 2 in a single one
    for fqn in layers:
        expected = dense.numpy(f"{fqn}.weight")
        codes = lowbit.unpack(packed.numpy(f"{fqn}.weight"), 2, expected.shape[1])
        expanded = lowbit.dequantize(codes, packed.numpy(f"{fqn}.scales"), packed.numpy(f"{fqn}.biases"), 128)
        np.testing.assert_array_equal(expanded, expected)


def test_tensors_equal_those_of_safetensors(tiny_packs: Path) -> None:
    pack = open_pack(tiny_packs / "ternary")
    for component in (pack.transformer, pack.text_encoder, pack.vae):
        expected = {name: value for file in component.files for name, value in load_file(file).items()}
        assert expected.keys() == component.tensors.keys()
        for name, value in expected.items():
            value = value.float() if value.dtype == torch.bfloat16 else value
            np.testing.assert_array_equal(component.tensors.numpy(name), value.numpy())
            assert component.tensors[name].shape == tuple(value.shape)


def test_codes_are_mapped_not_read(tiny_packs: Path) -> None:
    words = open_pack(tiny_packs / "ternary").transformer.tensors.numpy(f"{LAYER}.weight")
    assert isinstance(words, np.memmap) and words.dtype == np.uint32 and not words.flags.writeable


def test_the_4b_model_has_the_published_layers() -> None:
    found = dict(transformer(REAL_TRANSFORMER))
    quantised = [s for n, s in found.items() if n.split(".")[0].endswith("transformer_blocks") and len(s) == 2]
    dense = sum(map(math.prod, found.values())) - sum(map(math.prod, quantised))
    assert (len(quantised), sum(map(math.prod, quantised))) == (100, 3_680_501_760)
    assert (len(found) - 100, dense) == (69, 195_042_816)


def test_without_notes_the_constants_of_the_4b_model_hold(ternary: Path) -> None:
    (ternary / "niwaki.json").write_text('{"hidden_states": [1, 2, 3]}')
    pack = open_pack(ternary)
    assert pack.id == pack.notes.label == "ternary"
    assert pack.notes == Notes(label="ternary", hidden_states=(1, 2, 3))
    assert (pack.notes.steps, pack.notes.text_length, pack.notes.vocabulary) == (4, 512, None)
    (ternary / "niwaki.json").unlink()
    with pytest.raises(BadRequest, match="lacks tensor model.layers.4"):  # states 9, 18, 27 need 27 layers
        open_pack(ternary)


def test_shards_and_foreign_files_beside_them(tiny_packs: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_packs / "dense", tmp_path / "dense"))
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    file.unlink()
    save_file({name: tensors[name] for name in names[:9]}, file.with_name("a-00001-of-00002.safetensors"))
    save_file({name: tensors[name] for name in names[9:]}, file.with_name("a-00002-of-00002.safetensors"))
    file.with_name("._a-00001-of-00002.safetensors").write_bytes(b"left by macOS")
    component = open_pack(folder).transformer
    assert len(component.files) == 2 and component.tensors.keys() == tensors.keys()
    np.testing.assert_array_equal(component.tensors.numpy(names[-1]), tensors[names[-1]].float().numpy())
    save_file({names[0]: tensors[names[0]]}, file.with_name("b.safetensors"))
    with pytest.raises(BadRequest, match="lies in .* and .*b.safetensors; remove one"):
        open_pack(folder)


def test_an_encoder_in_bfloat16_is_accepted(ternary: Path) -> None:
    component = open_pack(ternary).text_encoder
    dense = {}
    for name in component.tensors:
        fqn, _, part = name.rpartition(".")
        if part == "weight" and component.is_packed(fqn):
            words, scales, biases = (component.tensors.numpy(f"{fqn}.{key}") for key in ("weight", "scales", "biases"))
            codes = lowbit.unpack(words, 4, words.shape[1] * 8)
            dense[name] = torch.from_numpy(lowbit.dequantize(codes, scales, biases, 64)).bfloat16()
        elif part == "weight":
            dense[name] = torch.from_numpy(component.tensors.numpy(name)).bfloat16()
    (ternary / "text_encoder").mkdir()
    save_file(dense, ternary / "text_encoder" / "model.safetensors")
    shutil.move(component.folder / "config.json", ternary / "text_encoder")
    shutil.rmtree(component.folder)
    pack = open_pack(ternary)
    assert pack.text_encoder.folder.name == "text_encoder" and pack.text_encoder.quantization is None


def halve_channels(pack: Path) -> None:
    """A transformer that is sound in itself, of another model than the VAE."""
    change_json(pack / CONFIG, in_channels=32)
    change_tensors(pack / WEIGHTS, {
        "x_embedder.weight": lambda t: t[:, :32].contiguous(), "proj_out.weight": lambda t: t[:32].contiguous()})


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no model folder .*ternary; .*models list"),
    "no transformer": (lambda p: shutil.rmtree(p / PACKED), f"no folder {PACKED} or transformer; give"),
    "no vae": (lambda p: shutil.rmtree(p / "vae"), "no folder vae; give"),
    "no weights": (lambda p: (p / WEIGHTS).unlink(), "no .safetensors file; fetch"),
    "no config": (lambda p: (p / PACKED / "config.json").unlink(), "config.json cannot be read .No such file"),
    "no tokenizer": (lambda p: (p / "tokenizer/tokenizer.json").unlink(), "tokenizer.json is missing; fetch"),
    "no bits": (lambda p: (p / BITS).unlink(), "quantization_config.json cannot be read"),
    "config cut": (lambda p: (p / CONFIG).write_text('{"num_l'), "config.json is no JSON object; fetch"),
    "config a list": (lambda p: (p / "vae/config.json").write_text("[1]"), "vae/config.json is no JSON object; fetch"),
    "config binary": (lambda p: (p / "vae/config.json").write_bytes(b"\xff\xfe\xfd"), "is no JSON object; fetch"),
    "config lacks a key": (lambda p: drop_json(p / CONFIG, "num_layers"), "config.json lacks 'num_layers'"),
    "config of text": (lambda p: change_json(p / CONFIG, num_attention_heads="2"), "makes no sense"),
    "config off": (lambda p: change_json(p / CONFIG, num_attention_heads=3), "where config.json implies"),
    "axes of text": (
        lambda p: change_json(p / CONFIG, axes_dims_rope="x"), "config.json holds axes_dims_rope 'x', which makes no"),
    "axes of another head": (lambda p: change_json(p / CONFIG, axes_dims_rope=[16] * 3), "holds axes_dims_rope"),
    "odd axes": (lambda p: change_json(p / CONFIG, axes_dims_rope=[15, 17, 16, 16]), "holds axes_dims_rope"),
    "eps no number": (lambda p: change_json(p / CONFIG, eps=None), "holds eps 'None'"),
    "theta of nan": (lambda p: change_json(p / CONFIG, rope_theta=math.nan), "holds rope_theta 'nan'"),
    "another activation": (lambda p: change_json(p / "vae/config.json", act_fn="gelu"), "holds act_fn 'gelu'"),
    "a misspelt block": (
        lambda p: change_json(p / "vae/config.json", down_block_types=["downEncoderBlock2D"] * 4), "down_block_types"),
    "widths of text": (lambda p: change_json(p / "vae/config.json", block_out_channels=["x"] * 4), "block_out_"),
    "groups that do not divide": (lambda p: change_json(p / "vae/config.json", norm_num_groups=3), "norm_num_groups"),
    "endless blocks": (lambda p: change_json(p / "vae/config.json", layers_per_block=10**9), "layers_per_block"),
    "the reader's activation": (
        lambda p: change_json(p / "text_encoder-mlx-4bit/config.json", hidden_act="gelu"), "holds hidden_act 'gelu'"),
    "an endless encoder": (
        lambda p: change_json(p / "text_encoder-mlx-4bit/config.json", num_hidden_layers=10**12), "num_hidden_layers"),
    "no depth": (
        lambda p: drop_json(p / "text_encoder-mlx-4bit/config.json", "num_hidden_layers"), "no num_hidden_layers"),
    "endless layers": (lambda p: change_json(p / CONFIG, num_layers=10**12), "lacks tensor .*blocks.1"),
    "bits of text": (lambda p: change_json(p / BITS, bits="2"), "declares '2' bits"),
    "three bits": (lambda p: change_json(p / BITS, bits=3), "declares 3 bits"),
    "other bits": (lambda p: change_json(p / BITS, bits=1), "where config.json implies"),
    "four bits": (lambda p: change_json(p / BITS, bits=4), "where config.json implies"),
    "other groups": (lambda p: change_json(p / BITS, group_size=96), "no multiple of group 96"),
    "groups of zero": (lambda p: change_json(p / BITS, group_size=0), "groups of 0"),
    "tensor gone": (lambda p: change_tensors(p / WEIGHTS, {f"{LAYER}.weight": None}), f"lacks tensor {LAYER}.weight"),
    "biases gone": (lambda p: change_tensors(p / WEIGHTS, {f"{LAYER}.biases": None}), f"lacks tensor {LAYER}.biases"),
    "scales gone": (lambda p: change_tensors(p / WEIGHTS, {f"{LAYER}.scales": None}), "where config.json implies"),
    "signed codes": (
        lambda p: change_tensors(p / WEIGHTS, {f"{LAYER}.weight": lambda t: t.view(torch.int32)}),
        r"is I32 \[128, 8\] where config.json implies U32 \[128, 8\]"),
    "transposed": (
        lambda p: change_tensors(p / WEIGHTS, {"context_embedder.weight": lambda t: t.T.contiguous()}),
        r"context_embedder.weight in .* is BF16 \[192, 128\]"),
    "encoder width": (
        lambda p: change_json(p / "text_encoder-mlx-4bit/config.json", hidden_size=128), "where config.json implies"),
    "states": (lambda p: change_json(p / "niwaki.json", hidden_states=[1, 2]), "reads 192 .* give 128"),
    "foreign vae": (halve_channels, "makes 32 channels where .*vae reads 64"),
    "notes cut": (lambda p: (p / "niwaki.json").write_text("{"), "niwaki.json is no JSON object"),
    "no sizes": (lambda p: change_json(p / "niwaki.json", sizes=[]), "niwaki.json is not understood .an empty list"),
    "sizes of text": (lambda p: change_json(p / "niwaki.json", sizes="64x64"), "niwaki.json is not understood"),
    "odd size": (lambda p: change_json(p / "niwaki.json", sizes=[[64, 72]]), r"size \(64, 72\) .* multiple of 16"),
    "steps": (lambda p: change_json(p / "niwaki.json", steps=0), "0 is not a positive whole number"),
    "files a list": (lambda p: change_json(p / "niwaki.json", files=["a"]), "niwaki.json is not understood"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_one_sentence_with_a_way_out(name: str, ternary: Path) -> None:
    damage, sentence = DAMAGES[name]
    damage(ternary)
    with pytest.raises(BadRequest, match=sentence) as raised:
        open_pack(ternary)
    assert "; " in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../b", "..", ".", "", "C:/x", "a\\..\\b", "\\\\host\\x"])
def test_recorded_paths_stay_inside_the_folder(path: str, ternary: Path) -> None:
    change_json(ternary / "niwaki.json", files={path: {"bytes": 1, "sha256": ""}})
    with pytest.raises(BadRequest, match="is not inside the folder"):
        open_pack(ternary)


BYTES4 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
HEADERS: dict[str, tuple[object, bytes, str]] = {
    "not JSON": (b"{oops", b"", "header of .* is no JSON object"),
    "a list": ([1], b"", "header of .* is no JSON object"),
    "deep": (b"[" * 200_000, b"", "header of .* is no JSON object"),
    "huge number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "header of .* is no JSON object"),
    "entry a number": ({"a": 1}, b"", "entry of tensor a .* is damaged"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, b"1234", "entry of tensor a .* is damaged"),
    "negative": ({"a": BYTES4 | {"shape": [-4]}}, b"1234", "entry of tensor a .* is damaged"),
    "fraction": ({"a": BYTES4 | {"shape": [4.0]}}, b"1234", "entry of tensor a .* is damaged"),
    "backwards": ({"a": BYTES4 | {"data_offsets": [4, 0]}}, b"1234", "entry of tensor a .* is damaged"),
    "size off": ({"a": BYTES4 | {"shape": [2**62, 2**62]}}, b"1234", "entry of tensor a .* is damaged"),
    "dtype": ({"a": BYTES4 | {"dtype": "F8_E4M3"}}, b"1234", "dtype F8_E4M3; convert"),
    "dtype a list": ({"a": BYTES4 | {"dtype": []}}, b"1234", "entry of tensor a .* is damaged"),
    "cut": ({"a": BYTES4}, b"123", "has .* bytes where its header promises"),
    "trailing": ({"a": BYTES4}, b"12345", "has .* bytes where its header promises"),
    "overlap": ({"a": BYTES4, "b": BYTES4 | {"data_offsets": [2, 6]}}, b"123456", "tensor b .* starts at byte"),
    "gap": ({"a": BYTES4, "b": BYTES4 | {"data_offsets": [6, 10]}}, b"1234567890", "tensor b .* starts at byte"),
    "twice": (
        b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
        b' "a": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}', b"12345678", "tensor a .* starts at byte"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_safetensors_headers(name: str, tmp_path: Path) -> None:
    header, data, sentence = HEADERS[name]
    file = write_safetensors(tmp_path / "x.safetensors", header, data)
    with pytest.raises(BadRequest, match=sentence) as raised:
        Tensors((file,))
    assert "x.safetensors" in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_files_that_do_not_hold_their_header(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(BadRequest, match="x.safetensors is cut short or foreign"):
        Tensors((tmp_path / "x.safetensors",))


def test_no_flipped_header_byte_ends_in_a_traceback(ternary: Path) -> None:
    rng = random.Random(0)
    file = ternary / "vae/diffusion_pytorch_model.safetensors"
    sound = file.read_bytes()
    end = 8 + struct.unpack("<Q", sound[:8])[0]
    refused = 0
    for _ in range(300):
        damaged = bytearray(sound)
        damaged[rng.randrange(end)] = rng.randrange(256)
        file.write_bytes(damaged)
        try:
            open_pack(ternary)
        except BadRequest:
            refused += 1
    assert refused > 150  # the rest renames a tensor that nobody asks for


def test_a_pack_is_read_again_once_a_file_of_it_changed(ternary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_pack(ternary) is not open_pack(ternary)  # just written: its times may hide a second change
    monkeypatch.setattr(packs, "SETTLED", -1)
    first = open_pack(ternary)
    assert open_pack(ternary) is first
    config = ternary / "vae" / "config.json"
    config.write_text(config.read_text() + " ")
    assert open_pack(ternary) is not first
    config.unlink()
    with pytest.raises(BadRequest):
        open_pack(ternary)


def test_scalars_and_empty_tensors_can_be_read(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(7), "half": torch.tensor(1.5).bfloat16(), "none": torch.zeros(0, 3).bfloat16()},
              tmp_path / "x.safetensors")
    tensors = Tensors((tmp_path / "x.safetensors",))
    assert tensors.numpy("scalar") == 7 and tensors.numpy("half") == 1.5
    assert tensors.numpy("none").shape == (0, 3) and tensors.numpy("none").dtype == np.float32


def test_verify_passes_sound_packs(tiny_packs: Path) -> None:
    for variant in ("ternary", "binary", "dense"):
        report = list(verify_pack(open_pack(tiny_packs / variant)))
        assert len(report) >= 12 and all(ok for _, ok, _ in report)


def faults(folder: Path) -> dict[str, str]:
    return {path: sentence for path, ok, sentence in verify_pack(open_pack(folder)) if not ok}


def test_verify_names_changed_files(ternary: Path) -> None:
    weights = bytearray((ternary / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (ternary / WEIGHTS).write_bytes(weights)
    with (ternary / "manifest.json").open("a") as stream:
        stream.write(" ")
    (ternary / "model_index.json").unlink()
    found = faults(ternary)
    assert found.keys() == {WEIGHTS, "manifest.json", "model_index.json"}
    assert "SHA-256" in found[WEIGHTS] and "bytes where" in found["manifest.json"]
    assert "cannot be read (No such file or directory); fetch" in found["model_index.json"]


@pytest.mark.parametrize("slot", [0, 1, 15])
def test_verify_finds_code_3_in_any_slot(slot: int, ternary: Path) -> None:
    def spoil(words: torch.Tensor) -> torch.Tensor:
        words.view(torch.int32)[100, 7] |= -(1 << 31) | (1 << 30) if slot == 15 else 3 << (2 * slot)
        return words

    change_tensors(ternary / WEIGHTS, {"single_transformer_blocks.0.attn.to_out.weight": spoil})
    drop_json(ternary / "niwaki.json", "files")
    found = faults(ternary)
    assert found.keys() == {WEIGHTS}
    assert "single_transformer_blocks.0.attn.to_out holds code 3" in found[WEIGHTS]


def test_verify_finds_scales_that_are_no_numbers(ternary: Path) -> None:
    def spoil(scales: torch.Tensor) -> torch.Tensor:
        scales[3, 0] = math.inf
        return scales

    change_tensors(ternary / WEIGHTS, {f"{LAYER}.scales": spoil})
    drop_json(ternary / "niwaki.json", "files")
    assert f"{LAYER} holds a scale or a bias that is not a finite number" in faults(ternary)[WEIGHTS]


def test_verify_finds_a_bias_that_is_not_minus_its_scale(ternary: Path) -> None:
    change_tensors(ternary / WEIGHTS, {f"{LAYER}.biases": lambda biases: biases / 2})
    drop_json(ternary / "niwaki.json", "files")
    assert f"{LAYER} holds a bias that is not minus its scale" in faults(ternary)[WEIGHTS]


def test_verify_says_when_nothing_is_recorded(ternary: Path) -> None:
    drop_json(ternary / "niwaki.json", "files")
    path, ok, sentence = next(verify_pack(open_pack(ternary)))
    assert (path, ok) == ("niwaki.json", True) and "no sizes and hashes are recorded" in sentence
