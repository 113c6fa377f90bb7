"""The MLX backend: one Request in, Steps and a Picture out, with one model in memory at a time.

It joins the parts and owns the denoising loop. It doesn't know how weights are packed (linear.py), who waits for the
picture, or where it goes. A lazy array belongs to the thread that made it, so all of this happens on the caller's one
thread (the worker's).
"""

import gc
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from time import perf_counter

import mlx.core as mx
import numpy as np

from engine import catalog, plan, prompt
from engine.embeddings import EmbeddingCache
from engine.hardware import Hardware, available_bytes
from engine.latents import Recent, foreseen, outset
from engine.mlx_backend import linear, tuning
from engine.mlx_backend.text_encoder import TextEncoder
from engine.mlx_backend.transformer import Flux2Transformer2DModel, token_ids
from engine.mlx_backend.vae import PictureDecoder
from engine.packs import Component, open_pack
from engine.preview import Previews
from engine.sampling import sampled
from engine.types import Cancelled, EngineError, Picture, Request, Seconds, Step

SMALLEST_CACHE = 64 << 20  # bytes of freed buffers that MLX may keep for the next block, whatever the plan says

Check = Callable[[], None]


def denoise(
    transformer: Flux2Transformer2DModel,
    latents: mx.array,
    embeddings: mx.array,
    sigmas: np.ndarray,
    grid: tuple[int, int],
    check: Check,
) -> Iterator[mx.array]:
    """Euler steps from noise to picture: yields the latents, float32 [1, rows * columns, C], after each step.

    `latents` float32 noise of that shape, `embeddings` [1, L, joint_attention_dim] in the weights' dtype, `sigmas`
    float32 [steps + 1] falling from 1 (or where a draft is taken up) to 0, `grid` (rows, columns). The latents stay
    float32 between steps.
    """
    img_ids, txt_ids = token_ids(embeddings.shape[1], grid)
    for sigma, sigma_next in pairwise(sigmas.tolist()):
        timestep = mx.full((1,), sigma)
        velocity = transformer(latents.astype(embeddings.dtype), embeddings, timestep, img_ids, txt_ids, check)
        latents = latents + (sigma_next - sigma) * velocity.astype(mx.float32)
        mx.eval(latents)
        yield latents


class Model:
    """An open pack, and from the first picture on its weights, each component read when it is first needed."""

    def __init__(self, folder: Path, data_dir: Path) -> None:
        self.pack = open_pack(folder)
        self.data_dir = data_dir
        self.tokenizer = prompt.Tokenizer(self.pack.tokenizer)
        self.embeddings: EmbeddingCache[mx.array] = EmbeddingCache()
        self.recent = Recent()
        self.text_encoder: TextEncoder | None = None
        self.transformer: Flux2Transformer2DModel | None = None
        self.decoder: PictureDecoder | None = None
        self.on_the_way: tuple[Callable[[], np.ndarray], tuple[int, int]] | None = None  # to the end, after a step

    def load_text_encoder(self, dtype: mx.Dtype, check: Check) -> TextEncoder:
        if self.text_encoder is None:
            pack = self.pack
            expand = self._checked(pack.text_encoder, dtype)
            encoder = TextEncoder(pack.text_encoder, pack.notes.hidden_states, dtype, expand)
            for layer in (encoder.model.embed_tokens, *encoder.model.layers):
                read(layer, check)
            self.text_encoder = encoder
        return self.text_encoder

    def drop_text_encoder(self) -> None:
        """Give its memory back; the prompts' embeddings stay."""
        self.text_encoder = None
        gc.collect()
        mx.clear_cache()

    def load_transformer(self, dtype: mx.Dtype, check: Check) -> Flux2Transformer2DModel:
        if self.transformer is None:
            expand = self._checked(self.pack.transformer, dtype)
            transformer = Flux2Transformer2DModel.from_config(self.pack.transformer.config)
            linear.build(transformer, self.pack.transformer, dtype, expand_from=expand)
            for block in transformer.transformer_blocks:
                read(block, check)
                linear.join(block.attn.to_q, block.attn.to_k, block.attn.to_v)
                linear.join(block.attn.add_q_proj, block.attn.add_k_proj, block.attn.add_v_proj)
            for single in transformer.single_transformer_blocks:
                read(single, check)
            read(transformer, check)
            self.transformer = transformer
        return self.transformer

    def load_decoder(self, dtype: mx.Dtype, check: Check) -> PictureDecoder:
        if self.decoder is None:
            decoder = PictureDecoder(self.pack.vae, dtype)
            read(decoder.vae, check)
            self.decoder = decoder
        return self.decoder

    def denoised(self, request: Request, embeddings: mx.array, check: Check) -> Iterator[mx.array]:
        """The latents after each step of a complete request, those of its draft first unless they are remembered.

        The last ones are the picture's, and are remembered for whoever refines it. The transformer must be loaded.
        """
        assert self.transformer is not None
        draft = request.draft
        if draft is not None and self.recent.get(draft) is None:
            yield from self.denoised(draft, embeddings, check)
        start, rest, grid = outset(request, self.pack, self.recent)
        noisy = mx.array(start)
        run = denoise(self.transformer, noisy, embeddings, rest, grid, check)
        for latents, pair in zip(run, pairwise(rest.tolist()), strict=True):
            self.on_the_way = partial(_expected, noisy, latents, *pair), grid
            yield latents
            noisy = latents
        self.recent.put(request, np.array(latents))

    def _checked(self, component: Component, dtype: mx.Dtype) -> dict[int, int | None]:
        """Prove this machine's kernels on the component's codes; from how many rows on its layers are expanded."""
        if component.quantization is None:
            return {}
        bits, group_size = component.quantization.bits, component.quantization.group_size
        tuning.check_products(bits, group_size, dtype)
        return {bits: tuning.expand_from(bits, group_size, dtype, self.data_dir)}


