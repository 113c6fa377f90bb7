"""Kernels on an NVIDIA card: how they are launched, and whether they can be used at all.

Knows no kernel. triton_passes.py and decoder_card.py have them; both ask here before the first use.
"""

import hashlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

AGREE = 1e-2  # |ours - exact| / |exact| of a whole pass in bfloat16, which alone rounds away 0.2 %

_ahead = False  # whether kernels are only compiled


class Wrong(Exception):
    """Which pass does not agree with torch, and by how much."""


def held(what: str, ours: Tensor, exact: Tensor, bound: float = AGREE) -> None:
    """Raises Wrong where they are further apart than `bound`."""
    off = float((ours.float() - exact.float()).norm() / exact.float().norm())
    if not (off <= bound or _ahead):
        raise Wrong(f"{what} is {off:.2%} off")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """A kernel of Triton's or Gluon's, in so many programs."""
    if _ahead:
        kernel.warmup(*arguments, grid=grid, **constants)
    else:
        kernel[grid](*arguments, **constants)


def refusal(name: str, check: Callable[[torch.device], None]) -> str:
    """Why the kernels that `check` compiles and compares can't be used on this card, as the second half of a sentence;
    "" where they agree with torch. They are compared once: a mark beside Triton's compiled kernels says so.

    Raises torch.OutOfMemoryError where the card has no room to compare them.
    """
    if importlib.util.find_spec("triton") is None:
        return "not without the package triton, which comes with torch for CUDA on Linux"
    try:
        if (mark := _mark(name)).exists():
            return ""
        with _compiling():
            check(torch.device("cuda"))
        check(torch.device("cuda"))
    except Wrong as wrong:
        return str(wrong)
    except Exception as error:  # of a compiler, a driver or a card that nobody has tried: the picture is not lost
        if "out of memory" in str(error):  # torch says so, Triton does; at another moment they are no worse for it
            raise torch.OutOfMemoryError(str(error)) from error
        return f"they can't be compiled here ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
    with suppress(OSError):
        mark.touch()
    return ""


def _mark(name: str) -> Path:
    """There once this check has passed with these libraries, this card and our code as it is."""
    import triton

    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    about = name, triton.__version__, torch.__version__, torch.cuda.get_device_name(), code
    return Path(triton.knobs.cache.dir) / f"niwaki-{hashlib.sha256(repr(about).encode()).hexdigest()[:16]}"


@contextmanager
def _compiling() -> Iterator[None]:
    """What is launched is only compiled, all of it side by side: one kernel after the other takes three times as long.
    What can't be compiled is passed over here, for it fails again when it is used."""
    import triton

    global _ahead
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        _ahead = True
        try:
            yield
        finally:
            _ahead = False


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether it has what Hopper brought: descriptors and 227 kB of shared memory."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major == 9  # interpreted it has


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
