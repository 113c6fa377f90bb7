"""The words that every part of the engine speaks: what goes in, what comes out, what can go wrong.

Imports nothing of ours, no torch and no mlx, so the page, the tests and the worker's parent can use it freely.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

VARIANTS = ("ternary", "binary", "4-bit", "dense")


class EngineError(Exception):
    """One sentence for a person: what failed, with which value, what to do next."""


class BadRequest(EngineError):
    """The caller asked for something impossible; nothing was started (the command line exits with 2)."""


class Cancelled(EngineError):
    """The caller asked to stop; raised at the next transformer block, VAE tile or text layer."""


class Crashed(EngineError):
    """The engine's process died under the picture: not the request's fault for sure, so it may be tried once more."""


@dataclass(frozen=True, slots=True)
class Request:
    """One picture to make. Field names are also the PNG's keys, the page's controls and, later, the columns.

    `width` and `height` are pixels, `steps` Euler steps. `model` is an id of the catalogue or the path of a pack
    folder. None means "as the pack declares": `plan.complete` fills it in.

    A variation (seed, strength) mixes other noise into the seed's: sqrt(1 - strength^2) * noise + strength * other, one
    after the other. With a `draft`, its final latents are enlarged to this size, given the noise of step `start` and
    refined from there. The chain is complete in itself: whoever has the request can make everything behind it again.
    """

    prompt: str
    model: str
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    variations: tuple[tuple[int, float], ...] = ()
    draft: "Request | None" = None
    start: int = 0


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock seconds of one picture. `load` and `encode` are 0 where model and prompt were already in memory."""

    load: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """Progress: `index` of `total` steps are done (0: the model and the prompt are ready).

    `total` counts what this run computes: fewer steps than the request names when it starts from a draft, more when the
    draft has to be drawn first. `preview` is a small uint8 [h, w, 3] of what is coming, where steps are slow.
    """

    index: int
    total: int
    preview: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Picture:
    """The result: `pixels` uint8 [height, width, 3], and how it was made; `dtype` is the number format computed in.

    `mean_memory_bytes` is what the model and its work took on average, 0 where the backend doesn't sample it.
    """

    pixels: np.ndarray
    request: Request
    backend: str
    reason: str
    seconds: Seconds
    peak_memory_bytes: int
    unknown_words: tuple[str, ...] = field(default=())
    dtype: str = ""
    mean_memory_bytes: int = 0


class Backend(Protocol):
    """Something that turns a complete Request into pictures, with one model in memory at a time.

    `generate` yields `Step(0, n)` .. `Step(n, n)` and then one `Picture`. Closing the generator stops the work;
    `cancelled` is asked at every transformer block, and makes it raise `Cancelled`. `prepare` is for a time when nobody
    waits: it may take seconds off the first picture.
    """

    name: str

    def prepare(self) -> None: ...

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Step | Picture]: ...

    def close(self) -> None: ...
