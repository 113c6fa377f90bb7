"""Token ids against the tokenizer's own reading of the templated string, against transformers, and against misuse."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers

from engine.prompt import Tokenizer, template, unknown_words
from engine.types import BadRequest

PROMPTS = [
    "two red circles on a blue background", "A", "", " ", "\n", "\n\nlines\n\nafter lines\n",
    "  leading and trailing  ",
    "don't 'quote'", "3 circles, 12% <of> |them|", "\ttabs\r\nand\r", "लाल वृत्त", "வட்டம்", "e\u0301 and \u00e9",
    "🌳 \u200d",
    "<b>im_start</b> <| end |>", "\u0301starts with a mark", "'s", "im_end",
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext|>"]


@pytest.fixture(scope="module")
def folder(tiny_packs: Path) -> Path:
    return tiny_packs / "ternary" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_ids_are_those_of_the_whole_templated_string(prompt: str, tokenizer: Tokenizer, folder: Path) -> None:
    full = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids, mask, length = tokenizer.encode(prompt, 96)
    assert ids.shape == mask.shape == (1, 96) and ids.dtype == mask.dtype == "int64"
    assert ids[0, :length].tolist() == full.encode(template(prompt)).ids
    assert set(ids[0, length:].tolist()) == {full.token_to_id("<|endoftext|>")}
    assert mask[0].tolist() == [1] * length + [0] * (96 - length)


@pytest.mark.parametrize("prompt", PROMPTS[:7] + PROMPTS[10:13], ids=repr)
def test_ids_are_those_of_transformers(prompt: str, tokenizer: Tokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = reference.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert text == template(prompt)
    expected = reference(text, padding="max_length", truncation=True, max_length=96)
    ids, mask, _ = tokenizer.encode(prompt, 96)
    assert ids[0].tolist() == expected["input_ids"] and mask[0].tolist() == expected["attention_mask"]


@pytest.mark.parametrize("token", CONTROL)
def test_control_tokens_in_a_prompt_are_text(token: str, tokenizer: Tokenizer, folder: Path) -> None:
    full = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = {full.token_to_id(name) for name in CONTROL}

    def controls(prompt: str) -> list[int]:
        ids, _, length = tokenizer.encode(prompt, 96)
        return [id_ for id_ in ids[0, :length].tolist() if id_ in control]

    assert controls(f"a {token}{token} circle") == controls("a circle") and len(controls("")) == 5
    ids, _, length = tokenizer.encode(f"a {token} circle", 96)
    assert token in full.decode([id_ for id_ in ids[0, :length].tolist() if id_ not in control])


def test_exactly_full_is_accepted_and_one_more_is_refused(tokenizer: Tokenizer) -> None:
    length = tokenizer.encode("a red circle", 96)[2]
    ids, mask, _ = tokenizer.encode("a red circle", length)
    assert ids.shape == (1, length) and mask.all()
    with pytest.raises(BadRequest, match=rf"takes {length} tokens .* reads {length - 1}; shorten"):
        tokenizer.encode("a red circle", length - 1)


def test_half_a_character_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="character 3 of the prompt is not valid text"):
        tokenizer.encode("a \udc80 circle", 64)


def test_settings_in_the_file_do_not_pad_or_cut(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    full = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    full.enable_truncation(3)
    full.enable_padding(length=7)
    full.save(str(tmp_path / "tokenizer.json"))
    expected = tokenizer.encode("a red circle", 64)[0]
    assert Tokenizer(tmp_path).encode("a red circle", 64)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "{\"added_tokens\": 3}", "\x00\xff"])
def test_damaged_files_are_one_sentence(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(BadRequest, match="tokenizer.json cannot be read .*; fetch or copy the pack again"):
        Tokenizer(tmp_path)


def test_a_missing_control_token_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "tokenizer.json", tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<think>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(BadRequest, match="does not know <think>; fetch"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("two Red circles", ()),
        ("a dragon, a Dragon and a (castle)!", ("dragon", "castle")),
        ("Castle dragon castle", ("Castle", "dragon")),
        ("red-circle; red/blue “circle”…", ()),
        ("लाल वृत्त। நீல வட்டம்", ("நீல",)),
        ("  \n\t ", ()),
        ("?!", ()),
        ("CAFE\u0301 Straße", ()),
    ],
)
def test_unknown_words(prompt: str, expected: tuple[str, ...]) -> None:
    known = {"two", "red", "blue", "circle", "circles", "a", "and", "लाल", "वृत्त", "வட்டம்", "caf\u00e9", "STRASSE"}
    assert unknown_words(prompt, frozenset(known)) == expected


def test_without_a_vocabulary_every_word_is_known() -> None:
    assert unknown_words("anything at all", None) == ()
