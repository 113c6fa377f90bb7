"""The workshop: a sheet with grids, templates and models; where a PNG is dropped and a zip leaves."""

from collections.abc import Iterator
from typing import Any

from studio import space
from studio.batches import MODELS, SEEDS, Batches
from studio.board import Board
from studio.extras import Extras
from studio.page import REUSED, SCENE, Look, Tab
from studio.runs import CONTROLS, STARTED
from studio.shop import Shop
from studio.storage import Storage
from studio.template import filling, template


def lay_out(board: Board, shop: Shop) -> Any:
    """Returns the tab of project and data; on a Space of the project alone, since the folder is nobody's to see."""
    import gradio as gr

    with gr.Column(elem_id="workshop", elem_classes="sheet"):
        gr.Button("Close", elem_id="close-workshop", min_width=80, scale=0)
        with gr.Tabs():
            with gr.Tab("Grids"):
                _grids(board)
            with gr.Tab("Templates"):
                _templates(board)
            with gr.Tab("Models", render_children=True):  # else a template that changes unseen comes up empty
                _models(board, shop)
            with gr.Tab("Project" if space.on_a_space() else "Data") as storage:
                _storage(board)
    board.add("drop", gr.File(file_types=[".png"], label="A picture made by Niwaki", elem_id="drop", height=1))
    board.add("parcel", template("workshop", filling(url=""), elem_id="parcel"))
    return storage


def _grids(board: Board) -> None:
    import gradio as gr

    offers = board.page.offers
    board.add("grid_kind", gr.Radio([SEEDS, MODELS], value=SEEDS, label="Rows x columns", elem_id="grid-kind"))
    board.add("grid_prompts", gr.Textbox(
        label="Prompts, one a line", lines=3, max_lines=8, elem_id="grid-prompts",
    ))  # fmt: skip
    board.add("grid_seeds", gr.Textbox(
        label="Seeds", placeholder="1 2 3; none: four from the page's seed on", lines=1, max_lines=1,
        elem_id="grid-seeds",
    ))  # fmt: skip
    board.add("grid_models", gr.Dropdown(
        board.page.model_choices(), value=list(offers)[:2], label="Models", multiselect=True, elem_id="grid-models",
    ), board.model)  # fmt: skip
    board.add("cost", gr.Markdown("", elem_id="grid-cost", elem_classes="soft"), _plain)
    board.add("grid_go", gr.Button("Make the grid", variant="primary", elem_id="grid-go", scale=0))
    board.add("cells", template("cells", filling(columns=[], rows=[]), elem_id="cells"))


def _templates(board: Board) -> None:
    import gradio as gr

    board.add("slots", gr.Textbox(
        label="Prompt with slots", placeholder="{product} on a {colour} table", lines=2, elem_id="slots",
    ))  # fmt: skip
    board.add("table", gr.Textbox(
        label="Table: the first line names the columns, every other line is one picture", lines=5, max_lines=12,
        placeholder="product,colour\na cup,red\na lamp,green", elem_id="table",
    ))  # fmt: skip
    board.add("csv", gr.UploadButton("Take the table from a CSV file", file_types=[".csv"], elem_id="csv", scale=0))
    board.add("bill", gr.Markdown("", elem_id="bill", elem_classes="soft"), _plain)
    board.add("fill", gr.Button("Make one picture per row", variant="primary", elem_id="fill", scale=0))


def _models(board: Board, shop: Shop) -> None:
    import gradio as gr

    board.add("shop", template("shop", shop.shown(), elem_id="shop"))
    choices, local = shop.choices(), not space.on_a_space()
    first = choices[0][1] if choices else None
    board.add(
        "get", gr.Dropdown(choices, value=first, label="Download", elem_id="get", visible=local),
        lambda left: gr.update(choices=left, value=left[0][1] if left else None),
    )  # fmt: skip
    with gr.Row(visible=local):
        board.add("get_go", gr.Button("Download", variant="primary", elem_id="get-go", scale=0))
        board.add("get_stop", gr.Button("Stop", elem_id="get-stop", scale=0))
    board.add("folder", gr.Textbox(
        label="Or import a folder of this machine", placeholder="/media/stick/bonsai-image-ternary-4B", lines=1,
        max_lines=1, elem_id="folder", visible=local,
    ))  # fmt: skip
    board.add("bring", gr.Button("Import", elem_id="bring", scale=0, visible=local))
    board.add("shop_said", gr.Markdown("", elem_id="shop-said", elem_classes="soft"), _plain)


