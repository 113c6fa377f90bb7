"""The tables of the history as they are declared today, and a connection to them.

Knows SQLAlchemy and SQLite, not what the rows are for. `migrations` builds the same tables step by step; a test
compares the two. Times are seconds since 1970, paths are relative to the data folder, an owner is any name.
"""

from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import INTEGER, REAL, TEXT, Column, ForeignKey, Index, Table

FILE = "history.sqlite"
metadata = sa.MetaData()


def _id() -> Column[int]:
    return Column("id", INTEGER, primary_key=True)


def _text(name: str, default: str | None = None) -> Column[Any]:
    return Column(name, TEXT, nullable=False, server_default=default)


def _number(name: str, default: str | None = None) -> Column[Any]:
    return Column(name, INTEGER, nullable=False, server_default=sa.text(default) if default else None)


def _recipe() -> list[Column[Any]]:
    """The fields of engine.types.Request: the plain ones as columns, the others as JSON in `rest`."""
    return [
        _text("prompt"),
        _text("model"),
        *map(_number, ("seed", "width", "height", "steps")),
        _text("rest", "{}"),
    ]


def _points_at(name: str, table: str, gone: str) -> Column[Any]:
    return Column(name, INTEGER, ForeignKey(f"{table}.id", ondelete=gone), nullable=gone == "SET NULL")


# AUTOINCREMENT everywhere: an id that a page still shows must never come back as another row.
project = Table(
    "project", metadata, _id(), _text("owner"), _text("name"),
    _text("prompt", ""), _text("controls", "{}"),
    Column("created_at", REAL, nullable=False), Column("used_at", REAL, nullable=False),
    Index("project_owner", "owner", "used_at"),
    sqlite_autoincrement=True,
)  # fmt: skip

revision = Table(
    "revision", metadata, _id(), _points_at("project", "project", "CASCADE"),
    _points_at("parent", "revision", "SET NULL"), _text("label"), _text("prompt"), _text("lang", ""),
    Column("created_at", REAL, nullable=False),
    Index("revision_project", "project"), Index("revision_parent", "parent"),
    sqlite_autoincrement=True,
)  # fmt: skip

job = Table(
    "job", metadata, _id(), _text("owner"), _points_at("project", "project", "CASCADE"),
    _points_at("revision", "revision", "CASCADE"), _text("batch"), _text("op"),
    Column("parent", INTEGER), *_recipe(), _text("state"), _number("step", "0"), _number("total", "0"),
    _text("error", ""), _number("tries", "0"), Column("place", REAL, nullable=False),
    Column("created_at", REAL, nullable=False), Column("started_at", REAL), Column("ended_at", REAL),
    Index("job_state", "state", "place"), Index("job_owner", "owner", "id"), Index("job_batch", "batch"),
    Index("job_project", "project"), Index("job_revision", "revision"),
    sqlite_autoincrement=True,
)  # fmt: skip

image = Table(
    "image", metadata, _id(), _text("owner"), _points_at("job", "job", "SET NULL"),
    _points_at("project", "project", "CASCADE"), _points_at("revision", "revision", "CASCADE"),
    _points_at("parent", "image", "SET NULL"), _text("op"), *_recipe(), _text("fingerprint"),
    _text("model_hash", ""), _text("backend"), _text("reason"), Column("seconds", REAL, nullable=False),
    _text("details", "{}"), _text("path"), _text("thumb", ""), _text("sha256"), _number("bytes"),
    _number("rating", "0"), Column("kept", INTEGER), _text("note", ""),
    Column("created_at", REAL, nullable=False), Column("deleted_at", REAL),
    Index("image_path", "path", unique=True), Index("image_job", "job"),
    Index("image_owner", "owner", "deleted_at", "id"), Index("image_project", "project", "deleted_at", "id"),
    Index("image_revision", "revision", "deleted_at", "id"), Index("image_parent", "parent"),
    Index("image_fingerprint", "fingerprint"), Index("image_pace", "model", "id"),
    sqlite_autoincrement=True,
)  # fmt: skip

tag = Table(
    "tag", metadata, Column("image", INTEGER, ForeignKey("image.id", ondelete="CASCADE"), primary_key=True),
    Column("name", TEXT, primary_key=True), Index("tag_name", "name"),
)  # fmt: skip

# Files whose rows are deleted for good and that are still to be unlinked: else a kill in between would bring them back.
gone = Table("gone", metadata, Column("path", TEXT, primary_key=True))

# The default tokenizer tears Hindi and Tamil words apart at every vowel sign: a search for नाला would find नीली.
SEARCH = (
    "CREATE VIRTUAL TABLE search USING fts5(prompt, tags, note, "
    "tokenize=\"unicode61 remove_diacritics 0 categories 'L* N* Co Mn Mc'\")"
)
search = sa.table("search", sa.column("rowid"), sa.column("prompt"), sa.column("tags"), sa.column("note"))


def connect(path: Path) -> sa.Engine:
    """An engine whose every connection keeps our promises: WAL, synced commits, foreign keys, real transactions."""
    engine = sa.create_engine(f"sqlite:///{path}", pool_size=8, max_overflow=-1)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # Python's own BEGIN leaves DDL outside the transaction
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            connection.execute(f"PRAGMA {setting}").close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A writer asks for its lock at once: one that starts as a reader can't wait for it later.
        writing = connection.get_execution_options().get("writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine
