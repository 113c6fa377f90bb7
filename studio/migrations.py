"""How a history gets from any earlier version to today's: numbered functions, applied once each, never edited again.

Before each step of an existing history a copy is laid into `backups`. A history written by a later Niwaki is refused
before anything is touched. `tables` says what must come out; a test compares the two.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from engine.types import BadRequest

log = logging.getLogger(__name__)

BACKUPS_KEPT = 3
Migration = Callable[[sqlite3.Connection], None]


def first(db: sqlite3.Connection) -> None:
    """Projects, revisions, jobs, images, tags and the search over them."""
    recipe = (
        "prompt TEXT NOT NULL, model TEXT NOT NULL, seed INTEGER NOT NULL, width INTEGER NOT NULL, "
        "height INTEGER NOT NULL, steps INTEGER NOT NULL, rest TEXT NOT NULL DEFAULT '{}'"
    )
    for statement in (
        "CREATE TABLE project (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, owner TEXT NOT NULL, name TEXT NOT NULL, "
        "prompt TEXT NOT NULL DEFAULT '', controls TEXT NOT NULL DEFAULT '{}', created_at REAL NOT NULL, "
        "used_at REAL NOT NULL)",
        "CREATE INDEX project_owner ON project (owner, used_at)",
        "CREATE TABLE revision (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, "
        "project INTEGER NOT NULL REFERENCES project (id) ON DELETE CASCADE, "
        "parent INTEGER REFERENCES revision (id) ON DELETE SET NULL, label TEXT NOT NULL, prompt TEXT NOT NULL, "
        "lang TEXT NOT NULL DEFAULT '', created_at REAL NOT NULL)",
        "CREATE INDEX revision_project ON revision (project)",
        "CREATE INDEX revision_parent ON revision (parent)",
        "CREATE TABLE job (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, owner TEXT NOT NULL, "
        "project INTEGER NOT NULL REFERENCES project (id) ON DELETE CASCADE, "
        "revision INTEGER NOT NULL REFERENCES revision (id) ON DELETE CASCADE, batch TEXT NOT NULL, op TEXT NOT NULL, "
        f"parent INTEGER, {recipe}, state TEXT NOT NULL, step INTEGER NOT NULL DEFAULT 0, "
        "total INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '', tries INTEGER NOT NULL DEFAULT 0, "
        "place REAL NOT NULL, created_at REAL NOT NULL, started_at REAL, ended_at REAL)",
        "CREATE INDEX job_state ON job (state, place)",
        "CREATE INDEX job_owner ON job (owner, id)",
        "CREATE INDEX job_batch ON job (batch)",
        "CREATE INDEX job_project ON job (project)",
        "CREATE INDEX job_revision ON job (revision)",
        "CREATE TABLE image (id INTEGER PRIMARY KEY AUTOINCREMENT NOT NULL, owner TEXT NOT NULL, "
        "job INTEGER REFERENCES job (id) ON DELETE SET NULL, "
        "project INTEGER NOT NULL REFERENCES project (id) ON DELETE CASCADE, "
        "revision INTEGER NOT NULL REFERENCES revision (id) ON DELETE CASCADE, "
        f"parent INTEGER REFERENCES image (id) ON DELETE SET NULL, op TEXT NOT NULL, {recipe}, "
        "fingerprint TEXT NOT NULL, model_hash TEXT NOT NULL DEFAULT '', backend TEXT NOT NULL, reason TEXT NOT NULL, "
        "seconds REAL NOT NULL, details TEXT NOT NULL DEFAULT '{}', path TEXT NOT NULL, "
        "thumb TEXT NOT NULL DEFAULT '', sha256 TEXT NOT NULL, bytes INTEGER NOT NULL, "
        "rating INTEGER NOT NULL DEFAULT 0, kept INTEGER, note TEXT NOT NULL DEFAULT '', created_at REAL NOT NULL, "
        "deleted_at REAL)",
        "CREATE UNIQUE INDEX image_path ON image (path)",
        "CREATE INDEX image_job ON image (job)",
        "CREATE INDEX image_owner ON image (owner, deleted_at, id)",
        "CREATE INDEX image_project ON image (project, deleted_at, id)",
        "CREATE INDEX image_revision ON image (revision, deleted_at, id)",
        "CREATE INDEX image_parent ON image (parent)",
        "CREATE INDEX image_fingerprint ON image (fingerprint)",
        "CREATE INDEX image_pace ON image (model, id)",
        "CREATE TABLE tag (image INTEGER NOT NULL REFERENCES image (id) ON DELETE CASCADE, name TEXT NOT NULL, "
        "PRIMARY KEY (image, name))",
        "CREATE INDEX tag_name ON tag (name)",
        "CREATE TABLE gone (path TEXT PRIMARY KEY NOT NULL)",
        "CREATE VIRTUAL TABLE search USING fts5(prompt, tags, note, "
        "tokenize=\"unicode61 remove_diacritics 0 categories 'L* N* Co Mn Mc'\")",
    ):
        db.execute(statement)


MIGRATIONS: tuple[Migration, ...] = (first,)


def migrate(path: Path, backups: Path, steps: Sequence[Migration] = MIGRATIONS) -> int:
    """Bring the history at `path` to version len(steps), from nothing if need be; returns the version it had.

    Raises BadRequest for a history of a later version, for a file that is no history, and for a full disk.
    """
    found = version(path)
    if found > len(steps):
        raise BadRequest(
            f"the history in {path.parent} was written by a later Niwaki (version {found}, known here {len(steps)}): "
            "update Niwaki, or choose another data folder with --data"
        )
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            for number in range(found + 1, len(steps) + 1):
                if number > 1:
                    _back_up(db, backups / f"{path.stem}-{number - 1}-{time.strftime('%Y%m%d-%H%M%S')}{path.suffix}")
                _apply(db, number, steps[number - 1])
    except (sqlite3.Error, OSError) as error:
        raise BadRequest(
            f"the history {path} can't be opened or updated ({error}): free some space, or choose another data folder "
            f"with --data; copies from before an update lie in {backups}"
        ) from error
    return found


def version(path: Path) -> int:
    """The version of the history at `path`, 0 where there is none. Changes nothing on the disk."""
    if not path.is_file() or not path.stat().st_size:
        return 0
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            (number,) = db.execute("PRAGMA user_version").fetchone()
            return int(number)
    except sqlite3.Error as error:
        way_out = "move it away, or choose another folder with --data"
        raise BadRequest(f"{path} is no history ({error}): {way_out}") from None


def _apply(db: sqlite3.Connection, number: int, step: Migration) -> None:
    """One step and its number in one transaction: a kill in between leaves the version before."""
    db.execute("BEGIN IMMEDIATE")
    try:
        step(db)
        db.execute(f"PRAGMA user_version = {number}")
        db.execute("COMMIT")
    except BaseException:
        db.execute("ROLLBACK")
        raise
    log.info("the history is now of version %d", number)


def _back_up(db: sqlite3.Connection, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(copy)) as target:
        db.backup(target)
    for old in sorted(copy.parent.glob(f"*{copy.suffix}"), key=lambda file: file.stat().st_mtime)[:-BACKUPS_KEPT]:
        old.unlink()
