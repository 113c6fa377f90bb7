"""Importing released layouts: the same model out of each, nothing half done, and bytes that others wrote."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import app
from engine import importers, lowbit
from engine.importers import gemlite, hqq
from engine.importers.checkpoint import Checkpoint
from engine.packs import Component, Pack, open_pack, verify_pack
from engine.torch_backend import linear
from engine.torch_backend.text_encoder import TextEncoder
from engine.torch_backend.transformer import Flux2Transformer2DModel, token_ids
from engine.types import BadRequest
from tests.packs import full, layouts
from tests.packs.content import Content, small

GOLDEN = Path(__file__).parent / "packs" / "golden"
NOTES = {"hidden_states": [1, 2, 3], "text_length": 64, "sizes": [[64, 64]], "demo": True}
LAYER, WIDE = "single_transformer_blocks.0.attn.to_out", "transformer_blocks.0.ff.linear_in"
SOURCES: dict[str, Callable[[Path, Content], Path]] = {
    "mlx": lambda folder, content: full.write(folder, "mlx", content),
    "mlx in shards": lambda folder, content: layouts.write_mlx(folder, content, small_tokenizer, shards=3),
    "gemlite": lambda folder, content: full.write(folder, "gemlite", content),
    "gemlite, mode 3": lambda folder, content: layouts.write_gemlite(folder, content, small_tokenizer, group_mode=3),
    "gemlite, HQQ axis 0": lambda folder, content: layouts.write_gemlite(folder, content, small_tokenizer, axis=0),
    "unpacked": lambda folder, content: full.write(folder, "unpacked", content),
    "unpacked in shards": lambda folder, content: layouts.write_unpacked(folder, content, small_tokenizer, shards=2),
}


def small_tokenizer(folder: Path) -> None:
    full.write_tokenizer(folder, 512 - len(full.SPECIAL + full.ADDED))


def import_(source: Path, target: Path) -> importers.Imported:
    *_, last = importers.import_folder(source, target)
    assert isinstance(last, importers.Imported)
    return last


@pytest.fixture(scope="module", params=["ternary", "binary", "4-bit"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pack]:
    """One model, written in every layout that can hold it and imported from each."""
    root = tmp_path_factory.mktemp(request.param)
    packs = {}
    for name, write in SOURCES.items():
        if request.param == "4-bit" and name.startswith("gemlite"):
            continue
        source = write(root / "sources" / name, Content(small(), request.param))
        (source / "niwaki.json").write_text(json.dumps(NOTES))
        import_(source, root / "packs" / name)
        packs[name] = open_pack(root / "packs" / name)
    return packs


def decoded(component: Component, fqn: str) -> np.ndarray:
    return component.dequantized(fqn) if component.is_packed(fqn) else component.tensors.floats(f"{fqn}.weight")


def test_every_layout_becomes_the_same_pack(imported: dict[str, Pack]) -> None:
    expected = imported["mlx"]
    names = {name.rpartition(".")[0] for name in expected.transformer.tensors}
    encoder = {name.rpartition(".")[0] for name in expected.text_encoder.tensors}
    for layout, pack in imported.items():
        stays_dense = expected.variant == "4-bit" and layout.startswith("unpacked")  # sixteen values a group
        assert (pack.variant, pack.id, pack.notes.demo) == ("dense" if stays_dense else expected.variant, layout, True)
        assert pack.transformer.quantization == (None if stays_dense else expected.transformer.quantization)
        for fqn in names:
            np.testing.assert_array_equal(decoded(pack.transformer, fqn), decoded(expected.transformer, fqn))
        for fqn in encoder if layout != "gemlite, HQQ axis 0" else ():
            np.testing.assert_array_equal(decoded(pack.text_encoder, fqn), decoded(expected.text_encoder, fqn))


def test_what_is_recorded_is_what_lies_there(imported: dict[str, Pack]) -> None:
    for pack in imported.values():
        assert all(ok for _, ok, _ in verify_pack(pack))
        there = {path.relative_to(pack.folder).as_posix() for path in pack.folder.rglob("*") if path.is_file()}
        assert there - {"niwaki.json"} == pack.notes.files.keys()
        assert {"tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "model_index.json"} <= there
        assert not any(path.endswith((".pt", ".bin")) for path in there)


def test_scales_keep_the_sources_dtype(imported: dict[str, Pack]) -> None:
    dtypes = {
        layout: (pack.transformer.tensors[f"{LAYER}.scales"].dtype, pack.transformer.tensors[f"{LAYER}.biases"].dtype)
        for layout, pack in imported.items()
        if pack.transformer.is_packed(LAYER)
    }
    floats = {layout: "F32" if layout.startswith("gemlite") else "BF16" for layout in dtypes}
    assert dtypes == {layout: (dtype, dtype) for layout, dtype in floats.items()} and {"mlx"} < dtypes.keys()
    if "gemlite" in imported:
        encoder = imported["gemlite"].text_encoder.tensors
        assert encoder["model.layers.0.mlp.up_proj.scales"].dtype == "F16"
        assert encoder["model.embed_tokens.weight"].dtype == "F16"


@torch.inference_mode()
def velocity(pack: Pack) -> torch.Tensor:
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel.from_config(pack.transformer.config)
    linear.build(transformer, pack.transformer, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 12, pack.transformer.config["in_channels"], generator=generator)
    embeddings = torch.randn(1, 16, pack.transformer.config["joint_attention_dim"], generator=generator)
    img_ids, txt_ids = token_ids(16, (3, 4), "cpu")
    return transformer(latents, embeddings, torch.tensor([0.7]), img_ids, txt_ids, lambda: None)


def test_every_layout_gives_the_same_velocity_bit_for_bit(imported: dict[str, Pack]) -> None:
    """Float32, given prompt embeddings; scales that bfloat16 holds exactly."""
    expected = velocity(imported["mlx"])
    assert expected.std() > 0 and torch.isfinite(expected).all()
    for layout, pack in imported.items():
        assert torch.equal(velocity(pack), expected), layout


def test_progress_ends_at_the_total_and_remarks_are_made(tmp_path: Path) -> None:
    source = SOURCES["unpacked"](tmp_path / "source", Content(small(), "binary"))
    (source / "niwaki.json").write_text(json.dumps(NOTES))
    (source / "LICENSE").write_text("Apache-2.0")
    *progress, last = importers.import_folder(source, tmp_path / "pack")
    assert all(a.done <= b.done for a, b in itertools.pairwise(progress))
    assert progress[-1].done == progress[-1].total == last.bytes
    assert (last.layout, last.variant) == ("unpacked", "binary")
    assert last.remarks == ("all 14 block matrices were exactly binary in groups of 128 and were packed without loss",)
    assert (tmp_path / "pack" / "LICENSE").read_text() == "Apache-2.0"


def test_dense_weights_stay_dense(tiny_packs: Path, tmp_path: Path) -> None:
    """One value off makes a group neither binary nor ternary."""
    source = Path(shutil.copytree(tiny_packs / "dense", tmp_path / "dense"))
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    info = open_pack(source).transformer.tensors[f"{LAYER}.weight"]
    with file.open("r+b") as stream:
        stream.seek(info.offset + 2)
        stream.write(b"\x12\x3f")
    last = import_(source, tmp_path / "pack")
    assert (last.variant, last.remarks) == ("dense", ())
    assert (tmp_path / "pack" / "transformer" / file.name).read_bytes() == file.read_bytes()


def test_nothing_is_left_of_a_stopped_or_failed_import(tmp_path: Path) -> None:
    source = SOURCES["gemlite"](tmp_path / "source", Content(small(), "ternary"))
    steps = importers.import_folder(source, tmp_path / "packs" / "a")
    for _ in range(3):
        next(steps)
    assert [path.name[:3] for path in (tmp_path / "packs").iterdir()] == [".a."]
    steps.close()
    with pytest.raises(BadRequest, match="lacks tensor model.layers.4"):  # without notes, states 9, 18, 27 are asked
        import_(source, tmp_path / "packs" / "a")
    assert list((tmp_path / "packs").iterdir()) == []
    (tmp_path / "packs" / "a").mkdir()
    with pytest.raises(BadRequest, match="packs/a exists: remove it first"):
        import_(source, tmp_path / "packs" / "a")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SOURCES["gemlite"](tmp_path / "source", Content(small(), "ternary"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(BadRequest, match=r"are needed in .*packs/a and 1.00 kB are free there"):
        import_(source, tmp_path / "packs" / "a")
    assert not (tmp_path / "packs").exists()


def test_recognising_layouts(tiny_packs: Path, tmp_path: Path) -> None:
    content = Content(small(), "ternary")
    found = {
        layout: (importers.recognise(folder), importers.is_foreign(folder))
        for layout, folder in ((name, full.write(tmp_path / name, name, content)) for name in full.LAYOUTS)
    }
    assert found == {"mlx": ("mlx", False), "gemlite": ("gemlite", True), "unpacked": ("unpacked", True)}
    assert not importers.is_foreign(tiny_packs / "dense")  # low-bit values, but its notes say it is meant as it is
    assert importers.recognise(tmp_path) is None
    with pytest.raises(BadRequest, match="no model folder of a layout we know"):
        import_(tmp_path, tmp_path / "pack")


def test_converting_happens_once(tmp_path: Path) -> None:
    source = SOURCES["gemlite"](tmp_path / "bonsai", Content(small(), "ternary"))
    (source / "niwaki.json").write_text(json.dumps(NOTES))
    first = list(importers.convert(source, tmp_path / "data"))
    again = list(importers.convert(source, tmp_path / "data"))
    assert len(first) > 4 and len(again) == 1 and again[0].folder == first[-1].folder
    assert again[0].folder.parent == tmp_path / "data" / "models" and again[0].folder.name.startswith("bonsai-")
    (source / "niwaki.json").write_text(json.dumps(NOTES | {"steps": 3}))
    assert len(list(importers.convert(source, tmp_path / "data"))) > 4
    assert open_pack(first[-1].folder).notes.steps == 3


def test_a_foreign_folder_given_as_the_model_is_converted_first(tmp_path: Path, capsys: Any) -> None:
    source = SOURCES["gemlite"](tmp_path / "bonsai", Content(small(), "ternary"))
    (source / "niwaki.json").write_text(json.dumps(NOTES))
    arguments = ["doctor", "--model", str(source), "--data", str(tmp_path / "data"), "--backend", "torch", "--json"]
    assert app.main(arguments) == 0
    said = capsys.readouterr()
    assert "gemlite" in said.err and str(tmp_path / "data" / "models") in said.err
    assert Path(json.loads(said.out.splitlines()[-1])["model"]).parent == tmp_path / "data" / "models"
    assert app.main(arguments) == 0 and "converting" not in capsys.readouterr().err


def test_models_import_converts_and_records(tmp_path: Path, capsys: Any) -> None:
    source = SOURCES["gemlite"](tmp_path / "bonsai", Content(small(), "binary"))
    (source / "niwaki.json").write_text(json.dumps(NOTES))
    data = ["--data", str(tmp_path / "data")]
    assert app.main(["models", "import", str(source), "--id", "mine", *data]) == 0
    assert "converted from the gemlite layout" in capsys.readouterr().out
    assert app.main(["models", "verify", "mine", *data]) == 0
    with (tmp_path / "data" / "models" / "mine" / "vae" / "config.json").open("a") as stream:
        stream.write(" ")
    assert app.main(["models", "verify", "mine", *data]) == 2
    assert "vae/config.json" in capsys.readouterr().err


def rows(count: int) -> np.ndarray:
    return np.arange(count)


@pytest.mark.parametrize(("bits", "mode"), [(1, 4), (1, 3), (2, 4), (2, 3)])
def test_bytes_that_gemlite_packed(bits: int, mode: int, tmp_path: Path) -> None:
    """tests/packs/golden/make_gemlite.py: codes are known, and so what they mean."""
    kept = np.load(GOLDEN / "gemlite.npz")
    pairs = np.unpackbits(kept[f"{bits}.codes"]).reshape(8, 256, 2)
    codes, s = pairs[..., 0] | pairs[..., 1] << 1, np.repeat(kept[f"{bits}.s"], 128, axis=1)
    state = {f"{LAYER}.{key}": torch.from_numpy(kept[f"{bits}.{mode}.{key}"]) for key in gemlite._LAYER_KEYS[:5]}
    torch.save(state, tmp_path / "state_dict.pt")
    layer = gemlite._layer(Checkpoint(tmp_path / "state_dict.pt"), LAYER, (8, 256))
    np.testing.assert_array_equal(lowbit.unpack(layer.words(), bits, 256), codes)
    expected = (codes.astype(np.float32) - 1) * s if bits == 2 else np.where(codes, s, -s)
    np.testing.assert_array_equal(layer.decode(rows(8)), expected)
    np.testing.assert_array_equal(lowbit.dequantize(codes, *layer.affine(), 128), expected)
    written = layouts.gemlite_codes(lowbit.pack(codes, bits).view(np.uint8))
    np.testing.assert_array_equal(written, kept[f"{bits}.{mode}.W_q"])
    assert layouts.gemlite_metadata(bits, mode) == kept[f"{bits}.{mode}.metadata"].tolist()


@pytest.mark.parametrize("axis", [1, 0])
def test_a_layer_that_hqq_saved(axis: int) -> None:
    """tests/packs/golden/make_hqq.py: what hqq computes in float16, bit for bit; our float32, to its rounding."""
    checkpoint = Checkpoint(GOLDEN / "hqq.pt")
    module = checkpoint.structure[f"axis{axis}"]
    expected = checkpoint.read(checkpoint.structure[f"axis{axis}.expected"]["weight"])
    quantised = hqq._Quantised(checkpoint, "x", module, (16, 128))
    (dense,) = quantised.dense().parts()
    np.testing.assert_array_equal(dense, expected)
    grouped = np.concatenate((checkpoint.read(module["W_q"]) >> 4, checkpoint.read(module["W_q"]) & 15))
    np.testing.assert_array_equal(layouts.hqq_codes(grouped), checkpoint.read(module["W_q"]))
    if axis == 1:
        layer = quantised.layer()
        found = lowbit.dequantize(lowbit.unpack(layer.words(), 4, 128), *map(np.float32, layer.affine()), 64)
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
        np.testing.assert_allclose(found, layer.decode(rows(16)), rtol=1e-6, atol=1e-7)


def test_an_encoder_saved_with_a_head_or_without_its_outer_name(tmp_path: Path) -> None:
    content = Content(small(), "ternary")
    layouts.write_hqq(tmp_path / "plain", content)
    modules = torch.load(tmp_path / "plain" / "qmodel.pt", weights_only=True)
    embedding = modules["model.embed_tokens"]["weight"]
    more = modules | {"lm_head": {"weight": embedding}, "model.rotary_emb": {"inv_freq": torch.ones(16)}}
    bare = {name.removeprefix("model."): module for name, module in modules.items()}
    expected = [entry.name for entry in hqq.text_encoder(tmp_path / "plain").entries]
    assert expected[0] == "model.embed_tokens.weight"
    for name, saved in (("more", more), ("bare", bare)):
        shutil.copytree(tmp_path / "plain", tmp_path / name)
        torch.save(saved, tmp_path / name / "qmodel.pt")
        assert [entry.name for entry in hqq.text_encoder(tmp_path / name).entries] == expected


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("/tmp/niwaki-code-was-run"),))


def change_state(change: Callable[[dict[str, Any]], object], name: str = "transformer-gemlite-int2/state_dict.pt"):  # type: ignore[no-untyped-def]
    def damage(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=True)
        change(state)
        torch.save(state, folder / name)

    return damage


def set_item(key: str, index: Any, value: float) -> Callable[[Path], None]:
    return change_state(lambda state: state[key].__setitem__(index, value))


def change_module(**values: Any) -> Callable[[Path], None]:
    name = "text_encoder-hqq-4bit/qmodel.pt"
    return change_state(lambda state: state["model.layers.1.mlp.up_proj"].update(values), name)


def cut(path: str, part: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(len(data) * part)])

    return damage


def flip(path: str, at: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / path).read_bytes())
        data[at] ^= 4
        (folder / path).write_bytes(data)

    return damage


STATE, QMODEL = "transformer-gemlite-int2/state_dict.pt", "text_encoder-hqq-4bit/qmodel.pt"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code 3": (set_item(f"{LAYER}.W_q", (5, 7), 0xFF), "state_dict.pt: .*to_out holds code 3"),
    "bias": (set_item(f"{LAYER}.zeros", (1, 7), 0.5), "state_dict.pt: .*to_out holds a bias that is not minus"),
    "infinite": (set_item(f"{LAYER}.scales", (1, 7), float("inf")), "state_dict.pt: .*to_out holds a scale or a bias"),
    "mode": (set_item(f"{LAYER}.metadata", 10, 2), "state_dict.pt: .*to_out has weight mode 2 where only 3 and 4"),
    "four bits": (set_item(f"{LAYER}.metadata", 1, 4), "which is no 1- or 2-bit layer"),
    "layer gone": (change_state(lambda s: s.pop(f"{LAYER}.scales")), "state_dict.pt lacks .*to_out.scales"),
    "norm gone": (change_state(lambda s: s.pop("proj_out.weight")), "state_dict.pt lacks proj_out.weight"),
    "a bias tensor": (change_state(lambda s: s.update({f"{LAYER}.bias": torch.ones(3)})), "state_dict.pt holds .*bias"),
    "transposed": (
        change_state(lambda s: s.update({f"{WIDE}.W_q": s[f"{WIDE}.W_q"].T.contiguous()})),
        r"linear_in.W_q is U8 \[768, 32\] where config.json implies U8 \[32, 768\]"),
    "code in the pickle": (lambda f: torch.save({"a": Code()}, f / STATE), "does not hold tensors alone .* was run"),
    "a list": (lambda f: torch.save([torch.ones(1)], f / STATE), "no flat list of tensors"),
    "empty": (lambda f: (f / STATE).write_bytes(b""), "state_dict.pt is cut short, damaged or foreign"),
    "cut": (cut(STATE, 0.7), "state_dict.pt is cut short, damaged or foreign"),
    "flipped": (flip(STATE, 600_000), "state_dict.pt changed since it was written"),
    "gone": (lambda f: (f / STATE).unlink(), "state_dict.pt cannot be read"),
    "JSON bomb": (
        lambda f: (f / "transformer-gemlite-int2/config.json").write_text("[" * 500_000), "config.json is no JSON"),
    "endless JSON": (
        lambda f: (f / "vae/config.json").write_text('{"a": "' + "a" * 3_000_000 + '"}'), "is longer than 2000000"),
    "endless layers": (
        lambda f: (f / "text_encoder-hqq-4bit/config.json").write_text(
            json.dumps(small().text_encoder | {"num_hidden_layers": 10**12})), "implies more than 100000 tensors"),
    "HQQ code": (lambda f: torch.save({"a": {"b": Code()}}, f / QMODEL), "qmodel.pt does not hold tensors alone"),
    "HQQ layer gone": (
        change_state(lambda s: s.pop("model.layers.1.mlp.up_proj"), QMODEL), "qmodel.pt lacks model.layers.1.mlp.up"),
    "HQQ bits": (change_module(nbits=3), "up_proj is HQQ of .*'nbits': 3"),
    "HQQ axis": (change_module(axis=2), "'axis': 2"),
    "HQQ group": (change_module(group_size=0), "no multiple of group 0"),
    "HQQ shape": (change_module(shape=torch.Size((2, 2))), "is HQQ of"),
    "HQQ scale gone": (change_module(scale=None), "qmodel.pt lacks scale of .*up_proj"),
    "HQQ scale infinite": (
        change_module(scale=torch.full((128, 1), torch.nan, dtype=torch.float16)), "up_proj holds a scale or a bias"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "has no folder vae"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "text_encoder-hqq-4bit" / "tokenizer"), "has no folder tokenizer"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = SOURCES["gemlite"](tmp_path_factory.mktemp("gemlite") / "sound", Content(small(), "ternary"))
    (folder / "niwaki.json").write_text(json.dumps(NOTES))
    return folder


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_sources_are_refused_in_one_sentence(name: str, sound: Path, tmp_path: Path) -> None:
    damage, sentence = DAMAGES[name]
    source = Path(shutil.copytree(sound, tmp_path / "source"))
    damage(source)
    with pytest.raises(BadRequest, match=sentence) as raised:
        import_(source, tmp_path / "packs" / "a")
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    assert not Path("/tmp/niwaki-code-was-run").exists()
    assert not (tmp_path / "packs").exists() or not list((tmp_path / "packs").iterdir())


def test_every_layout_gives_the_same_text_states(imported: dict[str, Pack]) -> None:
    """HQQ's float16 scales with float32 biases and a dense embedding, against MLX's bfloat16 ones, bit for bit."""
    ids, mask = np.arange(16, dtype=np.int64)[None], np.ones((1, 16), np.int64)
    states = {}
    for layout in imported.keys() & {"mlx", "gemlite", "unpacked"}:
        pack = imported[layout]
        encoder = TextEncoder(pack.text_encoder, pack.notes.hidden_states, torch.float32, torch.device("cpu"))
        states[layout] = encoder.encode(ids, mask, lambda: None)
    assert states["mlx"].shape == (1, 16, 192) and states["mlx"].std() > 0
    assert all(torch.equal(found, states["mlx"]) for found in states.values()) and "unpacked" in states
