"""Pieces of the page that are drawn from our .html templates, safe for any text.

The trap: gradio 6.31 fills `{{..}}` with Handlebars, which escapes HTML, and then runs the *result* as a JavaScript
template literal. A prompt with `${..}` in it would be executed, and one with a backslash breaks the component. So what
goes into a template goes through `filling` first, and templates use `{{..}}` and nothing else.
(A subclass of gr.HTML could do it unasked, but gradio writes a .pyi file beside the source of every subclass.)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gradio as gr

ASSETS = Path(__file__).resolve().parent.parent / "assets"

Filling = dict[str, Any]


def filling(**values: Any) -> Filling:
    """The value of a template: strings, numbers, booleans and lists of dicts of them, every string made harmless."""
    return {name: _literal(value) for name, value in values.items()}


def template(name: str, value: Filling, elem_id: str) -> "gr.HTML":
    """A component of ours: `assets/<name>/<name>.html` with the script beside it, or a part without one.

    `value`, and whatever an event sends later, comes from `filling`.
    """
    import gradio as gr

    folder = ASSETS / name
    script = folder / f"{name}.js"
    file = folder / f"{name}.html" if folder.is_dir() else ASSETS / "parts" / f"{name}.html"
    return gr.HTML(
        value,
        html_template=file.read_text(encoding="utf-8"),
        js_on_load=script.read_text(encoding="utf-8") if script.is_file() else None,
        apply_default_css=False,
        elem_id=elem_id,
    )


def style_sheets() -> list[Path]:
    """Every style sheet of the page, the tokens first."""
    first = [ASSETS / "tokens.css", ASSETS / "page.css"]
    return [*first, *sorted(ASSETS.glob("*/*.css"))]


def _literal(value: Any) -> Any:
    """Every string in `value`, escaped for a JavaScript template literal; Handlebars itself sees to backticks."""
    if isinstance(value, str):
        return value.replace("\\", "\\\\").replace("$", "\\$")
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    return value
