"""Grids and filled templates on the page, without a browser."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from studio import library
from studio.batches import MODELS, SEEDS, Batches, duration, numbers
from studio.page import Page, Tab
from studio.rows import LOCAL
from studio.runs import Runs
from studio.settings import Settings
from tests.rows import InlineEngine, queue
from tests.serving import OFFERS
from tests.test_extras import CONTROLS, look_of


@pytest.fixture
def engine() -> InlineEngine:
    return InlineEngine()


@pytest.fixture
def batches(engine: InlineEngine, tmp_path: Path) -> Iterator[Batches]:
    with queue(tmp_path, engine) as jobs:
        page = Page(jobs._history, jobs, Settings(tmp_path, backend="fake"), OFFERS)
        yield Batches(page, Runs(page))


@pytest.fixture
def tab(batches: Batches) -> Tab:
    return batches.page.tab("session")


def test_a_grid_is_drawn_with_labels_and_reused(batches: Batches, engine: InlineEngine, tab: Tab) -> None:
    asked = (SEEDS, "a circle\n\n a ring ", "1, 2", [], CONTROLS)
    assert "4 pictures; nothing like them" in batches.estimate_grid(tab, *asked)["cost"]
    look = look_of(batches.grid(tab, *asked))
    cells = look["cells"]
    assert [column["text"] for column in cells["columns"]] == ["seed 1", "seed 2"]
    assert [row["label"] for row in cells["rows"]] == ["a circle", "a ring"]
    assert all(cell["url"].startswith("/niwaki/picture/") for row in cells["rows"] for cell in row["cells"])
    assert cells["rows"][1]["cells"][0]["alt"] == "a ring, seed 1, seedling-ternary"
    assert batches.estimate_grid(tab, *asked)["cost"] == "All 4 pictures are there already."
    again = look_of(batches.grid(tab, *asked))
    assert again["cost"] == "4 of 4 cells were there already." and len(engine.drawn) == 4
    assert "2 of 4 are there already" in batches.estimate_grid(tab, SEEDS, "a circle", "1 2 3 4", [], CONTROLS)["cost"]


def test_models_are_rows_by_their_names(batches: Batches, tab: Tab) -> None:
    look = look_of(batches.grid(tab, MODELS, "a circle", "", ["seedling-ternary", "seedling-binary"], CONTROLS))
    assert [row["label"] for row in look["cells"]["rows"]] == [offer.label for offer in OFFERS[:2]]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ((SEEDS, " ", "", [], CONTROLS), "no prompts"),
        ((SEEDS, "a", "1 x", [], CONTROLS), "'x' is no seed"),
        ((MODELS, "a", "", [], CONTROLS), "no models"),
        ((SEEDS, "a", " ".join(map(str, range(65))), [], CONTROLS), "too large to look at"),
    ],
)
def test_impossible_grids_are_sentences(batches: Batches, tab: Tab, asked: tuple, words: str) -> None:
    assert words in batches.estimate_grid(tab, *asked)["cost"]
    assert words in look_of(batches.grid(tab, *asked))["cost"]


def test_a_template_is_filled_one_picture_a_row(batches: Batches, tab: Tab) -> None:
    template, table = "a {colour} circle", "colour,price\nred,1\nblue,2"
    bill = batches.estimate(tab, template, table, CONTROLS)["bill"]
    assert bill.startswith("2 pictures; ") and bill.endswith(" No slot asks for price.")
    look = look_of(batches.fill(tab, template, table, CONTROLS))
    assert look["bill"] == "2 pictures are queued."
    made = library.page(batches.page.history, LOCAL).images
    assert [image.request.prompt for image in made] == ["a blue circle", "a red circle"]
    assert {image.op for image in made} == {"template"}
    assert batches.estimate(tab, " ", table, CONTROLS) == {"bill": ""}
    assert "no column 'size'" in look_of(batches.fill(tab, "a {size} circle", table, CONTROLS))["bill"]


def test_a_table_is_read_from_a_file(batches: Batches, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeffcolour\nநீல", encoding="utf-8")
    assert batches.read(str(tmp_path / "a.csv")) == {"table": "colour\nநீல"}
    (tmp_path / "b.csv").write_bytes(b"\x81\xff\xfe")
    assert "B.csv is no UTF-8 text" in batches.read(str(tmp_path / "b.csv"))["bill"]


def test_numbers_and_durations() -> None:
    assert numbers("", 7) == [7, 8, 9, 10] and numbers("3,1;2", 7) == [3, 1, 2]
    assert [duration(s) for s in (0.25, 60, 600, 9000)] == ["0.2 s", "60 s", "10 minutes", "2.5 hours"]
