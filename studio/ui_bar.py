"""The bar at the top: project, model, queue, library, keys."""

import time
from collections.abc import Iterator
from typing import Any

from engine.types import EngineError
from studio import space
from studio.board import Board
from studio.models import sibling
from studio.page import MODEL, SCENE, Look, Page, Tab
from studio.runs import Runs
from studio.template import filling, template

NEW = 0  # the project list's last line
TWICE = 1.0  # seconds in which nobody wants two new projects

KEYS = (
    ("Enter", "make the picture"), ("Shift+Enter", "four new seeds"), ("Alt+Enter", "new line in the prompt"),
    ("K", "keep"), ("X", "reject"), ("V", "vary"), ("F", "refine"), ("C", "compare with the next one chosen"),
    ("Space", "flick to the other picture"), ("← →", "the picture before, after"), ("1 to 4", "one of four seeds"),
    ("R", "reuse all settings"), ("L", "lock or unlock the seed"), ("Del", "move to the bin"), ("+ −", "zoom"),
    ("Shift+arrows", "move about in an enlarged picture"),
    ("/", "to the prompt"), ("?", "this sheet"), ("Esc", "stop; else leave the prompt"),
)  # fmt: skip


def lay_out(board: Board) -> None:
    import gradio as gr

    page = board.page
    models = page.model_choices()
    board.add("bar", template("bar", page.bar(page.first.model), elem_id="brand"))
    board.add(
        "project",
        gr.Dropdown(
            [("New project", NEW)], value=NEW, label="Project", elem_id="project", min_width=0, allow_custom_value=True
        ),
        lambda said: gr.update(choices=[*said[0], ("New project", NEW)], value=said[1]),
    )  # fmt: skip
    plain: dict[str, Any] = dict(min_width=0, filterable=False)
    board.add(
        "model", gr.Dropdown(models, value=page.first.model, label="Model", elem_id="model", **plain), board.model
    )
    board.add(
        "switch", gr.Button(**_switch(page, page.first.model), elem_id="switch", size="lg", min_width=0),
        lambda model: gr.update(**_switch(page, model)),
    )  # fmt: skip
    board.add("queue", template("queue", filling(state="idle", summary="Queue empty", rows=[]), elem_id="queue"))
    if not space.on_a_space():
        gr.Button("Library", elem_id="open-library", size="lg", min_width=0)
    gr.Button("Workshop", elem_id="open-workshop", size="lg", min_width=0)
    gr.Button("Keys", elem_id="open-keys", size="lg", min_width=0)
    keys = filling(keys=[{"key": key, "does": does} for key, does in KEYS])
    board.add("keys", template("keys", keys, elem_id="keys"))


def wire(board: Board, runs: Runs) -> None:
    page, part = board.page, board.parts

    def choose(tab: Tab, model: str) -> Look:
        offer = page.offers.get(model, page.first)
        width, height = offer.sizes[0]
        return page.model(offer.model) | {"size": (offer.model, f"{width}x{height}"), "steps": offer.steps}

    def switch(tab: Tab, model: str, size: str, steps: float) -> Look:
        other = sibling(page.offers.get(model, page.first), page.offers.values())
        return page.model(other.model) | {"size": (other.model, size), "steps": steps} if other else {}

    def steer(tab: Tab, data: dict[str, Any]) -> Iterator[Look]:
        yield from runs.steer(tab, data.get("id"), str(data.get("what")))

    def go(tab: Tab, chosen: object) -> Look:
        # gradio says the choice again when its list loses the focus
        if chosen == tab.project or chosen == NEW and time.monotonic() - tab.begun < TWICE:
            return page.projects(tab)
        if chosen == NEW:
            tab.begun = time.monotonic()
        try:
            return page.whole(tab, chosen_project(page, tab, chosen))
        except EngineError as error:
            return page.refused(error) | page.projects(tab)

    chosen = [*MODEL, "size", "steps"]
    board.on(part["model"].input, choose, ["model"], outputs=chosen)
    board.on(part["switch"].click, switch, ["model", "size", "steps"], outputs=chosen)
    board.on(part["queue"].job, steer, outputs=SCENE, event=True)
    gone = board.on(part["project"].input, go, ["project"])
    board.on(gone.then, page.follow, outputs=SCENE)


def chosen_project(page: Page, tab: Tab, chosen: object) -> int:
    """The id behind a choice in the list: an id, the line for a new one, or the name of one that is to be made."""
    ids = {project.id for project in page.history.projects(tab.owner)}
    if isinstance(chosen, int) and chosen in ids:
        return chosen
    name = chosen if isinstance(chosen, str) and chosen.strip() else f"Project {len(ids) + 1}"
    return page.history.new_project(tab.owner, name).id


def _switch(page: Page, model: str) -> dict[str, Any]:
    """The button that changes to the model's counterpart; away where there is none."""
    other = sibling(page.offers[model], page.offers.values())
    return {"value": f"Switch to {other.short}" if other else "", "visible": other is not None}
