"""Other engines on the 4B model's shapes, in turn with ours: seconds and memory, each in a process of its own.

    python -m tests.peers PACK [--size 512x512] [--rounds 2] [--ways compiled,outs,plain,diffusers_bfloat16]
    python -m tests.peers PACK --sd-cli PROGRAM --weights FOLDER [--blocks tq2_0] [--steps 4]

The first line: denoising steps alone, those of `tests.floor` (its ways; `outs` keeps linear_out and to_out out of int8,
`diffusers_bfloat16` is diffusers' transformer with dense random weights), the best of `--rounds`, wall clock, with the
process's resident memory meanwhile. The second: whole pictures from the start of the process to the PNG, ours against
stable-diffusion.cpp's, whose random weights are written into FOLDER first (4 GB; norms float32, the blocks' products as
`--blocks`, the rest bfloat16, text encoder q4_0; the autoencoder is the pack's). Ours runs twice; in the first run its
layers are on trial and nothing is timed (`--data` with a folder where that has happened saves it). With
`--their-steps 1` their picture is composed of its parts. Their program comes from PyPI's sources, in any folder:

    pip download --no-deps --no-binary :all: stable_diffusion_cpp_python==0.4.7 && tar xzf stable_diffusion_cpp_python-*
    cmake -S stable_diffusion_cpp_python-*/vendor/stable-diffusion.cpp -B build -DCMAKE_BUILD_TYPE=Release
    cmake --build build --target sd-cli -j 2                                 # build/bin/sd-cli
"""

import argparse
import json
import multiprocessing
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, BinaryIO

import numpy as np

from engine import shapes
from engine.hardware import resident_bytes
from engine.packs import open_pack
from engine.plan import token_side
from engine.sampling import sampled

ROOT = Path(__file__).parent.parent
PROMPT = "a bonsai tree in a quiet ceramic studio, soft morning light"
Clocked = dict[str, float]


# One step after the other, ours and diffusers', in a process of its own


def steps(pack: Path, way: str, size: tuple[int, int], rounds: int) -> Clocked:
    """Best seconds of a step, and resident bytes (mean and most) during all of them."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_steps, (pack, way, size, rounds))


def _steps(folder: Path, way: str, size: tuple[int, int], rounds: int) -> Clocked:
    from tests.floor import Diffusers, Engine, planned  # before torch: it says how long torch's threads spin

    # isort: split
    import torch

    pack = open_pack(folder)
    grid = size[1] // token_side(pack), size[0] // token_side(pack)
    runner: Engine | Diffusers
    if way.startswith("diffusers"):
        runner = Diffusers(pack, grid, getattr(torch, way.partition("_")[2]), time.perf_counter)
    else:
        runner = Engine(pack, grid, planned(), time.perf_counter, way)
    with sampled(resident_bytes) as samples:
        for _ in range(rounds):
            runner.measure()
    return {"step_s": round(min(runner.seconds), 2), "mean_bytes": round(fmean(samples)), "most_bytes": max(samples)}


# Whole pictures, ours and stable-diffusion.cpp's


def ours(pack: Path, size: str, count: int, data: Path) -> Clocked:
    """A picture of `python app.py generate`, from the start of the process to its end."""
    options = ["--model", str(pack), "--size", size, "--steps", str(count), "--data", str(data)]
    command = [sys.executable, "app.py", "generate", PROMPT, "--json", "--out", str(data / "ours.png"), *options]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    total = time.perf_counter() - start
    seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
    return {
        "picture_s": round(total, 1), "encode_s": seconds["encode"], "step_s": round(seconds["denoise"] / count, 2),
        "decode_s": seconds["decode"],
    }  # fmt: skip


def theirs(program: Path, weights: Path, pack: Path, blocks: str, size: str, count: int, data: Path) -> Clocked:
    """The same picture by stable-diffusion.cpp, with flash attention and as many threads as we have cores."""
    width, height = size.split("x")
    command = [
        program, "-M", "img_gen", "--diffusion-model", weights / f"klein-{blocks}.gguf",
        "--llm", weights / "qwen3-q4_0.gguf", "--vae", next((pack / "vae").glob("*.safetensors")), "-p", PROMPT,
        "--cfg-scale", "1.0", "--sampling-method", "euler", "--steps", str(count), "-W", width, "-H", height,
        "-s", "0", "-t", str(len(os.sched_getaffinity(0))), "--diffusion-fa", "-v", "-o", data / "theirs.png",
    ]  # fmt: skip
    log = data / "theirs.log"
    start = time.perf_counter()
    with log.open("w") as file:
        subprocess.run(list(map(str, command)), check=True, stdout=file, stderr=subprocess.STDOUT)
    total, text = time.perf_counter() - start, log.read_text(errors="replace")

    def took(what: str) -> float:
        found = re.search(rf"{what} completed, taking ([0-9.]+)s", text)
        assert found, f"{what} is not in {log}"
        return float(found[1])

    return {
        "picture_s": round(total, 1), "encode_s": took("get_learned_condition"),
        "step_s": round(took("sampling") / count, 2), "decode_s": took("decode_first_stage"),
    }  # fmt: skip


def whole(seconds: Clocked, taken: int, wanted: int) -> Clocked:
    """A picture of `wanted` steps, composed from one of `taken` steps and the seconds of a step."""
    return seconds | {"picture_s": round(seconds["picture_s"] + (wanted - taken) * seconds["step_s"], 1)}


# Random weights in GGUF


class Kind:
    """How a tensor lies in a GGUF: ggml's number for it, weights and bytes a block, where the float16 scale is."""

    def __init__(self, number: int, weights: int, size: int, scale: int | None = None) -> None:
        self.number, self.weights, self.size, self.scale = number, weights, size, scale

    def nbytes(self, count: int) -> int:
        return count // self.weights * self.size


