"""What leaves for good, what comes back from a recipe, and how big the rest is."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine.types import BadRequest, Picture, Request, Seconds
from studio import adopt, disk, library, lineage, pictures
from studio.history import History
from studio.library import Filter
from studio.recipe import UNKNOWN, Link, Origin
from studio.rows import LOCAL
from studio.tables import FILE
from tests.test_history import found, history, made

__all__ = ["history"]  # the fixture
ROOT = Path(__file__).parent.parent


def words_on_disk(history: History, word: str) -> list[str]:
    """Files of the data folder that contain the word."""
    return [path.name for path in history.data_dir.rglob("*") if path.is_file() and word.encode() in path.read_bytes()]


def test_purging_leaves_nothing_behind(history: History) -> None:
    root, gone, kept = made(history, "a circle"), made(history, "xylophone secret"), made(history, "a ring")
    image = history.image(LOCAL, gone)
    with pytest.raises(BadRequest, match="in the bin"):
        disk.purge(history, LOCAL, [gone])
    history.delete(LOCAL, [gone])
    pictures.publish(image.path, history.data_dir / "cache")
    assert words_on_disk(history, "xylophone")
    disk.purge(history, LOCAL, [gone])
    assert found(history) == [kept, root]
    assert image.thumb and not image.path.exists() and not image.thumb.exists()
    assert words_on_disk(history, "xylophone") == []
    with closing(sqlite3.connect(history.data_dir / FILE)) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_children_of_a_purged_picture_become_their_grandparents(history: History) -> None:
    root = made(history, "a circle")
    middle = made(history, "a ring", parent=root)
    lower = made(history, "a red ring", parent=middle)
    leaf = made(history, "a blue ring", parent=lower)
    history.delete(LOCAL, [middle, lower])
    disk.purge(history, LOCAL, [middle, lower])
    assert history.image(LOCAL, leaf).parent == root
    labels = {r.label: r.parent for r in history.revisions(LOCAL, history.last_project(LOCAL).id)}
    assert labels == {"r1": None, "r4": history.image(LOCAL, root).revision}


def test_a_kill_between_row_and_file_does_not_bring_a_picture_back(
    history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    id = made(history, "a circle")
    path = history.image(LOCAL, id).path
    history.delete(LOCAL, [id])
    with monkeypatch.context() as patch:
        patch.setattr(disk, "sweep_gone", lambda history: None)
        disk.purge(history, LOCAL, [id])
    assert path.exists()
    disk.sweep_gone(history)
    assert not path.exists() and adopt.lost(history) == []


def test_the_bin_is_emptied_after_its_days(history: History) -> None:
    old, young = made(history, "a circle"), made(history, "a ring")
    history.delete(LOCAL, [old, young])
    assert disk.empty_bin(history) == 0
    assert disk.empty_bin(history, owner="somebody", days=-1) == 0
    history.restore(LOCAL, [young])
    assert disk.empty_bin(history, days=-1) == 1
    assert found(history) == [young] and found(history, deleted=True) == []


def test_a_visitor_is_forgotten_and_nobody_else(history: History) -> None:
    mine, theirs = made(history, "a circle"), made(history, "xylophone secret", owner="visitor")
    path = history.image("visitor", theirs).path
    disk.forget(history, "visitor")
    assert found(history) == [mine] and history.projects("visitor") == () and not path.exists()
    assert words_on_disk(history, "xylophone") == []


def test_usage_counts_every_part(history: History) -> None:
    made(history, "a circle")
    parts = {part.name: part for part in disk.usage(history.data_dir).parts}
    assert parts["pictures"].files == parts["thumbs"].files == 1
    assert parts["history"].bytes > 4096 and disk.usage(history.data_dir).free > 0


def loose(folder: Path, prompt: str, origin: Origin = UNKNOWN) -> Path:
    request = Request(prompt, "m", 5, 16, 16, 4)
    picture = Picture(np.zeros((16, 16, 3), np.uint8), request, "fake", "because", Seconds(total=0.5), 7)
    return pictures.save(picture, folder / f"{prompt}.png", origin)


def test_pictures_from_before_the_history_are_taken_in(history: History) -> None:
    paths = [loose(history.data_dir / "pictures" / "2025-01-01", prompt) for prompt in ("a circle", "एक नीली कार")]
    (history.data_dir / "pictures" / "strange.png").write_bytes(b"no picture")
    half = history.data_dir / "pictures" / ".half.part"
    half.write_bytes(b"")
    assert [adopt.take_in(history, path) for path in adopt.lost(history)] == [True, True, False]
    assert not half.exists() and (history.data_dir / "pictures" / "strange.png").exists()
    images = library.page(history, LOCAL, Filter(text="नीली")).images
    assert [image.path for image in images] == [paths[1]] and images[0].seconds == 0.5
    assert history.last_project(LOCAL).name == adopt.EARLIER


def test_a_picture_from_elsewhere_brings_its_chain(history: History, tmp_path: Path) -> None:
    project = history.last_project(LOCAL).id
    parent = made(history, "two circles")
    links = (Link(Request("one circle", "m", 5, 16, 16, 4)), Link(history.image(LOCAL, parent).request, "vary", "abc"))
    file = loose(tmp_path, "three circles", Origin("refine", links))
    image = adopt.adopt(history, LOCAL, project, file)
    assert image.parent == parent and image.path.read_bytes() == file.read_bytes()
    assert (image.op, lineage.past(image)) == ("refine", links)
    assert [r.prompt for r in history.revisions(LOCAL, project)] == ["two circles", "one circle", "three circles"]
    assert adopt.adopt(history, LOCAL, project, file) == image


def test_a_second_niwaki_on_the_folder_is_told_so_and_does_no_harm(history: History) -> None:
    made(history, "a circle")
    before = {p: p.read_bytes() for p in history.data_dir.rglob("*") if p.is_file()}
    code = f"from studio.history import History\nHistory({str(history.data_dir)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert f"another Niwaki (process {os.getpid()}) is using the data folder" in done.stderr and done.returncode
    assert {p: p.read_bytes() for p in history.data_dir.rglob("*") if p.is_file()} == before
    made(history, "a ring")


def test_the_data_folder_can_be_moved(history: History, tmp_path: Path) -> None:
    id = made(history, "a circle")
    shutil.copytree(history.data_dir, tmp_path / "elsewhere")
    moved = History(tmp_path / "elsewhere")
    try:
        image = moved.image(LOCAL, id)
        assert image.path.is_file() and (tmp_path / "elsewhere") in image.path.parents
        assert json.dumps(dict(image.details))
    finally:
        moved.close()


def test_a_lost_history_is_rebuilt_from_the_pictures(history: History) -> None:
    root = made(history, "a circle")
    made(history, "एक नीली कार", parent=root)
    history.close()
    for file in history.data_dir.glob(f"{FILE}*"):
        file.unlink()
    again = History(history.data_dir)
    try:
        assert all([adopt.take_in(again, path) for path in adopt.lost(again)])
        child, parent = library.page(again, LOCAL).images
        assert (parent.request.prompt, child.request.prompt) == ("a circle", "एक नीली कार")
        assert child.parent == parent.id
    finally:
        again.close()
