"""The seedling's tokenizer: byte-level BPE with Qwen's template tokens, small enough to read.

Two rules differ from Qwen's on purpose: letters and combining marks are one class, so that Devanagari and Tamil words
are not cut at every vowel sign, and text is lower-cased. Both live in tokenizer.json, which `tokenizers` obeys.
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from engine.seedling.captions import LANGUAGES, caption, vocabulary
from engine.seedling.scenes import random_scene

VOCABULARY_SIZE = 3072
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>")
WORD_RULE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """Merges from captions (each of their words becomes one token) and from everyday words (others take few).

    Rare words of captions stand in the corpus by themselves too; merging ends where the vocabulary is full.
    """
    rng = np.random.default_rng(seed)
    words = (Path(__file__).parent / "words.txt").read_text().split()
    corpus = [caption(rng, random_scene(rng), language) for language in LANGUAGES for _ in range(2000)]
    corpus += [f" {word}" for word in sorted(vocabulary()) for _ in range(20)]
    corpus += [f" {word}" for word in words for _ in range(3)] + ["user\n", "assistant\n", "\n\n"] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_RULE), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(CONTROL) - len(THINK),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # at the end of the vocabulary, as in Qwen3; there too the two think tokens are not "special"
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