KINDS = {
    "f32": Kind(0, 1, 4),
    "q4_0": Kind(2, 32, 18, 0),
    "q8_0": Kind(8, 32, 34, 0),
    "bf16": Kind(30, 1, 2),
    "tq2_0": Kind(35, 256, 66, 64),
}
CHUNK = 1 << 22  # weights made anew; a bigger tensor repeats them
Named = tuple[str, tuple[int, ...], str]  # name, shape [out, in], kind


def klein(config: dict[str, Any], blocks: str) -> Iterator[Named]:
    """The transformer's tensors under the names of Black Forest Labs' own file: queries, keys and values are joined."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    mlp = int(width * config["mlp_ratio"])
    for name, rows, columns in (
        ("img_in", width, config["in_channels"]), ("txt_in", width, config["joint_attention_dim"]),
        ("time_in.in_layer", width, config["timestep_guidance_channels"]), ("time_in.out_layer", width, width),
        ("double_stream_modulation_img.lin", 6 * width, width), ("double_stream_modulation_txt.lin", 6 * width, width),
        ("single_stream_modulation.lin", 3 * width, width), ("final_layer.adaLN_modulation.1", 2 * width, width),
        ("final_layer.linear", config["in_channels"], width),
    ):  # fmt: skip
        yield f"{name}.weight", (rows, columns), "bf16"
    for number in range(config["num_layers"]):
        for stream in ("img", "txt"):
            block = f"double_blocks.{number}.{stream}"
            yield f"{block}_attn.qkv.weight", (3 * width, width), blocks
            yield f"{block}_attn.proj.weight", (width, width), blocks
            yield f"{block}_attn.norm.query_norm.scale", (head,), "f32"
            yield f"{block}_attn.norm.key_norm.scale", (head,), "f32"
            yield f"{block}_mlp.0.weight", (2 * mlp, width), blocks
            yield f"{block}_mlp.2.weight", (width, mlp), blocks
    for block in (f"single_blocks.{number}" for number in range(config["num_single_layers"])):
        yield f"{block}.linear1.weight", (3 * width + 2 * mlp, width), blocks
        yield f"{block}.linear2.weight", (width, width + mlp), blocks
        yield f"{block}.norm.query_norm.scale", (head,), "f32"
        yield f"{block}.norm.key_norm.scale", (head,), "f32"


def qwen3(config: dict[str, Any]) -> Iterator[Named]:
    """The text encoder, all its layers."""
    for name, shape in shapes.text_encoder(config, config["num_hidden_layers"]):
        yield name, shape, "q4_0" if len(shape) == 2 else "f32"
    yield "model.norm.weight", (config["hidden_size"],), "f32"


def write_gguf(path: Path, tensors: list[Named]) -> None:
    """Random weights of a sane size; norms are ones."""
    aside = path.with_suffix(".part")
    with aside.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), 0))
        at = 0
        for name, shape, kind in tensors:
            file.write(struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(shape)))
            file.write(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
            file.write(struct.pack("<IQ", KINDS[kind].number, at))
            at += aligned(KINDS[kind].nbytes(int(np.prod(shape))))
        file.write(bytes(aligned(file.tell()) - file.tell()))
        for _, shape, kind in tensors:
            write_tensor(file, kind, shape)
            file.write(bytes(aligned(file.tell()) - file.tell()))
    aside.replace(path)


def aligned(offset: int) -> int:
    return -(-offset // 32) * 32


def write_tensor(file: BinaryIO, kind: str, shape: tuple[int, ...]) -> None:
    count, size = int(np.prod(shape)), np.float32(shape[-1] ** -0.5)
    rng = np.random.default_rng(count)
    if kind == "f32":
        file.write(np.ones(count, np.float32).tobytes())
        return
    few = min(count, CHUNK)
    if kind == "bf16":
        made = (rng.standard_normal(few, np.float32) * size).view(np.uint32) >> 16
        chunk = made.astype(np.uint16).tobytes()
    else:
        layout = KINDS[kind]
        rows = np.frombuffer(rng.bytes(layout.nbytes(few)), np.uint8).reshape(-1, layout.size).copy()
        if kind == "tq2_0":
            rows &= ~(rows >> 1 & 0x55)  # code 3 becomes 2
        largest = {"tq2_0": 1, "q4_0": 4, "q8_0": 64}[kind]
        assert layout.scale is not None
        rows[:, layout.scale : layout.scale + 2] = np.frombuffer(np.float16(size / largest).tobytes(), np.uint8)
        chunk = rows.tobytes()
    left = KINDS[kind].nbytes(count)
    while left > 0:
        file.write(chunk[:left])
        left -= len(chunk)


def written(weights: Path, pack: Path, blocks: str) -> None:
    """The two files that `theirs` reads, unless they are there."""
    weights.mkdir(parents=True, exist_ok=True)
    described = open_pack(pack)
    wanted: dict[str, Callable[[], Iterator[Named]]] = {
        f"klein-{blocks}.gguf": lambda: klein(dict(described.transformer.config), blocks),
        "qwen3-q4_0.gguf": lambda: qwen3(dict(described.text_encoder.config)),
    }
    for name, tensors in wanted.items():
        if not (weights / name).exists():
            write_gguf(weights / name, list(tensors()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Other engines in turn with ours.")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", default="compiled,outs,plain,diffusers_bfloat16")
    parser.add_argument("--sd-cli", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--blocks", choices=("tq2_0", "q8_0"), default="tq2_0")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--their-steps", type=int, help="fewer steps for stable-diffusion.cpp, where time is short")
    parser.add_argument("--data", type=Path, help="a data folder in which this pack's layers had their trial")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    facts: dict[str, Any] = {"size": args.size, "cores": len(os.sched_getaffinity(0))}

    def note(name: str, found: Clocked) -> None:
        facts[name] = found
        print(f"{name}: {found}", file=sys.stderr, flush=True)  # a run that is cut off has said this much

    if args.sd_cli:
        written(args.weights, args.pack, args.blocks)
        with tempfile.TemporaryDirectory() as folder:
            data = args.data or Path(folder)
            if not args.data:
                ours(args.pack, args.size, 1, data)
            note("ours", ours(args.pack, args.size, args.steps, data))
            taken = args.their_steps or args.steps
            found = theirs(args.sd_cli, args.weights, args.pack, args.blocks, args.size, taken, data)
            note("sd.cpp", whole(found, taken, args.steps))
        facts["times"] = {key: round(facts["sd.cpp"][key] / facts["ours"][key], 2) for key in facts["ours"]}
    else:
        for way in args.ways.split(","):
            note(way, steps(args.pack, way, (width, height), args.rounds))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
