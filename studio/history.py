"""The memory of the studio: projects, revisions of their prompts, jobs and images, in SQLite under the data folder.

    history = History(settings.data_dir)                     # locks the folder, updates the file; close() when done
    project = history.last_project(LOCAL)                    # the one used last, made if there is none
    history.save_draft(LOCAL, project.id, "two red", seed=7) # as it is typed; comes back as project.prompt, .controls
    history.revisions(LOCAL, project.id)                     # r1, r2, r2a ..; each has .prompt and .parent
    history.image(LOCAL, id), history.find(LOCAL, request)   # one picture; the picture of a recipe already made
    history.keep(LOCAL, [id], True | False | None)           # kept, rejected, undecided
    history.rate / tag / untag / note / delete / restore     # delete is into the bin, restore takes it back
    library.page(history, LOCAL, Filter(text="red", kept=True))      # search, filters, paging, stacks: studio.library
    lineage.tree(library.page(..).images)                    # the tree of pictures: studio.lineage
    disk.usage(history.data_dir), disk.purge(history, LOCAL, ids), disk.empty_bin(..), disk.delete_project(..)
    adopt.adopt(history, LOCAL, project.id, png)             # a picture from elsewhere, with the chain it carries

Everything takes the owner first and neither shows nor changes another owner's rows: on a Space that is what keeps
visitors apart, elsewhere it is rows.LOCAL. What is made, and when, is `jobs`. Everything may be called from any thread.
Raises BadRequest for an id that isn't there, EngineError (one sentence) where the disk is full.
"""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.types import BadRequest, Request
from studio import tables as t
from studio.rows import Image, Job, Project, Revision, as_json, clean, fingerprint, request_of, searchable
from studio.store import Store

SEPARATOR = "\x1f"  # between tags in one column; no tag contains it
MAX_TAG = 60

_TAGS = sa.select(sa.func.group_concat(t.tag.c.name, SEPARATOR)).where(t.tag.c.image == t.image.c.id).scalar_subquery()
IMAGES = sa.select(t.image, _TAGS.label("tags"))
JOBS = sa.select(t.job, t.image.c.id.label("image")).outerjoin(t.image, t.image.c.job == t.job.c.id)


