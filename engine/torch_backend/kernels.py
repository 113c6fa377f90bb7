"""The passes of passes.py compiled from kernels.cpp: built once on a machine with a C++ compiler, then loaded.

How a product is made differs by processor (UNITS, the fastest first), what it gives doesn't; one that rounds more and
is faster (FOLDED) stands before it where there is one. A library lies in a folder of the caller's, under a name made of
the source, the compiler and the processor, so that a change of any of them builds another one. Before it is used it has
to agree with torch (`_check`); whatever goes wrong on the way is a sentence, and whoever asked takes torch's passes
instead. Nothing is built or loaded by importing this.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine import measured
from engine.hardware import Hardware
from engine.torch_backend.cores import Cores
from engine.torch_backend.int8 import Scratch
from engine.torch_backend.linear import PackedLinear, expand
from engine.torch_backend.passes import TorchPasses
from engine.torch_backend.transformer import Modulation, Rotary, apply_rotary_emb

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = "-std=c++17 -O3 -march=native -fopenmp-simd -fno-math-errno -fno-trapping-math -fno-exceptions -shared -fPIC"
PATIENCE = 120  # seconds for the compiler: it takes one or two
ZIG = "ziglang"  # a package on PyPI with clang in it: `make setup` installs it where no compiler is
WITHOUT_LIBRARIES = ("-nostdlib++", "-rtlib=none")  # of C++ and of the compiler, which zig would first build: a minute
SHARES = 4  # of the work for each core, so that one that is interrupted holds nobody up for long
AGREE = 1e-3  # |ours - exact| / |exact| of a whole pass; what quantising rounds away is not counted


class Unavailable(Exception):
    """Why there are no compiled passes here, as the second half of a sentence."""


class Compiler(NamedTuple):
    command: list[str]
    version: str  # what it says of itself, a line


class Unit(NamedTuple):
    """How a product is made, a file beside kernels.cpp."""

    file: str
    name: str
    feature: str  # of a processor; see engine/hardware.py
    groups: range  # sizes that it can do


UNITS = (
    Unit("amx.h", "AMX", "amx_int8", range(64, 129, 64)),
    Unit("vnni.h", "AVX-512 VNNI", "avx512_vnni", range(32, 1025, 32)),
)
FOLDED = Unit("folded.h", "AMX with scales folded", "amx_int8", range(128, 129))


class Panels(NamedTuple):
    """Quantised tokens as the product reads them; see kernels.cpp."""

    values: Tensor  # int8
    steps: Tensor  # float32
    offsets: Tensor  # int32
    tokens: int
    inputs: int


class Codes(NamedTuple):
    """A packed layer, or some of its rows, as it lies in the file."""

    codes: Tensor  # uint8 [N, K * bits / 8]
    scales: Tensor  # [N, K / group]
    biases: Tensor | None  # the same, for four bits; fewer bits have theirs from the scales
    bits: int

    def rows(self, wanted: slice) -> "Codes":
        biases = None if self.biases is None else self.biases[wanted]
        return Codes(self.codes[wanted], self.scales[wanted], biases, self.bits)


class Kernels:
    """See TorchPasses for what each method does. "compiled": codes and scales are exact, and a token has a step of its
    own for every group of its inputs, so that only that rounding is left. "folded": `fold` groups share a step, and
    their scales are 127ths of the largest of them. Nothing of a layer is kept: codes and scales are read in place.
    A token takes a byte for each input and 8 for each step, a thread 0.9 MB while it multiplies (folded: 3)."""

    dtype = torch.float32
    device = torch.device("cpu")
    by_head = True
    halves = True

    def __init__(self, library: ctypes.CDLL, compiler: str, unit: Unit, group: int, threads: int) -> None:
        self.compiler = compiler
        self.unit = unit
        self.scratch = Scratch()  # theirs who call: nothing is kept here
        self._library = library
        self.group, self.fold = group, library.folded_groups()
        self.name = "folded" if self.fold > 1 else "compiled"
        self._panel, self._strip = library.panel_tokens(), library.strip_outputs()
        self._cores = Cores(threads) if threads > 1 else None

    def bears(self, layer: PackedLinear) -> bool:
        """Any 4-bit layer that is not folded, fewer bits where the biases follow from the scales."""
        fits = layer.centre is not None or (layer.bits == 4 and self.fold == 1)
        groups = layer.scales.shape[1]
        fits = fits and groups % self.fold == 0 and layer.features == groups * self.group
        return fits and layer.weight.device.type == "cpu"

    def weights(self, layer: PackedLinear) -> Codes:
        return Codes(layer.weight, layer.scales, layer.biases if layer.bits == 4 else None, layer.bits)

    def dense(
        self, codes: Tensor, scales: Tensor, biases: Tensor, bits: int, dtype: torch.dtype, centre: float | None = None
    ) -> Tensor:
        """See linear.expand; for a layer that is multiplied in the model's number format."""
        out = torch.empty(len(codes), codes.shape[1] * 8 // bits, dtype=dtype)
        scales = _floats(scales)
        shifts = None if centre is not None else _floats(biases)
        weights = (_at(codes), _at(scales), None if shifts is None else _at(shifts), out.shape[1], self.group, bits)
        self._each(len(codes), self._library.dense, (*weights, dtype == torch.bfloat16), (_at(out),))
        return out

    def quantize(self, x: Tensor, first: Tensor | None = None) -> Panels:
        first, x = _readable(x if first is None else first), None if first is None else _floats(x)
        split = first.shape[1]
        tokens = self._empty(len(first), split + (0 if x is None else x.shape[1]))
        rest = (None, 0) if x is None else (_at(x), x.stride(0))
        self._each(
            self._panels(len(first)), self._library.quantize,
            (_at(first), first.stride(0), first.dtype == torch.bfloat16, split, *rest, *tokens[3:], self.group),
            tuple(map(_at, tokens[:3])),
        )  # fmt: skip
        return tokens

    def modulate(self, x: Tensor, modulation: Modulation, eps: float) -> Panels:
        width = x.shape[1]  # asked for by size: one modulation for all pictures of a batch
        x, scale, shift = _floats(x), _floats(modulation.scale.view(width)), _floats(modulation.shift.view(width))
        tokens = self._empty(*x.shape)
        self._each(
            self._panels(len(x)), self._library.modulate,
            (_at(x), x.stride(0), _at(scale), _at(shift), eps, len(x), x.shape[1], self.group),
            tuple(map(_at, tokens[:3])),
        )  # fmt: skip
        return tokens

    def multiply(self, x: Panels, w: Codes, out: Tensor) -> None:
        self._product(self._library.product, x, w, (None, out.dtype == torch.bfloat16, _at(out), out.stride(0)))

    def gate(self, x: Panels, w: Codes, out: Tensor) -> None:
        self._product(self._library.gated, x, w, (_at(out), out.stride(0)))

    def add(self, x: Panels, w: Codes, gate: Tensor, out: Tensor) -> None:
        gate = _floats(gate)
        self._product(self._library.product, x, w, (_at(gate), False, _at(out), out.stride(0)))

    def turn(self, x: Tensor, weight: Tensor, eps: float, rotary: Rotary, out: Tensor) -> None:
        tokens = (_at(x), x.dtype == torch.bfloat16, x.stride(0))
        norm = (_at(weight := _floats(weight)), eps)
        angles = (_at(rotary.cos), _at(rotary.sin))
        result = (out.dtype == torch.bfloat16, _at(out), out.stride(0), out.stride(1))
        self._each(len(x), self._library.turn, (*tokens, *norm, *angles, *x.shape[1:]), result)

    def _product(self, run: Callable[..., None], x: Panels, w: Codes, result: tuple[Any, ...]) -> None:
        scales = w.scales.float().contiguous()
        biases = None if w.biases is None else w.biases.float().contiguous()
        layer = (_at(w.codes), _at(scales), None if biases is None else _at(biases), len(w.codes), w.bits)
        tokens = (*map(_at, x[:3]), x.tokens, x.inputs, self.group)
        self._each(-(-len(w.codes) // self._strip), run, (*tokens, *layer), result)

    def _each(self, count: int, run: Callable[..., None], before: tuple[Any, ...], after: tuple[Any, ...]) -> None:
        """`run` on `count` rows, panels or strips, shared among the cores; ctypes lets go of Python meanwhile."""
        if self._cores is None:
            run(*before, 0, count, *after)
            return
        share = -(-count // (self._cores.count * SHARES))
        starts = range(0, count, share)
        self._cores.share(lambda _, start: run(*before, start, min(start + share, count), *after), starts)

    def _panels(self, tokens: int) -> int:
        return -(-tokens // self._panel)

    def _empty(self, count: int, inputs: int) -> Panels:
        rows = self._panels(count) * self._panel
        steps = rows * inputs // (self.group * self.fold)
        return Panels(
            torch.empty(rows * inputs, dtype=torch.int8), torch.empty(steps), torch.empty(steps, dtype=torch.int32),
            count, inputs,
        )  # fmt: skip


def chosen(data_dir: Path, hardware: Hardware, group: int) -> list[Kernels]:
    """The compiled passes that can be had, those preferred first, built into the data folder; `doctor` says which, or
    why there are none."""
    folder, found = data_dir / "kernels", []
    try:
        found.append(exact := load(folder, hardware, group))
        words = f"int8 passes for groups of {group}, compiled by {exact.compiler} for {exact.unit.name}"
        if exact.unit.feature == FOLDED.feature and group in FOLDED.groups:
            found.insert(0, load(folder, hardware, group, [FOLDED]))
            words += f", the scales of {found[0].fold} groups folded where a layer bears it"
    except Unavailable as reason:
        if found:
            words += f", no groups folded: {reason}"
        else:
            words = f"int8 passes for groups of {group} in torch, without compiled ones: {reason}"
    key = f"int8 passes on {hardware.name}, groups of {group}"
    if measured.recall(data_dir).get(key) != {"sentence": words}:
        measured.keep(data_dir, key, {"sentence": words})
    return found


def load(folder: Path, hardware: Hardware, group: int, units: Sequence[Unit] = UNITS) -> Kernels:
    """The compiled passes for layers of `group` inputs a scale, built into `folder` if need be: with the first of
    `units` that this processor has and that agrees with torch.

    Raises Unavailable with the reason where they can't be had.
    """
    reason = Unavailable(f"they are for Linux on processors with {' or '.join(unit.name for unit in reversed(units))}")
    for unit in units if sys.platform == "linux" else ():
        if unit.feature not in hardware.features:
            continue
        try:
            return _loaded(folder, hardware, group, unit)
        except Unavailable as fault:
            reason = fault
    raise reason


def _loaded(folder: Path, hardware: Hardware, group: int, unit: Unit) -> Kernels:
    if group not in unit.groups:
        sizes = f"{unit.groups.start} to {unit.groups[-1]} inputs in steps of {unit.groups.step}"
        raise Unavailable(f"they need groups of {sizes}, and this model has {group}")
    path, version = build(folder, hardware, unit)
    try:
        library = _declared(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as fault:
        raise Unavailable(f"the library built by {version} can't be loaded ({fault})") from None
    if not library.allowed():
        raise Unavailable(f"Linux does not let this process use {unit.name}")
    try:
        # one thread has all strips in one call: big layers have several in each
        _check(Kernels(library, version, unit, group, 1), group)
        return Kernels(library, version, unit, group, torch.get_num_threads())
    except RuntimeError as fault:  # no further thread, no memory
        raise Unavailable(f"they can't be run ({fault})") from None


def build(folder: Path, hardware: Hardware, unit: Unit) -> tuple[Path, str]:
    """The library in `folder`, compiled if it isn't there, by the first compiler that can, and that one's version.
    Raises Unavailable."""
    reason = Unavailable(f"no C++ compiler was found: with g++ or the package {ZIG}, int8 layers are faster")
    for compiler in compilers():
        try:
            return _built(folder, compiler, hardware, unit), compiler.version
        except Unavailable as fault:
            reason = fault
    raise reason


def compilers() -> Iterator[Compiler]:
    """The C++ compilers that are here: CXX, g++, c++, clang++ and that of the package ziglang."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "c++", "clang++")):
        if path := shutil.which(name):
            asked = _run([path, "--version"])
            if asked.returncode == 0 and asked.stdout:
                yield Compiler([path], asked.stdout.splitlines()[0])
    with suppress(PackageNotFoundError):
        # -P: not one from the working directory
        yield Compiler([sys.executable, "-P", "-m", ZIG, "c++", *WITHOUT_LIBRARIES], f"zig {package_version(ZIG)}")


def _built(folder: Path, compiler: Compiler, hardware: Hardware, unit: Unit) -> Path:
    sources = [SOURCE.with_name(name).read_bytes() for name in (SOURCE.name, unit.file, "panels.h", "tiles.h")]
    circumstances = (*sources, FLAGS, *compiler, hardware.name, sorted(hardware.features))
    library = folder / f"kernels-{hashlib.sha256(repr(circumstances).encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / library.name
            command = [*compiler.command, *FLAGS.split(), f'-DUNIT="{unit.file}"', str(SOURCE), "-o", str(made)]
            # zig would keep 50 MB in the home folder
            done = _run(command, {f"ZIG_{which}_CACHE_DIR": aside for which in ("GLOBAL", "LOCAL")})
            if done.returncode:
                complaint = (done.stderr.strip() or "no message").splitlines()[0]
                raise Unavailable(f"{compiler.version} can't build them: {complaint}")
            made.replace(library)
    except OSError as fault:
        raise Unavailable(f"{folder} can't be written ({fault.strerror})") from None
    return library


def _run(command: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL, check=False,
            env=os.environ | (environment or {}),
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as fault:
        return subprocess.CompletedProcess(command, 1, "", str(fault))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions, without which ctypes would cut addresses to 32 bits."""
    kinds: dict[str, Any] = {"p": ctypes.c_void_p, "n": ctypes.c_long, "f": ctypes.c_float, "i": ctypes.c_int}
    tokens, product = "ppp", "pppnnn pppni nn"
    for name, signature in {
        "allowed": "", "panel_tokens": "", "strip_outputs": "", "folded_groups": "",
        "quantize": "pnin pn nnn nn" + tokens,
        "modulate": "pnppfnnn nn" + tokens,
        "product": product + "pipn",
        "gated": product + "pn",
        "dense": "pppnni i nn p",
        "turn": "pinpfppnn nn ipnn",
    }.items():  # fmt: skip
        function = library[name]
        function.argtypes = [kinds[letter] for letter in signature.replace(" ", "")]
        function.restype = ctypes.c_long if not signature else None
        setattr(library, name, function)
    return library


def _at(tensor: Tensor) -> int:
    """Where a tensor's numbers begin; the caller keeps the tensor, and its rows lie close within."""
    assert tensor.stride(-1) == 1
    return tensor.data_ptr()


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype == torch.bfloat16 and x.stride(-1) == 1 else _floats(x)


def _floats(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float32 and x.stride(-1) == 1 else x.float().contiguous()


@torch.inference_mode()
def _check(kernels: Kernels, group: int) -> None:
    """Every pass on small random tensors, once against exact arithmetic and once against torch's passes. The sizes
    leave a rest of everything: of panels, strips and blocks. Raises Unavailable."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    def held(what: str, ours: Tensor, exact: Tensor, bound: float = AGREE) -> None:
        off = float((ours - exact).norm() / exact.norm())
        if not off <= bound:
            raise Unavailable(f"{what} by the compiled library is {off:.2%} off")

    fold = kernels.fold
    tokens, groups, outputs = 37, 7 * fold, 150
    inputs = groups * group
    x, split = normal(tokens, inputs) * normal(tokens, 1).exp(), group + 5
    in_parts = torch.cat((x[:, :split].bfloat16().float(), x[:, split:]), dim=1)
    modulation = Modulation(normal(inputs), normal(inputs), normal(outputs))
    modulated = F.layer_norm(x, (inputs,), eps=1e-6) * (1 + modulation.scale) + modulation.shift
    for bits, centre in ((1, -0.5), (2, -1.0), (4, None)):
        if bits == 4 and fold > 1:
            continue
        packed = torch.randint(0, 256, (outputs, inputs * bits // 8), generator=random, dtype=torch.uint8)
        if fold > 1 and bits == 2:
            packed &= ~(packed >> 1 & 0b01010101)  # no code of 3, which nothing ternary has
        scales = normal(outputs, groups).abs() + 0.5
        biases = normal(outputs, groups) - 8 * scales
        w = Codes(packed, scales, biases if bits == 4 else None, bits)
        dense = expand(packed, rounded(scales, fold), biases, bits, torch.float32, centre)
        exact = expand(packed, scales, biases, bits, torch.float32, centre)
        for dtype in (torch.float32, torch.bfloat16):
            made = kernels.dense(packed, scales, biases, bits, dtype, centre)
            held(f"a layer in {dtype}", made.float(), exact.to(dtype).float())
        for source, panels in (
            (x, kernels.quantize(x)),
            (in_parts, kernels.quantize(x[:, split:], x[:, :split].bfloat16())),
            (modulated, kernels.modulate(x, modulation, 1e-6)),
        ):
            exact = rounded(source, group * fold) @ dense.T
            out = torch.empty(tokens, outputs)
            kernels.multiply(panels, w, out)
            held("a product", out, exact)
            kernels.multiply(panels, w, half := torch.empty_like(out, dtype=torch.bfloat16))
            held("a product in bfloat16", half.float(), out.bfloat16().float(), 0)
            kernels.gate(panels, w, out[:, : outputs // 2])
            held("SwiGLU", out[:, : outputs // 2], F.silu(exact[:, : outputs // 2]) * exact[:, outputs // 2 :])
            out.fill_(1)
            kernels.add(panels, w, modulation.gate, out)
            held("a gated sum", out, 1 + modulation.gate * exact)
    angles = normal(tokens, 12)
    rotary, heads, weight = Rotary(angles.cos(), angles.sin()), normal(tokens, 3, 24), normal(24)
    turned, plain = torch.empty_like(heads), torch.empty_like(heads)
    kernels.turn(heads, weight, 1e-6, rotary, turned)
    TorchPasses().turn(heads, weight, 1e-6, rotary, plain)
    held("a rotation", turned, apply_rotary_emb(F.rms_norm(heads, (24,), weight, 1e-6)[None], rotary)[0])
    held("a rotation", turned, plain)
    kernels.turn(heads, weight, 1e-6, rotary, half := torch.empty_like(heads, dtype=torch.bfloat16))
    held("a rotation in bfloat16", half.float(), turned.bfloat16().float(), 0)
    kernels.turn(heads.bfloat16(), weight, 1e-6, rotary, half)
    kernels.turn(heads.bfloat16().float(), weight, 1e-6, rotary, turned)
    held("a rotation of bfloat16", half.float(), turned.bfloat16().float(), 0)


def rounded(x: Tensor, group: int) -> Tensor:
    """What int8 leaves of x [M, K]: each group of a row in 127 steps of its largest value."""
    parts = x.unflatten(1, (-1, group))
    steps = parts.abs().amax(-1, keepdim=True) / 127
    return ((parts / steps).round() * steps).flatten(1)
