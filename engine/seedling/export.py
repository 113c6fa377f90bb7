"""Trained weights -> pack folders in exactly the released layouts: packed (MLX) for low-bit, unpacked for dense.

Takes any module of the right kind, so the tests' random packs are written by it too. What is written is read back and
compared by the tests, not here.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine import lowbit, schedule
from engine.seedling.quantize import ENCODER_BITS, ENCODER_GROUP, TRANSFORMER_GROUP, binary, is_block_linear, ternary

BITS = {"ternary": 2, "binary": 1, "4-bit": 4}
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One model: its config.json and its full-precision weights."""

    config: dict[str, Any]
    state: State


def stored(tensor: Tensor) -> Tensor:
    """Floats as bfloat16; counters as they are."""
    return tensor.bfloat16().contiguous() if tensor.is_floating_point() else tensor.contiguous()


def packed(state: State, names: set[str], bits: int, group_size: int) -> dict[str, Tensor]:
    """The state with every weight of `names` replaced by codes, scales and biases, the rest in bfloat16.

    Ternary and binary weights are first made what training computed with; lowbit then takes them over without loss.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name not in names:
            out[name] = stored(tensor)
            continue
        weights, fqn = tensor.float(), name.removesuffix(".weight")
        match bits:
            case 1:
                codes, scales, biases = lowbit.quantize_binary(binary(weights, group_size).numpy(), group_size)
            case 2:
                codes, scales, biases = lowbit.quantize_ternary(ternary(weights, group_size).numpy(), group_size)
            case _:
                codes, scales, biases = lowbit.quantize_affine(weights.numpy(), bits, group_size)
        out[f"{fqn}.weight"] = torch.from_numpy(lowbit.pack(codes, bits))
        out[f"{fqn}.scales"] = torch.from_numpy(scales).bfloat16()
        out[f"{fqn}.biases"] = torch.from_numpy(biases).bfloat16()
    return out


def block_weights(state: State) -> set[str]:
    """The weights that the released packs quantise: every matrix inside a transformer block."""
    return {name for name, tensor in state.items() if is_block_linear(name) and tensor.ndim == 2}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_transformer(folder: Path, variant: str, part: Part, group_size: int = TRANSFORMER_GROUP) -> None:
    """All matrices inside the blocks are packed; dense keeps every weight in bfloat16."""
    target = folder / ("transformer" if variant == "dense" else "transformer-packed-mflux")
    write_json(target / "config.json", {"_class_name": "Flux2Transformer2DModel", **part.config})
    if variant == "dense":
        tensors = {name: stored(tensor) for name, tensor in part.state.items()}
    else:
        tensors = packed(part.state, block_weights(part.state), BITS[variant], group_size)
        write_json(target / "quantization_config.json", {"bits": BITS[variant], "group_size": group_size})
    save_file(tensors, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_encoder(folder: Path, part: Part) -> None:
    """Qwen3 at 4 bit, embedding included, under its usual `model.` names."""
    target = folder / "text_encoder-mlx-4bit"
    quantization = {"group_size": ENCODER_GROUP, "bits": ENCODER_BITS}
    write_json(
        target / "config.json", {"architectures": ["Qwen3ForCausalLM"], **part.config, "quantization": quantization}
    )
    state = {f"model.{name}": tensor for name, tensor in part.state.items()}
    names = {name for name, tensor in state.items() if tensor.ndim == 2}
    tensors = packed(state, names, ENCODER_BITS, ENCODER_GROUP)
    save_file(tensors, target / "model.safetensors", metadata={"format": "mlx"})


def write_vae(folder: Path, part: Part) -> None:
    target = folder / "vae"
    write_json(target / "config.json", {"_class_name": "AutoencoderKLFlux2", **part.config})
    tensors = {name: stored(tensor) for name, tensor in part.state.items()}
    save_file(tensors, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_frame(folder: Path, variant: str) -> None:
    """The small files that hold the parts together."""
    write_json(folder / "scheduler" / "scheduler_config.json", schedule.RELEASED)
    write_json(folder / "model_index.json", {"_class_name": "Flux2KleinPipeline", "_diffusers_version": "0.37.0.dev0"})
    write_json(folder / "manifest.json", {"format": "niwaki", "variant": variant})


def write_notes(folder: Path, notes: dict[str, Any]) -> None:
    """niwaki.json: what the released files do not say, with sizes and hashes of everything that lies there now."""
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "niwaki.json"
    }
    write_json(folder / "niwaki.json", {**notes, "files": files})
