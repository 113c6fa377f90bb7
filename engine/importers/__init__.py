"""Turn a model folder in a released layout into our pack folder, once.

    recognise(folder) -> str | None          "gemlite", "mlx" (ours), "unpacked", or None: no model folder
    is_foreign(folder) -> bool               whether it has to be converted before it can be opened
    import_folder(source, target, ...)       yields transfer.Progress .. and at last one Imported
    convert(source, data_dir)                the same, into the data folder; for `--model FOLDER`

Nothing is loaded as a whole: a tensor is read, converted, written and dropped. The target appears when it is complete,
with the size and SHA-256 of every file in its niwaki.json, and after rows of every layer were decoded from it and
compared with the source. Whatever is wrong with a source is one BadRequest sentence that names the file.
"""

import hashlib
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

from engine import jsonfile, schedule
from engine.importers import gemlite, hqq, unpacked
from engine.importers.build import Imported, build
from engine.importers.parts import Copy, Part
from engine.packs import NOTES_FILE, TEXT_ENCODER_FOLDERS, open_pack
from engine.transfer import Progress
from engine.types import BadRequest

__all__ = ["Imported", "convert", "import_folder", "is_foreign", "recognise"]

_NAMED_BY_US = ("id", "label", "files", "provenance")
_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")


def recognise(folder: Path) -> str | None:
    """The layout of a model folder by the folders in it: "gemlite", "mlx" (also our own), "unpacked", or None."""
    if any((folder / name).is_dir() for name in gemlite.FOLDERS):
        return "gemlite"
    if (folder / "transformer-packed-mflux").is_dir():
        return "mlx"
    return "unpacked" if (folder / unpacked.FOLDER).is_dir() else None


def is_foreign(folder: Path) -> bool:
    """Whether `folder` has to be converted before it can be opened, or should be: dense weights that are low-bit in all
    but storage. A dense folder with our niwaki.json is meant as it is. Raises BadRequest for damaged tensors."""
    layout = recognise(folder)
    if layout == "unpacked" and not (folder / NOTES_FILE).exists():
        return unpacked.looks_packed(folder / unpacked.FOLDER)
    return layout == "gemlite"


def import_folder(
    source: Path, target: Path, *, label: str | None = None
) -> Generator[Progress | Imported, None, None]:
    """Write the pack folder `target`, which must not exist, from the model folder `source`.

    MLX packs are copied and checked, gemlite ones converted, unpacked ones packed where that loses nothing. Raises
    BadRequest, in one sentence that names the file, where the source is damaged, incomplete or foreign, and where the
    disk is too full; nothing is left of `target` then.
    """
    source, target = Path(source), Path(target)
    layout = recognise(source)
    if layout is None:
        raise BadRequest(f"{source} is no model folder of a layout we know: gemlite, MLX or unpacked diffusers")
    parts, folders = _parts(source, layout)
    copies = [copy for folder, path in folders for copy in _tree(folder, path)]
    copies += [Copy(file, file.name) for pattern in _LICENCES for file in sorted(source.glob(pattern))]
    copies += [Copy(source / name, name) for name in _frame(layout) if (source / name).is_file()]
    if layout == "gemlite":
        parts.append(Part("scheduler", {"scheduler_config.json": dict(schedule.RELEASED)}, "", ()))
    given = jsonfile.read(source / NOTES_FILE) if (source / NOTES_FILE).is_file() else {}
    notes = {key: value for key, value in given.items() if key not in _NAMED_BY_US}
    notes |= {"id": target.name, "label": label or given.get("label") or target.name}
    notes["provenance"] = {"layout": layout, "source": source.name, "fingerprint": _fingerprint(source)}
    yield from build(target, layout, parts, copies, notes)


def convert(source: Path, data_dir: Path) -> Generator[Progress | Imported, None, None]:
    """`import_folder` into the data folder, under a name made of the source's; done before, it yields nothing new.

    A source that changed since is converted again.
    """
    source = Path(source).resolve()
    target = converted(source, data_dir)
    if target.is_dir():
        pack = open_pack(target)
        if pack.notes.provenance.get("fingerprint") == _fingerprint(source):
            size = sum(int(entry.get("bytes", 0)) for entry in pack.notes.files.values())
            yield Imported(target, recognise(source) or "", pack.variant, size, ())
            return
        shutil.rmtree(target)
    yield from import_folder(source, target, label=source.name)


def converted(source: Path, data_dir: Path) -> Path:
    """Where `convert` puts the pack made of `source`."""
    source = Path(source).resolve()
    mark = hashlib.sha256(str(source).encode()).hexdigest()[:8]
    return Path(data_dir) / "models" / f"{source.name}-{mark}"


def _parts(source: Path, layout: str) -> tuple[list[Part], list[tuple[Path, str]]]:
    """What has to be converted, and the folders that are copied as they are, each with its path in the pack."""
    parts, folders = [], [(_folder(source, "vae"), "vae")]
    if layout == "gemlite":
        parts.append(gemlite.transformer(_folder(source, *gemlite.FOLDERS)))
    else:
        found = unpacked.transformer(_folder(source, unpacked.FOLDER)) if layout == "unpacked" else None
        dense = _folder(source, "transformer-packed-mflux", unpacked.FOLDER)
        if found:
            parts.append(found)
        else:
            folders.append((dense, dense.name))
        if (source / "scheduler").is_dir():
            folders.append((source / "scheduler", "scheduler"))
    if (source / hqq.FOLDER).is_dir():
        parts.append(hqq.text_encoder(source / hqq.FOLDER))
    else:
        encoder = _folder(source, *TEXT_ENCODER_FOLDERS)
        folders.append((encoder, encoder.name))
    folders.append((_folder(source, "tokenizer", f"{hqq.FOLDER}/tokenizer"), "tokenizer"))
    return parts, folders


def _folder(source: Path, *names: str) -> Path:
    found = next((source / name for name in names if (source / name).is_dir()), None)
    if found is None:
        raise BadRequest(f"{source} has no folder {' or '.join(names)}: give the folder of a complete model")
    return found


def _tree(folder: Path, path: str) -> list[Copy]:
    """The files of a component, for copying; no pickles, pictures or hidden files, and no folders inside it."""
    wanted = (".json", ".safetensors", ".txt", ".jinja", ".model")
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [Copy(file, f"{path}/{file.name}") for file in files if file.name.endswith(wanted)]


def _frame(layout: str) -> tuple[str, ...]:
    """The small files at the top. A gemlite manifest names gemlite's files, which the pack does not have."""
    return ("model_index.json",) if layout == "gemlite" else ("model_index.json", "manifest.json")


def _fingerprint(source: Path) -> str:
    """Changes when a file of the source does, as far as sizes and dates tell."""
    files = sorted(file for file in source.rglob("*") if file.is_file())
    facts: list[Any] = [(f.relative_to(source).as_posix(), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
