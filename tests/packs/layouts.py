"""Write one model in each released layout, for any configuration, streaming: gemlite with HQQ, MLX, and unpacked.

Each function writes a whole folder. What a layout's bytes mean was taken from the formats page, and is held in tests
to bytes that gemlite, hqq and MLX themselves made. Knows nothing of how a layout is read.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import lowbit, tensorfile
from engine.tensorfile import Entry
from tests.packs.content import ENCODER_BITS, ENCODER_GROUP, GROUP, Content, Shape, group_of
from tests.packs.torchfile import Checkpoint

SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "time_shift_type": "exponential", "use_dynamic_shifting": True,
}  # fmt: skip
FORMATS = {2: "gemlite-int2-ternary-g128", 1: "gemlite-int1-g128"}
SKIPPED = ("context_embedder", "norm_out", "proj_out", "x_embedder", "modulation", "time_guidance_embed")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Tokenizer = Callable[[Path], None]
Parts = Callable[[], Iterator[np.ndarray]]


def write_mlx(folder: Path, content: Content, tokenizer: Tokenizer, shards: int = 1) -> Path:
    """The MLX pack: transformer-packed-mflux, text_encoder-mlx-4bit, vae, scheduler, tokenizer."""
    _frame(folder, content)
    tokenizer(folder / "tokenizer")
    write_json(folder / "manifest.json", {"format": "mlx", "variant": content.variant})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    packed = folder / "transformer-packed-mflux"
    write_json(packed / "config.json", content.configs.transformer)
    write_json(packed / "quantization_config.json", {"bits": content.bits, "group_size": content.group})
    _write_shards(packed, WEIGHTS, packed_entries(content), {"format": "mlx"}, shards)
    encoder = folder / "text_encoder-mlx-4bit"
    quantization = {"group_size": ENCODER_GROUP, "bits": ENCODER_BITS}
    write_json(encoder / "config.json", content.configs.text_encoder | {"quantization": quantization})
    entries = [entry for layer in content.text_encoder() for entry in _mlx_entries(content, *layer, ENCODER_BITS)]
    _write_shards(encoder, "model.safetensors", entries, {"format": "mlx"}, shards)
    return folder


def write_gemlite(folder: Path, content: Content, tokenizer: Tokenizer, group_mode: int = 4, axis: int = 1) -> Path:
    """The CUDA pack: transformer-gemlite-intN/state_dict.pt, text_encoder-hqq-4bit/qmodel.pt, vae; no scheduler.

    Ternary or binary. `group_mode` is gemlite's metadata[10]; `axis` is how HQQ groups the text encoder's weights.
    """
    _frame(folder, content)
    write_json(folder / "manifest.json", {"format": FORMATS[content.bits]})
    packed = folder / f"transformer-gemlite-int{content.bits}"
    ignored = {"enable_time_sign_embed": False, "musubi_block_swap_device": "cpu", "musubi_blocks_to_swap": 0}
    write_json(packed / "config.json", content.configs.transformer | ignored)
    fqns = [name.removesuffix(".weight") for name, _, quantised in content.transformer() if quantised]
    skipped = sum(len(shape) == 2 and not quantised for _, shape, quantised in content.transformer())
    write_json(packed / "quantization_config.json", {
        "format": FORMATS[content.bits], "bits": content.bits, "group_size": GROUP, "packing_bitwidth": 8,
        "quantized_count": len(fqns), "skipped_count": skipped, "quantized_fqns": fqns, "skip_patterns": list(SKIPPED),
    })  # fmt: skip
    checkpoint = Checkpoint()
    checkpoint.save(gemlite_state(checkpoint, content, group_mode), packed / "state_dict.pt")
    write_hqq(folder / "text_encoder-hqq-4bit", content, axis)
    tokenizer(folder / "text_encoder-hqq-4bit" / "tokenizer")
    return folder


def gemlite_state(checkpoint: Checkpoint, content: Content, group_mode: int = 4) -> dict[str, torch.Tensor]:
    """The flat dict of a state_dict.pt, its tensors not yet filled."""
    state = {}
    for name, shape, quantised in content.transformer():
        if quantised:
            state |= _gemlite_layer(checkpoint, content, name.removesuffix(".weight"), shape, group_mode)
        else:
            state[name] = checkpoint.tensor(shape, torch.bfloat16, _dense_bfloat16(content, name, shape))
    return state


def write_hqq(folder: Path, content: Content, axis: int = 1) -> None:
    """hqq's {module: {name: tensor or value}} of a Qwen3ForCausalLM: linears at 4 bit, the rest in float16."""
    write_json(folder / "config.json", content.configs.text_encoder | {"torch_dtype": "float16"})
    checkpoint, modules = Checkpoint(), {}
    for name, shape, matrix in content.text_encoder():
        fqn = name.removesuffix(".weight")
        if matrix and fqn != "model.embed_tokens":
            modules[fqn] = _hqq_layer(checkpoint, content, fqn, shape, axis)
        elif matrix:
            parts = _as_float16(lambda fqn=fqn, shape=shape: content.values(fqn, shape, ENCODER_BITS))
            modules[fqn] = {"weight": checkpoint.tensor(shape, torch.float16, parts)}
        else:
            parts = _as_float16(lambda name=name, shape=shape: iter([content.dense(name, shape)]))
            modules[fqn] = {"weight": checkpoint.tensor(shape, torch.float16, parts)}
    checkpoint.save(modules, folder / "qmodel.pt")


