"""The public functions as endpoints of the page's API: generate, vary, history, models.

For scripts (gradio_client) and agents: parameters are typed, the docstrings are what callers read. Every call works on
the caller's own pictures, in a project called API. Errors are sentences.
"""

from typing import Any, TypedDict

from engine.types import BadRequest, EngineError, Request
from studio import files, library, relatives, space
from studio.page import Page
from studio.rows import DONE, Image, Job

PROJECT = "API"
MOST = 200  # pictures of one answer
NAMES = ("generate", "vary", "history", "models")


class Made(TypedDict):
    """One picture as the API tells it. `address` is where this server has its PNG, with the recipe inside."""

    id: int
    address: str
    prompt: str
    model: str
    seed: int
    width: int
    height: int
    steps: int
    operation: str
    parent: int | None
    kept: bool | None
    seconds: float


def add(page: Page) -> None:
    """Declare the endpoints; to be called inside the Blocks."""
    import gradio as gr

    endpoints = _endpoints(page)
    for name in NAMES:
        gr.api(endpoints[name], api_name=name, concurrency_limit=None)


def _endpoints(page: Page) -> dict[str, Any]:
    import gradio as gr

    def generate(
        prompt: str, model: str = "", seed: int = 0, width: int = 0, height: int = 0, steps: int = 0,
        request: gr.Request = None,
    ) -> Made:  # fmt: skip
        """Make one picture and wait for it.

        Args:
            prompt: What the picture shows.
            model: Id of an installed model (see models); empty: the one the page starts with.
            seed: Whole number from 0 on; the same seed and settings give the same picture.
            width: Pixels; 0 with height 0: the model's first size.
            height: Pixels; 0 with width 0: the model's first size.
            steps: Denoising steps; 0: as the model is made for.
        """
        asked = Request(prompt, model or page.first.model, seed, width or None, height or None, steps or None)
        return _told(lambda: _make(page, _owner(request), asked))

    def vary(picture: int, strength: str = "subtle", seed: int = 0, request: gr.Request = None) -> Made:
        """Make a variation of a picture and wait for it.

        Args:
            picture: The picture's id, from generate or history.
            strength: subtle, medium or strong.
            seed: Seed of the noise that is mixed in; 0: a new one.
        """

        def made() -> Made:
            image = page.history.image(_owner(request), picture)
            varied = relatives.vary(image.request, strength, seed or None)
            return _make(page, image.owner, varied, op=f"vary {strength}", image=image)

        return _told(made)

    def history(text: str = "", kept: bool = False, limit: int = 20, request: gr.Request = None) -> list[Made]:
        """The newest pictures.

        Args:
            text: Only pictures whose prompt, tags or note contain this phrase.
            kept: Only kept pictures.
            limit: How many at most, up to 200.
        """

        def found() -> list[Made]:
            if not 1 <= limit <= MOST:
                raise BadRequest(f"limit {limit} is out of range: give 1 to {MOST}")
            wanted = library.Filter(text=text or None, kept=True if kept else None)
            return [_made(image) for image in library.page(page.history, _owner(request), wanted, limit=limit).images]

        return _told(found)

    def models() -> list[dict[str, Any]]:
        """The installed models: id, label, demo or not, sizes in pixels, steps, where it runs and why."""
        return [
            {"id": offer.model, "label": offer.label, "demo": offer.demo, "steps": offer.steps,
             "sizes": [list(size) for size in offer.sizes], "why": offer.why}
            for offer in page.offers.values()
        ]  # fmt: skip

    return {"generate": generate, "vary": vary, "history": history, "models": models}


def _owner(request: Any) -> str:
    return space.owner(str(getattr(request, "session_hash", None) or ""))


def _told(work: Any) -> Any:
    """The result, or the sentence as an error that gradio shows to the caller."""
    import gradio as gr

    try:
        return work()
    except EngineError as error:
        raise gr.Error(str(error), print_exception=False) from None


def _make(page: Page, owner: str, asked: Request, op: str = "make", image: Image | None = None) -> Made:
    if space.on_a_space():
        space.forget_idle(page.history, page.jobs, page.owners())
    project = image.project if image else _project(page, owner)
    base = image.revision if image else None
    (job,) = page.jobs.submit(owner, project, asked, op=op, parent=image.id if image else None, base=base)
    over: Job = [*page.jobs.watch(owner, job.id)][-1]
    if over.state != DONE or over.image is None:
        raise EngineError(over.error or f"the picture was {over.state}: ask for it again")
    return _made(page.history.image(owner, over.image))


def _project(page: Page, owner: str) -> int:
    there = (project.id for project in page.history.projects(owner) if project.name == PROJECT)
    found = next(there, None)
    return page.history.new_project(owner, PROJECT).id if found is None else found


def _made(image: Image) -> Made:
    request = image.request
    return Made(
        id=image.id, address=files.picture(image), prompt=request.prompt, model=request.model, seed=request.seed,
        width=request.width or 0, height=request.height or 0, steps=request.steps or 0, operation=image.op,
        parent=image.parent, kept=image.kept, seconds=image.seconds,
    )  # fmt: skip
