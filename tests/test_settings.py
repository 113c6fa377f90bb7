"""Where data lies, and what is said when it can't."""

import logging
import os
import sys
from pathlib import Path

import pytest

from engine.types import BadRequest
from studio.settings import Settings, data_dir, make_folder, start_log


def test_the_given_folder_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NIWAKI_DATA", str(tmp_path / "from-environment"))
    assert data_dir() == tmp_path / "from-environment"
    assert data_dir(tmp_path / "given") == tmp_path / "given"
    assert list(tmp_path.iterdir()) == []  # asking creates nothing


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [
        ("linux", "XDG_DATA_HOME", "niwaki"),
        ("win32", "LOCALAPPDATA", "Niwaki"),
    ],
)
def test_the_platform_decides_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, platform: str, variable: str, tail: str
) -> None:
    monkeypatch.delenv("NIWAKI_DATA", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert data_dir() == tmp_path / tail
    monkeypatch.delenv(variable)
    assert Path.home() in data_dir().parents


def test_a_relative_folder_becomes_absolute_and_home_is_understood(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_dir("here") == tmp_path / "here"
    assert data_dir("~/niwaki") == Path.home() / "niwaki"


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadRequest, match=r"cannot write to .*file.*--data or NIWAKI_DATA"):
        make_folder(tmp_path / "file" / "data")


def test_a_folder_without_permission_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, whom no permission stops
    with pytest.raises(BadRequest, match="no permission to write"):
        make_folder(tmp_path)


def test_the_log_is_written_and_rotates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("studio.settings.LOG_BYTES", 400)
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        path = start_log(Settings(tmp_path))
        assert start_log(Settings(tmp_path)) == path
        for number in range(20):
            logging.getLogger("engine.anything").info("line %d", number)
        ours = [handler for handler in root.handlers if handler.get_name() == "niwaki"]
        assert len(ours) == 1
        assert path == tmp_path / "logs" / "niwaki.log"
        assert path.stat().st_size <= 400
        assert path.with_name("niwaki.log.1").exists()
    finally:
        for handler in set(root.handlers) - set(before):
            root.removeHandler(handler)
            handler.close()
