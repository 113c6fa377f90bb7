"""The page's components by name, and events wired to functions that answer with a Look.

Knows gradio's ways (one output list per event, hints that ask for the request) so that nobody else has to. A Look may
name any part; what a part needs besides its value (choices, a label) its `show` function makes of it.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from studio.page import BREATH, Look, Page, Tab

Show = Callable[[Any], Any]

# Without an empty `show_progress_on`, gradio's script tells every output of every event about each event's progress.
QUIET: dict[str, Any] = dict(show_progress="hidden", show_progress_on=[], api_visibility="private")


class Board:
    """Names for components. Regions add theirs with `add` and wire them with `on`, after all are laid out."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.parts: dict[str, Any] = {}
        self._shows: dict[str, Show] = {}

    def add(self, name: str, component: Any, show: Show | None = None) -> Any:
        """Name a component; `show` turns what a Look says into gradio's update. Without it that is the value."""
        self.parts[name] = component
        if show is not None:
            self._shows[name] = show
        return component

    def on(
        self, trigger: Any, answer: Callable[..., Any], inputs: Sequence[str] = (), *,
        outputs: Sequence[str] | None = None, event: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """Wire `trigger` (a component's event, or a list of them) to answer(tab, [event data,] *values of `inputs`).

        A generator function streams Looks and runs beside others; anything else answers at once, past gradio's queue.
        `outputs` are the parts that it may name: gradio builds each of them anew for every Look, named or not (0.7 ms
        a part), so None, every part, is for a project that opens. Empty: the answer is thrown away.
        """
        import gradio as gr

        names = tuple(self.parts if outputs is None else outputs)

        def once(request: gr.Request, data: gr.EventData, *values: Any) -> Any:
            given = (data._data or {},) if event else ()
            tab = self.tab(request)
            return self.update(tab, answer(tab, *given, *values), names)

        def stream(request: gr.Request, data: gr.EventData, *values: Any) -> Iterator[Any]:
            given = (data._data or {},) if event else ()
            tab = self.tab(request)
            for look in answer(tab, *given, *values):
                yield self.update(tab, look, names)
            time.sleep(BREATH)  # a template whose value is followed at once by another message may not be drawn
            yield self.update(tab, {}, names)  # gradio says a stream's last word twice, the second time out of date

        streams = inspect.isgeneratorfunction(answer)
        chosen: dict[str, Any] = dict(
            fn=stream if streams else once,
            inputs=[self.parts[name] for name in inputs],
            outputs=[self.parts[name] for name in names],
            trigger_mode="multiple",
        )
        chosen |= QUIET
        # As they come: an event that was on its way when the model changed, and the sizes with it, would be refused
        # without a word for a size that isn't in the list any more. What is asked is checked when it is asked for.
        chosen |= dict(preprocess=any(isinstance(part, gr.File | gr.UploadButton) for part in chosen["inputs"]))
        # A stream lasts as long as the queue is busy: any number of tabs may look.
        chosen |= dict(concurrency_limit=None) if streams else dict(queue=False)
        chosen |= options
        return gr.on(trigger, **chosen) if isinstance(trigger, list) else trigger(**chosen)

    def update(self, tab: Tab, look: Look, names: Sequence[str] | None = None) -> Any:
        """A Look as gradio takes it from a function whose outputs are these parts (None: all)."""
        import gradio as gr

        wanted = self.parts if names is None else names
        if strange := look.keys() - set(wanted):
            raise KeyError(f"an event answers with {sorted(strange)}, which are not among its outputs")
        tab.shown.update(look)
        found = {self.parts[name]: self._shown(name, value) for name, value in look.items()}
        if found or not wanted:
            return found or None
        return gr.skip() if len(wanted) == 1 else tuple(gr.skip() for _ in wanted)

    def model(self, chosen: Any) -> Any:
        """For a list of models: what is installed by now, and what is chosen (None: what was chosen)."""
        import gradio as gr

        choices = self.page.model_choices()
        return gr.update(choices=choices) if chosen is None else gr.update(choices=choices, value=chosen)

    def tab(self, request: Any) -> Tab:
        """The tab that a gradio request comes from."""
        return self.page.tab(str(request.session_hash))

    def _shown(self, name: str, value: Any) -> Any:
        show = self._shows.get(name)
        return value if show is None else show(value)
