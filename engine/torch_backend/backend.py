"""The torch backend: one Request in, Steps and a Picture out, with one model in memory at a time.

It joins the parts and owns the denoising loop. It doesn't know how weights are packed (linear.py), who waits for the
picture, or where it goes.
"""

import ctypes
import gc
import os
import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine import catalog, measured, plan, products, prompt, schedule
from engine.embeddings import EmbeddingCache
from engine.hardware import Hardware, available_bytes, resident_bytes
from engine.latents import Recent, begin, enlarge, foreseen
from engine.packs import Pack, open_pack
from engine.preview import Previews
from engine.sampling import sampled
from engine.torch_backend import fused, kernels, linear, remember, triton_passes
from engine.torch_backend.admission import Admission
from engine.torch_backend.graph import Graphs
from engine.torch_backend.mapped import MappedFiles
from engine.torch_backend.measure import measure, measure_card
from engine.torch_backend.passes import TorchPasses
from engine.torch_backend.text_encoder import TextEncoder
from engine.torch_backend.transformer import Flux2Transformer2DModel, token_ids
from engine.torch_backend.vae import PictureDecoder
from engine.types import Cancelled, EngineError, Picture, Request, Seconds, Step

Check = Callable[[], None]


@torch.inference_mode()  # as a decorator: `with` around a yield would leak into whoever resumes the generator
def denoise(
    transformer: Callable[..., Tensor],
    latents: Tensor,
    embeddings: Tensor,
    sigmas: np.ndarray,
    grid: tuple[int, int],
    check: Check,
    restart: Callable[[], bool] = lambda: False,
) -> Iterator[Tensor]:
    """Euler steps from noise to picture: yields the latents, float32 [1, rows * columns, C], after each step.

    `latents` float32 noise of that shape, `embeddings` [1, L, joint_attention_dim] in the weights' dtype, `sigmas`
    float32 [steps + 1] falling from 1 (or where a draft is taken up) to 0,
    `grid` (rows, columns). The latents stay float32 between steps. `restart` is asked after each: when it says so, the
    steps so far are made again, since a layer has changed its arithmetic meanwhile.
    """
    img_ids, txt_ids = token_ids(embeddings.shape[1], grid, latents.device)

    def stepped(latents: Tensor, sigma: float, sigma_next: float) -> Tensor:
        timestep = torch.full((1,), sigma, device=latents.device)
        velocity = transformer(latents.to(embeddings.dtype), embeddings, timestep, img_ids, txt_ids, check)
        return latents + (sigma_next - sigma) * velocity.float()

    start, pairs = latents, list(pairwise(sigmas.tolist()))
    for index, pair in enumerate(pairs, start=1):
        latents = stepped(latents, *pair)
        while restart():
            latents = start
            for earlier in pairs[:index]:
                latents = stepped(latents, *earlier)
        yield latents


class Weights(NamedTuple):
    transformer: Flux2Transformer2DModel
    decoder: PictureDecoder
    files: tuple[MappedFiles, ...]


