"""Dense transformers to codes: the storage table to the byte, errors that are true, and packs that run."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import app
from engine import compress, lowbit, shapes, tensorfile
from engine.compress import Compressed
from engine.packs import open_pack, verify_pack
from engine.tensorfile import Entry, Tensors
from engine.types import BadRequest

ROOT = Path(__file__).parent.parent

# The configuration of FLUX.2 Klein 4B and of every Bonsai, and what the formats page (section 1) says it takes.
KLEIN = {
    "_class_name": "Flux2Transformer2DModel", "attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-6, "guidance_embeds": False, "in_channels": 128, "joint_attention_dim": 7680, "mlp_ratio": 3.0,
    "num_attention_heads": 24, "num_layers": 5, "num_single_layers": 20, "out_channels": None, "patch_size": 1,
    "rope_theta": 2000, "timestep_guidance_channels": 256,
}  # fmt: skip
TABLE = {
    1: {"packed weights": 460_062_720, "scales": 57_507_840, "biases": 57_507_840, "dense": 390_085_632},
    2: {"packed weights": 920_125_440, "scales": 57_507_840, "biases": 57_507_840, "dense": 390_085_632},
}
TOTALS = {1: 965_164_032, 2: 1_425_226_752}
DENSE_FILE = 7_751_109_712


@pytest.fixture
def dense(tiny_packs: Path, tmp_path: Path) -> Path:
    """A whole dense model with weights that are not ternary, and a licence."""
    folder = tmp_path / "dense"
    shutil.copytree(tiny_packs / "dense", folder)
    entries = []
    rng = np.random.default_rng(5)
    old = Tensors((folder / "transformer" / compress.FILE,))
    for name, info in old.items():
        values = lowbit.bfloat16_bits(rng.standard_normal(info.shape, np.float32) * 0.02)
        entries.append(Entry(name, "BF16", info.shape, lambda values=values: (values,)))  # type: ignore[misc]
    tensorfile.write(folder / "transformer" / compress.FILE, entries, {"format": "pt"})
    (folder / "LICENSE").write_text("the licence")
    (folder / "NOTICE.md").write_text("the notice")
    return folder


def run(source: Path, target: Path, bits: int) -> Compressed:
    *_, last = compress.compress(source, target, bits)
    assert isinstance(last, Compressed)
    return last


@pytest.mark.parametrize("bits", [1, 2])
def test_the_storage_table_follows_from_the_configuration_to_the_byte(bits: int) -> None:
    table = compress.sizes(KLEIN, bits)
    assert {name: after for name, (_, after) in table.items()} == TABLE[bits]
    assert sum(after for _, after in table.values()) == TOTALS[bits]
    packed = [shape for name, shape in shapes.transformer(KLEIN) if compress.is_packed(name, shape)]
    others = [(name, shape) for name, shape in shapes.transformer(KLEIN) if not compress.is_packed(name, shape)]
    assert (len(packed), sum(n * k for n, k in packed)) == (100, 3_680_501_760)
    assert len(others) == 69 and sum(len(shape) == 2 for _, shape in others) == 9
    assert {len(shape) for _, shape in others} == {1, 2}
    before = sum(before for before, _ in table.values())
    assert before == 2 * (3_680_501_760 + 195_042_816)
    entries = [Entry(name, "BF16", shape, lambda: ()) for name, shape in shapes.transformer(KLEIN)]
    assert tensorfile.size_of(entries) == DENSE_FILE


@pytest.mark.parametrize("bits", [1, 2])
def test_a_model_becomes_a_pack_that_holds_what_lowbit_says(dense: Path, tmp_path: Path, bits: int) -> None:
    done = run(dense, tmp_path / "packed", bits)
    pack = open_pack(done.folder)
    assert pack.variant == done.variant == compress.BITS[bits]
    assert all(ok for _, ok, _ in verify_pack(pack))
    before = Tensors((dense / "transformer" / compress.FILE,))
    worst = 0.0
    quantize = lowbit.quantize_ternary if bits == 2 else lowbit.quantize_binary
    assert done.layers
    for layer in done.layers:
        fqn = layer.name.removesuffix(".weight")
        weights = before.numpy(layer.name)
        codes, scales, biases = quantize(weights, compress.GROUP)
        assert (pack.transformer.tensors.numpy(f"{fqn}.weight") == lowbit.pack(codes, bits)).all()
        assert (pack.transformer.tensors.numpy(f"{fqn}.scales") == scales).all()
        assert (pack.transformer.tensors.numpy(f"{fqn}.biases") == biases).all()
        error = np.linalg.norm(lowbit.dequantize(codes, scales, biases, compress.GROUP) - weights)
        assert layer.relative_error == pytest.approx(error / np.linalg.norm(weights), rel=1e-4)
        worst = max(worst, layer.relative_error)
    # Of normally distributed weights, theory: sqrt(1 - 2 / pi) = 0.603 for binary with mean-magnitude scales.
    assert 0.3 < done.relative_error <= worst
    if bits == 1:
        assert done.relative_error == pytest.approx(0.603, abs=0.01)
    packed = {layer.name for layer in done.layers}
    for name in before.keys() - packed:  # as they were, to the byte
        assert (pack.transformer.tensors.read(name) == before.read(name)).all()
    assert len([name for name in before.keys() - packed if len(before[name].shape) == 2]) == 9
    assert (done.folder / "LICENSE").read_text() == "the licence"
    assert (done.folder / "NOTICE.md").read_text() == "the notice"
    assert "rounded to" in pack.notes.provenance["changed"]


def test_the_report_adds_up(dense: Path, tmp_path: Path, capsys: Any) -> None:
    assert app.main(["pack", str(dense), str(tmp_path / "packed"), "--bits", "2", "--json"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out.splitlines()[-1])
    config = json.loads((dense / "transformer" / "config.json").read_text())
    for name, (before, after) in compress.sizes(config, 2).items():
        assert facts["bytes"][name] == {"before": before, "after": after}
        assert f"{after:,}" in out
    files = facts["bytes"]["transformer files"]
    assert files["before"] == (dense / "transformer" / compress.FILE).stat().st_size
    assert files["after"] == (tmp_path / "packed" / compress.FOLDER / compress.FILE).stat().st_size
    assert facts["bytes"]["vae"]["before"] == facts["bytes"]["vae"]["after"] > 0
    layers = [line for line in out.splitlines() if line[6:].startswith(("  transformer_blocks.", "  single_transf"))]
    assert [line.split()[1] for line in layers] == [layer["name"] for layer in facts["layers"]]


def test_a_lone_transformer_folder_will_do(dense: Path, tmp_path: Path) -> None:
    (dense / "transformer" / "LICENSE").write_text("beside the weights")
    done = run(dense / "transformer", tmp_path / "packed", 1)
    there = sorted(path.relative_to(done.folder).as_posix() for path in done.folder.rglob("*") if path.is_file())
    files = [f"{compress.FOLDER}/{name}" for name in ("config.json", compress.FILE, "quantization_config.json")]
    assert there == ["LICENSE", *files]


def test_ternary_weights_lose_nothing(tiny_packs: Path, tmp_path: Path) -> None:
    done = run(tiny_packs / "dense", tmp_path / "packed", 2)
    assert done.relative_error == 0 and {layer.relative_error for layer in done.layers} == {0.0}


def test_small_chunks_give_the_same_file(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = run(dense, tmp_path / "whole", 2)
    monkeypatch.setattr(tensorfile, "ROWS_VALUES", 1000)
    pieces = run(dense, tmp_path / "pieces", 2)
    assert [(path / compress.FOLDER / compress.FILE).read_bytes() for path in (whole.folder, pieces.folder)][0] == (
        pieces.folder / compress.FOLDER / compress.FILE
    ).read_bytes()
    assert pieces.relative_error == pytest.approx(whole.relative_error, rel=1e-5)


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(dense: Path, tiny_packs: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    file = dense / "transformer" / compress.FILE
    cases: list[tuple[Path, int, str]] = [
        (dense, 4, "--bits 4 is not possible: give 1"),
        (tiny_packs / "ternary" / compress.FOLDER, 2, "is packed already"),
        (tiny_packs / "ternary", 2, "has no config.json: give a transformer folder"),
        (tmp_path / "nowhere", 2, "has no config.json"),
        (dense / "vae", 2, "is no FLUX.2 transformer's"),
    ]
    for source, bits, words in cases:
        with pytest.raises(BadRequest, match=words):
            run(source, target, bits)
    info = Tensors((file,))["transformer_blocks.0.attn.to_q.weight"]
    with file.open("r+b") as stream:
        stream.seek(info.offset + 2 * 1000)
        stream.write(struct.pack("<H", 0x7FC0))  # not a number
    with pytest.raises(BadRequest, match="transformer_blocks.0.attn.to_q.weight of .* not a finite number"):
        run(dense, target, 1)
    config = json.loads((dense / "transformer" / "config.json").read_text())
    (dense / "transformer" / "config.json").write_text(json.dumps(config | {"num_layers": 2}))
    with pytest.raises(BadRequest, match=r"transformer_blocks.1.attn.to_q.weight in .* is missing"):
        run(dense, target, 2)
    (dense / "transformer" / "config.json").write_text(json.dumps(config | {"num_single_layers": 0}))
    with pytest.raises(BadRequest, match="has single_transformer_blocks.0.* which config.json does not imply"):
        run(dense, target, 2)
    assert not [path for path in tmp_path.iterdir() if "packed" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [1, 2])
def test_the_real_size_fits_the_table_and_4_gb_of_memory(full_size: Path, tmp_path: Path, bits: int) -> None:
    command = [sys.executable, "-c", MEASURED, "pack", str(full_size), str(tmp_path / "packed"), "--bits", str(bits)]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    *_, last, peak = done.stdout.splitlines()
    facts = json.loads(last)
    assert {name: facts["bytes"][name]["after"] for name in TABLE[bits]} == TABLE[bits]
    assert facts["bytes"]["transformer files"]["before"] == DENSE_FILE
    header = facts["bytes"]["transformer files"]["after"] - TOTALS[bits]
    assert 0 < header < 60_000
    assert int(peak) < 4_000_000_000
    shutil.rmtree(tmp_path / "packed")


# The command in a process of its own, and the most memory it had.
MEASURED = """
import sys, app
status = app.main(sys.argv[1:])
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")))
sys.exit(status)
"""


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    if shutil.disk_usage(folder).free < 15_000_000_000 or not Path("/proc/self/status").exists():
        pytest.skip("needs 15 GB of disk, and /proc to read the peak of memory")
    yield write_full_size(folder / "transformer")
    shutil.rmtree(folder)


def test_closing_and_a_taken_name_leave_nothing_behind(dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("engine.transfer.REPORT_SECONDS", 0)
    steps = compress.compress(dense, tmp_path / "packed", 2)
    next(steps)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".packed")]
    steps.close()
    assert not [path for path in tmp_path.iterdir() if "packed" in path.name]
    (tmp_path / "packed").mkdir()
    with pytest.raises(BadRequest, match="exists: choose another folder"):
        run(dense, tmp_path / "packed", 2)


def synthetic(rng: np.random.Generator, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Random bfloat16 bit patterns, both signs, magnitudes from 0.008 to 0.03, some rows at a time."""
    rows, *rest = shape
    for start in range(0, rows, 2048):
        count = (min(2048, rows - start), *rest)
        yield rng.integers(0, 1 << 16, count, np.uint16) & np.uint16(0x80FF) | np.uint16(0x3C00)


def write_full_size(folder: Path) -> Path:
    """The dense transformer in its real size, with random values: 7,751,109,712 bytes, written row by row."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(KLEIN))
    rng = np.random.default_rng(0)
    entries = [
        Entry(name, "BF16", shape, lambda shape=shape: synthetic(rng, shape))  # type: ignore[misc]
        for name, shape in shapes.transformer(KLEIN)
    ]
    tensorfile.write(folder / compress.FILE, entries)
    return folder