class History:
    """An open history. One per data folder and process; a second process is refused with a sentence."""

    def __init__(self, data_dir: Path) -> None:
        self.store = Store(data_dir)
        self.data_dir = self.store.data_dir

    def close(self) -> None:
        """Finish what is being written and let another Niwaki have the folder."""
        self.store.close()

    # Projects

    def projects(self, owner: str) -> tuple[Project, ...]:
        """All projects, the one used last first."""
        query = sa.select(t.project).where(t.project.c.owner == owner).order_by(t.project.c.used_at.desc())
        return self.store.read(lambda db: tuple(_project(row) for row in db.execute(query).mappings()))

    def project(self, owner: str, id: int) -> Project:
        return self.store.read(lambda db: _project(_one(db, t.project, owner, id, "project")))

    def last_project(self, owner: str) -> Project:
        """The project used last; a first one where there is none."""
        return next(iter(self.projects(owner)), None) or self.new_project(owner, "My first project")

    def new_project(self, owner: str, name: str) -> Project:
        """Raises BadRequest for an empty name."""
        values = {"owner": owner, "name": _name(name), "created_at": time.time(), "used_at": time.time()}
        (id,) = self.store.write(lambda db: _inserted(db, t.project, values))
        return self.project(owner, id)

    def rename_project(self, owner: str, id: int, name: str) -> None:
        self._update(t.project, owner, [id], name=_name(name))

    def save_draft(self, owner: str, id: int, prompt: str, **controls: Any) -> None:
        """Remember the prompt as it is typed, and the page's other values; makes this the project used last."""
        self._update(
            t.project, owner, [id], prompt=clean(prompt), controls=as_json(controls), used_at=time.time()
        )  # fmt: skip

    # Revisions

    def revisions(self, owner: str, project: int) -> tuple[Revision, ...]:
        """All wordings of a project's prompt, oldest first."""
        query = sa.select(t.revision).join(t.project).where(t.project.c.owner == owner, t.project.c.id == project)
        ordered = query.order_by(t.revision.c.id)
        return self.store.read(lambda db: tuple(Revision(**row) for row in db.execute(ordered).mappings()))

    def revision(self, owner: str, id: int) -> Revision:
        query = sa.select(t.revision).join(t.project).where(t.project.c.owner == owner, t.revision.c.id == id)
        row = self.store.read(lambda db: db.execute(query).mappings().first())
        if row is None:
            raise _missing("revision", id)
        return Revision(**row)

    # Images

    def image(self, owner: str, id: int) -> Image:
        """One picture, in the bin or not."""
        found = self.images(owner, [id])
        if not found:
            raise _missing("picture", id)
        return found[0]

    def images(self, owner: str, ids: Iterable[int]) -> tuple[Image, ...]:
        """These pictures in the order of the ids; those that are gone are left out."""
        wanted = list(dict.fromkeys(ids))
        rows = self.select(IMAGES.where(t.image.c.owner == owner, t.image.c.id.in_(wanted)))
        found = {image.id: image for image in rows}
        return tuple(found[id] for id in wanted if id in found)

    def find(self, owner: str, request: Request) -> Image | None:
        """The newest picture already made by this complete recipe, not counting the bin."""
        same = (t.image.c.fingerprint == fingerprint(request), t.image.c.owner == owner, t.image.c.deleted_at.is_(None))
        found = self.select(IMAGES.where(*same).order_by(t.image.c.id.desc()).limit(1))
        return found[0] if found else None

    def select(self, query: sa.Select[Any]) -> tuple[Image, ...]:
        """Run a query built on IMAGES."""
        return self.store.read(lambda db: tuple(_image(row, self.data_dir) for row in db.execute(query).mappings()))

    def keep(self, owner: str, ids: Sequence[int], kept: bool | None) -> None:
        """Keep (True), reject (False) or make undecided again (None)."""
        self._update(t.image, owner, ids, kept=None if kept is None else int(kept))

    def rate(self, owner: str, ids: Sequence[int], rating: int) -> None:
        """0 takes the rating away. Raises BadRequest beyond 5."""
        if not 0 <= rating <= 5:
            raise BadRequest(f"rating {rating} is out of range: give 0 to 5")
        self._update(t.image, owner, ids, rating=rating)

    def delete(self, owner: str, ids: Sequence[int]) -> None:
        """Into the bin, where it stays for 30 days."""
        self._update(t.image, owner, ids, deleted_at=time.time())

    def restore(self, owner: str, ids: Sequence[int]) -> None:
        """Out of the bin again."""
        self._update(t.image, owner, ids, deleted_at=None)

    def note(self, owner: str, id: int, note: str) -> None:
        """A free text beside the picture; the search finds it."""

        def change(db: sa.Connection) -> None:
            _update(db, t.image, owner, [id], note=clean(note))
            index(db, [id])

        self.store.write(change)

    def tag(self, owner: str, ids: Sequence[int], name: str) -> None:
        """Give pictures a tag. Raises BadRequest for an empty or overlong one."""
        name = " ".join(clean(name).replace(SEPARATOR, " ").split())
        if not 1 <= len(name) <= MAX_TAG:
            raise BadRequest(f"a tag has 1 to {MAX_TAG} characters, this one {len(name)}: choose another")

        def change(db: sa.Connection) -> None:
            _owned(db, t.image, owner, ids)
            db.execute(t.tag.insert().prefix_with("OR IGNORE"), [{"image": id, "name": name} for id in ids])
            index(db, ids)

        if ids:
            self.store.write(change)

    def untag(self, owner: str, ids: Sequence[int], name: str) -> None:
        """Take a tag away; nothing happens where it wasn't."""

        def change(db: sa.Connection) -> None:
            _owned(db, t.image, owner, ids)
            db.execute(t.tag.delete().where(t.tag.c.image.in_(ids), t.tag.c.name == name))
            index(db, ids)

        self.store.write(change)

    # Jobs, as they are in the file: `jobs` knows how far a running one is

    def job(self, owner: str, id: int) -> Job:
        found = self.jobs(owner, t.job.c.id == id)
        if not found:
            raise _missing("job", id)
        return found[0]

    def jobs(self, owner: str, *where: sa.ColumnElement[bool], limit: int = 200) -> tuple[Job, ...]:
        """The newest jobs that fulfil every condition, in the order in which they run or ran."""
        newest = JOBS.where(t.job.c.owner == owner, *where).order_by(t.job.c.place.desc(), t.job.c.id.desc())
        rows = self.store.read(lambda db: db.execute(newest.limit(limit)).mappings().all())
        return tuple(job_of(row) for row in reversed(rows))

    def _update(self, table: sa.Table, owner: str, ids: Sequence[int], **values: Any) -> None:
        self.store.write(lambda db: _update(db, table, owner, ids, **values))


