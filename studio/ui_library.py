"""The library: a sheet over the desk with every picture, searched, filtered and paged."""

from typing import Any

from studio.board import Board
from studio.page import Look, Tab
from studio.shelf import SHOW, Shelf
from studio.template import filling, template

ASKED = ("text", "show", "tag", "stacked", "here")


def lay_out(board: Board, shelf: Shelf) -> None:
    import gradio as gr

    with gr.Column(elem_id="library", elem_classes="sheet"):
        with gr.Row(elem_id="filters"):
            board.add("text", gr.Textbox(
                label="Search", placeholder="words of a prompt, tags, notes", lines=1, max_lines=1,
                elem_id="search", min_width=200, scale=2,
            ))  # fmt: skip
            board.add("show", gr.Radio(list(SHOW), value="all", label="Show", elem_id="show", min_width=320, scale=3))
            board.add(
                "tag", gr.Dropdown([("Any tag", "")], value="", label="Tag", elem_id="tag", min_width=140, scale=1),
                lambda choices: gr.update(choices=choices),
            )  # fmt: skip
            board.add(
                "stacked", gr.Checkbox(False, label="Stack by revision", elem_id="stacked", min_width=120, scale=1)
            )
            board.add("here", gr.Checkbox(False, label="This project only", elem_id="here", min_width=120, scale=1))
            gr.Button("Close", elem_id="close-library", min_width=80, scale=0)
        board.add("grid", template("grid", filling(pictures=[], nothing=""), elem_id="grid"))
        with gr.Row(elem_id="pages"):
            board.add("back", gr.Button("Newer", elem_id="back", min_width=90, scale=0), _usable)
            board.add("found", gr.Markdown("", elem_id="found"))
            board.add("older", gr.Button("Older", elem_id="older", min_width=90, scale=0), _usable)
        board.add("trail", gr.JSON([], visible=False))
        board.add("next", gr.Number(None, visible=False, precision=0))


def wire(board: Board, shelf: Shelf) -> None:
    part = board.parts
    sheet = ["grid", "found", "trail", "next", "back", "older", "tag"]
    shown = [*sheet, "progress"]

    def asked(values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(ASKED, values, strict=True))

    def first(tab: Tab, *values: Any) -> Look:
        return shelf.look(tab, asked(values))

    def opened(tab: Tab, *values: Any) -> Look:
        return shelf.look(tab, asked(values)) | {"tag": shelf.tags(tab)}

    def older(tab: Tab, trail: list[int], after: float | None, *values: Any) -> Look:
        return shelf.look(tab, asked(values), [*(trail or []), *([int(after)] if after else [])])

    def newer(tab: Tab, trail: list[int], *values: Any) -> Look:
        return shelf.look(tab, asked(values), (trail or [])[:-1])

    def pick(tab: Tab, data: dict[str, Any], trail: list[int], *values: Any) -> Look:
        return shelf.pick(tab, data.get("id"), str(data.get("what")), asked(values), trail or [])

    board.on(part["grid"].opened, opened, ASKED, outputs=shown)
    changes = [part[name].change for name in ASKED]
    board.on(changes, first, ASKED, outputs=shown, trigger_mode="always_last")
    board.on(part["older"].click, older, ["trail", "next", *ASKED], outputs=shown)
    board.on(part["back"].click, newer, ["trail", *ASKED], outputs=shown)
    board.on(part["grid"].pick, pick, ["trail", *ASKED], event=True)  # every part: it may open another project


def _usable(on: bool) -> Any:
    """A button that does nothing now can't be pressed."""
    import gradio as gr

    return gr.update(interactive=on)
