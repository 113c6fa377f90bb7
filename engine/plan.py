"""What will be made and how: fills in a Request from the pack's own words, and picks backend, device and number format.

Decides only; runs nothing, and imports neither torch nor mlx. Every decision comes with the sentence that explains it.
"""

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

from engine.hardware import Hardware
from engine.packs import Notes, Pack
from engine.types import BadRequest, Request

BACKENDS = ("auto", "torch", "mlx", "fake")
MAX_STEPS = 50
MAX_PROMPT = 20_000  # characters; far above what any pack's tokens hold, and small enough for every pipe's buffer
MAX_SEED = 2**63 - 1  # what SQLite, and a signed 64-bit generator, hold
MAX_TOKENS = 128 * 128  # image tokens: 2048 x 2048 pixels at the real VAE's 16 pixels a token

# From here on a pack's weights, not its arithmetic, set the pace on a CPU: half the bytes is worth bfloat16's rounding.
# Below, float32 costs nothing that a person would notice and keeps parity with the reference at 1e-4.
BIG_TRANSFORMER = 256 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """`backend` 'torch' or 'fake', `device` 'cpu' or 'cuda', `dtype` of the activations: 'float32' or 'bfloat16'."""

    backend: str
    device: str
    dtype: str
    why: str


def complete(request: Request, pack: Pack | None) -> Request:
    """The request with every field set, as the pack declares; completing it again changes nothing.

    Without a pack (the fake backend needs none) what holds for the 4B model holds.

    Raises BadRequest for an empty prompt and for a size, steps or seed that no pack or not this pack can do. How many
    tokens the prompt has is the tokenizer's to say.
    """
    if not request.prompt.strip():
        raise BadRequest("the prompt is empty: say what the picture shows, for example 'two red circles'")
    if len(request.prompt) > MAX_PROMPT:
        raise BadRequest(f"the prompt has {len(request.prompt)} characters: give at most {MAX_PROMPT}")
    try:
        request.prompt.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"character {error.start + 1} of the prompt is no text: type the prompt again") from None
    if not 0 <= request.seed <= MAX_SEED:
        raise BadRequest(f"seed {request.seed} is out of range: give a whole number from 0 to {MAX_SEED}")
    notes = Notes(label="") if pack is None else pack.notes
    steps = notes.steps if request.steps is None else request.steps
    if not 1 <= steps <= MAX_STEPS:
        raise BadRequest(f"{steps} steps are out of range: give 1 to {MAX_STEPS}, this model is made for {notes.steps}")
    width, height = _size(request, notes.sizes, token_side(pack))
    return replace(request, width=width, height=height, steps=steps)


def token_side(pack: Pack | None) -> int:
    """Pixels along one side of an image token: 2 x 2^(VAE levels - 1), 16 for the real VAE."""
    return 16 if pack is None else 2 << (len(pack.vae.config["block_out_channels"]) - 1)


def _size(request: Request, declared: tuple[tuple[int, int], ...], side: int) -> tuple[int, int]:
    if request.width is None and request.height is None:
        return declared[0]
    ways_out = f"this model is made for {', '.join(f'{w}x{h}' for w, h in declared)}"
    if request.width is None or request.height is None:
        given = f"width {request.width}" if request.height is None else f"height {request.height}"
        raise BadRequest(f"{given} alone is not a size: give both sides; {ways_out}")
    width, height = request.width, request.height
    if (width, height) in declared:
        return width, height
    if min(width, height) < 2 * side or width % (2 * side) or height % (2 * side):
        raise BadRequest(f"size {width}x{height} is impossible: both sides are multiples of {2 * side}; {ways_out}")
    if width * height > MAX_TOKENS * side * side:
        raise BadRequest(f"size {width}x{height} is too large: at most {MAX_TOKENS * side * side} pixels; {ways_out}")
    return width, height


def plan(hardware: Hardware, pack: Pack, request: Request, backend: str = "auto") -> Plan:
    """Choose where and in which number format the request runs. Raises BadRequest for a backend that isn't there."""
    check_backend(backend)
    if backend == "fake":
        return Plan("fake", "cpu", "float32", "fake: a gradient instead of a model's picture, because it was asked for")
    if hardware.kind == "cuda":
        if torch_has_cuda():
            return Plan("torch", "cuda", "bfloat16", f"{hardware.reason}; bfloat16, the pack's own format")
        return _on_cpu(hardware, pack, f"; {hardware.name} is idle, because torch is a build without CUDA")
    if hardware.kind == "mps":
        return _on_cpu(hardware, pack, "; the Apple GPU waits for the MLX backend of a later version")
    return _on_cpu(hardware, pack, "")


def check_backend(backend: str) -> None:
    """Raise BadRequest for a backend that doesn't exist or isn't part of this version."""
    if backend not in BACKENDS:
        raise BadRequest(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if backend == "mlx":
        raise BadRequest("backend 'mlx' is not part of this version: use auto or torch")


def _on_cpu(hardware: Hardware, pack: Pack, remark: str) -> Plan:
    """float32, except for a big pack on a CPU that multiplies bfloat16 itself."""
    where = hardware.reason if hardware.kind == "cpu" else f"cpu: {hardware.cores} cores"
    size = pack.transformer.bytes_on_disk
    native = sorted(hardware.features & {"avx512_bf16", "amx_bf16"})
    if native and size >= BIG_TRANSFORMER:
        why = f"bfloat16, because the transformer has {size / 1e6:.0f} MB and the CPU has {native[0]}"
        return Plan("torch", "cpu", "bfloat16", f"{where}; {why}{remark}")
    if native:
        why = f"float32, because the transformer's {size / 1e6:.0f} MB are under {BIG_TRANSFORMER / 1e6:.0f} MB"
    else:
        why = "float32, because the CPU has no bfloat16 arithmetic"
    return Plan("torch", "cpu", "float32", f"{where}; {why}{remark}")


def torch_has_cuda() -> bool:
    """Whether the installed torch was built with CUDA, read from its version file: importing torch takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        version = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return False
    return re.search(r"^cuda\b.*=\s*['\"]", version, re.MULTILINE) is not None
