"""What the commands about models print and hand back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import app
from engine.transfer import Meter, Progress
from studio import terminal


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NIWAKI_DATA", str(tmp_path / "data"))
    return tmp_path


def test_a_model_comes_goes_and_is_listed_in_between(tiny_packs: Path, place: Path, capsys: Any) -> None:
    assert app.main(["models", "import", str(tiny_packs / "binary"), "--id", "mine", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["model"], facts["path"]) == ("mine", str(place / "data" / "models" / "mine"))
    assert app.main(["models", "list", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["imported"] == {"mine": facts["path"]}
    for line in out.splitlines():
        if line[2:].startswith(("bonsai-binary ", "klein-dense")):
            assert line.endswith("(not pinned by us)")
    assert app.main(["models", "verify", "mine"]) == 0
    assert app.main(["generate", "a red circle", "--model", "mine", "--backend", "fake", "--steps", "1"]) == 0
    assert app.main(["models", "remove", "mine", "--json"]) == 0
    out = capsys.readouterr().out
    assert "mine is removed" in out and json.loads(out.splitlines()[-1])["freed_bytes"] > facts["bytes"]
    assert app.main(["models", "remove", "mine"]) == 2
    assert capsys.readouterr().err.startswith("app.py: 'mine' is not installed in")


def test_a_damaged_model_ends_with_2_and_names_the_file(tiny_packs: Path, place: Path, capsys: Any) -> None:
    shutil.copytree(tiny_packs / "ternary", place / "pack")
    (place / "pack" / "manifest.json").write_text("{}")
    assert app.main(["models", "verify", str(place / "pack")]) == 2
    said = capsys.readouterr()
    assert "damaged  manifest.json: the file has 2 bytes" in said.out
    assert "is damaged (manifest.json)" in said.err


def test_offline_ends_with_1_and_a_sentence(capsys: Any) -> None:  # conftest sets HF_HUB_OFFLINE
    assert app.main(["models", "get", "bonsai-ternary"]) == 1
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert app.main(["models", "get", "seedling-ternary"]) == 2


def test_progress_reads_like_a_sentence() -> None:
    step = Progress("vae/x", 1_200_000_000, 3_890_000_000, 11_300_000, 238)
    assert terminal.describe(step) == "1.20 GB of 3.89 GB, 11.30 MB/s, 4 min left: vae/x"
    assert terminal.describe(Progress("x", 5, 10)) == "5 bytes of 10 bytes: x"
    waiting = Progress("x", 5000, 10_000, 1.0, 8000.0, waiting=4)
    assert terminal.describe(waiting) == "5.00 kB of 10.00 kB, the connection broke, trying again in 4 s: x"
    assert "2.2 h left" in terminal.describe(Progress("x", 0, 10, 1.0, 8000.0))
    assert "30 s left" in terminal.describe(Progress("x", 0, 10, 1.0, 30.0))


def test_elsewhere_than_on_a_terminal_ten_lines_suffice(capsys: Any) -> None:
    line = terminal._Line()
    for done in range(0, 1001):
        line.show(Progress("x", done, 1000))
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_the_rate_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("engine.transfer.time", type("Clock", (), {"monotonic": staticmethod(lambda: now)}))
    meter = Meter(10_000)
    meter.found(1000)  # was there: no part of the rate
    assert meter.progress("x").rate is None
    for second in range(1, 31):
        now = float(second)
        meter.moved(10 if second <= 15 else 100)
    step = meter.progress("x")
    assert step.rate == 100 and step.done == 1000 + 15 * 10 + 15 * 100
    assert step.seconds_left == (10_000 - step.done) / 100
