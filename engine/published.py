"""Published figures of the Bonsai packs: by hardware, with our own bounds where nothing is published; and of quality.
Data only.

Seconds per image at four steps, warm, binary and ternary; peak in bytes where somebody published it.
"""

import re
from dataclasses import dataclass

SLACK = 1.25  # another driver, another clock: slower than this is a fault
STEPS = 4
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Figures:
    """What a picture should take; None: nobody says. `source` in words."""

    source: str
    seconds: float | None = None
    peak_bytes: float | None = None
    mean_bytes: float | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """GenEval's overall score, and the bytes of the transformer (Bonsai's: of the MLX packs)."""

    name: str
    overall: float
    transformer_bytes: int


QUALITY_SOURCE = "Bonsai Image's published table of GenEval scores"
QUALITY = (
    Quality("Bonsai Image 4B binary", 0.671, 965_164_000),
    Quality("Bonsai Image 4B ternary", 0.723, 1_425_227_000),
    Quality("FLUX.2 Klein 4B", 0.819, 7_751_109_744),
)
# hardware's name -> size -> (binary, ternary) seconds
_SECONDS: dict[str, dict[str, tuple[float, float]]] = {
    r"\bA100\b": {"512x512": (1.0, 1.1), "1024x1024": (2.7, 2.8)},
    r"RTX PRO 6000": {"512x512": (1.0, 1.0), "1024x1024": (1.8, 2.1)},
    r"RTX 3080(?! Ti)": {"512x512": (1.5, 1.4), "1024x1024": (4.5, 4.5)},
    r"RTX 3060 Laptop": {"512x512": (4.4, 3.3), "1024x1024": (24.8, 17.5)},
    r"\bM4 Pro\b": {"512x512": (6.01, 5.78), "1024x1024": (24.07, 24.26)},
}
_PEAK: dict[str, dict[str, tuple[float, float]]] = {
    r"RTX 3080(?! Ti)": {"1024x1024": (6.4 * GIB, 6.8 * GIB)},
    # No CPU figure is published: these are what Niwaki's own plan promises, libraries included.
    r"^cpu$": {"512x512": (2.8e9, 3.2e9), "1024x1024": (3.8e9, 4.2e9)},
}
# Mean while a picture is made. On a CPU our own bound, of the resident memory with libraries.
_MEAN: dict[str, dict[str, tuple[float, float]]] = {
    r"\bM4 Pro\b": {"512x512": (1.50e9, 1.96e9), "1024x1024": (1.95e9, 2.38e9)},
    r"^cpu$": {"512x512": (2.1e9, 2.5e9)},
}


def find(hardware: str, variant: str, size: str, steps: int) -> Figures | None:
    """The figures for a machine ("cpu" for any processor), or None where nothing is known."""
    if variant not in ("binary", "ternary") or steps != STEPS:
        return None
    seconds, peak, mean = (_look(table, hardware, variant, size) for table in (_SECONDS, _PEAK, _MEAN))
    if seconds is None and peak is None and mean is None:
        return None
    source = "Niwaki's own bounds for a CPU" if hardware == "cpu" else f"the published figures for {hardware}"
    return Figures(source, seconds, peak, mean)


def _look(
    table: dict[str, dict[str, tuple[float, float]]], hardware: str, variant: str, size: str
) -> float | None:
    for pattern, sizes in table.items():
        if size in sizes and re.search(pattern, hardware):
            return sizes[size][variant == "ternary"]
    return None
