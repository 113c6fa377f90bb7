"""From a prompt to token ids: the fixed chat template, and the words that a small model does not know.

What a person types is always text: "<|im_end|>" in a prompt is spelled out, never the control token that ends the turn.
Knows nothing of models beyond the tokenizer's folder.
"""

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers

from engine.types import BadRequest

_HEAD = "<|im_start|>user\n"
_TAIL = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_PADDING = "<|endoftext|>"
_CONTROL = re.compile(r"(<\|im_start\|>|<\|im_end\|>|<think>|</think>)")


def template(prompt: str) -> str:
    """The prompt as one user turn for Qwen3, answered without thinking: the string that the models were trained on."""
    return f"{_HEAD}{prompt}{_TAIL}"


class Tokenizer:
    """The tokenizer of a pack, from `folder`/tokenizer.json. Raises BadRequest where that is missing or damaged."""

    def __init__(self, folder: str | Path) -> None:
        file = Path(folder) / "tokenizer.json"
        try:
            spec = json.loads(file.read_text(encoding="utf-8"))
            ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
            # Without added tokens the same tokenizer cannot take text for control, and cuts all other text as before.
            self._text = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
        except Exception as why:  # the library raises bare Exception
            raise BadRequest(f"{file} cannot be read ({why}); fetch or copy the pack again") from None
        self._text.no_truncation()
        self._text.no_padding()
        needed = {_PADDING, *_CONTROL.findall(template(""))}
        if missing := sorted(needed - ids.keys()):
            raise BadRequest(f"{file} does not know {' '.join(missing)}; fetch or copy the pack again")
        self._control = {token: ids[token] for token in needed}

    def encode(self, prompt: str, text_length: int) -> tuple[np.ndarray, np.ndarray, int]:
        """The templated prompt as (ids int64 [1, text_length], mask int64 [1, text_length], its number of tokens).

        Padded on the right with <|endoftext|>, where the mask is 0. For every prompt without control tokens in it, the
        ids are those of encoding `template(prompt)` in one piece. Raises BadRequest, naming both numbers, for a prompt
        that is too long, and for one that is not valid text.
        """
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as why:
            raise BadRequest(f"character {why.start + 1} of the prompt is not valid text; type it again") from None
        head, tail = _CONTROL.split(_HEAD), _CONTROL.split(_TAIL)
        head[-1] += prompt  # in one piece with what stands before it: the tokenizer looks across the seam
        ids = [id_ for piece in head + tail for id_ in self._ids(piece)]
        if len(ids) > text_length:
            raise BadRequest(
                f"the prompt takes {len(ids)} tokens with its template where the model reads {text_length}; shorten it"
            )
        padding = text_length - len(ids)
        mask = np.array([[1] * len(ids) + [0] * padding], dtype=np.int64)
        return np.array([ids + [self._control[_PADDING]] * padding], dtype=np.int64), mask, len(ids)

    def _ids(self, piece: str) -> list[int]:
        """The ids of a control token, or of a stretch of text between two of them."""
        if piece in self._control:
            return [self._control[piece]]
        return self._text.encode(piece, add_special_tokens=False).ids


def unknown_words(prompt: str, vocabulary: Iterable[str] | None) -> tuple[str, ...]:
    """The words of the prompt that are not in the vocabulary (None: every word is), as typed, in order, each once.

    Case does not count. Words end at white space and at punctuation (Unicode categories P*); never at what a regular
    expression holds for a word's end, which cuts Devanagari and Tamil at every vowel sign.
    """
    if vocabulary is None:
        return ()
    known = {_folded(word) for word in vocabulary}
    apart = "".join(" " if unicodedata.category(letter).startswith("P") else letter for letter in prompt)
    unknown: dict[str, str] = {}
    for word in apart.split():
        if _folded(word) not in known:
            unknown.setdefault(_folded(word), word)
    return tuple(unknown.values())


def _folded(word: str) -> str:
    """The word in one case and one spelling of its accents."""
    return unicodedata.normalize("NFC", word.casefold())