def _storage(board: Board) -> None:
    import gradio as gr

    board.add("name", gr.Textbox(label="Name of this project", lines=1, max_lines=1, elem_id="name"))
    board.add("rename", gr.Button("Rename", elem_id="rename", scale=0))
    if not space.on_a_space():
        board.add("storage", template("storage", filling(parts=[]), elem_id="storage"))
    with gr.Row():
        if not space.on_a_space():
            board.add("empty_bin", gr.Button("Empty the bin", elem_id="empty-bin", scale=0))
        board.add("drop_project", gr.Button("Delete this project", elem_id="drop-project", scale=0))
    board.add("storage_said", gr.Markdown("", elem_id="storage-said", elem_classes="soft"), _plain)


def wire_storage(board: Board, tab: Any, storage: Storage) -> None:
    """The data folder: looked at when its tab is opened."""
    part = board.parts
    said = [name for name in ("storage", "name", "storage_said") if name in part]
    board.on(tab.select, storage.look, outputs=said)
    board.on([part["rename"].click, part["name"].submit], storage.rename, ["name"], outputs=["project", *said])
    if "empty_bin" in part:
        board.on(part["empty_bin"].click, storage.empty_bin, outputs=[*SCENE, *said, "undo"])
    board.on(part["drop_project"].click, storage.delete_project)


def wire(board: Board, extras: Extras, batches: Batches, shop: Shop) -> None:
    part = board.parts

    def asked(values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(CONTROLS, values, strict=True))

    def dropped(tab: Tab, file: str | None, prompt: str, *values: Any) -> Look:
        return extras.dropped(tab, file, prompt, asked(values))

    def estimate_grid(tab: Tab, kind: str, prompts: str, seeds: str, models: list[str], *values: Any) -> Look:
        return batches.estimate_grid(tab, kind, prompts, seeds, models, asked(values))

    def make_grid(tab: Tab, kind: str, prompts: str, seeds: str, models: list[str], *values: Any) -> Iterator[Look]:
        yield from batches.grid(tab, kind, prompts, seeds, models, asked(values))

    def estimate(tab: Tab, slots: str, table: str, *values: Any) -> Look:
        return batches.estimate(tab, slots, table, asked(values))

    def fill(tab: Tab, slots: str, table: str, *values: Any) -> Iterator[Look]:
        yield from batches.fill(tab, slots, table, asked(values))

    def read(tab: Tab, file: str) -> Look:
        return batches.read(file)

    board.on(part["drop"].upload, dropped, ["drop", "prompt", *CONTROLS], outputs=[*SCENE, *REUSED, "project", "drop"])
    board.on(part["strip"].export, extras.export, outputs=["progress", "parcel"])
    grid = ["grid_kind", "grid_prompts", "grid_seeds", "grid_models", *CONTROLS]
    changes = [part[name].change for name in grid[:4]]
    board.on(changes, estimate_grid, grid, outputs=["cost"], trigger_mode="always_last")
    board.on(part["grid_go"].click, make_grid, grid, outputs=[*SCENE, "cells", "cost"])
    filled, typed = ["slots", "table", *CONTROLS], [part["slots"].change, part["table"].change]
    board.on(typed, estimate, filled, outputs=["bill"], trigger_mode="always_last")
    board.on(part["fill"].click, fill, filled, outputs=[*SCENE, "bill"])
    board.on(part["csv"].upload, read, ["csv"], outputs=["table", "bill"])
    arrived = ["shop", "shop_said", "get", "model", "grid_models"]
    board.on(part["get_go"].click, shop.get, ["get"], outputs=arrived)
    board.on(part["get_stop"].click, shop.stop, ["get"], outputs=["shop_said"])
    board.on(part["bring"].click, shop.bring, ["folder"], outputs=arrived)


def wire_live(board: Board, extras: Extras, shop: Shop) -> None:
    """Beside the prompt: the picture follows the typing, and the memory it would take is foretold."""
    part = board.parts

    def typed(tab: Tab, on: bool, prompt: str, stage: Any, *values: Any) -> Iterator[Look]:
        yield from extras.typed(tab, on, prompt, dict(zip(CONTROLS, values, strict=True)), stage)

    def foresee(tab: Tab, *values: Any) -> Look:
        return shop.foresee(tab, extras.current("a", dict(zip(CONTROLS, values, strict=True))))

    changes = [part[name].change for name in ("size", "quality", "model")]
    # gradio draws the fold's content when it opens, and a template that changed before comes up empty.
    board.on(part["more"].expand, lambda tab, model: {"facts": board.page.facts(model)}, ["model"], outputs=["facts"])
    board.on(changes, foresee, CONTROLS, outputs=["foresee"], trigger_mode="always_last")
    for trigger in (part["keys"].typed, part["live"].input):  # not prompt.input: with Live off a key costs no stream
        board.on(trigger, typed, ["live", "prompt", "stage", *CONTROLS], outputs=STARTED)


def _plain(text: str) -> str:
    """Text as it stands: what a person wrote must not become Markdown or HTML."""
    marks = {ord(mark): f"\\{mark}" for mark in r"\`*_{}[]()#+-.!|~<>&$"}
    return text.translate(marks)