def revise(db: sa.Connection, project: int, prompt: str, base: int | None = None) -> int:
    """The revision of this wording: the one that has it already, else a new one that follows `base` (None: the last).

    The label says where it branched: r3 follows r2 unless something does already; then it is r2a, r2b ..
    What follows r2a is r2a2, r2a3 ..; what branches off there r2a2a.
    """
    c, prompt = t.revision.c, prompt.strip()
    of_project = sa.select(c.id, c.label).where(c.project == project)
    known = db.execute(of_project.where(c.prompt == prompt).order_by(c.id).limit(1)).first()
    if known is not None:
        return int(known.id)
    parent = db.execute(of_project.where(c.id == base)).first() if base is not None else None
    parent = parent or db.execute(of_project.order_by(c.id.desc()).limit(1)).first()

    values = {
        "project": project,
        "parent": parent.id if parent else None,
        "label": _label(parent.label, {row.label for row in db.execute(of_project)}) if parent else "r1",
        "prompt": prompt,
        "lang": "",
        "created_at": time.time(),
    }
    (id,) = _inserted(db, t.revision, values)
    return id


def last_revision(db: sa.Connection, project: int) -> int | None:
    """The newest wording, None in an empty project."""
    return db.execute(sa.select(sa.func.max(t.revision.c.id)).where(t.revision.c.project == project)).scalar()


def _label(parent: str, taken: set[str]) -> str:
    """r2 after r1; r2a where r3 is taken; r2a2 after r2a."""
    if parent[-1].isdigit():
        line = parent.rstrip("0123456789")
        follows = f"{line}{int(parent[len(line) :]) + 1}"
    else:
        follows = f"{parent}2"
    if follows not in taken:
        return follows
    number = 1
    while (branch := parent + _letters(number)) in taken:
        number += 1
    return branch


def _letters(number: int) -> str:
    """a .. z, then za .. zz, zza ..: still in order, never a digit."""
    return "z" * ((number - 1) // 26) + chr(ord("a") + (number - 1) % 26)


def index(db: sa.Connection, ids: Sequence[int]) -> None:
    """Bring the search up to date with these images' prompts, tags and notes."""
    db.execute(t.search.delete().where(t.search.c.rowid.in_(ids)))
    rows = db.execute(sa.select(t.image.c.id, t.image.c.prompt, t.image.c.note, _TAGS.label("tags")).where(
        t.image.c.id.in_(ids)
    )).mappings()  # fmt: skip
    for row in rows:
        texts = {"prompt": row["prompt"], "tags": (row["tags"] or "").replace(SEPARATOR, " . "), "note": row["note"]}
        db.execute(t.search.insert().values(rowid=row["id"], **{k: searchable(v) for k, v in texts.items()}))


def job_of(row: Any) -> Job:
    """A row of JOBS."""
    names = set(Job.__dataclass_fields__) & set(row)
    return Job(**{name: row[name] for name in names}, request=request_of(row))


def _image(row: Any, data_dir: Path) -> Image:
    values = {name: row[name] for name in set(Image.__dataclass_fields__) & set(row)}
    return Image(**values | {
        "request": request_of(row),
        "details": json.loads(row["details"]),
        "path": data_dir / row["path"],
        "thumb": data_dir / row["thumb"] if row["thumb"] else None,
        "kept": None if row["kept"] is None else bool(row["kept"]),
        "tags": tuple(sorted(row["tags"].split(SEPARATOR))) if row["tags"] else (),
    })  # fmt: skip


def _project(row: Any) -> Project:
    return Project(**{**row, "controls": json.loads(row["controls"])})


def _update(db: sa.Connection, table: sa.Table, owner: str, ids: Sequence[int], **values: Any) -> None:
    _owned(db, table, owner, ids)
    db.execute(table.update().where(table.c.id.in_(ids)).values(**values))


def _owned(db: sa.Connection, table: sa.Table, owner: str, ids: Sequence[int]) -> None:
    """Raise BadRequest unless every id is there and this owner's."""
    there = set(db.execute(sa.select(table.c.id).where(table.c.id.in_(ids), table.c.owner == owner)).scalars())
    if strange := set(ids) - there:
        raise _missing("picture" if table is t.image else table.name, min(strange))


def _one(db: sa.Connection, table: sa.Table, owner: str, id: int, what: str) -> Any:
    row = db.execute(sa.select(table).where(table.c.id == id, table.c.owner == owner)).mappings().first()
    if row is None:
        raise _missing(what, id)
    return row


def _inserted(db: sa.Connection, table: sa.Table, values: Any) -> tuple[int, ...]:
    return tuple(map(int, db.execute(table.insert().values(**values)).inserted_primary_key))  # type: ignore[arg-type]


def _missing(what: str, id: int) -> BadRequest:
    return BadRequest(f"{what} {id} is not here: it was deleted for good, or it belongs to somebody else")


def _name(name: str) -> str:
    name = " ".join(clean(name).split())[:200]
    if not name:
        raise BadRequest("the project has no name: give it one")
    return name
