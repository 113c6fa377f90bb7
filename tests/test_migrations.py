"""Every earlier history becomes today's, with a copy from before; a later one is refused untouched."""

import hashlib
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from engine.types import BadRequest
from studio import migrations, tables
from studio.migrations import MIGRATIONS, migrate, version
from studio.tables import FILE, SEARCH

ROWS = (
    "INSERT INTO project (id, owner, name, created_at, used_at) VALUES (1, 'local', 'p', 1, 1)",
    "INSERT INTO revision (id, project, label, prompt, created_at) VALUES (1, 1, 'r1', 'a circle', 1)",
    "INSERT INTO image (id, owner, project, revision, op, prompt, model, seed, width, height, steps, fingerprint, "
    "backend, reason, seconds, path, sha256, bytes, created_at) VALUES "
    "(1, 'local', 1, 1, 'make', 'a circle', 'm', 1, 2, 3, 4, 'f', 'fake', '', 0, 'pictures/a.png', '', 1, 1)",
    "INSERT INTO tag VALUES (1, 'red')",
)


def shape(db: sqlite3.Connection) -> dict[str, Any]:
    """Columns, indexes and foreign keys of every table, as SQLite itself tells them; the text of virtual tables."""
    found: dict[str, Any] = {}
    query = "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'search_%' ORDER BY name"
    for name, sql in db.execute(query).fetchall():
        if sql.startswith("CREATE VIRTUAL"):
            found[name] = re.sub(r"\s+", " ", sql)
        elif not name.startswith("sqlite_"):
            indexes = db.execute(f"PRAGMA index_list({name})").fetchall()
            found[name] = {
                "columns": [row[1:] for row in db.execute(f"PRAGMA table_xinfo({name})")],
                "indexes": {
                    (row[1], row[2], tuple(c[2] for c in db.execute(f"PRAGMA index_info({row[1]})"))) for row in indexes
                },
                "keys": {row[2:] for row in db.execute(f"PRAGMA foreign_key_list({name})")},
                "counts": "AUTOINCREMENT" in sql,
            }
    return found


def declared() -> dict[str, Any]:
    engine = sa.create_engine("sqlite://")
    with engine.connect() as connection:
        tables.metadata.create_all(connection)
        connection.exec_driver_sql(SEARCH)
        return shape(connection.connection.dbapi_connection)


def test_the_migrated_schema_is_the_declared_one(tmp_path: Path) -> None:
    assert migrate(tmp_path / FILE, tmp_path / "backups") == 0
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        assert shape(db) == declared()
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert version(tmp_path / FILE) == len(MIGRATIONS)
    assert not (tmp_path / "backups").exists()  # there was nothing to lose


@pytest.mark.parametrize("start", range(1, len(MIGRATIONS) + 1))
def test_every_earlier_version_arrives_with_its_rows(start: int, tmp_path: Path) -> None:
    migrate(tmp_path / FILE, tmp_path / "backups", MIGRATIONS[:start])
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        for statement in ROWS:
            db.execute(statement)
        db.commit()
    assert migrate(tmp_path / FILE, tmp_path / "backups") == start
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        assert shape(db) == declared()
        assert db.execute("SELECT prompt, name FROM image JOIN tag ON tag.image = image.id").fetchall() == [
            ("a circle", "red")
        ]
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def colour(db: sqlite3.Connection) -> None:
    db.execute("ALTER TABLE project ADD COLUMN colour TEXT NOT NULL DEFAULT 'green'")


def broken(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE half (id INTEGER)")
    raise sqlite3.OperationalError("database or disk is full")


def test_a_migration_is_backed_up_before_and_done_once(tmp_path: Path) -> None:
    file, backups = tmp_path / FILE, tmp_path / "backups"
    migrate(file, backups)
    with closing(sqlite3.connect(file)) as db:
        db.execute(ROWS[0])
        db.commit()
    later = (*MIGRATIONS, colour)
    assert migrate(file, backups, later) == len(MIGRATIONS)
    assert migrate(file, backups, later) == len(later)
    (copy,) = backups.iterdir()
    assert version(copy) == len(MIGRATIONS)
    with closing(sqlite3.connect(copy)) as before, closing(sqlite3.connect(file)) as after:
        assert before.execute("SELECT name FROM project").fetchall() == [("p",)]
        assert after.execute("SELECT colour FROM project").fetchall() == [("green",)]


def test_a_migration_that_fails_leaves_the_version_before(tmp_path: Path) -> None:
    migrate(tmp_path / FILE, tmp_path / "backups")
    with pytest.raises(BadRequest, match="disk is full"):
        migrate(tmp_path / FILE, tmp_path / "backups", (*MIGRATIONS, broken))
    assert version(tmp_path / FILE) == len(MIGRATIONS)
    with closing(sqlite3.connect(tmp_path / FILE)) as db:
        assert shape(db) == declared()


def test_only_the_newest_copies_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = iter(f"2026010{n}-000000" for n in range(9))
    monkeypatch.setattr(migrations.time, "strftime", lambda _: next(names))
    migrate(tmp_path / FILE, tmp_path / "backups")

    def nothing(db: sqlite3.Connection) -> None:
        """Stands for any step."""

    migrate(tmp_path / FILE, tmp_path / "backups", (*MIGRATIONS, *[nothing] * 5))
    assert len(list((tmp_path / "backups").iterdir())) == migrations.BACKUPS_KEPT


def test_a_later_history_is_refused_and_not_touched(tmp_path: Path) -> None:
    migrate(tmp_path / FILE, tmp_path / "backups", (*MIGRATIONS, colour))
    before = hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest()
    shutil.rmtree(tmp_path / "backups")
    with pytest.raises(BadRequest, match=r"later Niwaki \(version 2, known here 1\).*--data"):
        migrate(tmp_path / FILE, tmp_path / "backups")
    assert hashlib.sha256((tmp_path / FILE).read_bytes()).hexdigest() == before
    assert not (tmp_path / "backups").exists()


def test_a_file_that_is_no_history_is_refused_and_not_touched(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"my diary, not yours " * 100)
    with pytest.raises(BadRequest, match="is no history"):
        migrate(tmp_path / FILE, tmp_path / "backups")
    assert (tmp_path / FILE).read_bytes() == b"my diary, not yours " * 100
