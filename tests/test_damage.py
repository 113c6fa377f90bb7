"""Two hundred random corruptions: each pack is refused in one sentence or draws, without a hang and in the memory that
its plan says; what is drawn from all the same, verify finds out."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from engine import importers
from engine.hardware import Hardware
from engine.memory import LIBRARIES
from engine.packs import open_pack, verify_pack
from engine.plan import complete, plan
from engine.torch_backend.backend import TorchBackend
from engine.types import EngineError, Picture, Request
from tests.packs import full
from tests.packs.content import Content, small

# What opening, checking or importing a megabyte may take beyond what is there: a block, and JSON's own objects.
MEMORY = 160 << 20
SECONDS = 60  # on the busiest machine; a picture of these packs takes a tenth of one
HARDWARE = Hardware("cpu", "test processor", 0, 1, frozenset(), "cpu: test processor")
NOTES = '{"hidden_states": [1, 2, 3], "text_length": 64, "sizes": [[64, 64]]}'


def flip(data: bytearray, rng: random.Random) -> bytearray:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def overwrite(data: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(data))
    data[start : start + 64] = rng.randbytes(len(data[start : start + 64]))
    return data


def flip_early(data: bytearray, rng: random.Random) -> bytearray:
    """Where headers and tables of contents are."""
    data[rng.randrange(min(len(data), 2000))] = rng.randrange(256)
    return data


def flip_late(data: bytearray, rng: random.Random) -> bytearray:
    data[-1 - rng.randrange(min(len(data), 2000))] = rng.randrange(256)
    return data


DAMAGES: tuple[Callable[[bytearray, random.Random], bytearray], ...] = (
    flip,
    flip_early,
    flip_late,
    overwrite,
    lambda data, rng: data[: rng.randrange(len(data))],
    lambda data, rng: data + rng.randbytes(rng.randrange(1, 100)),
    lambda data, rng: bytearray(),
    lambda data, rng: bytearray(b"[" * 100_000),
    lambda data, rng: bytearray(b'{"a":' + b"9" * 100_000 + b"}"),
    lambda data, rng: bytearray(len(data)),
    lambda data, rng: data[len(data) // 2 :] + data[: len(data) // 2],
)


def peak() -> int:
    status = Path("/proc/self/status").read_text("ascii", "replace")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


@contextmanager
def bounded_memory(most: int = MEMORY) -> Iterator[None]:
    """What is done inside may not take more than `most` bytes beyond what the process has."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():  # only Linux tells and resets the peak
        yield
        return
    clear.write_text("5")
    before = peak()
    yield
    assert peak() - before < most


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damaged(sound: Path, folder: Path, rng: random.Random) -> Path:
    """Change one file of a copy; returns its path."""
    path = rng.choice(files_of(sound))
    data = (sound / path).read_bytes()
    changed = bytes(rng.choice(DAMAGES)(bytearray(data), rng))
    while changed == data:
        changed = bytes(flip(bytearray(data), rng))
    (folder / path).write_bytes(changed)
    return path


def one_sentence(raised: BaseException) -> bool:
    return isinstance(raised, EngineError) and "\n" not in str(raised)


def draw(folder: Path, data: Path) -> None:
    """A picture from a pack that opens, of whatever, in the memory that its plan says. Raises EngineError."""
    request = Request("a red circle", str(folder), steps=1)
    pack = open_pack(folder)
    decided = plan(HARDWARE, pack, complete(request, pack))
    backend, start = TorchBackend(HARDWARE, data), monotonic()
    try:
        with bounded_memory(decided.peak_bytes - LIBRARIES):
            *_, last = backend.generate(request, lambda: monotonic() - start > SECONDS)
    finally:
        backend.close()
    assert isinstance(last, Picture) and monotonic() - start < SECONDS