class Model:
    """An open pack; its text encoder while prompts are read, and from the first picture on its other weights."""

    def __init__(self, folder: Path) -> None:
        self.pack = open_pack(folder)
        self.tokenizer = prompt.Tokenizer(self.pack.tokenizer)
        self.embeddings: EmbeddingCache[Tensor] = EmbeddingCache()
        self.recent = Recent()
        self.text_encoder: TextEncoder | None = None
        self.weights: Weights | None = None
        self.admission: Admission | None = None
        self.graphs: Graphs | None = None
        self.reading: Admission | None = None  # the text encoder's, as long as it is loaded
        self.on_the_way: tuple[Callable[[], np.ndarray], tuple[int, int]] | None = None  # to the end, after a step

    def load_encoder(self, decided: plan.Plan) -> bool:
        """Open the text encoder, and say whether that was needed. Where it does not stay, the pages of the other
        weights leave memory for it."""
        if self.text_encoder is not None:
            return False
        if self.weights is not None and not decided.keep_text_encoder:
            for files in self.weights.files:
                files.release()
        states = self.pack.notes.hidden_states
        self.text_encoder = TextEncoder(self.pack.text_encoder, states, *placed(decided))
        return True

    def embed(self, words: str, ids: np.ndarray, mask: np.ndarray, decided: plan.Plan, check: Check) -> Tensor:
        """The prompt's embeddings, cached. Where the plan says so the text encoder is gone afterwards, and after a
        cancel too. `load_encoder` comes first."""
        assert self.text_encoder is not None
        try:
            embeddings = self.text_encoder.encode(ids, mask, check)
            if self.reading is not None:
                self.reading.settle()
        finally:
            if self.reading is not None:
                self.reading.clear()
            if not decided.keep_text_encoder:
                self.text_encoder.files.release()
                self.text_encoder = self.reading = None
                give_back()
        self.embeddings.put(words, embeddings)
        return embeddings

    def load(self, decided: plan.Plan, check: Check) -> bool:
        """Open the transformer and the decoder, and say whether that was needed."""
        if self.weights is not None:
            return False
        with torch.device("meta"):
            transformer = Flux2Transformer2DModel.from_config(self.pack.transformer.config)
        files = linear.build(transformer, self.pack.transformer, *placed(decided))
        if decided.device == "cpu":
            remember.install(transformer)
        check()
        decoder = PictureDecoder(self.pack.vae, *placed(decided))
        self.weights = Weights(transformer, decoder, (files, decoder.files))
        return True

    def admit(self, data_dir: Path, hardware: Hardware, trial: bool = True) -> None:
        """Let the transformer's packed layers multiply as bytes: those that an earlier picture admitted, or on trial
        until the end of this one. Without `trial` nothing is done where there was no such picture."""
        assert self.weights is not None
        self.admission = self._admission(self.weights.transformer, "transformer", data_dir, hardware, trial)
        if self.admission is not None:
            fused.install(self.weights.transformer, self.admission)
            for files in self.weights.files:
                files.release()  # the scales were read and are folded: they need not stay

    def record(self, data_dir: Path, hardware: Hardware) -> None:
        """Run steps as CUDA graphs, once layers are no longer on trial. After `admit`."""
        assert self.weights is not None
        admission = self.admission

        def ready() -> bool:
            return admission is None or not admission.trial

        def told(words: str) -> None:
            measured.keep(data_dir, f"graphs on {hardware.name}", {"sentence": words})

        self.graphs = Graphs(self.weights.transformer, ready, admission.scratch if admission else None, told)

    def admit_reading(self, data_dir: Path, hardware: Hardware, trial: bool = True) -> None:
        """The same for the text encoder, until its first prompt was read."""
        assert self.text_encoder is not None
        self.reading = self._admission(self.text_encoder.model, "text_encoder", data_dir, hardware, trial)

    def _admission(
        self, module: nn.Module, part: products.Part, data_dir: Path, hardware: Hardware, trial: bool
    ) -> Admission | None:
        quantization = (self.pack.transformer if part == "transformer" else self.pack.text_encoder).quantization
        tried = {name: products.errors(data_dir, self.pack, name, part) for name in products.PASSES}
        found = {name: errors for name, errors in tried.items() if errors}
        if quantization is None or not (trial or found):
            return None
        if next(module.parameters()).device.type == "cuda":
            passes: Sequence[Any] = triton_passes.chosen(data_dir, hardware)
        else:
            passes = kernels.chosen(data_dir, hardware, quantization.group_size) or [TorchPasses()]
        keep = partial(products.keep_errors, data_dir, self.pack, part=part)
        made = Admission(module, passes, found, keep=keep, trial=trial)
        return made if made.layers else None

    def denoised(self, request: Request, embeddings: Tensor, device: torch.device, check: Check) -> Iterator[Tensor]:
        """The latents after each step of a complete request, those of its draft first unless they are remembered.

        The last ones are the picture's, and are remembered for whoever refines it. The model must be loaded.
        """
        assert self.weights is not None and request.steps is not None
        x0, draft = None, request.draft
        if draft is not None:
            x0 = self.recent.get(draft)
            if x0 is None:
                for latents in self.denoised(draft, embeddings, device, check):
                    yield latents
                x0 = latents.cpu().numpy()
            x0 = enlarge(x0, token_grid(draft, self.pack), token_grid(request, self.pack))
        grid = token_grid(request, self.pack)
        sigmas = schedule.sigmas(grid[0] * grid[1], request.steps)
        start = begin(request, self.pack.transformer.config["in_channels"], grid, sigmas, x0)
        noisy, rest = torch.from_numpy(start).to(device), sigmas[request.start :]
        again = self.admission.restart if self.admission else lambda: False
        run = denoise(self.graphs or self.weights.transformer, noisy, embeddings, rest, grid, check, again)
        try:
            for latents, pair in zip(run, pairwise(rest.tolist()), strict=True):
                self.on_the_way = partial(_expected, noisy, latents, *pair), grid
                yield latents
                noisy = latents
        finally:
            if self.admission:
                self.admission.clear()
        self.recent.put(request, latents.cpu().numpy())


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
        pack = model.pack
        request = plan.complete(request, pack)
        assert request.steps is not None
        decided = self._decide(pack, request)
        _, device = placed(decided)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        encoded = None
        if (embeddings := model.embeddings.get(request.prompt)) is None:
            encoded = model.tokenizer.encode(request.prompt, pack.notes.text_length)
        if model is not self._model:
            self.close()  # the old model first: two do not fit where one just does
            self._model = model
        load = encode = 0.0
        if embeddings is None:
            assert encoded is not None
            if model.load_encoder(decided):
                if decided.int8:
                    model.admit_reading(self.data_dir, self.hardware)
                load = clock.lap(device)
            embeddings = model.embed(request.prompt, encoded[0], encoded[1], decided, check)
            encode = clock.lap(device)
        if model.load(decided, check):
            if decided.int8:
                model.admit(self.data_dir, self.hardware)
            if device.type == "cuda":
                model.record(self.data_dir, self.hardware)
            load += clock.lap(device)
        assert model.weights is not None
        decoder = model.weights.decoder

        total = model.recent.steps_to_make(request)
        yield Step(0, total)
        clock.lap(device)
        def shown(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
            if not decided.keep_text_encoder:
                give_back()
            pixels = decoder.decode(torch.from_numpy(tokens).to(device), grid, check)
            if not decided.keep_text_encoder:
                decoder.files.release()
            return pixels

        previews = Previews(shown)
        for index, latents in enumerate(model.denoised(request, embeddings, device, check), start=1):
            clock.wait(latents.device)  # a Step is reported when it is computed, not when it is queued
            assert model.on_the_way is not None
            wanted = self.previews and index < total
            yield Step(index, total, previews.after(*model.on_the_way) if wanted else None)
        if model.admission:
            model.admission.settle()
        denoised = clock.lap(device)

        if not decided.keep_text_encoder:
            if model.graphs:
                model.graphs.clear()
            give_back()
        pixels = decoder.decode(latents, token_grid(request, pack), check, decided.vae_tile)
        if not decided.keep_text_encoder:
            decoder.files.release()
        decode = clock.lap(device)
        yield Picture(
            pixels=pixels,
            request=request,
            backend=self.name,
            reason=decided.why,
            seconds=Seconds(load=load, encode=encode, denoise=denoised, decode=decode, total=clock.total()),
            peak_memory_bytes=peak_memory_bytes(device),
            unknown_words=prompt.unknown_words(request.prompt, pack.notes.vocabulary),
            dtype=f"{decided.dtype} with int8" if model.admission else decided.dtype,
        )

    def _decide(self, pack: Pack, request: Request) -> plan.Plan:
        """The plan; for a big pack where nobody has measured products yet, after measuring them."""
        rates, room = products.rates(self.data_dir, self.hardware), self._available()
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
            return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
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


def _expected(before: Tensor, after: Tensor, sigma: float, sigma_next: float) -> np.ndarray:
    return foreseen(before, after, sigma, sigma_next).cpu().numpy()


def placed(decided: plan.Plan) -> tuple[torch.dtype, torch.device]:
    """The plan's number format and device, as torch's."""
    return getattr(torch, decided.dtype), torch.device(decided.device)


def give_back() -> None:
    """Hand memory that nobody uses any more back to the card or the system."""
    gc.collect()  # hooks make circles of the modules, which would keep their memory until some later collection
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.system() == "Linux":
        with suppress(OSError, AttributeError):  # another C library than glibc keeps no such heap
            ctypes.CDLL(None).malloc_trim(0)


class Clock:
    """Wall-clock seconds, with the work queued on a CUDA device counted where it was queued."""

    def __init__(self) -> None:
        self._start = self._last = perf_counter()

    def wait(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def lap(self, device: torch.device) -> float:
        self.wait(device)
        last, self._last = self._last, perf_counter()
        return self._last - last

    def total(self) -> float:
        return self._last - self._start


def token_grid(request: Request, pack: Pack) -> tuple[int, int]:
    """(rows, columns) of image tokens of a complete request."""
    assert request.width is not None and request.height is not None
    side = plan.token_side(pack)
    return request.height // side, request.width // side


def allocated_bytes() -> int:
    """What tensors take on the card now, at least 1; 0 without a card."""
    return max(1, torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0


def peak_memory_bytes(device: torch.device) -> int:
    """CUDA: the most that this picture's tensors took. CPU: the most this process ever had in memory; 0 on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if platform.system() == "Windows":
        return 0
    if platform.system() == "Linux":
        return resident_bytes(field="VmHWM")  # not ru_maxrss, which a spawned process inherits from its parent
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes, unlike the others
