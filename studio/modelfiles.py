"""The SHA-256 of a model's weight files, so that a picture can say exactly which files drew it.

Knows pack folders, not pictures. Hashing gigabytes takes seconds, so a hash is kept in the data folder for as long as
the file's size and time stay. What an import recorded isn't believed: the point is which bytes were really there.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from engine import catalog
from engine.packs import Pack, open_pack
from engine.types import EngineError
from studio.settings import make_folder

log = logging.getLogger(__name__)

FILE = "model-hashes.json"
_LATER = "the picture is saved without the hashes of its model"


def hashes(model: str, data_dir: Path) -> dict[str, str]:
    """Path in the pack folder -> SHA-256 of every weight file; empty where no pack is there (the fake backend)."""
    try:
        pack = open_pack(catalog.find(model, data_dir))
        return _hashes(pack, data_dir)
    except (EngineError, OSError) as error:
        log.info("%s: %s", _LATER, error)
        return {}


def combined(files: Mapping[str, str]) -> str:
    """One hash for a model: of all its files' hashes; "" for none."""
    lines = "".join(f"{sha256}  {path}\n" for path, sha256 in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest() if files else ""


def _hashes(pack: Pack, data_dir: Path) -> dict[str, str]:
    kept_in = make_folder(data_dir) / FILE
    known = _read(kept_in)
    found: dict[str, str] = {}
    fresh = dict(known)
    for file in (*pack.transformer.files, *pack.text_encoder.files, *pack.vae.files):
        name, status = file.relative_to(pack.folder).as_posix(), file.stat()
        key = f"{file.resolve()}|{status.st_size}|{status.st_mtime_ns}"
        if key in known:
            found[name] = known[key]
        else:
            with file.open("rb") as stream:
                found[name] = fresh[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    if fresh != known:
        aside = kept_in.with_suffix(".part")
        aside.write_text(json.dumps(fresh, indent=1), encoding="utf-8")
        aside.replace(kept_in)
    return found


def _read(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and all(isinstance(value, str) for value in known.values()) else {}
