"""The words that the importers share: a packed layer on its way in, a component to be written, a file to be copied.

What an importer makes is a list of these; nothing is read before `engine.importers.build` asks. Knows no layout.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine import lowbit
from engine.jsonfile import REPAIR
from engine.shapes import Shapes
from engine.tensorfile import Entry, widened
from engine.types import BadRequest

_MOST_NAMES = 100_000


@dataclass(frozen=True)
class Layer:
    """A quantised linear of shape [N, K] as its source holds it. `words` and `affine` give it in our layout: uint32
    [N, K * bits / 32], and scales and biases [N, K / group_size] in the dtypes named. `decode` gives float32 weights
    [rows, K] of some rows by the source's own rule; it shares no code with the other two, for it is what checks them.
    """

    fqn: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    dtypes: tuple[str, str]
    file: Path
    words: Callable[[], np.ndarray]
    affine: Callable[[], tuple[np.ndarray, np.ndarray]]
    decode: Callable[[np.ndarray], np.ndarray]

    def entries(self) -> list[Entry]:
        """The three tensors, checked when they are made."""
        rows, k = self.shape
        groups = (rows, k // self.group_size)

        def part(index: int) -> Callable[[], Iterable[np.ndarray]]:
            def parts() -> Iterable[np.ndarray]:
                scales, biases = self.affine()
                wide = widened(scales, self.dtypes[0]), widened(biases, self.dtypes[1])
                if fault := lowbit.affine_fault(*wide, self.bits):
                    raise BadRequest(f"{self.file}: {self.fqn} {fault}; {REPAIR}")
                return (scales if index == 0 else biases,)

            return parts

        def words() -> Iterable[np.ndarray]:
            made = self.words()
            if fault := lowbit.words_fault(made, self.bits):
                raise BadRequest(f"{self.file}: {self.fqn} {fault}; {REPAIR}")
            return (made,)

        return [
            Entry(f"{self.fqn}.weight", "U32", (rows, k * self.bits // lowbit.WORD_BITS), words),
            Entry(f"{self.fqn}.scales", self.dtypes[0], groups, part(0)),
            Entry(f"{self.fqn}.biases", self.dtypes[1], groups, part(1)),
        ]


@dataclass(frozen=True)
class Part:
    """One component of the new pack: a folder, its JSON files by name, its tensors, the packed layers among them."""

    folder: str
    documents: Mapping[str, dict[str, Any]]
    tensors: str
    entries: Sequence[Entry]
    layers: Sequence[Layer] = ()
    remarks: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Copy:
    """A file that is taken over as it is, and its path in the new pack."""

    source: Path
    path: str


def names(expected: Shapes, config: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes that a configuration implies. Raises BadRequest where the configuration is senseless."""
    try:
        listed = list(itertools.islice(expected, _MOST_NAMES + 1))
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as why:
        fault = f"lacks {why}" if isinstance(why, KeyError) else f"holds a value that makes no sense ({why})"
        raise BadRequest(f"{config} {fault}; {REPAIR}") from None
    if len(listed) > _MOST_NAMES:
        raise BadRequest(f"{config} implies more than {_MOST_NAMES} tensors, which no model has; {REPAIR}")
    return listed


def is_block_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the released packs quantise this weight: all matrices inside the transformer blocks."""
    return name.startswith(("transformer_blocks.", "single_transformer_blocks.")) and len(shape) == 2
