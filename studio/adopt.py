"""Pictures without a row get one, from the recipe inside them.

Knows recipes and rows. At the start: what a kill left between renaming a picture and committing its row, and the
pictures from before there was a history. On the page: a picture from elsewhere, with the chain it carries.
"""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.types import BadRequest
from studio import modelfiles, pictures
from studio import tables as t
from studio.history import IMAGES, History, index, revise
from studio.lineage import chain, past
from studio.recipe import Link, Recipe
from studio.rows import DONE, INTERRUPTED, LOCAL, Image, as_json, columns, fingerprint
from studio.saving import files, make_thumb

log = logging.getLogger(__name__)

EARLIER = "Earlier pictures"  # the project of those that are no job's
DETAILS = ("seconds", "peak_memory_bytes", "unknown_words", "ancestors", "dtype")  # what of a recipe has no column


def lost(history: History) -> list[Path]:
    """The pictures in the folder that have no row, oldest first; half-written files are removed.

    To be called before anything is made: a picture that is being written would be taken for a lost one.
    """
    folder = history.data_dir / "pictures"
    for half in (*folder.rglob(".*.part"), *(history.data_dir / "thumbs").rglob(".*.part")):
        half.unlink(missing_ok=True)
    known = set(history.store.read(lambda db: list(db.execute(sa.select(t.image.c.path)).scalars())))
    return [p for p in sorted(folder.rglob("*.png")) if p.relative_to(history.data_dir).as_posix() not in known]


def take_in(history: History, path: Path) -> bool:
    """Give a lost picture its row; False for somebody else's picture, which is left alone.

    The job that made it, if a kill interrupted it, is done; otherwise it goes to the project of earlier pictures.
    """
    try:
        recipe, values = pictures.reopen(path), pictures.read_recipe(path)
    except BadRequest as error:
        log.info("left alone: %s", error)
        return False
    thumb = make_thumb(path, history.data_dir)
    same = [t.job.c[name] == value for name, value in columns(recipe.request).items()]
    without = ~sa.exists().where(t.image.c.job == t.job.c.id)
    interrupted = sa.select(t.job).where(t.job.c.state == INTERRUPTED, *same, without).order_by(t.job.c.id.desc())

    def insert(db: sa.Connection) -> None:
        job = db.execute(interrupted).mappings().first()
        if job is None:
            project = _earlier(db)
            where = {"owner": LOCAL, "project": project, "revision": revise(db, project, recipe.request.prompt)}
        else:
            where = {name: job[name] for name in ("owner", "project", "revision")} | {"job": job["id"]}
            done = {"state": DONE, "error": "", "step": job["total"]}
            db.execute(t.job.update().where(t.job.c.id == job["id"]).values(**done))
        _insert(db, recipe, values, where | files(path, thumb, history.data_dir), path.stat().st_mtime)

    history.store.write(insert)
    return True


def adopt(history: History, owner: str, project: int, file: Path, name: str = "") -> Image:
    """Take a picture of ours from anywhere into a project: its copy, its wordings from first to last, its row.

    Returns the picture that is here already if the owner has this very file; `name` is what sentences call it. Raises
    BadRequest for a picture without a recipe.
    """
    recipe, values = pictures.reopen(file, name), pictures.read_recipe(file, name)
    history.project(owner, project)
    if here := _same_file(history, owner, file):
        return here
    now = datetime.now()
    target = history.data_dir / "pictures" / f"{now:%Y-%m-%d}" / f"{now:%H%M%S.%f}-{recipe.request.seed}.png"
    _copy(file, target)
    thumb = make_thumb(target, history.data_dir)

    def insert(db: sa.Connection) -> int:
        base = None
        for link in recipe.origin.ancestors:
            base = revise(db, project, link.request.prompt, base)
        revision = revise(db, project, recipe.request.prompt, base)
        where = {"owner": owner, "project": project, "revision": revision}
        return _insert(db, recipe, values, where | files(target, thumb, history.data_dir), time.time())

    return history.image(owner, history.store.write(insert))


def missing(history: History, image: Image) -> tuple[Link, ...]:
    """The ancestors that a picture from elsewhere names and that are not here, the first one first."""
    return tuple(link for link in past(image) if history.find(image.owner, link.request) is None)


def relink(history: History, image: Image) -> None:
    """Hang a picture from elsewhere under its nearest ancestor that is here by now, and those under one another."""
    here = [found for link in past(image) if (found := history.find(image.owner, link.request))]
    for parent, child in pairwise([*here, image]):
        if child.parent is not None and child.id != image.id:
            continue  # made here: it knows where it comes from
        if child.id not in {above.id for above in chain(history, image.owner, parent.id)}:
            change = t.image.update().where(t.image.c.id == child.id).values(parent=parent.id)
            history.store.write(partial(sa.Connection.execute, statement=change))


def _insert(
    db: sa.Connection, recipe: Recipe, values: Mapping[str, Any], where: dict[str, Any], created_at: float
) -> int:  # fmt: skip
    made = {
        "parent": _parent(db, where["owner"], recipe),
        "op": recipe.origin.op,
        "fingerprint": fingerprint(recipe.request),
        "model_hash": modelfiles.combined(recipe.origin.model_files),
        "backend": recipe.backend,
        "reason": recipe.reason,
        "seconds": recipe.seconds,
        "details": as_json({name: values[name] for name in DETAILS if name in values}),
        "created_at": created_at,
    }
    inserted = db.execute(t.image.insert().values(**columns(recipe.request), **made, **where))
    id = int(inserted.inserted_primary_key[0])  # type: ignore[index]
    index(db, [id])
    return id


def _parent(db: sa.Connection, owner: str, recipe: Recipe) -> int | None:
    """The nearest ancestor that is here."""
    for link in reversed(recipe.origin.ancestors):
        same = (t.image.c.owner == owner, t.image.c.fingerprint == fingerprint(link.request))
        if (found := db.execute(sa.select(sa.func.max(t.image.c.id)).where(*same)).scalar()) is not None:
            return int(found)
    return None


def _copy(file: Path, target: Path) -> None:
    """Aside and renamed, like every picture of ours."""
    aside = target.with_name(f".{target.stem}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb") as source, open(aside, "xb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())
        os.replace(aside, target)
    except OSError as error:
        raise BadRequest(f"cannot copy {file.name} to {target} ({error.strerror or error}): free some space") from error
    finally:
        aside.unlink(missing_ok=True)


def _same_file(history: History, owner: str, file: Path) -> Image | None:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    query = IMAGES.where(t.image.c.owner == owner, t.image.c.sha256 == digest).limit(1)
    found = history.select(query)
    return found[0] if found else None


def _earlier(db: sa.Connection) -> int:
    mine = sa.select(t.project.c.id).where(t.project.c.owner == LOCAL, t.project.c.name == EARLIER)
    if (found := db.execute(mine).scalar()) is not None:
        return int(found)
    values = {"owner": LOCAL, "name": EARLIER, "created_at": time.time(), "used_at": 0.0}  # never the one used last
    return int(db.execute(t.project.insert().values(**values)).inserted_primary_key[0])  # type: ignore[index]
