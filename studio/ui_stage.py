"""The middle and the right: the stage with its caption, the tree, and the strip at the bottom."""

from collections.abc import Iterator
from typing import Any

from studio import views
from studio.board import Board
from studio.desk import Desk
from studio.page import REUSED, SCENE, Look, Tab
from studio.runs import Runs
from studio.template import filling, template


def lay_out(board: Board) -> None:
    import gradio as gr

    page = board.page
    with gr.Column(elem_id="centre", min_width=0):
        board.add("stage", template("stage", views.empty(page.examples(), page.installed()), elem_id="stage"))
        board.add("caption", template("caption", views.no_caption(), elem_id="caption"))
    with gr.Column(elem_id="right", min_width=0, scale=0):
        board.add("tree", template("tree", filling(rows=[]), elem_id="tree"))


def lay_out_strip(board: Board) -> None:
    empty = filling(pictures=[], batch=[], kept=0, project=0)
    board.add("strip", template("strip", empty, elem_id="strip"))


def wire(board: Board, runs: Runs, desk: Desk) -> None:
    stage, strip = board.parts["stage"], board.parts["strip"]
    told: dict[str, Any] = dict(event=True)
    scene: dict[str, Any] = dict(outputs=SCENE, event=True)

    def operate(name: str) -> Any:
        def act(tab: Tab, data: dict[str, Any]) -> Iterator[Look]:
            yield from runs.operate(tab, name or str(data.get("name")), data.get("id"))

        return act

    def other(tab: Tab, data: dict[str, Any]) -> Iterator[Look]:
        yield from runs.other_model(tab, data.get("id"))

    def restore(tab: Tab, data: dict[str, Any]) -> Look:
        return desk.restore(tab, data.get("id"))

    board.on(
        stage.pair,
        lambda tab, d: desk.pair(tab, d.get("a"), d.get("b")),
        outputs=["caption", "progress"],
        trigger_mode="always_last",
        **told,
    )
    opened = ["stage", "caption", "progress"]
    marked, tagged = [*opened, "strip", "tree"], ["strip", "progress"]
    restored = [*opened, "prompt", "base", "revisions"]
    board.on(stage.rate, lambda tab, d: desk.rate(tab, d.get("id"), d.get("rating")), outputs=marked, **told)
    board.on(stage.tags, lambda tab, d: desk.tag(tab, d.get("id"), d.get("text")), outputs=tagged, **told)
    board.on(stage.reuse, lambda tab, d: desk.reuse(tab, d.get("id")), outputs=[*REUSED, "progress"], **told)
    board.on(stage.bin, lambda tab, d: desk.bin(tab, d.get("id")), outputs=[*SCENE, "undo"], **told)
    board.on(stage.copied, lambda tab, d: desk.copied(d.get("ok")), outputs=["progress"], **told)
    board.on(stage.vary, operate("vary"), **scene)
    board.on(stage.refine, operate("refine"), **scene)
    board.on(stage.act, operate(""), **scene)
    board.on(stage.other, other, **scene)
    board.on(strip.open, lambda tab, d: desk.open(tab, d.get("id")), outputs=opened, **told)
    board.on(board.parts["revisions"].restore, restore, outputs=restored, **told)
    board.on(board.parts["undo"].click, desk.undo, outputs=[*SCENE, "undo"])
