"""The page, composed of its regions.

Knows which regions there are and in which order they are drawn; what they hold is theirs (ui_*.py), what they say is
`page`'s and its friends'. Gradio is imported inside functions, after `serve.prepare` has told it to stay quiet.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from engine.catalog import Model
from studio import api, space, ui_bar, ui_library, ui_prompt, ui_stage, ui_workshop
from studio.batches import Batches
from studio.board import QUIET, Board
from studio.desk import Desk
from studio.extras import Extras
from studio.history import History
from studio.jobs import Jobs
from studio.models import Offer
from studio.page import SCENE, Look, Page, Tab
from studio.runs import Runs
from studio.settings import Settings
from studio.shelf import Shelf
from studio.shop import Shop
from studio.storage import Storage

if TYPE_CHECKING:
    import gradio as gr


def build(
    history: History, jobs: Jobs, settings: Settings, offers: Sequence[Offer], others: Sequence[Model] = ()
) -> "gr.Blocks":
    """The page for these models (the first is chosen), with `others` named as what could be installed."""
    import gradio as gr

    page = Page(history, jobs, settings, offers, others, patient=True)
    runs, desk, shelf = Runs(page), Desk(page), Shelf(page)
    extras, batches, shop = Extras(page, runs), Batches(page, runs), Shop(page)
    board = Board(page)
    with gr.Blocks(title="Niwaki", analytics_enabled=False, fill_width=True) as blocks:
        with gr.Row(elem_id="bar"):
            ui_bar.lay_out(board)
        with gr.Row(elem_id="desk"):
            ui_prompt.lay_out(board)
            ui_stage.lay_out(board)
        ui_stage.lay_out_strip(board)
        if not space.on_a_space():
            ui_library.lay_out(board, shelf)
        storage = ui_workshop.lay_out(board, shop)
        ui_prompt.wire(board, runs)
        ui_bar.wire(board, runs)
        ui_stage.wire(board, runs, desk)
        if not space.on_a_space():
            ui_library.wire(board, shelf)
        ui_workshop.wire(board, extras, batches, shop)
        ui_workshop.wire_live(board, extras, shop)
        ui_workshop.wire_storage(board, storage, Storage(page))
        api.add(page)
        _wire_opening(blocks, board, lambda tab, look: shop.opened(tab, extras.asked(look)))
        _wire_leaving(blocks, board)
    return blocks


def _wire_leaving(blocks: "gr.Blocks", board: Board) -> None:
    """On a Space a visitor's pictures go with the visit."""
    import gradio as gr

    def left(request: gr.Request) -> None:
        page, session = board.page, str(request.session_hash)
        page.close(session)
        space.farewell(page.history, page.jobs, space.owner(session))

    if space.on_a_space():
        blocks.unload(left)


def _wire_opening(blocks: "gr.Blocks", board: Board, more: Callable[[Tab, Look], Look]) -> None:
    """A page that opens shows its project as it was left, and follows what still runs."""
    import gradio as gr

    page = board.page

    def opened(request: gr.Request) -> Any:
        tab = board.tab(request)
        whole = page.whole(tab, request.query_params.get("project"))
        return board.update(tab, whole | more(tab, whole))

    loaded = blocks.load(opened, None, list(board.parts.values()), queue=False, **QUIET)
    board.on(loaded.then, page.follow, outputs=SCENE)
    # A safety net for another tab's pictures and lost connections, never the fast path.
    late = ["stage", "caption", "strip", "tree", "revisions", "queue", "progress", "model", "grid_models"]
    board.on(gr.Timer(5).tick, page.tick, outputs=late)
