"""The torch backend: one Request in, Steps and a Picture out, with one model in memory at a time.

It joins the parts. It doesn't know what a model is made of (model.py), who waits for the picture, or where it goes.
"""

import os
import platform
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine import catalog, plan, products, prompt
from engine.hardware import Hardware, available_bytes, resident_bytes
from engine.packs import Pack
from engine.preview import Previews
from engine.sampling import sampled
from engine.torch_backend import decoder_card, kernels, triton_check
from engine.torch_backend.measure import measure, measure_card
from engine.torch_backend.model import Check, Model, give_back, placed
from engine.types import Cancelled, EngineError, Picture, Request, Seconds, Step

QUICK = 0.25  # seconds of a step up to which a card is given the next one before anybody waits


class Clock:
    """Wall-clock seconds of a picture's parts. A card's queue is marked, not waited for: it never runs empty then."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._marks: list[tuple[str, Mark]] = [("", perf_counter())]

    def on(self, device: torch.device) -> None:
        """What follows is done there; before the first lap."""
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self._marks = [("", self._marks[0][1]), ("", perf_counter()), ("", self._mark())]

    def lap(self, part: str) -> None:
        """What was done since the last lap belongs to this part."""
        self._marks.append((part, self._mark()))

    def skip(self) -> None:
        """What was done since the last lap belongs to none, but to the total."""
        self.lap("")

    def done(self, steps: Iterator[Tensor]) -> Iterator[Tensor]:
        """Each of the steps when it is computed. Where a card makes them so quickly that launching matters, it has
        already been given the next one, and the last one counts as done as soon as it is queued."""
        if self.device.type != "cuda":
            yield from steps
            return
        queued: list[tuple[Tensor, torch.cuda.Event]] = []
        quick, before = False, perf_counter()
        for latents in steps:
            queued.append((latents, self._event()))
            if len(queued) > quick:
                one, event = queued.pop(0)
                event.synchronize()
                yield one
                quick, before = perf_counter() - before < QUICK, perf_counter()
        yield from (one for one, _ in queued)

    def seconds(self) -> Seconds:
        """Waits for the card, if nobody has."""
        spent = dict.fromkeys(("", "load", "encode", "denoise", "decode"), 0.0)
        for (_, before), (part, mark) in pairwise(self._marks):
            spent[part] += _between(before, mark)
        total = sum(spent.values())
        del spent[""]
        return Seconds(**spent, total=total)

    def _mark(self) -> "Mark":
        return self._event() if self.device.type == "cuda" else perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


Mark = float | torch.cuda.Event  # a moment of the computer, or of a card's queue


def _between(before: Mark, after: Mark) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    if isinstance(before, float) or isinstance(after, float):
        return 0.0  # the same moment, marked both ways (Clock.on)
    after.synchronize()
    return before.elapsed_time(after) / 1000


class Making(NamedTuple):
    """A picture in the making: a complete request, and how it is to be done."""

    model: Model
    request: Request
    decided: plan.Plan
    check: Check
    clock: Clock


class TorchBackend:
    """CPU and CUDA. See engine.types.Backend for the contract."""

    name = "torch"

    def __init__(
        self, hardware: Hardware, data_dir: Path, int8: bool | None = None, *, previews: bool = False
    ) -> None:
        """`int8` True or False instead of what the plan chooses; with `previews` slow steps show what is coming."""
        self.hardware = hardware
        self.data_dir = data_dir
        self.int8 = int8
        self.previews = previews
        self._model: Model | None = None
        self._rates: products.Numbers | None = None  # this machine's, once they were measured

    def prepare(self) -> None:
        """Compile a card's kernels, once for all pictures of packed models: some ten seconds on 16 cores."""
        if self.hardware.kind == "cuda" and torch.cuda.is_available():
            with suppress(torch.OutOfMemoryError):  # somebody else has the card at the moment: a picture will ask again
                triton_check.found()
                decoder_card.passes()
            give_back()

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Generator[Step | Picture, None, None]:
        """Yields Step(0, n) .. Step(n, n) and a Picture.

        Raises BadRequest before anything is loaded or dropped, Cancelled within one block of `cancelled` turning true,
        EngineError when the tensors don't fit or the memory doesn't suffice.
        """

        def check() -> None:
            if cancelled():
                raise Cancelled("the picture was cancelled before it was finished; generate again to get it")

        try:
            with sampled(allocated_bytes) as samples:
                for answer in self._generate(request, check):
                    if isinstance(answer, Picture) and samples:
                        answer = replace(answer, mean_memory_bytes=round(fmean(samples)))
                    yield answer
        except torch.OutOfMemoryError:
            self.close()
            raise EngineError(
                f"{self.hardware.name} has too little free memory for this picture with {request.model}; ask for a "
                "smaller size, or close other programs that use the card"
            ) from None

    def _generate(self, request: Request, check: Check) -> Iterator[Step | Picture]:
        clock = Clock()
        model = self._open(catalog.find(request.model, self.data_dir))
        request = plan.complete(request, model.pack)
        making = Making(model, request, self._decide(model.pack, request), check, clock)
        clock.on(placed(making.decided)[1])
        if clock.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(clock.device)
        embeddings, encoded = model.embeddings.get(request.prompt), None
        if embeddings is None:
            encoded = model.tokenizer.encode(request.prompt, model.pack.notes.text_length)
        if model is not self._model:
            self.close()  # the old model first: two do not fit where one just does
            self._model = model
        if encoded is not None:
            embeddings = self._read(making, *encoded[:2])
        assert embeddings is not None
        self._load(making)
        latents = yield from self._denoised(making, embeddings)
        yield self._decoded(making, latents)

    def _read(self, making: Making, ids: np.ndarray, mask: np.ndarray) -> Tensor:
        """The embeddings of a prompt that was not read before."""
        model, request, decided, check, clock = making
        if model.load_encoder(decided):
            if decided.int8:
                model.admit_reading(self.data_dir, self.hardware)
            if clock.device.type == "cuda" and decided.keep_text_encoder:
                model.record_reading(self.data_dir, self.hardware)
            clock.lap("load")
        embeddings = model.embed(request.prompt, ids, mask, decided, check)
        clock.lap("encode")
        return embeddings

    def _load(self, making: Making) -> None:
        """Whatever a picture needs beside its prompt's embeddings."""
        model, _, decided, check, clock = making
        if model.load(decided, check):
            if decided.int8:
                model.admit(self.data_dir, self.hardware)
            if clock.device.type == "cuda":
                model.record(self.data_dir, self.hardware)
            clock.lap("load")

    def _denoised(self, making: Making, embeddings: Tensor) -> Generator[Step, None, Tensor]:
        """Step(0, n) .. Step(n, n); returns the last latents."""
        model, request, decided, check, clock = making

        def shown(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
            if decided.hand_back:
                give_back()
            return model.decode(torch.from_numpy(tokens).to(clock.device), grid, decided, check)

        total, previews = model.recent.steps_to_make(request), Previews(shown)
        yield Step(0, total)
        clock.skip()
        made = clock.done(model.denoised(request, embeddings, clock.device, check))
        for index, latents in enumerate(made, start=1):  # noqa: B007 the last are returned
            assert model.on_the_way is not None
            wanted = self.previews and index < total
            yield Step(index, total, previews.after(*model.on_the_way) if wanted else None)
        if model.admission:
            model.admission.settle()
        clock.lap("denoise")
        return latents

    def _decoded(self, making: Making, latents: Tensor) -> Picture:
        model, request, decided, check, clock = making
        if decided.hand_back:
            if model.graphs:
                model.graphs.clear()
            give_back()
        pixels = model.decode(latents, plan.token_grid(request, model.pack), decided, check, decided.vae_tile)
        clock.lap("decode")
        return Picture(
            pixels=pixels,
            request=request,
            backend=self.name,
            reason=decided.why,
            seconds=clock.seconds(),
            peak_memory_bytes=peak_memory_bytes(clock.device),
            unknown_words=prompt.unknown_words(request.prompt, model.pack.notes.vocabulary),
            dtype=f"{decided.dtype} with int8" if model.admission else decided.dtype,
        )

    def _decide(self, pack: Pack, request: Request) -> plan.Plan:
        """The plan; for a big pack where nobody has measured products yet, after measuring them."""
        self._rates = rates = self._rates or products.rates(self.data_dir, self.hardware)
        room = self._available()
        decided = plan.plan(self.hardware, pack, request, self.name, room, rates, self.int8)
        on_card = decided.device == "cuda"  # where only int8 depends on it
        open_question = plan.bears_int8(pack) and self.int8 is None if on_card else True
        if rates or not plan.is_big(pack) or not open_question:
            return decided
        rates = measure_card() if on_card else self._measured(pack)
        products.keep_rates(self.data_dir, self.hardware, rates)
        return plan.plan(self.hardware, pack, request, self.name, room, rates, self.int8)

    def _measured(self, pack: Pack) -> products.Numbers:
        """How fast this processor multiplies a pack's layers."""
        if (quantization := pack.transformer.quantization) is None:
            return measure()
        passes = kernels.chosen(self.data_dir, self.hardware, quantization.group_size)
        return measure(passes[0] if passes else None, quantization.group_size)

    def _open(self, folder: Path) -> Model:
        if self._model is not None and self._model.pack.folder == folder:
            return self._model
        return Model(folder)

    def _available(self) -> int:
        """Bytes that this process may have, with what it has already; 0 where nobody knows."""
        if self.hardware.kind == "cuda" and torch.cuda.is_available():
            return torch.cuda.mem_get_info()[0] + counted("reserved_bytes")
        free = available_bytes()
        return free + resident_bytes() if free else 0

    def close(self) -> None:
        """Drop the model. The next picture loads again."""
        self._model = None
        give_back()


def use_cores(hardware: Hardware) -> None:
    """A thread for each physical core of this process, unless the user has said how many. For the whole process."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(hardware.cores)


def allocated_bytes() -> int:
    """What tensors take on the card now, at least 1; 0 without a card."""
    return max(1, counted("allocated_bytes")) if torch.cuda.is_available() else 0


def counted(what: str, when: str = "current") -> int:
    """By torch's allocator on the card; torch's own functions for this take 0.3 ms each."""
    return int(torch.cuda.memory_stats_as_nested_dict().get(what, {}).get("all", {}).get(when, 0))


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: the most that this picture's tensors took. CPU: the most this process ever had in memory; 0 on Windows."""
    if device.type == "cuda":
        return counted("allocated_bytes", "peak")
    if platform.system() == "Windows":
        return 0
    if platform.system() == "Linux":
        return resident_bytes(field="VmHWM")  # not ru_maxrss, which a spawned process inherits from its parent
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes, unlike the others
