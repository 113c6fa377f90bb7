"""What our own markup, style and scripts may not contain, and how much of them there may be."""

import re
from pathlib import Path

import pytest

from studio import page
from studio.template import ASSETS, filling, style_sheets

STUDIO = Path(page.__file__).parent


def test_strings_for_templates_are_escaped_all_the_way_down() -> None:
    assert filling(a="${x}", b=[{"c": "C:\\new"}], d=1, e=True) == {
        "a": "\\${x}",
        "b": [{"c": "C:\\\\new"}],
        "d": 1,
        "e": True,
    }


@pytest.mark.parametrize("file", sorted(ASSETS.rglob("*.html")), ids=lambda file: file.name)
def test_templates_hold_no_live_parts(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for live in ("${", "{{{", "{{&", "`", "\\", "<script", "style=", "javascript:", "http:", "https:"):
        assert live not in text, f"{live} in {file.name}"
    assert not re.search(r"\son\w+=", text)
    assert set(re.findall(r"{{[#/]?(\w+)", text)) <= {"if", "unless", "each", "else", "value", "this"}


def test_colours_stand_in_the_token_file_only() -> None:
    for sheet in style_sheets():
        css = sheet.read_text(encoding="utf-8")
        assert "url(" not in css and "@import" not in css, sheet.name
        colours = re.findall(r"#[0-9a-fA-F]{3,8}\b(?=\s*[;,)])|rgba?\(|hsl", css)
        assert bool(colours) == (sheet.name == "tokens.css"), (sheet.name, colours)


def test_the_page_stays_a_gradio_page() -> None:
    """The budget: few components, little script, none of it in Python strings."""
    components = {file.parent.name for file in ASSETS.glob("*/*.js")}
    assert len(components) <= 8, components
    for name in components:
        assert {file.suffix for file in (ASSETS / name).iterdir()} == {".html", ".css", ".js"}
    script = [line for file in ASSETS.rglob("*.js") for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(script) < 600
    assert max(map(len, script)) <= 160  # a budget of lines is none if a line may be a page
    for file in STUDIO.glob("*.py"):
        if file.name != "accept_page.py":  # a file to share, which has to carry its own style; no part of the page
            assert not re.search(r"<\w+[ >].*</|style=|js=", file.read_text(encoding="utf-8")), file


def test_scripts_never_read_what_a_person_wrote_into_markup() -> None:
    for file in ASSETS.rglob("*.js"):
        text = file.read_text(encoding="utf-8")
        for live in ("innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "Function(", "document.write"):
            assert live not in text, f"{live} in {file.name}"


def test_importing_the_page_does_not_import_gradio() -> None:
    for file in STUDIO.glob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"(import|from) gradio", line), file
