"""An open pack in torch: its text encoder while prompts are read, its other weights from the first picture on.

It owns the denoising loop. It doesn't know how weights are packed (linear.py), nor when what is loaded or dropped: that
is the backend's.
"""

import ctypes
import gc
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine import measured, plan, products, prompt
from engine.embeddings import EmbeddingCache
from engine.hardware import Hardware
from engine.latents import Recent, foreseen, outset
from engine.packs import open_pack
from engine.torch_backend import fused, kernels, linear, remember, triton_check
from engine.torch_backend.admission import Admission
from engine.torch_backend.graph import Graphs
from engine.torch_backend.mapped import MappedFiles
from engine.torch_backend.passes import TorchPasses
from engine.torch_backend.text_encoder import TextEncoder
from engine.torch_backend.transformer import Flux2Transformer2DModel, token_ids
from engine.torch_backend.vae import PictureDecoder
from engine.types import Request

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
        self.graphs = _graphs(self.weights.transformer, self.admission, data_dir, hardware)

    def record_reading(self, data_dir: Path, hardware: Hardware) -> None:
        """Read prompts as a CUDA graph. After `admit_reading`."""
        assert self.text_encoder is not None
        self.text_encoder.run = _graphs(self.text_encoder.read, self.reading, data_dir, hardware)

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
            passes: Sequence[Any] = triton_check.chosen(data_dir, hardware)
        else:
            passes = kernels.chosen(data_dir, hardware, quantization.group_size) or [TorchPasses()]
        keep = partial(products.keep_errors, data_dir, self.pack, part=part)
        made = Admission(module, passes, found, keep=keep, trial=trial)
        return made if made.layers else None

    def decode(
        self, latents: Tensor, grid: tuple[int, int], decided: plan.Plan, check: Check, tile: int = 0
    ) -> np.ndarray:
        """uint8 [height, width, 3] of latents [1, rows * columns, C]. The model must be loaded."""
        assert self.weights is not None
        decoder = self.weights.decoder
        pixels = decoder.decode(latents, grid, check, tile)
        if not decided.keep_text_encoder:
            decoder.files.release()
        return pixels

    def denoised(self, request: Request, embeddings: Tensor, device: torch.device, check: Check) -> Iterator[Tensor]:
        """The latents after each step of a complete request, those of its draft first unless they are remembered.

        The last ones are the picture's, and are remembered for whoever refines it. The model must be loaded.
        """
        assert self.weights is not None
        draft = request.draft
        if draft is not None and self.recent.get(draft) is None:
            yield from self.denoised(draft, embeddings, device, check)
            finish(device)  # its latents are on their way, and read at once
        start, rest, grid = outset(request, self.pack, self.recent)
        noisy = torch.from_numpy(start).to(device)
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
        # a card is not waited for: this is there when the picture is
        self.recent.put(request, latents.to("cpu", non_blocking=True).numpy())


def _graphs(run: Callable[..., Tensor], admission: Admission | None, data_dir: Path, hardware: Hardware) -> Graphs:
    def ready() -> bool:
        return admission is None or not admission.trial

    def told(words: str) -> None:
        measured.keep(data_dir, f"graphs on {hardware.name}", {"sentence": words})

    return Graphs(run, ready, admission.scratch if admission else None, told)


def _expected(before: Tensor, after: Tensor, sigma: float, sigma_next: float) -> np.ndarray:
    return foreseen(before, after, sigma, sigma_next).cpu().numpy()


def placed(decided: plan.Plan) -> tuple[torch.dtype, torch.device]:
    """The plan's number format and device, as torch's."""
    return getattr(torch, decided.dtype), torch.device(decided.device)


def finish(device: torch.device) -> None:
    """Wait for what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def give_back() -> None:
    """Hand memory that nobody uses any more back to the card or the system."""
    gc.collect()  # hooks make circles of the modules, which would keep their memory until some later collection
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.system() == "Linux":
        with suppress(OSError, AttributeError):  # another C library than glibc keeps no such heap
            ctypes.CDLL(None).malloc_trim(0)