@pytest.mark.timeout(2400)  # a minute of processor time, which a busy machine gives out slowly
@pytest.mark.parametrize("count", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_a_damaged_pack_is_refused_or_draws(count: int, tmp_path: Path) -> None:
    source = full.write(tmp_path / "source", "mlx", Content(small(), "ternary"))
    (source / "niwaki.json").write_text(NOTES)
    sound = tmp_path / "sound"
    list(importers.import_folder(source, sound))
    folder = Path(shutil.copytree(sound, tmp_path / "pack"))
    draw(folder, tmp_path)  # the libraries are in memory before it is measured
    rng, refused, drawn = random.Random(0), 0, 0
    for number in range(count):
        path = damaged(sound, folder, rng)
        try:
            with bounded_memory():
                faults = [name for name, ok, _ in verify_pack(open_pack(folder)) if not ok]
            # our own list cannot hold its own hash: `models verify` keeps that one elsewhere
            assert faults or path.name == "niwaki.json", (number, path)
            draw(folder, tmp_path)
            drawn += 1
        except EngineError as why:
            assert one_sentence(why), (number, path, why)
            refused += 1
        except Exception as why:
            why.add_note(f"corruption {number}, of {path}")
            raise
        shutil.copyfile(sound / path, folder / path)
    assert refused > 0.3 * count and drawn > 0.2 * count


@pytest.mark.parametrize("count", [10, pytest.param(60, marks=pytest.mark.slow)])
def test_a_damaged_source_is_refused_or_imported(count: int, tmp_path: Path) -> None:
    """And where it is imported, nothing that matters was damaged: the pack's weights are those of the sound source."""
    sound = full.write(tmp_path / "sound", "gemlite", Content(small(), "ternary"))
    (sound / "niwaki.json").write_text(NOTES)
    *_, expected = importers.import_folder(sound, tmp_path / "expected")
    weights = {str(path): record for path, record in open_pack(expected.folder).notes.files.items()}
    folder = Path(shutil.copytree(sound, tmp_path / "source"))
    rng, refused = random.Random(1), 0
    with bounded_memory():
        for number in range(count):
            path = damaged(sound, folder, rng)
            try:
                *_, last = importers.import_folder(folder, tmp_path / "pack")
            except EngineError as why:
                assert one_sentence(why), (number, path, why)
                refused += 1
            else:
                made = open_pack(last.folder).notes.files
                assert path.suffix != ".pt" or made == weights, (number, path)
                shutil.rmtree(last.folder)
            shutil.copyfile(sound / path, folder / path)
    assert refused > 0.3 * count and not (tmp_path / "pack").exists()


@pytest.mark.parametrize(
    ("shard", "sentence"),
    [
        ("../../elsewhere.safetensors", "names '../../elsewhere.safetensors', which is no file beside it"),
        ("/etc/passwd", "names '/etc/passwd', which is no file beside it"),
        ("..\\x.safetensors", "which is no file beside it"),
        ("gone.safetensors", "names 'gone.safetensors', which is no file beside it"),
        (7, "names 7, which is no file beside it"),
    ],
)
def test_an_index_names_only_files_beside_it(shard: object, sentence: str, tmp_path: Path) -> None:
    from tests.packs.layouts import write_mlx

    write_mlx(tmp_path, Content(small(), "binary"), full.write_tokenizer, shards=2)
    (tmp_path / "niwaki.json").write_text(NOTES)
    open_pack(tmp_path)
    index = next(tmp_path.glob("transformer*/*.index.json"))
    told = json.loads(index.read_text())
    told["weight_map"]["proj_out.weight"] = shard
    index.write_text(json.dumps(told))
    with pytest.raises(EngineError) as raised:
        open_pack(tmp_path)
    assert sentence in str(raised.value) and index.name in str(raised.value)
    told["weight_map"] = ["a"]
    index.write_text(json.dumps(told))
    with pytest.raises(EngineError, match="index.json has no weight_map"):
        open_pack(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    from tests.packs.layouts import write_mlx

    write_mlx(tmp_path, Content(small(), "binary"), full.write_tokenizer, shards=2)
    (tmp_path / "niwaki.json").write_text(NOTES)
    next(tmp_path.glob("transformer*/*-00002-of-00002.safetensors")).unlink()
    with pytest.raises(EngineError, match="-00002-of-00002.safetensors', which is no file beside it"):
        open_pack(tmp_path)
