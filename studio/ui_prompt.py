"""The left column: the prompt and what changed in it, Generate, sizes, seed, steps, revisions."""

import secrets
from collections.abc import Iterator
from typing import Any

from engine.plan import MAX_STEPS
from studio.board import Board
from studio.models import Offer
from studio.page import Look, Tab
from studio.runs import CONTROLS, NEW_SEEDS, SEEDS, STARTED, Runs
from studio.template import filling, template
from studio.views import idle


def lay_out(board: Board) -> None:
    import gradio as gr

    page = board.page
    with gr.Column(elem_id="left", min_width=0, scale=0):
        with gr.Column(elem_id="ask", min_width=0):  # on a phone it stays at the bottom of the screen
            _ask(board)
        board.add(
            "undo", gr.Button("Undo", elem_id="undo", visible=False, min_width=0), lambda on: gr.update(visible=on)
        )
        _sizes_and_seed(board, page.first)
        template("sheets", filling(), elem_id="sheets")
        board.add("revisions", template("revisions", filling(rows=[]), elem_id="revisions"))


def _ask(board: Board) -> None:
    import gradio as gr

    board.add("prompt", gr.Textbox(
        label="What should the picture show?", placeholder=board.page.examples()[0][1], lines=1, max_lines=8,
        elem_id="prompt",
    ))  # fmt: skip
    board.add("diff", template("words", filling(label="", words=[]), elem_id="diff"))
    with gr.Row(elem_id="go"):
        board.add("generate", gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=0))
        board.add("four", gr.Button(f"{SEEDS} seeds", elem_id="four", scale=1, min_width=0))
        board.add("stop", gr.Button("Stop", elem_id="stop", scale=1, min_width=0))
    board.add("progress", template("progress", idle(), elem_id="progress"))


def _sizes_and_seed(board: Board, first: Offer) -> None:
    import gradio as gr

    board.add(
        "size", gr.Radio(sizes(first), value=sizes(first)[0][1], label="Size", elem_id="size"), _size_update(board)
    )
    board.add("quality", gr.Radio(
        [("Full", "full"), ("Draft, half as wide", "draft")], value="full", label="Quality", show_label=False,
        elem_id="quality",
    ))  # fmt: skip
    with gr.Row(elem_id="luck"):
        board.add("seed", gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=60, scale=1))
        board.add("lock", gr.Checkbox(True, label="Lock", elem_id="lock", min_width=0, scale=0, container=False))
        board.add("live", gr.Checkbox(False, label="Live", elem_id="live", min_width=0, scale=0, container=False))
        board.add("dice", gr.Button("⚄ New", elem_id="dice", min_width=0, scale=0))
    board.add("unmix", gr.Button("", elem_id="unmix", visible=False, min_width=0), _unmix)
    with gr.Accordion("More", open=False, elem_id="more") as more:
        board.add("steps", gr.Slider(1, MAX_STEPS, first.steps, step=1, label="Steps", elem_id="steps"))
        board.add("facts", template("facts", board.page.facts(first.model), elem_id="facts"))
        board.add("foresee", gr.Markdown("", elem_id="foresee", elem_classes="soft"))
    board.add("more", more)
    board.add("base", gr.Number(0, visible=False, precision=0))
    board.add("past", gr.JSON(None, visible=False))


def wire(board: Board, runs: Runs) -> None:
    controls = ["prompt", "stage", *CONTROLS]

    def asked(values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(CONTROLS, values, strict=True))

    def run(tab: Tab, prompt: str, stage: Any, *values: Any) -> Iterator[Look]:
        yield from runs.run(tab, prompt, asked(values), stage)

    def four(tab: Tab, prompt: str, stage: Any, *values: Any) -> Iterator[Look]:
        yield from runs.run(tab, prompt, asked(values), stage, SEEDS)

    def example(tab: Tab, data: dict[str, Any], prompt: str, stage: Any, *values: Any) -> Iterator[Look]:
        yield from runs.example(tab, int(data.get("index", 0)), asked(values))

    def typed(tab: Tab, prompt: str, *values: Any) -> Look:
        saved = asked(values)
        runs.save(tab, prompt, saved)
        return {"diff": board.page.diff(tab, prompt, saved["base"])}

    def saved(tab: Tab, prompt: str, *values: Any) -> Look:
        runs.save(tab, prompt, asked(values))
        return {}

    part = board.parts
    board.on([part["prompt"].submit, part["generate"].click], run, controls, outputs=STARTED)
    board.on(part["four"].click, four, controls, outputs=STARTED)
    board.on(part["stage"].example, example, controls, outputs=[*STARTED, "prompt"], event=True)
    board.on(part["stop"].click, runs.stop, outputs=["progress"])
    board.on(
        part["dice"].click,
        lambda tab: {"seed": secrets.randbelow(NEW_SEEDS)} | board.page.past(None),
        outputs=["seed", "past", "unmix"],
    )
    board.on(part["unmix"].click, lambda tab: board.page.past(None), outputs=["past", "unmix"])
    box = ["prompt", *CONTROLS]
    board.on(part["prompt"].change, typed, box, outputs=["diff"], trigger_mode="always_last")
    rest = [part[name].change for name in CONTROLS if name not in ("model", "base")]
    board.on(rest, saved, box, outputs=[], trigger_mode="always_last")


def sizes(offer: Offer) -> list[tuple[str, str]]:
    """The sizes that a model declares, as (label, value), the default first."""
    return [(f"{width} × {height}", f"{width}x{height}") for width, height in offer.sizes]


def _unmix(text: str) -> Any:
    """The button that says what of a reused picture is taken over unseen, and drops it."""
    import gradio as gr

    return gr.update(value=f"{text} ✕", visible=bool(text))


def _size_update(board: Board) -> Any:
    """What a Look says of the size is a value, or (model, value): then the choices are that model's."""
    import gradio as gr

    def show(said: str | tuple[str, str]) -> Any:
        if isinstance(said, str):
            return said
        model, value = said
        choices = sizes(board.page.offers.get(model, board.page.first))
        if value not in dict((v, k) for k, v in choices):
            choices = [*choices, (value.replace("x", " × "), value)]
        return gr.update(choices=choices, value=value)

    return show
