"""The README's claims that a machine can hold it to: the tree, the commands, the links, the front matter of a Space."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def tree() -> list[tuple[str, str]]:
    """(path, description) of every line of the annotated tree."""
    block = README.split("## The tree")[1].split("```")[1]
    rows, folder = [], ""
    for line in block.strip("\n").splitlines():
        name, _, about = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        rows.append(((folder + name) if line.startswith(" ") else name, about.strip()))
    return rows


def test_every_line_of_the_tree_exists_and_is_described() -> None:
    for path, about in tree():
        assert (ROOT / path).exists(), path
        assert about, path


def test_the_tree_leaves_no_module_of_the_engine_out() -> None:
    listed = {path.rstrip("/") for path, _ in tree()}
    there = {f"engine/{p.name}" for p in (ROOT / "engine").iterdir() if p.name not in ("__init__.py", "__pycache__")}
    assert there <= listed


def test_relative_links_and_pictures_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("line", re.findall(r"^python app\.py (\S+)", README, re.M))
def test_every_command_shown_is_known(line: str) -> None:
    if line.startswith("#"):
        return
    asked = subprocess.run([sys.executable, "app.py", line, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr


def test_make_targets_shown_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`?make ([a-z-]+)`?", README)):
        assert re.search(rf"^{target}:", makefile, re.M) or target == "no", target


def test_front_matter_is_what_a_space_reads() -> None:
    matter = README.split("---")[1]
    assert "sdk: gradio" in matter and "app_file: app.py" in matter
    version = re.search(r"sdk_version: (\S+)", matter)
    assert version and version.group(1).startswith("6.")
    short = re.search(r"short_description: (.*)", matter)
    assert short and len(short.group(1)) <= 60  # the hub refuses longer ones
