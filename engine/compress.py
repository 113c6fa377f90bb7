"""Compress a dense FLUX.2 Klein transformer into ternary or binary codes, and say what it costs in bytes and in error.

The matrices inside the blocks become codes with one scale per 128 inputs, the mean magnitude; the nine outer
projections and the norms stay as they are. Some rows are in memory at a time, never a whole tensor. What the codes mean
is lowbit's business.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from engine import jsonfile, lowbit, records, shapes, tensorfile, transfer
from engine.packs import NOTES_FILE, open_pack
from engine.records import Digest, Known
from engine.tensorfile import FLOATS, Entry, Tensors
from engine.transfer import Meter, Progress
from engine.types import BadRequest

GROUP = 128
BITS = {1: "binary", 2: "ternary"}
FOLDER = "transformer-packed-mflux"
FILE = "diffusion_pytorch_model.safetensors"
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_OTHERS = ("text_encoder", "text_encoder-mlx-4bit", "vae", "tokenizer", "scheduler")

Sizes = dict[str, tuple[int, int]]
"""Bytes before and after, by component."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a packed layer of shape [out, in] is from the dense one: |W - W'| / |W| (Frobenius)."""

    name: str
    shape: tuple[int, int]
    relative_error: float


@dataclass(frozen=True, slots=True)
class Compressed:
    """The finished folder. `relative_error` is that of all packed weights together; `sizes` by component."""

    folder: Path
    variant: str
    bits: int
    sizes: Sizes
    layers: tuple[LayerError, ...]
    relative_error: float


@dataclass
class _Sums:
    """Of one layer, gathered chunk by chunk: squares of differences and weights; scales and biases as bfloat16."""

    difference: float = 0.0
    weight: float = 0.0
    scales: list[np.ndarray] = field(default_factory=list)
    biases: list[np.ndarray] = field(default_factory=list)

    @property
    def relative(self) -> float:
        return math.sqrt(self.difference / self.weight) if self.weight else 0.0


