"""Whether the tensors of a file are the ones that a model needs, and the sentence that says what is wrong.

Both backends ask before they assign anything. It knows names and shapes, no framework.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from engine.types import EngineError

NAMES_SHOWN = 3  # of the missing or unexpected tensors, in an error sentence
REPAIR = "fetch or copy the pack again"

Shapes = Mapping[str, tuple[int, ...]]


def refuse_misfits(expected: Shapes, found: Shapes, folder: Path) -> None:
    """Raise EngineError unless `found` has exactly the names and shapes of `expected`."""
    shapes = [
        f"{name} is {list(found[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    kinds = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "misshapen": shapes,
    }
    faults = [f"{kind} {_shortened(names)}" for kind, names in kinds.items() if names]
    if faults:
        raise EngineError(f"tensors in {folder} do not fit its config.json: {'; '.join(faults)}; {REPAIR}")


@contextmanager
def sensible(folder: Path) -> Iterator[None]:
    """Whatever a library raises inside, about values of a config.json that open_pack lets pass, as one EngineError."""
    try:
        yield
    except EngineError:
        raise
    except Exception as why:
        brief = " ".join(str(why).split())[:120]
        raise EngineError(f"{folder / 'config.json'} holds a value that makes no sense ({brief}); {REPAIR}") from why


def _shortened(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
