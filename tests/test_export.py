"""Kept pictures leave as a zip that needs nothing of ours."""

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.types import BadRequest
from studio import export
from studio.history import History
from studio.rows import LOCAL, Image
from tests.rows import add_image

HINDI = 'नीला, "two"\n<b>red</b>'


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    opened = History(tmp_path / "data")
    yield opened
    opened.close()


def test_a_zip_holds_the_pictures_their_recipes_and_the_licences(history: History, tmp_path: Path) -> None:
    first = add_image(history, HINDI, seed=7)
    formula = add_image(history, "=HYPERLINK(1)", seed=8)
    add_image(history, "not kept", seed=9)
    history.keep(LOCAL, [first.id, formula.id], True)
    history.tag(LOCAL, [first.id], "poster")
    kept = export.kept(history, LOCAL)
    assert [image.id for image in kept] == [first.id, formula.id]
    path = export.write(history, kept, tmp_path / "cache")
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert archive.read("001-r1-7.png") == first.path.read_bytes()
        rows = list(csv.DictReader(io.StringIO(archive.read("pictures.csv").decode("utf-8-sig"), newline="")))
    assert [row["prompt"] for row in rows] == [HINDI, "'=HYPERLINK(1)"]
    assert rows[0]["file"] == "001-r1-7.png" and rows[0]["tags"] == "poster" and rows[0]["sha256"] == first.sha256
    assert tuple(rows[0]) == export.COLUMNS
    assert {"licences/seedling-ternary/LICENSE", "licences/seedling-ternary/NOTICE"} <= set(names)
    assert not list(tmp_path.rglob("*.part"))


def test_one_project_only_and_never_a_stranger(history: History) -> None:
    mine = add_image(history, "mine")
    other = history.new_project(LOCAL, "other")
    second = add_image(history, "second", project=other.id)
    strange = add_image(history, "strange", owner="visitor")
    for image in (mine, second, strange):
        history.keep(image.owner, [image.id], True)
    assert [image.id for image in export.kept(history, LOCAL, other.id)] == [second.id]
    assert [image.id for image in export.kept(history, LOCAL)] == [mine.id, second.id]


def test_what_cannot_be_exported_is_a_sentence(history: History, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no picture is kept yet"):
        export.write(history, (), tmp_path)
    image: Image = add_image(history, "a")
    image.path.unlink()
    with pytest.raises(BadRequest, match="is gone"):
        export.write(history, [image], tmp_path)
    assert not list(tmp_path.rglob("*.zip")) and not list(tmp_path.rglob("*.part"))


def test_many_pages_of_kept_pictures_come_in_order(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [add_image(history, f"picture {number}", seed=number).id for number in range(5)]
    history.keep(LOCAL, ids, True)
    monkeypatch.setattr(export.library, "page", _small_pages(export.library.page))
    assert [image.id for image in export.kept(history, LOCAL)] == ids


def _small_pages(page):  # type: ignore[no-untyped-def]
    return lambda *args, **options: page(*args, **{**options, "limit": 2})
