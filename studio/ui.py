"""The page: its controls, and which function each calls.

Knows where things stand on the screen, and no more: who may draw is `turns`, what can draw is `models`, files are
`pictures`. Gradio is imported inside functions, after `serve.prepare` has told it to stay quiet.
"""

import logging
import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.catalog import Model
from engine.plan import MAX_STEPS
from engine.types import BadRequest, Cancelled, EngineError, Picture, Request, Step
from studio import pictures, privacy
from studio.models import Offer
from studio.settings import Settings
from studio.template import Filling, filling, template
from studio.turns import Engine, Turns, Waiting

if TYPE_CHECKING:
    import gradio as gr

log = logging.getLogger(__name__)

EXAMPLES = (
    "two red circles on a blue background",
    "a green triangle on a yellow background",
    "an orange ring left of a purple square",
    "three pink squares on a black background",
)
NEW_SEEDS = 2**32  # the dice's; noise repeats after that many

# What a run shows, in the order of the outputs: picture, progress, note, Generate, Stop.
Shown = tuple[Any, Any, Any, Any, Any]


class Page:
    """What the controls call. One for all tabs: a tab is told apart by its session."""

    def __init__(self, engine: Engine, settings: Settings, offers: Sequence[Offer]) -> None:
        self._turns = Turns(engine)
        self._settings = settings
        self._offers = {offer.model: offer for offer in offers}

    def generate(self, session: str, prompt: str, size: str, seed: float, steps: float, model: str) -> Iterator[Shown]:
        """Make one picture and show how far it is; every failure ends as a sentence on the page."""
        yield self._busy("Getting ready", 0, 0)
        try:
            request = self._request(prompt, size, seed, steps, model)
            with closing(self._turns.run(session, request)) as run:
                for item in run:
                    yield self._shown(item)
        except Cancelled:
            yield self._ended("stopped", "Stopped. Nothing was saved.")
        except EngineError as error:
            log.info("refused: %s", error)
            yield self._ended("error", _sentence(str(error)))
        except Exception:
            log.exception("a picture failed")
            yield self._ended("error", f"Something in Niwaki broke; the details are in {self._settings.log_file}.")

    def stop(self, session: str) -> None:
        """Stop this tab's picture; other tabs' go on."""
        self._turns.stop(session)

    def bar(self, model: str) -> Filling:
        """What stands at the top: whether the model is a demo, and who can reach this page."""
        reach, is_open = privacy.reach(self._settings.host)
        return filling(demo=self._offers[model].demo, reach=reach, open=is_open)

    def facts(self, model: str) -> Filling:
        """What the panel says about the chosen model."""
        offer = self._offers[model]
        known = f" It knows {offer.words} words and nothing else." if offer.words else ""
        said = f"A demo model: small, made to show what the studio does.{known}" if offer.demo else ""
        return filling(label=offer.label, demo=said, why=_sentence(f"runs on {offer.why}"))

    def choices(self, model: str) -> tuple[list[tuple[str, str]], int]:
        """The sizes that the model declares, as (label, value), the default first; and its steps."""
        return _sizes(self._offers[model]), self._offers[model].steps

    def _request(self, prompt: str, size: str, seed: float, steps: float, model: str) -> Request:
        if seed is None or steps is None:
            raise BadRequest(f"the {'seed' if seed is None else 'number of steps'} is empty: give a whole number")
        width, _, height = size.partition("x")
        return Request(prompt, model, int(seed), int(width), int(height), int(steps))

    def _shown(self, item: Waiting | Step | Picture) -> Shown:
        match item:
            case Waiting():
                return self._busy("Waiting: another picture is being made", 0, 0)
            case Step(index=0, total=total):
                return self._busy(f"Model ready, {total} steps to go", 0, total)
            case Step(index=index, total=total):
                return self._busy(f"Step {index} of {total}", index, total)
            case Picture():
                return self._done(item)

    def _done(self, picture: Picture) -> Shown:
        import gradio as gr

        path = pictures.keep(picture, self._settings.pictures)
        request, seconds = picture.request, picture.seconds.total
        size = f"{request.width} × {request.height}"
        note = filling(
            caption=f"{size}, seed {request.seed}, {request.steps} steps, {seconds:.2f} s",
            where=str(path),
            unknown=_listed(picture.unknown_words),
        )
        shown = gr.update(value=str(pictures.publish(path, self._settings.cache)), alt_text=request.prompt)
        return shown, _progress("done", "", 1, 1), note, gr.update(interactive=True), gr.update(interactive=False)

    @staticmethod
    def _busy(text: str, done: int, total: int) -> Shown:
        import gradio as gr

        progress = _progress("busy", text, done, total)
        return gr.skip(), progress, gr.skip(), gr.update(interactive=False), gr.update(interactive=True)

    @staticmethod
    def _ended(state: str, text: str) -> Shown:
        import gradio as gr

        progress = _progress(state, text, 0, 1)
        return gr.skip(), progress, gr.skip(), gr.update(interactive=True), gr.update(interactive=False)


class Controls(NamedTuple):
    """Everything on the page that an event reads or changes."""

    brand: Any
    model: Any
    prompt: Any
    generate: Any
    stop: Any
    examples: list[Any]
    size: Any
    seed: Any
    dice: Any
    steps: Any
    facts: Any
    image: Any
    progress: Any
    note: Any


