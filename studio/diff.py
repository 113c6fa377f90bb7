"""What changed between two prompts, word by word, for any script.

Knows text only. Words end at white space and at punctuation (Unicode category P), which is a word of its own; never
split with \\w, which cuts Hindi and Tamil at every vowel sign.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

SAME, GONE, NEW = "same", "gone", "new"
MAX_CELLS = 1_000_000  # old words x new words; beyond it (two 10,000-character novels) only the ends are compared


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of text: in both prompts, only in the old one, or only in the new one. Shown one after the other."""

    kind: str
    text: str


def words(text: str) -> list[str]:
    """The words and punctuation marks, without the white space."""
    return [text[start:end] for start, end in _spans(text)]


def diff(old: str, new: str) -> tuple[Piece, ...]:
    """The pieces of both prompts in reading order; those that aren't GONE, put together, are `new` to the letter.

    Prompts that differ in white space only have no GONE and no NEW piece.
    """
    before, after = _spans(old), _spans(new)
    pieces: list[Piece] = []
    for kind, i1, i2, j1, j2 in _changes(words(old), words(new)):
        if kind == GONE:
            gone = old[before[i1][0] : before[i2 - 1][1]]
            pieces.append(Piece(GONE, gone + " "))
        else:
            start = 0 if j1 == 0 else after[j1][0]  # white space belongs to the word before it; at the start, after it
            pieces.append(Piece(kind, new[start : after[j2][0] if j2 < len(after) else len(new)]))
    return tuple(pieces) if words(new) or not new else (*pieces, Piece(SAME, new))


def changed(old: str, new: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(gone, new): the stretches of words that differ, for a short caption such as “red → blue”."""
    pieces = diff(old, new)
    return tuple(tuple(p.text.strip() for p in pieces if p.kind == kind) for kind in (GONE, NEW))  # type: ignore[return-value]


def _spans(text: str) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    start: int | None = None
    for place, char in enumerate(text):
        mark = unicodedata.category(char)[0] == "P"
        if mark or char.isspace():
            if start is not None:
                found.append((start, place))
            start = None
            if mark:
                found.append((place, place + 1))
        elif start is None:
            start = place
    if start is not None:
        found.append((start, len(text)))
    return found


def _changes(old: Sequence[str], new: Sequence[str]) -> list[tuple[str, int, int, int, int]]:
    """(kind, i1, i2, j1, j2) as SequenceMatcher gives them, a replacement as GONE and then NEW."""
    head = 0
    while head < min(len(old), len(new)) and old[head] == new[head]:
        head += 1
    tail = 0
    while tail < min(len(old), len(new)) - head and old[-1 - tail] == new[-1 - tail]:
        tail += 1
    middle_old, middle_new = old[head : len(old) - tail], new[head : len(new) - tail]
    steps = [("equal", 0, head, 0, head)]
    if len(middle_old) * len(middle_new) > MAX_CELLS:
        steps.append(("replace", head, head + len(middle_old), head, head + len(middle_new)))
    else:
        found = SequenceMatcher(None, middle_old, middle_new, autojunk=False).get_opcodes()
        steps += [(op, head + a, head + b, head + c, head + d) for op, a, b, c, d in found]
    steps.append(("equal", len(old) - tail, len(old), len(new) - tail, len(new)))
    changes = []
    for op, i1, i2, j1, j2 in steps:
        if op == "equal" and j1 < j2:
            changes.append((SAME, i1, i2, j1, j2))
        if op in ("replace", "delete") and i1 < i2:
            changes.append((GONE, i1, i2, j1, j1))
        if op in ("replace", "insert") and j1 < j2:
            changes.append((NEW, i1, i1, j1, j2))
    return changes
