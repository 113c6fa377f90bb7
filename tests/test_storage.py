"""The page's hand on the data folder: sizes, a project's name, and what leaves for good after a second press."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.types import BadRequest
from studio import library
from studio.page import Page
from studio.rows import LOCAL
from studio.settings import Settings
from studio.shelf import Shelf
from studio.storage import Storage
from tests.rows import InlineEngine, add_image, queue
from tests.serving import OFFERS


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with queue(tmp_path, InlineEngine()) as jobs:
        yield Page(jobs._history, jobs, Settings(tmp_path, backend="fake"), OFFERS)


def test_the_folder_is_named_with_the_size_of_its_parts(page: Page) -> None:
    image = add_image(page.history)
    look = Storage(page).look(page.tab("a"))
    assert look["storage"]["folder"] == str(page.settings.data_dir) and look["name"] == "My first project"
    parts = {part["name"]: part for part in look["storage"]["parts"]}
    assert parts["pictures"]["files"] == "1 file" and parts["pictures"]["size"].startswith(f"{image.bytes / 1e6:.1f}")
    assert look["storage"]["bin"] == "0 pictures" and look["storage"]["free"].endswith("GB")


def test_a_project_gets_another_name(page: Page) -> None:
    storage, tab = Storage(page), page.tab("a")
    look = storage.rename(tab, "  Posters for   <b>spring</b> ")
    assert look["project"][0] == [("Posters for <b>spring</b>", tab.project)] and look["storage_said"] == "Renamed."
    assert storage.rename(tab, " ")["storage_said"].startswith("The project has no name")


def test_the_bin_is_emptied_at_the_second_press(page: Page) -> None:
    storage, tab = Storage(page), page.tab("a")
    assert storage.empty_bin(tab)["storage_said"] == "The bin is empty."
    image, stays = add_image(page.history), add_image(page.history, seed=2)
    page.history.delete(LOCAL, [image.id])
    assert storage.empty_bin(tab) == {"storage_said": "Press again to delete 1 picture for good."}
    assert image.path.exists()
    storage.look(tab)  # whatever else is done in between takes the first press back
    assert "Press again" in storage.empty_bin(tab)["storage_said"] and image.path.exists()
    assert storage.empty_bin(tab)["storage_said"] == "1 picture deleted for good."
    assert not image.path.exists() and stays.path.exists()


def test_a_project_goes_at_the_second_press_and_another_one_opens(page: Page) -> None:
    storage, tab = Storage(page), page.tab("a")
    image = add_image(page.history)
    other = page.history.new_project(LOCAL, "Other")
    page.history.keep(LOCAL, [image.id], True)
    tab.project = image.project
    said = storage.delete_project(tab)["storage_said"]
    assert said.startswith("Press again to delete “My first project” with 1 picture, 1 of them kept")
    look = storage.delete_project(tab)
    assert look["storage_said"] == "“My first project” was deleted for good."
    assert tab.project == other.id and not image.path.exists() and page.history.projects(LOCAL) == (other,)


def test_a_visitor_of_a_space_names_and_deletes_their_own_project_and_sees_no_folder(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPACE_ID", "somebody/niwaki")
    storage, ann, bob = Storage(page), page.tab("ann"), page.tab("bob")
    assert ann.owner != bob.owner
    assert "storage" not in storage.look(ann) and storage.rename(ann, "Ann's")["name"] == "Ann's"
    bob.project = ann.project  # whatever a visitor's page may say
    assert "not here" in storage.delete_project(bob)["storage_said"]
    assert "not here" in storage.rename(bob, "Bob's")["storage_said"]
    assert storage.delete_project(ann)["storage_said"].startswith("Press again")
    assert storage.delete_project(ann)["storage_said"] == "“Ann's” was deleted for good."
    assert [project.name for project in page.history.projects(ann.owner)] == ["My first project"]


def test_one_picture_of_the_bin_goes_for_good(page: Page) -> None:
    shelf, tab, wanted = Shelf(page), page.tab("a"), {"show": "bin"}
    image = add_image(page.history)
    page.history.delete(LOCAL, [image.id])
    (shown,) = shelf.look(tab, wanted)["grid"]["pictures"]
    assert shown["purge"] == "Delete for good"
    (asked,) = shelf.pick(tab, image.id, "purge", wanted, [])["grid"]["pictures"]
    assert asked["purge"] == "Really delete?" and image.path.exists()
    assert shelf.pick(tab, image.id, "purge", wanted, [])["grid"]["pictures"] == []
    assert not image.path.exists() and library.count(page.history, LOCAL, library.Filter(deleted=True)) == 0
    with pytest.raises(BadRequest):
        page.history.image(LOCAL, image.id)


def test_a_picture_outside_the_bin_is_not_deleted(page: Page) -> None:
    shelf, tab = Shelf(page), page.tab("a")
    image = add_image(page.history)
    shelf.pick(tab, image.id, "purge", {}, [])
    look = shelf.pick(tab, image.id, "purge", {}, [])
    assert "only pictures in the bin" in look["progress"]["text"].lower() and image.path.exists()
