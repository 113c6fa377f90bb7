"""What is known of matrix products on this machine: how fast each number format is, which layers of a pack bear int8.

Reads and keeps only (engine/measured.py has the file): the torch backend measures, `plan` decides. Imports no
framework. What can't be read, or was found under other circumstances, counts as not measured.
"""

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

from engine import measured
from engine.hardware import Hardware
from engine.packs import Pack

FORMATS = ("float32", "bfloat16", "int8")
INT8_BITS = (1, 2)  # of a transformer, whose codes are a sign or nothing: torch_backend/int8.py folds their scales
# The names of the ways to multiply as bytes, those preferred first; together where one takes what the other refuses.
WAYS = (("triton",), ("folded", "compiled"), ("torch",))
PASSES = tuple(name for together in WAYS for name in together)
BOUND = 0.02  # |int8 - plain| / |plain| of a layer's outputs, up to which it is multiplied as bytes
Numbers = Mapping[str, float]
Part = Literal["transformer", "text_encoder"]
PARTS: tuple[Part, ...] = ("transformer", "text_encoder")


def rates(data_dir: Path, hardware: Hardware) -> Numbers | None:
    """GFLOP/s of a packed layer in each of FORMATS (0: torch can't), None where nobody has measured them here."""
    found = _numbers(data_dir, _rates_key(hardware), "gflops")
    return found if found and set(found) == set(FORMATS) else None


def keep_rates(data_dir: Path, hardware: Hardware, gflops: Numbers) -> None:
    if not gflops["float32"]:  # a card, where nobody asks for it
        words = " and ".join(f"{gflops[name] / 1000:.0f} in {name}" for name in FORMATS[1:])
        sentence = f"{hardware.name}: {words} (TFLOP/s of a packed layer)"
    else:
        words = ", ".join(f"{gflops[name]:.0f} in {name}" for name in FORMATS)
        sentence = f"{hardware.name}, {hardware.cores} cores: {words} (GFLOP/s of a packed layer)"
    measured.keep(data_dir, _rates_key(hardware), {"sentence": sentence, "gflops": dict(gflops)})


def errors(data_dir: Path, pack: Pack, passes: str, part: Part = "transformer") -> Numbers | None:
    """How far int8 was off in each layer of a part of a pack, computed by these passes (torch_backend/passes.py); None
    where it was not tried or the weights have changed since."""
    return _numbers(data_dir, _errors_key(pack, passes, part), "errors")


def trial(data_dir: Path, pack: Pack, part: Part = "transformer") -> Numbers:
    """The same by whichever passes a layer was left to, those preferred first; empty where it was not tried."""
    for together in WAYS:
        tried = [found for passes in together if (found := errors(data_dir, pack, passes, part))]
        if tried:
            names = dict.fromkeys(name for found in tried for name in found)
            each = {name: [found[name] for found in tried if name in found] for name in names}
            return {name: next((error for error in found if error <= BOUND), found[-1]) for name, found in each.items()}
    return {}


def keep_errors(data_dir: Path, pack: Pack, found: Numbers, passes: str, part: Part = "transformer") -> None:
    sentence = f"{_whose(pack, part)}: int8 ({passes}) for {errors_in_words(found)}"
    measured.keep(data_dir, _errors_key(pack, passes, part), {"sentence": sentence, "errors": dict(found)})


def errors_in_words(found: Numbers) -> str:
    """What the trial of a pack found, for a person."""
    refused = {name: error for name, error in found.items() if error > BOUND}
    text = f"{len(found) - len(refused)} of {len(found)} layers"
    if borne := [error for error in found.values() if error <= BOUND]:
        text += f", off by at most {max(borne):.2%}"
    if refused:
        worst = max(refused, key=lambda name: refused[name])
        text += f"; {len(refused)} would be off by more than {BOUND:.0%}, {worst} by {refused[worst]:.1%}"
    return text


def _numbers(data_dir: Path, key: str, name: str) -> Numbers | None:
    found = measured.recall(data_dir).get(key, {}).get(name)
    if not isinstance(found, dict) or not all(isinstance(number, int | float) for number in found.values()):
        return None
    return {str(name): float(number) for name, number in found.items()}


def _rates_key(hardware: Hardware) -> str:
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "missing"
    return f"layers of torch {torch} on {hardware.name}, {hardware.cores} cores"


def _errors_key(pack: Pack, passes: str, part: Part) -> str:
    """With the weights' files, so that other weights in the same folder are tried again."""
    files = pack.transformer.files if part == "transformer" else pack.text_encoder.files
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr((str(pack.folder.resolve()), weights)).encode()).hexdigest()
    return f"int8 ({passes}) in {_whose(pack, part)} {digest[:12]}"


def _whose(pack: Pack, part: Part) -> str:
    return pack.id if part == "transformer" else f"{pack.id}'s text encoder"
