"""Make a pack folder out of parts: in a hidden folder beside the target, read back, recorded, renamed as the last act.

Knows no released layout; the importers say what there is to write. Long work is a generator: closing it removes what
was begun.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine import lowbit, tensorfile
from engine.importers.parts import Copy, Layer, Part
from engine.packs import NOTES_FILE, Component, Pack, open_pack, verify_codes
from engine.transfer import Meter, Progress, check_space
from engine.types import BadRequest, EngineError

_CHECKED_ROWS = 16  # of every packed layer, spread over it


@dataclass(frozen=True, slots=True)
class Imported:
    """The finished pack: where it lies, the layout it came in, its bytes, and what a person should know about it."""

    folder: Path
    layout: str
    variant: str
    bytes: int
    remarks: tuple[str, ...]


def build(
    target: Path, layout: str, parts: Sequence[Part], copies: Sequence[Copy], notes: Mapping[str, Any]
) -> Generator[Progress | Imported, None, None]:
    """Write `target`, which must not exist, and yield Progress and at last Imported.

    Raises BadRequest where the source is damaged or the disk too full; nothing of `target` is left then.
    """
    aside = target.parent / f".{target.name}.{os.getpid()}.import"
    sizes = [tensorfile.size_of(part.entries, {"format": "mlx"}) for part in parts if part.entries]
    meter = Meter(total := sum(sizes) + sum(copy.source.stat().st_size for copy in copies))
    if target.exists():
        raise BadRequest(f"{target} exists: remove it first, or choose another name")
    try:
        check_space(target, total)
        aside.mkdir(parents=True)
        files: dict[str, dict[str, Any]] = {}
        yield from _write(aside, parts, copies, files, meter)
        _write_json(aside / NOTES_FILE, {**notes, "files": dict(sorted(files.items()))})
        pack = open_pack(aside)
        for part in (part for part in parts if part.layers):
            yield meter.progress(f"{part.folder}/{part.tensors}")
            _compare(pack, part)
        _refuse_damage(pack, target)
        os.replace(aside, target)
    except OSError as why:
        raise BadRequest(f"cannot make {target} ({why.strerror}, {why.filename or aside}): choose another data folder "
                         "with --data, or copy the source again") from None  # fmt: skip
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    remarks = tuple(remark for part in parts for remark in part.remarks)
    yield Imported(target, layout, pack.variant, total, remarks)


def _write(
    folder: Path, parts: Sequence[Part], copies: Sequence[Copy], files: dict[str, dict[str, Any]], meter: Meter
) -> Generator[Progress, None, None]:
    """Write everything but the notes, entering each file's record."""
    for copy in copies:
        yield meter.progress(copy.path)
        files[copy.path] = _copy(copy.source, folder / copy.path)
        meter.moved(files[copy.path]["bytes"])
    for part in parts:
        path = f"{part.folder}/{part.tensors}"
        for name, value in part.documents.items():
            files[f"{part.folder}/{name}"] = _write_json(folder / part.folder / name, value)
        if not part.entries:
            continue
        writing = tensorfile.stream(folder / path, part.entries, {"format": "mlx"})
        while True:
            try:
                meter.moved(next(writing))
            except StopIteration as end:
                files[path] = end.value
                break
            if meter.due():
                yield meter.progress(path)


def _copy(source: Path, target: Path) -> dict[str, Any]:
    """Copy one file and return its record."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, size = hashlib.sha256(), 0
    with source.open("rb") as read, target.open("wb") as write:
        while block := read.read(tensorfile.BLOCK):
            write.write(block)
            digest.update(block)
            size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _write_json(file: Path, value: object) -> dict[str, Any]:
    file.parent.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    file.write_bytes(data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _compare(pack: Pack, part: Part) -> None:
    """Hold rows of every packed layer, read back from the new file, to the source decoded by its own rule."""
    for component in (pack.transformer, pack.text_encoder):
        if component.folder.name == part.folder:
            for layer in part.layers:
                rows = np.unique(np.linspace(0, layer.shape[0] - 1, _CHECKED_ROWS).astype(int))
                found, expected = _decoded(component, layer, rows), layer.decode(rows)
                # bias = -zero * scale is rounded once more than the source's own rule
                if not np.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(np.abs(expected).max())):
                    raise EngineError(f"{layer.fqn} of {layer.file} was not taken over as it is: report this file")


def _decoded(component: Component, layer: Layer, rows: np.ndarray) -> np.ndarray:
    words, scales, biases = (component.tensors.numpy(f"{layer.fqn}.{name}") for name in ("weight", "scales", "biases"))
    codes = lowbit.unpack(words[rows], layer.bits, layer.shape[1])
    return lowbit.dequantize(codes, scales[rows], biases[rows], layer.group_size)


def _refuse_damage(pack: Pack, target: Path) -> None:
    """Check the codes and scales of what was written, copied components included."""
    for path, ok, sentence in verify_codes(pack):
        if not ok:
            raise BadRequest(f"{target} was not made, because in {path} {sentence}")