class MlxBackend:
    """Apple Silicon, and wherever else mlx runs. See engine.types.Backend for the contract."""

    name = "mlx"

    def __init__(self, hardware: Hardware, data_dir: Path, *, previews: bool = False) -> None:
        """Raises EngineError for an mlx that is too old. With `previews` slow steps show what is coming."""
        tuning.check_version()
        self.hardware = hardware
        self.data_dir = data_dir
        self.previews = previews
        self._model: Model | None = None

    def prepare(self) -> None:
        """Nothing that is known without a model."""

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Generator[Step | Picture, None, None]:
        """Yields Step(0, n) .. Step(n, n) and a Picture.

        Raises BadRequest before anything is loaded or dropped, Cancelled within one block of `cancelled` turning true,
        EngineError when the tensors don't fit, mlx computes wrongly or the memory doesn't suffice.
        """

        def check() -> None:
            if cancelled():
                raise Cancelled("the picture was cancelled before it was finished; generate again to get it")

        try:
            yield from self._generate(request, check)
        except RuntimeError as fault:  # what MLX raises for everything
            if not any(word in str(fault) for word in ("alloc", "memory", "Memory")):
                raise
            self.close()
            raise EngineError(
                f"{self.hardware.name} has too little free memory for this picture with {request.model}; ask for a "
                "smaller size, or close other programs"
            ) from None

    def _generate(self, request: Request, check: Check) -> Iterator[Step | Picture]:
        clock = Clock()
        model = self._open(catalog.find(request.model, self.data_dir))
        pack = model.pack
        request = plan.complete(request, pack)
        assert request.steps is not None
        decided = plan.plan(self.hardware, pack, request, self.name, self._available())
        dtype: mx.Dtype = getattr(mx, decided.dtype)
        embeddings = model.embeddings.get(request.prompt)
        if embeddings is None:
            ids, mask, _ = model.tokenizer.encode(request.prompt, pack.notes.text_length)
        if model is not self._model:
            self.close()  # the old model first: two do not fit where one just does
            self._model = model
        set_limits(decided)

        load = encode = 0.0
        mx.reset_peak_memory()
        with sampled(active_bytes) as samples:
            if embeddings is None:
                encoder = model.load_text_encoder(dtype, check)
                load += clock.lap()
                embeddings = encoder.encode(ids, mask, check)
                mx.eval(embeddings)
                model.embeddings.put(request.prompt, embeddings)
                del encoder
                if not decided.keep_text_encoder:
                    model.drop_text_encoder()
                encode = clock.lap()
            model.load_transformer(dtype, check)
            decoder = model.load_decoder(dtype, check)
            load += clock.lap()

            total = model.recent.steps_to_make(request)
            yield Step(0, total)
            clock.lap()
            previews = Previews(lambda tokens, at: decoder.decode(mx.array(tokens), at, check))
            for index, latents in enumerate(model.denoised(request, embeddings, check), start=1):  # noqa: B007
                assert model.on_the_way is not None
                wanted = self.previews and index < total
                yield Step(index, total, previews.after(*model.on_the_way) if wanted else None)
            denoised = clock.lap()

            pixels = decoder.decode(latents, plan.token_grid(request, pack), check, decided.vae_tile)
            decode = clock.lap()
        yield Picture(
            pixels=pixels,
            request=request,
            backend=self.name,
            reason=decided.why,
            seconds=Seconds(load=load, encode=encode, denoise=denoised, decode=decode, total=clock.total()),
            peak_memory_bytes=mx.get_peak_memory(),
            unknown_words=prompt.unknown_words(request.prompt, pack.notes.vocabulary),
            dtype=decided.dtype,
            mean_memory_bytes=round(fmean(samples)),
        )

    def _open(self, folder: Path) -> Model:
        if self._model is not None and self._model.pack.folder == folder:
            return self._model
        return Model(folder, self.data_dir)

    def _available(self) -> int:
        """Bytes that this process may have, with what it has already; 0 where nobody knows."""
        free = available_bytes()
        return free + mx.get_active_memory() + mx.get_cache_memory() if free else 0

    def close(self) -> None:
        """Drop the model. The next picture loads again."""
        self._model = None
        gc.collect()
        mx.clear_cache()


def _expected(before: mx.array, after: mx.array, sigma: float, sigma_next: float) -> np.ndarray:
    return np.array(foreseen(before, after, sigma, sigma_next))


class Clock:
    """Wall-clock seconds. Whoever laps has waited for its arrays."""

    def __init__(self) -> None:
        self._start = self._last = perf_counter()

    def lap(self) -> float:
        last, self._last = self._last, perf_counter()
        return self._last - last

    def total(self) -> float:
        return self._last - self._start


def active_bytes() -> int:
    """What arrays take now, at least 1: 0 would say that it can't be told."""
    return max(1, mx.get_active_memory())


def read(module: object, check: Check) -> None:
    """Read a module's tensors from their file now, and ask whether to go on."""
    mx.eval(module.parameters())  # type: ignore[attr-defined]
    check()


def set_limits(decided: plan.Plan) -> None:
    """Let MLX keep what the plan says a picture needs: weights wired where Metal does that, freed buffers for reuse."""
    mx.set_cache_limit(max(SMALLEST_CACHE, decided.working_bytes))
    if mx.metal.is_available():
        mx.set_wired_limit(min(decided.peak_bytes, int(mx.device_info()["max_recommended_working_set_size"])))
