"""The three demo models side by side, from kept answers: a table, and a plot that is well-formed SVG."""

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from engine import catalog, evaluate, retention
from engine.published import QUALITY
from engine.seedling.questions import questions
from engine.types import BadRequest

RIGHT = {"seedling-dense": 2, "seedling-ternary": 3, "seedling-binary": 6}  # one question in so many


@pytest.fixture
def data(tiny_packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with answers of three tiny packs to five questions of each task in each language."""
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(catalog, "SHIPPED", shipped)
    (tmp_path / "evaluations").mkdir()
    for model, one_in in RIGHT.items():
        shutil.copytree(tiny_packs / model.removeprefix("seedling-"), shipped / model)
        right = {evaluate._key(q): q.seed // 4 % one_in == 0 for q in questions(6)}
        evaluate._keep(tmp_path / "evaluations" / f"{model}.json", shipped / model, right)
    return tmp_path


def test_the_table_holds_all_scores_and_sizes(data: Path) -> None:
    rows = retention.table(data)
    assert [row["model"] for row in rows] == list(RIGHT) and {row["n"] for row in rows} == {6 * 4 * 6}
    dense, ternary, binary = rows
    assert "against" not in dense and ternary["overall"] == pytest.approx(1 / 3, abs=0.06)
    assert ternary["against"]["ratio"] == pytest.approx(ternary["overall"] / dense["overall"])
    for part in ("transformer", "pack", "blocks_in_memory"):
        assert dense["bytes"][part] > ternary["bytes"][part] > binary["bytes"][part] > 0
    text = retention.markdown(rows)
    assert all(f"| {name} |" in text for name in (*rows[0]["tasks"], "en", "hi", "mr", "ta", "shapes", "objects"))
    assert f"**{dense['overall']:.3f}**" in text and "| ratio to dense | - |" in text and "144 questions" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_only_what_all_were_asked_counts(data: Path) -> None:
    path = data / "evaluations" / "seedling-binary.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    fewer = {evaluate._key(question) for question in questions(4) if question.language in ("en", "hi")}
    kept["right"] = {key: right for key, right in kept["right"].items() if key in fewer}
    path.write_text(json.dumps(kept), encoding="utf-8")
    assert {row["n"] for row in retention.table(data)} == {6 * 2 * 4}


def test_who_was_not_asked_is_named(data: Path) -> None:
    (data / "evaluations" / "seedling-ternary.json").unlink()
    with pytest.raises(BadRequest, match="no answers of seedling-ternary are kept; run .* first"):
        retention.table(data)


def test_the_plot_shows_both_worlds_apart(data: Path) -> None:
    path = data / "plot.svg"
    retention.write(path, retention.table(data))
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in (*RIGHT, *(each.name for each in QUALITY)):
        assert sum(text.startswith(f"{name} ") for text in words) == 1
    assert {"right answers, ink garden", "GenEval overall, published"} <= set(words)
    spots = [float(c.get("cx", "")) for c in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert all(x < retention.WIDE for x in spots[:3]) and all(x > retention.WIDE for x in spots[3:]) and len(spots) == 6
    with pytest.raises(BadRequest, match="can't write .*choose another file"):
        retention.write(data, retention.table(data))


def test_the_frontier_leaves_out_what_another_beats() -> None:
    dots = [("a", 10.0, 0.5, None), ("b", 20.0, 0.4, None), ("c", 30.0, 0.9, None)]
    assert [dot[0] for dot in retention.frontier(dots)] == ["a", "c"]
