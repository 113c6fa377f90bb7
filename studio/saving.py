"""A finished picture becomes files, and the values of its row. Files first: a row never points at a missing one.

Knows the layout of the data folder and Pillow's thumbnails, not who asked.
"""

import hashlib
import logging
import os
import secrets
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from PIL import Image as Pixels

from engine.types import Picture
from studio import modelfiles, pictures
from studio import tables as t
from studio.history import History, index
from studio.lineage import chain, past
from studio.recipe import Link, Origin
from studio.rows import Job, as_json, columns, fingerprint

log = logging.getLogger(__name__)

THUMB = 256  # pixels of a thumbnail's longer side


@dataclass(frozen=True, slots=True)
class Saved:
    """A picture on its way to the disk; what is None isn't written yet."""

    picture: Picture
    path: Path | None = None
    thumb: Path | None = None
    model_hash: str = ""


def save(saved: Saved, job: Job, history: History) -> Saved:
    """Write the PNG with its recipe and the thumbnail. Raises BadRequest on a full disk; nothing half remains."""
    whence = origin(saved.picture, job, history)
    path = saved.path or pictures.keep(saved.picture, history.data_dir / "pictures", origin=whence)
    thumb = saved.thumb or make_thumb(path, history.data_dir)
    return replace(saved, path=path, thumb=thumb, model_hash=modelfiles.combined(whence.model_files))


def origin(picture: Picture, job: Job, history: History) -> Origin:
    """What the engine doesn't know: what was done, the chain of pictures it was done to, the hashes of the model."""
    ancestors = () if job.parent is None else chain(history, job.owner, job.parent)
    links = [Link(image.request, image.op, image.sha256) for image in ancestors]
    if ancestors:
        links[:0] = past(ancestors[0])  # the first one may have come from elsewhere, with a chain of its own
    return Origin(job.op, tuple(links), modelfiles.hashes(picture.request.model, history.data_dir))


def make_thumb(path: Path, data_dir: Path) -> Path | None:
    """A small WebP of the picture under `thumbs`; None where it can't be written, which is logged."""
    thumb = data_dir / "thumbs" / path.relative_to(data_dir / "pictures").with_suffix(".webp")
    aside = thumb.with_name(f".{secrets.token_hex(6)}.part")
    try:
        thumb.parent.mkdir(parents=True, exist_ok=True)
        with Pixels.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((THUMB, THUMB), Pixels.Resampling.LANCZOS)
            small.save(aside, "WEBP", quality=85, method=2)
        os.replace(aside, thumb)
    except (OSError, ValueError) as error:
        log.warning("no thumbnail of %s: %s", path, error)
        aside.unlink(missing_ok=True)
        return None
    return thumb


def insert_image(db: sa.Connection, job: Job, saved: Saved, data_dir: Path) -> int:
    """The row of a picture that a job made; returns its id."""
    picture, path = saved.picture, saved.path
    assert path is not None, "files first"
    origin: dict[str, Any] = {
        "owner": job.owner, "job": job.id, "project": job.project, "revision": job.revision,
        "parent": _there(db, job.parent), "op": job.op, "created_at": time.time(),
    }  # fmt: skip
    made = {
        "fingerprint": fingerprint(picture.request),
        "model_hash": saved.model_hash,
        "backend": picture.backend,
        "reason": picture.reason,
        "seconds": picture.seconds.total,
        "details": as_json(
            {
                "dtype": picture.dtype,
                "seconds": asdict(picture.seconds),
                "peak_memory_bytes": picture.peak_memory_bytes,
                "unknown_words": picture.unknown_words,
            }
        ),
    }
    values = origin | columns(picture.request) | made | files(path, saved.thumb, data_dir)
    id = int(db.execute(t.image.insert().values(**values)).inserted_primary_key[0])  # type: ignore[index]
    index(db, [id])
    return id


def remove(saved: Saved) -> None:
    """Take back the files of a picture that nobody wants any more."""
    for path in (saved.path, saved.thumb):
        if path is not None:
            path.unlink(missing_ok=True)


def files(path: Path, thumb: Path | None, data_dir: Path) -> dict[str, Any]:
    """The columns about a picture's files."""
    content = path.read_bytes()
    return {
        "path": path.relative_to(data_dir).as_posix(),
        "thumb": thumb.relative_to(data_dir).as_posix() if thumb else "",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }


def _there(db: sa.Connection, parent: int | None) -> int | None:
    """The parent, unless it was deleted for good while its child waited."""
    if parent is None:
        return None
    return db.execute(sa.select(t.image.c.id).where(t.image.c.id == parent)).scalar()