def build(engine: Engine, settings: Settings, offers: Sequence[Offer], others: Sequence[Model] = ()) -> "gr.Blocks":
    """The page for these models (the first is chosen), with `others` named as what could be installed."""
    import gradio as gr

    page = Page(engine, settings, offers)
    with gr.Blocks(title="Niwaki", analytics_enabled=False, fill_width=True) as blocks:
        _wire(blocks, page, _lay_out(page, offers, _others(others, settings)))
    return blocks


def _lay_out(page: Page, offers: Sequence[Offer], others: Filling) -> Controls:
    import gradio as gr

    first = offers[0]
    with gr.Row(elem_id="bar"):
        brand = template("bar", page.bar(first.model), elem_id="brand")
        model = gr.Dropdown(
            [(offer.label, offer.model) for offer in offers],
            value=first.model, label="Model", elem_id="model", min_width=360, scale=0, filterable=False,
        )  # fmt: skip
    with gr.Row(elem_id="desk"):
        with gr.Column(elem_id="controls", min_width=300, scale=0):
            prompt = gr.Textbox(
                label="What should the picture show?", placeholder=EXAMPLES[0], lines=1, max_lines=8,
                autofocus=True, elem_id="prompt",
            )  # fmt: skip
            with gr.Row(elem_id="go"):
                generate = gr.Button("Generate", variant="primary", elem_id="generate", scale=3)
                stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=1, min_width=80)
            with gr.Row(elem_id="examples"):
                examples = [gr.Button(text, size="sm", min_width=0, elem_classes="example") for text in EXAMPLES]
            size = gr.Radio(_sizes(first), value=_sizes(first)[0][1], label="Size", elem_id="size")
            with gr.Row(elem_id="luck"):
                seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=120, scale=1)
                dice = gr.Button("⚄ New seed", elem_id="dice", min_width=110, scale=0)
            with gr.Accordion("More", open=False, elem_id="more"):
                steps = gr.Slider(1, MAX_STEPS, first.steps, step=1, label="Steps", elem_id="steps")
            facts = template("facts", page.facts(first.model), elem_id="facts")
            template("others", others, elem_id="others")
        with gr.Column(elem_id="stage", scale=1, min_width=300):
            template("empty", filling(), elem_id="empty")
            image = gr.Image(
                label="Picture", show_label=False, interactive=False, type="filepath", format="png",
                buttons=["download", "fullscreen"], elem_id="picture", container=False,
            )  # fmt: skip
            progress = template("progress", _progress("idle", "", 0, 1), elem_id="progress")
            note = template("note", filling(caption="", where="", unknown=""), elem_id="note")
    return Controls(
        brand, model, prompt, generate, stop, examples, size, seed, dice, steps, facts, image, progress, note
    )  # fmt: skip


def _wire(blocks: "gr.Blocks", page: Page, on: Controls) -> None:
    import gradio as gr

    def generate(
        prompt: str, size: str, seed: float, steps: float, model: str, request: gr.Request
    ) -> Iterator[Shown]:  # fmt: skip
        yield from page.generate(str(request.session_hash), prompt, size, seed, steps, model)

    def stop(request: gr.Request) -> None:
        page.stop(str(request.session_hash))

    def choose(model: str) -> tuple[Any, ...]:
        sizes, steps = page.choices(model)
        return page.bar(model), page.facts(model), gr.update(choices=sizes, value=sizes[0][1]), steps

    run: dict[str, Any] = dict(
        fn=generate,
        inputs=[on.prompt, on.size, on.seed, on.steps, on.model],
        outputs=[on.image, on.progress, on.note, on.generate, on.stop],
        concurrency_limit=None,  # Turns lets one run at a time, and says to the others that they wait
        show_progress="hidden",
        api_visibility="private",
    )
    quick: dict[str, Any] = dict(queue=False, show_progress="hidden", api_visibility="private")
    gr.on([on.prompt.submit, on.generate.click], **run)
    for text, chip in zip(EXAMPLES, on.examples, strict=True):
        chip.click(lambda text=text: text, None, on.prompt, **quick).then(**run)
    on.stop.click(stop, None, None, **quick)
    on.dice.click(lambda: secrets.randbelow(NEW_SEEDS), None, on.seed, **quick)
    on.model.change(choose, on.model, [on.brand, on.facts, on.size, on.steps], **quick)
    blocks.unload(stop)


def _progress(state: str, text: str, done: int, total: int) -> Filling:
    """`state` idle, busy, done, stopped or error; `total` 0 while nobody knows how long it takes."""
    return filling(state=state, text=text, done=done, total=total)


def _sizes(offer: Offer) -> list[tuple[str, str]]:
    return [(f"{width} × {height}", f"{width}x{height}") for width, height in offer.sizes]


def _others(models: Sequence[Model], settings: Settings) -> Filling:
    listed = [
        {
            "id": model.id,
            "label": model.label,
            "repository": model.repository,
            "gigabytes": f"{model.bytes / 1e9:.1f} GB" if model.bytes else "",
        }
        for model in models
    ]
    return filling(folder=str(settings.data_dir / "models"), models=listed)


def _listed(words: Sequence[str]) -> str:
    """“a”, “b” and “c”; from a long list the first eight, and how many more there are."""
    parts = [f"“{word}”" for word in words[:8]]
    if len(words) > 8:
        parts.append(f"{len(words) - 8} more")
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _sentence(text: str) -> str:
    """An engine's message as the page shows it: a capital first, a full stop last."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
