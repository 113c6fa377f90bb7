"""What will be made and how: fills in a Request from the pack's own words, and picks backend, device and number format.

Decides only; runs nothing, and imports neither torch nor mlx. Every decision comes with the sentence that explains it.
"""

import importlib.util
import re
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

from engine import chain, memory, memory_mlx
from engine.hardware import Hardware
from engine.packs import Notes, Pack
from engine.products import INT8_BITS, Numbers
from engine.types import BadRequest, Request

BACKENDS = ("auto", "torch", "mlx", "fake")
MAX_STEPS = chain.MAX_STEPS
MAX_PROMPT = 20_000  # characters; far above what any pack's tokens hold, and small enough for every pipe's buffer
MAX_TOKENS = 128 * 128  # image tokens: 2048 x 2048 pixels at the real VAE's 16 pixels a token

# From here on a pack's weights, not its arithmetic, set the pace on a CPU: half the bytes is worth bfloat16's rounding.
# Below, float32 costs nothing that a person would notice and keeps parity with the reference at 1e-4.
BIG_TRANSFORMER = 256 << 20
BIG_ENCODER = 256 << 20
# Times as fast as the next format: what a layer as bytes must be for its rounding to be borne. Norms, gates and sums
# are then made in the same passes, which gains as much again.
WORTH_IT = 1.2
WHOLE_PIXELS = 512 * 512  # the largest picture that a CPU decodes in one piece
VAE_TILES = (512, 256)  # pixels a side


@dataclass(frozen=True, slots=True)
class Plan:
    """`backend` 'torch', 'mlx' or 'fake', `device` 'cpu', 'cuda' or 'mps', `dtype` of the activations: 'float32' or
    'bfloat16'.

    `keep_text_encoder`: it stays in memory between prompts. `hand_back`: what denoising took, on a card its graphs, is
    handed back before decoding. `vae_tile`: pixels a side of the tiles in which the picture is decoded, 0 for one
    piece. `batch` pictures at a time: one, since arithmetic and not the weights sets the pace.
    `int8`: packed layers are multiplied as bytes where their activations bear it (torch_backend/admission.py).
    `peak_bytes` is what the process (on a card, and for MLX: its allocator) is predicted to take at most,
    `working_bytes` what of that comes and goes while the picture is made.
    """

    backend: str
    device: str
    dtype: str
    why: str
    keep_text_encoder: bool = True
    hand_back: bool = False
    vae_tile: int = 0
    batch: int = 1
    peak_bytes: int = 0
    int8: bool = False
    working_bytes: int = 0


def complete(request: Request, pack: Pack | None) -> Request:
    """The request with every field set, as the pack declares; completing it again changes nothing.

    Without a pack (the fake backend needs none) what holds for the 4B model holds.

    Raises BadRequest for an empty prompt and for a size, steps, seed, variation or draft that no pack or not this pack
    can do. How many tokens the prompt has is the tokenizer's to say.
    """
    chain.check_length(request)
    if not request.prompt.strip():
        raise BadRequest("the prompt is empty: say what the picture shows, for example 'two red circles'")
    if len(request.prompt) > MAX_PROMPT:
        raise BadRequest(f"the prompt has {len(request.prompt)} characters: give at most {MAX_PROMPT}")
    try:
        request.prompt.encode()
    except UnicodeEncodeError as error:
        raise BadRequest(f"character {error.start + 1} of the prompt is no text: type the prompt again") from None
    chain.check_seed(request.seed)
    notes = Notes(label="") if pack is None else pack.notes
    steps = notes.steps if request.steps is None else request.steps
    if not 1 <= steps <= MAX_STEPS:
        raise BadRequest(f"{steps} steps are out of range: give 1 to {MAX_STEPS}, this model is made for {notes.steps}")
    width, height = _size(request, notes.sizes, token_side(pack))
    draft = None if request.draft is None else complete(request.draft, pack)
    whole = replace(request, width=width, height=height, steps=steps, draft=draft)
    chain.check(whole)
    return whole


def token_side(pack: Pack | None) -> int:
    """Pixels along one side of an image token: 2 x 2^(VAE levels - 1), 16 for the real VAE."""
    return 16 if pack is None else 2 << (len(pack.vae.config["block_out_channels"]) - 1)


def token_grid(request: Request, pack: Pack) -> tuple[int, int]:
    """(rows, columns) of image tokens of a complete request."""
    assert request.width is not None and request.height is not None
    side = token_side(pack)
    return request.height // side, request.width // side


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