def write_unpacked(folder: Path, content: Content, tokenizer: Tokenizer, shards: int = 1) -> Path:
    """Diffusers' own folder in bfloat16, holding exactly the values that the packed ones stand for."""
    _frame(folder, content)
    tokenizer(folder / "tokenizer")
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "transformer" / "config.json", content.configs.transformer)
    _write_shards(folder / "transformer", WEIGHTS, unpacked_entries(content), None, shards)
    write_json(folder / "text_encoder" / "config.json", content.configs.text_encoder)
    entries = [_unpacked_entry(content, *layer, ENCODER_BITS) for layer in content.text_encoder()]
    _write_shards(folder / "text_encoder", "model.safetensors", entries, {"format": "pt"}, shards)
    return folder


def packed_entries(content: Content) -> list[Entry]:
    """The tensors of the MLX transformer."""
    return [entry for layer in content.transformer() for entry in _mlx_entries(content, *layer, content.bits)]


def unpacked_entries(content: Content) -> list[Entry]:
    """The tensors of the unpacked transformer, all bfloat16."""
    return [_unpacked_entry(content, *layer, content.bits) for layer in content.transformer()]


def vae_entries(content: Content) -> list[Entry]:
    """The tensors of the VAE: bfloat16, but for a counter."""
    return [
        Entry(name, "I64", shape, lambda n=name, s=shape: [content.dense(n, s)])
        if name.endswith("num_batches_tracked")
        else Entry(name, "BF16", shape, _dense_bfloat16(content, name, shape))
        for name, shape in content.vae()
    ]


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _frame(folder: Path, content: Content) -> None:
    write_json(folder / "model_index.json", {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0.dev0"})
    write_json(folder / "vae" / "config.json", content.configs.vae)
    tensorfile.write(folder / "vae" / WEIGHTS, vae_entries(content), {"format": "pt"})


def _write_shards(folder: Path, name: str, entries: list[Entry], metadata: dict[str, str] | None, shards: int) -> None:
    """One file, or `shards` of them with the index that the hub's libraries write."""
    if shards == 1:
        tensorfile.write(folder / name, entries, metadata)
        return
    stem, weight_map = name.removesuffix(".safetensors"), {}
    for number in range(shards):
        shard = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = entries[number::shards]
        tensorfile.write(folder / shard, part, metadata)
        weight_map |= {entry.name: shard for entry in part}
    total = sum(entry.nbytes for entry in entries)
    write_json(folder / f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _mlx_entries(content: Content, name: str, shape: Shape, quantised: bool, bits: int) -> Iterator[Entry]:
    if not quantised:
        yield Entry(name, "BF16", shape, _dense_bfloat16(content, name, shape))
        return
    fqn = name.removesuffix(".weight")
    group = group_of(bits)
    yield Entry(name, "U32", (shape[0], shape[1] * bits // 32), lambda: content.code_bytes(fqn, shape, bits))
    for index, part in enumerate(("scales", "biases")):
        def parts(index: int = index) -> Iterator[np.ndarray]:
            yield lowbit.bfloat16_bits(content.scales_and_biases(fqn, shape, bits)[index])

        yield Entry(f"{fqn}.{part}", "BF16", (shape[0], shape[1] // group), parts)


def gemlite_codes(rows: np.ndarray) -> np.ndarray:
    """W_q [K / codes a byte, N] of packed rows [N, K / codes a byte]."""
    return rows.T


def gemlite_metadata(bits: int, mode: int) -> list[int]:
    return [0, bits, GROUP, 2**bits - 1, 8 // bits, 1, 1, 0, 0, 0, mode, 1]


def hqq_codes(grouped: np.ndarray) -> np.ndarray:
    """W_q of 4-bit codes that lie in hqq's groups: the first half of the rows in the high bits."""
    half = len(grouped) // 2
    return grouped[:half] << 4 | grouped[half:]


def _gemlite_layer(checkpoint: Checkpoint, content: Content, fqn: str, shape: Shape, mode: int) -> dict[str, Any]:
    (n, k), bits = shape, content.bits

    def codes() -> Iterator[np.ndarray]:
        yield gemlite_codes(np.concatenate(list(content.code_bytes(fqn, shape, bits))))

    def scales() -> Iterator[np.ndarray]:
        yield content.scales_and_biases(fqn, shape, bits)[0].T

    def zeros() -> Iterator[np.ndarray]:
        scale, bias = content.scales_and_biases(fqn, shape, bits)
        yield bias.T if mode == 4 else (-bias / scale).T

    metadata = gemlite_metadata(bits, mode)
    return {
        f"{fqn}.W_q": checkpoint.tensor((k * bits // 8, n), torch.uint8, codes),
        f"{fqn}.scales": checkpoint.tensor((k // GROUP, n), torch.float32, scales),
        f"{fqn}.zeros": checkpoint.tensor((k // GROUP, n), torch.float32, zeros),
        f"{fqn}.metadata": checkpoint.tensor((12,), torch.int32, lambda: iter([np.int32(metadata)])),
        f"{fqn}.orig_shape": checkpoint.tensor((2,), torch.int32, lambda: iter([np.int32(shape)])),
    }


def _hqq_layer(checkpoint: Checkpoint, content: Content, fqn: str, shape: Shape, axis: int) -> dict[str, Any]:
    """As hqq 0.2.8 saves a layer. Axis 1: groups are rows of 64 inputs; axis 0: 64 weights, each N K / 64 apart."""
    n, k = shape
    groups = n * k // ENCODER_GROUP
    wide, narrow = ((groups, ENCODER_GROUP), (groups, 1)) if axis == 1 else ((ENCODER_GROUP, groups), (1, groups))

    def codes() -> Iterator[np.ndarray]:
        packed = np.concatenate(list(content.code_bytes(fqn, shape, ENCODER_BITS)))
        yield hqq_codes(lowbit.unpack(packed.view("<u4"), ENCODER_BITS, k).reshape(wide))

    scale = _as_float16(lambda: iter([content.scales_and_biases(fqn, shape, ENCODER_BITS)[0]]))
    zero = _as_float16(lambda: iter([content.zeros(fqn, shape)]))
    return {
        "W_q": checkpoint.tensor((wide[0] // 2, wide[1]), torch.uint8, codes),
        "nbits": ENCODER_BITS, "group_size": ENCODER_GROUP, "shape": torch.Size(shape),
        "scale": checkpoint.tensor(narrow, torch.float16, scale),
        "zero": checkpoint.tensor(narrow, torch.float16, zero),
        "axis": axis, "packing": "4bit_u8", "unpack_view_dtype": torch.uint8, "view_as_float": False,
        "quant_scale": False, "quant_zero": False,
        "compute_dtype": torch.float16, "offload_meta": False, "stores_quant_config": True, "channel_wise": True,
        "optimize": True, "round_zero": True,
    }  # fmt: skip


def _unpacked_entry(content: Content, name: str, shape: Shape, quantised: bool, bits: int) -> Entry:
    fqn = name.removesuffix(".weight")
    if not quantised:
        return Entry(name, "BF16", shape, _dense_bfloat16(content, name, shape))
    return Entry(name, "BF16", shape, lambda: map(lowbit.bfloat16_bits, content.values(fqn, shape, bits)))


def _dense_bfloat16(content: Content, name: str, shape: Shape) -> Parts:
    return lambda: iter([lowbit.bfloat16_bits(content.dense(name, shape))])


def _as_float16(parts: Parts) -> Parts:
    return lambda: (part.astype(np.float16) for part in parts())