def sizes(config: Mapping[str, Any], bits: int, dense_bytes: int = 2) -> Sizes:
    """The storage table of a transformer, from its configuration alone: bytes before and after per component, without
    the few kB of a file's header."""
    packed = sum(math.prod(shape) for name, shape in shapes.transformer(config) if is_packed(name, shape))
    dense = sum(math.prod(shape) for name, shape in shapes.transformer(config) if not is_packed(name, shape))
    return {
        "packed weights": (packed * dense_bytes, packed * bits // 8),
        "scales": (0, packed // GROUP * 2),
        "biases": (0, packed // GROUP * 2),
        "dense": (dense * dense_bytes, dense * dense_bytes),
    }


def is_packed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a weight becomes codes: the matrices inside the blocks do."""
    return name.startswith(_BLOCKS) and len(shape) == 2


def compress(source: Path, target: Path, bits: int) -> Generator[Progress | Compressed, None, None]:
    """Write the packed form of `source` into `target`, which must not exist.

    `source` is a transformer folder (config.json and safetensors), or a whole model with one in it: then the rest of
    the model is copied and `target` is a pack that can be run. Licence and notice come along.
    Raises BadRequest for anything that is no dense transformer, for a weight that is no finite number, and for a full
    disk; nothing of `target` is left then, nor when the generator is closed.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if bits not in BITS:
        raise BadRequest(f"--bits {bits} is not possible: give 1 (binary) or 2 (ternary)")
    if target.exists():
        raise BadRequest(f"{target} exists: choose another folder")
    whole = (source / "transformer" / "config.json").is_file()
    dense = source / "transformer" if whole else source
    config, tensors = _open(dense)
    others = _others(source, whole)
    plan = sizes(config, bits)
    new = sum(after for _, after in plan.values())
    meter = Meter(new + sum(file.stat().st_size for file in others.values()))
    transfer.check_space(target.parent, meter.total)
    aside = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        files: dict[str, dict[str, Any]] = {}
        for path, file in others.items():
            digest = Digest(Known(file.stat().st_size))
            yield from transfer.copy_file(file, aside / path, digest, path, meter)
            files[path] = {"bytes": file.stat().st_size, "sha256": digest.sha256}
        sums = yield from _write(tensors, config, bits, aside, files, meter)
        if whole:
            _write_notes(source, aside, target.name, bits, files)
            open_pack(aside)
        with transfer.writing(target):
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    yield _report(source, target, bits, config, tensors, sums)


def _open(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """A dense transformer, its names and shapes checked."""
    if not (folder / "config.json").is_file():
        raise BadRequest(f"{folder} has no config.json: give a transformer folder, or a model folder with one in it")
    config = jsonfile.read(folder / "config.json")
    tensors = Tensors(tuple(sorted(folder.glob("[!.]*.safetensors"))))
    if any(name.endswith(".scales") for name in tensors):
        raise BadRequest(f"{folder} is packed already: give the dense transformer it was made from")
    try:
        expected = dict(shapes.transformer(config))
    except (KeyError, TypeError, ValueError, OverflowError) as why:
        raise BadRequest(f"{folder / 'config.json'} is no FLUX.2 transformer's ({why}): give another folder") from None
    for name, shape in expected.items():
        info = tensors.get(name)
        if info is None or info.shape != shape or info.dtype not in FLOATS:
            found = "is missing" if info is None else f"is {info.dtype} {list(info.shape)}"
            raise BadRequest(f"{name} in {folder} {found} where config.json implies {list(shape)}: copy it again")
        if is_packed(name, shape) and shape[1] % GROUP:
            raise BadRequest(f"{name} in {folder} has {shape[1]} inputs, no multiple of {GROUP}: it cannot be packed")
    if strange := sorted(tensors.keys() - expected.keys()):
        raise BadRequest(f"{folder} has {strange[0]}, which config.json does not imply: give a Klein transformer")
    return config, tensors


def _others(source: Path, whole: bool) -> dict[str, Path]:
    """What comes along unchanged, by path in the new folder."""
    found = {name: source / name for name in records.licences(path.name for path in source.iterdir())}
    if whole:
        found |= {name: source / name for name in ("model_index.json",) if (source / name).is_file()}
        for folder in (source / name for name in _OTHERS):
            files = sorted(file for file in folder.glob("[!.]*") if file.is_file() and file.suffix != ".bin")
            found |= {f"{folder.name}/{file.name}": file for file in files}
    return found


def _write(
    tensors: Tensors, config: dict[str, Any], bits: int, aside: Path, files: dict[str, dict[str, Any]], meter: Meter
) -> Generator[Progress, None, dict[str, _Sums]]:
    """The packed transformer, streamed; returns the sums of every packed layer."""
    folder = transfer.make_folder(aside / FOLDER)
    sums = {name: _Sums() for name, shape in shapes.transformer(config) if is_packed(name, shape)}
    path = f"{FOLDER}/{FILE}"
    with transfer.writing(folder):
        for name, value in (
            ("config.json", config),
            ("quantization_config.json", {"bits": bits, "group_size": GROUP, "quantized_count": len(sums)}),
        ):
            data = (json.dumps(value, indent=2) + "\n").encode()
            (folder / name).write_bytes(data)
            digest = Digest(Known(len(data)))
            digest.update(data)
            files[f"{FOLDER}/{name}"] = {"bytes": len(data), "sha256": digest.sha256}
        writing = tensorfile.stream(folder / FILE, _entries(tensors, config, bits, sums), {"format": "mlx"})
        while True:
            try:
                meter.moved(next(writing))
            except StopIteration as end:
                files[path] = end.value
                return sums
            if meter.due():
                yield meter.progress(path)


def _entries(tensors: Tensors, config: Mapping[str, Any], bits: int, sums: dict[str, _Sums]) -> list[Entry]:
    """What the new file holds. A file's widest items come first, so every layer's words, whose making also finds the
    scales, are written before any of the scales."""
    entries = []
    for name, (rows, *rest) in shapes.transformer(config):
        if name not in sums:
            entries.append(Entry(name, tensors[name].dtype, (rows, *rest), partial(tensors.blocks, name)))
            continue
        fqn, k = name.removesuffix(".weight"), rest[0]
        groups, words = (rows, k // GROUP), (rows, k * bits // lowbit.WORD_BITS)
        entries += [
            Entry(f"{fqn}.weight", "U32", words, _words(tensors, name, bits, sums[name])),
            Entry(f"{fqn}.scales", "BF16", groups, partial(iter, sums[name].scales)),
            Entry(f"{fqn}.biases", "BF16", groups, partial(iter, sums[name].biases)),
        ]
    return entries


def _words(tensors: Tensors, name: str, bits: int, sums: _Sums) -> Callable[[], Iterator[np.ndarray]]:
    quantize = lowbit.quantize_ternary if bits == 2 else lowbit.quantize_binary

    def parts() -> Iterator[np.ndarray]:
        for weights in tensors.rows(name):
            try:
                codes, scales, biases = quantize(weights, GROUP)
            except BadRequest as why:
                raise BadRequest(f"{name} of {tensors[name].file}: {why}") from None
            sums.scales.append(lowbit.bfloat16_bits(scales))
            sums.biases.append(lowbit.bfloat16_bits(biases))
            sums.weight += _squares(weights)
            weights -= lowbit.dequantize(codes, scales, biases, GROUP)
            sums.difference += _squares(weights)
            yield lowbit.pack(codes, bits)

    return parts


def _squares(values: np.ndarray) -> float:
    flat = values.ravel()
    return float(np.dot(flat, flat))


def _write_notes(source: Path, aside: Path, name: str, bits: int, files: dict[str, dict[str, Any]]) -> None:
    """Our niwaki.json: the source's own words where it has some, and that and how its weights were changed."""
    known = jsonfile.read(source / NOTES_FILE) if (source / NOTES_FILE).is_file() else {}
    change = f"block matrices rounded to {BITS[bits]} codes in groups of {GROUP}, mean-absolute scales, by app.py pack"
    notes = known | {
        "id": name,
        "label": f"{known.get('label', source.name)}, {BITS[bits]} by `pack`",
        "provenance": {"source": source.resolve().name, "changed": change},
        "files": dict(sorted(files.items())),
    }
    records.write_json(aside / NOTES_FILE, notes)


def _report(
    source: Path, target: Path, bits: int, config: Mapping[str, Any], tensors: Tensors, sums: dict[str, _Sums]
) -> Compressed:
    table: Sizes = {}
    for name, (_, after) in sizes(config, bits).items():
        before = 0
        if name in ("packed weights", "dense"):
            packed = name == "packed weights"
            before = sum(info.nbytes for key, info in tensors.items() if (key in sums) == packed)
        table[name] = (before, before if name == "dense" else after)
    file = target / FOLDER / FILE
    table["transformer files"] = (sum(old.stat().st_size for old in tensors.files), file.stat().st_size)
    for folder in _OTHERS:
        if (target / folder).is_dir():
            total = sum(each.stat().st_size for each in (target / folder).iterdir())
            table[folder] = (total, total)
    layers = tuple(LayerError(name, tensors[name].shape, each.relative) for name, each in sums.items())  # type: ignore[arg-type]
    weight = sum(each.weight for each in sums.values())
    error = math.sqrt(sum(each.difference for each in sums.values()) / weight) if weight else 0.0
    return Compressed(target, BITS[bits], bits, table, layers, error)