def plan(
    hardware: Hardware,
    pack: Pack,
    request: Request,
    backend: str = "auto",
    available: int = 0,
    rates: Numbers | None = None,
    int8: bool | None = None,
) -> Plan:
    """Choose where, in which number format and in how much memory the request runs.

    `available` bytes may be used by the process that will run it, what it holds already included; 0: as much as the
    hardware has. `rates` are this processor's (engine/products.py), once they are measured; `int8` True or False takes
    that decision away. Raises BadRequest for a backend that isn't there, and for a picture that would not fit, naming
    the largest size that would.
    """
    check_backend(backend)
    if backend == "fake":
        return Plan("fake", "cpu", "float32", "fake: a gradient instead of a model's picture, because it was asked for")
    where = _where(hardware, pack, choose_backend(hardware, backend), rates, int8)
    side = token_side(pack)
    size = _size(request, pack.notes.sizes, side)
    room = available or (hardware.memory_bytes if hardware.kind == where.device else 0)
    way, needed = _cheapest(where, pack, size, side, room)
    peak = needed.peak(way.keep_text_encoder, way.hand_back)
    if room and peak > room:
        raise BadRequest(_too_big(where, pack, request, size, side, room, peak))
    working = max(needed.denoising, needed.decoding)
    why = f"{where.why}; {_memory_words(way, needed, peak, room)}"
    return replace(where, **asdict(way), peak_bytes=peak, working_bytes=working, why=why)


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to arrange the memory of a picture."""

    keep_text_encoder: bool
    hand_back: bool
    vae_tile: int


def _ways(where: Plan, pack: Pack, size: tuple[int, int]) -> list[_Way]:
    """From the fastest arrangement to the smallest.

    An encoder of gigabytes in main memory always leaves: its pages come back from the file cache in a moment, and the
    memory is more use to whatever else runs on the machine. On a card it stays where there is room, as graphs do.
    """
    small = memory.encoder_bytes(pack, where.dtype) < BIG_ENCODER
    tiles = VAE_TILES if where.device != "cuda" and size[0] * size[1] > WHOLE_PIXELS else (0, *VAE_TILES)
    if where.device != "cuda":
        return [_Way(small, not small, tile) for tile in tiles]
    first = [_Way(True, False, tiles[0]), _Way(small, False, tiles[0])]
    return [*first, *(_Way(small, True, tile) for tile in tiles)]


def _cheapest(
    where: Plan, pack: Pack, size: tuple[int, int], side: int, room: int
) -> tuple[_Way, memory.Need]:
    """The first way that fits into `room` bytes (0: unknown, so the first), else the last one."""
    for way in _ways(where, pack, size):
        count = memory_mlx.need if where.backend == "mlx" else partial(memory.need, int8=where.int8)
        needed = count(pack, size, side, where.dtype, cpu=where.device == "cpu", tile=way.vae_tile)
        if not room or needed.peak(way.keep_text_encoder, way.hand_back) <= room:
            break
    return way, needed


def _too_big(
    where: Plan, pack: Pack, request: Request, size: tuple[int, int], side: int, room: int, peak: int
) -> str:
    """The sentence that refuses a picture, with the largest size of the same shape that would fit."""
    need = f"a {size[0]}x{size[1]} picture with {request.model} needs {peak / 1e9:.1f} GB where {room / 1e9:.1f} GB"
    step = 2 * side
    for width in range(size[0] // step * step, 0, -step):
        height = max(step, round(width * size[1] / size[0] / step) * step)
        way, needed = _cheapest(where, pack, (width, height), side, room)
        if height <= size[1] and needed.peak(way.keep_text_encoder, way.hand_back) <= room:
            return f"{need} are available: the largest size that fits is {width}x{height}"
    return f"{need} are available, and no smaller size fits: close other programs or choose a smaller model"


def _memory_words(way: _Way, needed: memory.Need, peak: int, room: int) -> str:
    stays = "stays in memory" if way.keep_text_encoder else "leaves memory after each new prompt"
    tiles = f", the picture is decoded in tiles of {way.vae_tile} pixels" if way.vae_tile else ""
    of = f" of {room / 1e9:.1f} GB" if room else ""
    return f"the text encoder's {needed.encoder / 1e6:.0f} MB {stays}{tiles}; at most {peak / 1e9:.2f} GB{of}"


def choose_backend(hardware: Hardware, backend: str) -> str:
    """'torch', 'mlx' or 'fake': what `backend` means on this machine. Raises BadRequest for one that isn't there."""
    check_backend(backend)
    if backend == "auto":
        return "mlx" if hardware.kind == "mps" and installed("mlx") else "torch"
    if backend == "mlx" and not installed("mlx"):
        package = "mlx" if hardware.kind == "mps" else "'mlx[cpu]'"
        raise BadRequest(
            f"backend 'mlx' needs the package mlx, which this Python lacks ({hardware.reason}): on Apple Silicon or "
            f"Linux pip install {package}, elsewhere use --backend torch"
        )
    return backend


