"""Write a full-size pack with random codes, to measure memory and time with.

    python -m tests.packs.full OUT --layout mlx|gemlite|unpacked --variant ternary|binary [--small]

Sizes on disk: MLX 3.9 GB (ternary) and 3.4 GB (binary), gemlite 4.5 and 4.1 GB, unpacked 16 GB. In memory it stays
under 1.5 GB, torch included. The arithmetic does not care what the codes mean.
"""

import argparse
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.packs import layouts
from tests.packs.content import Configs, Content, small

LAYOUTS = {"mlx": layouts.write_mlx, "gemlite": layouts.write_gemlite, "unpacked": layouts.write_unpacked}
FIRST_SPECIAL = 151_643
# Qwen3's own control tokens, from id 151,643 on; those in the second tuple are not "special" to the library.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
ADDED = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXT = ("user\nassistant\n\n", "a bonsai tree in a quiet ceramic studio, soft morning light", "two red circles")


def write_tokenizer(folder: Path, first_special: int = FIRST_SPECIAL) -> None:
    """A small byte-level BPE whose control tokens have the ids of Qwen3's; the ids between mean nothing."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT * 3, trainer)
    trained = tokenizer.model
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = trained.save(str(folder), "trained")
    vocab, merges = models.BPE.read_file(vocab_file, merges_file)
    vocab |= {token: first_special + number for number, token in enumerate(SPECIAL + ADDED)}
    tokenizer.model = models.BPE(vocab, merges)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    Path(vocab_file).unlink()
    Path(merges_file).unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    layouts.write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|endoftext|>", "eos_token": "<|im_end|>",
        "padding_side": "right", "model_max_length": 131072,
    })


def write(folder: Path, layout: str, content: Content) -> Path:
    """Write `content` into `folder` in one of the three layouts, with a tokenizer that fits its vocabulary."""
    size = content.configs.text_encoder["vocab_size"]
    first = min(FIRST_SPECIAL, size - len(SPECIAL + ADDED))
    return LAYOUTS[layout](folder, content, lambda target: write_tokenizer(target, first))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="mlx")
    parser.add_argument("--variant", choices=("ternary", "binary"), default="ternary")
    parser.add_argument("--small", action="store_true", help="a megabyte instead of gigabytes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.out, args.layout, Content(small() if args.small else Configs(), args.variant, args.seed))


if __name__ == "__main__":
    main()
