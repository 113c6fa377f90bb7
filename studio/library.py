"""Finding pictures again: search, filters, pages, stacks by revision, tags.

Knows queries, not the page. Pages are read from the newest on by id, so the thousandth page is as quick as the first.
"""

import unicodedata
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from studio import tables as t
from studio.diff import words
from studio.history import IMAGES, History
from studio.rows import Image, searchable

PAGE = 60


@dataclass(frozen=True, slots=True)
class Filter:
    """Which pictures: every field that isn't None narrows. `deleted` True looks into the bin instead.

    `decided` False: neither kept nor rejected yet. `text` is searched in prompts, tags and notes, the last word may
    be half typed.
    """

    project: int | None = None
    revision: int | None = None
    kept: bool | None = None
    decided: bool | None = None
    min_rating: int | None = None
    tag: str | None = None
    model: str | None = None
    op: str | None = None
    text: str | None = None
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """Some pictures, newest first; `next` is what to pass as `before` for the following page, None on the last."""

    images: tuple[Image, ...]
    next: int | None


@dataclass(frozen=True, slots=True)
class Stack:
    """The pictures of one revision: how many, how many kept, and the one to show (the newest kept, else the newest)."""

    revision: int
    count: int
    kept: int
    cover: Image


def page(
    history: History, owner: str, wanted: Filter | None = None, before: int | None = None, limit: int = PAGE
) -> Page:
    """One page of the pictures that fulfil the filter."""
    query = IMAGES.where(*_where(owner, wanted or Filter())).order_by(t.image.c.id.desc()).limit(limit + 1)
    if before is not None:
        query = query.where(t.image.c.id < before)
    found = history.select(query)
    return Page(found[:limit], found[limit - 1].id if len(found) > limit else None)


def count(history: History, owner: str, wanted: Filter | None = None) -> int:
    """How many pictures fulfil the filter."""
    query = sa.select(sa.func.count()).select_from(t.image).where(*_where(owner, wanted or Filter()))
    return int(history.store.read(lambda db: db.execute(query).scalar_one()))


def stacks(history: History, owner: str, wanted: Filter | None = None) -> tuple[Stack, ...]:
    """The same pictures by revision, the revision with the newest picture first."""
    newest_kept = sa.func.max(sa.case((t.image.c.kept == 1, t.image.c.id)))
    newest = sa.func.max(t.image.c.id)
    query = (
        sa.select(
            t.image.c.revision,
            sa.func.count().label("count"),
            sa.func.count(sa.case((t.image.c.kept == 1, 1))).label("kept"),
            sa.func.coalesce(newest_kept, newest).label("cover"),
        )
        .where(*_where(owner, wanted or Filter()))
        .group_by(t.image.c.revision)
        .order_by(newest.desc())
    )
    rows = history.store.read(lambda db: db.execute(query).mappings().all())
    covers = {image.id: image for image in history.images(owner, [row["cover"] for row in rows])}
    shown = [row for row in rows if row["cover"] in covers]
    return tuple(Stack(row["revision"], row["count"], row["kept"], covers[row["cover"]]) for row in shown)


def tags(history: History, owner: str) -> tuple[tuple[str, int], ...]:
    """(tag, how many pictures have it), in alphabetical order."""
    query = (
        sa.select(t.tag.c.name, sa.func.count())
        .join(t.image, t.image.c.id == t.tag.c.image)
        .where(t.image.c.owner == owner, t.image.c.deleted_at.is_(None))
        .group_by(t.tag.c.name)
        .order_by(t.tag.c.name)
    )
    return history.store.read(lambda db: tuple((str(name), int(number)) for name, number in db.execute(query)))


def _where(owner: str, wanted: Filter) -> list[Any]:
    c = t.image.c
    conditions: list[Any] = [c.owner == owner, c.deleted_at.is_not(None) if wanted.deleted else c.deleted_at.is_(None)]
    for name in ("project", "revision", "model", "op"):
        if (value := getattr(wanted, name)) is not None:
            conditions.append(c[name] == value)
    if wanted.kept is not None:
        conditions.append(c.kept == int(wanted.kept))
    if wanted.decided is not None:
        conditions.append(c.kept.is_not(None) if wanted.decided else c.kept.is_(None))
    if wanted.min_rating is not None:
        conditions.append(c.rating >= wanted.min_rating)
    if wanted.tag is not None:
        conditions.append(c.id.in_(sa.select(t.tag.c.image).where(t.tag.c.name == wanted.tag)))
    if wanted.text and wanted.text.strip():
        conditions.append(_matches(searchable(wanted.text)))
    return conditions


def _matches(text: str) -> Any:
    """The phrase as typed, its last word as a beginning; what has no words (an emoji, a dash) letter by letter."""
    if not any(unicodedata.category(char)[0] in "LN" for char in text):
        return t.image.c.prompt.contains(text.strip(), autoescape=True)
    ends_open = not text[-1].isspace()
    phrase = '"' + " ".join(words(text)).replace('"', '""') + '"' + ("*" if ends_open else "")
    found = sa.select(t.search.c.rowid).where(sa.text("search MATCH :phrase").bindparams(phrase=phrase))
    return t.image.c.id.in_(found)