def _where(hardware: Hardware, pack: Pack, backend: str, rates: Numbers | None, int8: bool | None) -> Plan:
    """Device and number format for a backend; the memory is still open."""
    if backend == "mlx":
        if hardware.kind == "mps":
            return Plan("mlx", "mps", "bfloat16", f"{hardware.reason}; bfloat16, the pack's own format")
        if hardware.kind == "cuda" and mlx_has_cuda():
            return Plan("mlx", "cuda", "bfloat16", f"{hardware.reason}; mlx on CUDA, bfloat16, the pack's own format")
        where = hardware.reason if hardware.kind == "cpu" else f"cpu: {hardware.cores} cores"
        return Plan("mlx", "cpu", "float32", f"{where}; mlx because it was asked for, slow on a CPU; float32")
    if hardware.kind == "cuda":
        if torch_has_cuda():
            as_bytes, how = _as_bytes(pack, rates, int8)
            why = f"{hardware.reason}; bfloat16, the pack's own format{how}"
            return Plan("torch", "cuda", "bfloat16", why, int8=as_bytes)
        return _on_cpu(hardware, pack, f"; {hardware.name} is idle, because torch is a build without CUDA", rates, int8)
    if hardware.kind == "mps":
        idle = "torch was asked for" if installed("mlx") else "the package mlx is missing: pip install mlx"
        return _on_cpu(hardware, pack, f"; the Apple GPU is idle, because {idle}", rates, int8)
    return _on_cpu(hardware, pack, "", rates, int8)


def check_backend(backend: str) -> None:
    """Raise BadRequest for a backend that doesn't exist."""
    if backend not in BACKENDS:
        raise BadRequest(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")


def installed(package: str) -> bool:
    """Whether a package could be imported, found out without importing it."""
    return importlib.util.find_spec(package) is not None


def is_big(pack: Pack) -> bool:
    """Whether the number format is chosen for speed. Smaller packs keep parity with the reference at 1e-4."""
    return pack.transformer.bytes_on_disk >= BIG_TRANSFORMER


def bears_int8(pack: Pack) -> bool:
    """Whether the transformer's codes are a sign or nothing, so that layers can be multiplied as bytes."""
    return pack.transformer.quantization is not None and pack.transformer.quantization.bits in INT8_BITS


def _on_cpu(hardware: Hardware, pack: Pack, remark: str, rates: Numbers | None, int8: bool | None) -> Plan:
    """float32 for a small pack; for a big one what this processor multiplies fastest, measured if it was measured."""
    where = hardware.reason if hardware.kind == "cpu" else f"cpu: {hardware.cores} cores"
    dtype, why = _format(hardware, pack, rates)
    as_bytes, how = _as_bytes(pack, rates, int8)
    return Plan("torch", "cpu", dtype, f"{where}; {why}{how}{remark}", int8=as_bytes)


def _format(hardware: Hardware, pack: Pack, rates: Numbers | None) -> tuple[str, str]:
    """The number format of the activations, and why."""
    size = pack.transformer.bytes_on_disk
    fast = _fast_bfloat16(hardware)
    if rates and is_big(pack):
        half, whole = rates["bfloat16"], rates["float32"]
        dtype = "bfloat16" if half >= whole else "float32"
        return dtype, f"{dtype}, since {half:.0f} GFLOP/s were measured in bfloat16 and {whole:.0f} in float32"
    if fast and is_big(pack):
        return "bfloat16", f"bfloat16, because the transformer has {size / 1e6:.0f} MB and the CPU has {fast}"
    if fast:
        under = f"the transformer's {size / 1e6:.0f} MB are under {BIG_TRANSFORMER / 1e6:.0f} MB"
        return "float32", f"float32, because {under}"
    if "avx512_bf16" in hardware.features:
        return "float32", "float32, which this CPU multiplies faster than bfloat16"
    return "float32", "float32, because the CPU has no bfloat16 arithmetic"


def _as_bytes(pack: Pack, rates: Numbers | None, int8: bool | None) -> tuple[bool, str]:
    """Whether packed layers are multiplied as bytes, and the words that say so ("" where nobody would ask)."""
    if not bears_int8(pack):
        return False, ""
    if int8 is not None:
        return int8, f"; int8 {'for the layers that bear it' if int8 else 'nowhere'}, because it was asked for"
    if not is_big(pack):
        return False, ""
    if rates is None:
        return False, "; int8 is measured before the first picture"
    whole, best = rates["int8"], max(rates["float32"], rates["bfloat16"])
    if whole >= WORTH_IT * best:
        return True, f"; int8 at {whole:.0f} GFLOP/s for the layers that bear it"
    return False, f"; int8 nowhere, its {whole:.0f} GFLOP/s are under {WORTH_IT} times the {best:.0f} of other numbers"


def _fast_bfloat16(hardware: Hardware) -> str | None:
    """The instruction set by which the CPU multiplies bfloat16 faster than float32, if it has one.

    Intel's avx512_bf16 alone isn't: 84 against 150 GFLOP/s a core, since one port multiplies it and two float32.
    """
    if "amx_bf16" in hardware.features:
        return "amx_bf16"
    return "avx512_bf16" if "avx512_bf16" in hardware.features and "AMD" in hardware.name else None


def mlx_has_cuda() -> bool:
    """Whether mlx's CUDA build is installed; it is a package of its own, with a library and no module."""
    return any(True for name in ("mlx-cuda-12", "mlx-cuda-13") for _ in metadata.distributions(name=name))


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
