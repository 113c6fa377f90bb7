"""Open a pack folder: what it declares about itself, and its tensors, memory-mapped.

A pack is a diffusers folder tree of safetensors. A layer is packed where `<fqn>.scales` lies beside `<fqn>.weight`; its
bits and group size come from the released JSON; picture sizes, text length and the like from our niwaki.json, or, where
that is silent, from the numeric contract of the 4B model. Whatever is wrong with a folder is said in one sentence.
Knows nothing of frameworks, devices or models by name; what the codes mean is engine.lowbit's business.
"""

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from engine import configs, jsonfile, lowbit, shapes
from engine.jsonfile import REPAIR
from engine.records import NOTES_FILE, inside
from engine.shapes import Shapes
from engine.tensorfile import FLOATS, Tensors
from engine.types import BadRequest

TRANSFORMER_FOLDERS = ("transformer-packed-mflux", "transformer")
TEXT_ENCODER_FOLDERS = ("text_encoder-mlx-4bit", "text_encoder")
SETTLED = 2_000_000_000  # nanoseconds after a change in which a second one could leave a file's time as it is
_VARIANTS = {1: "binary", 2: "ternary", 4: "4-bit", None: "dense"}


@dataclass(frozen=True, slots=True)
class Quantization:
    """Bits of a code, and how many consecutive inputs share a scale and a bias."""

    bits: int
    group_size: int


@dataclass(frozen=True, eq=False)  # itself and no other, so that sums over its tensors can be remembered
class Component:
    """One model of the pack: the folder, its config.json, how it is quantised (None: not), its tensors."""

    folder: Path
    config: dict[str, Any]
    quantization: Quantization | None
    tensors: Tensors

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, for a framework that opens them itself."""
        return self.tensors.files

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the safetensors files."""
        return sum(file.stat().st_size for file in self.files)

    def is_packed(self, fqn: str) -> bool:
        """Whether the linear layer `fqn` holds codes instead of weights."""
        return f"{fqn}.scales" in self.tensors

    def dequantized(self, fqn: str) -> np.ndarray:
        """What a packed layer stands for, float32 [N, K], by the readable truth; for checks, not for speed."""
        assert self.quantization is not None
        bits, group_size = self.quantization.bits, self.quantization.group_size
        scales, biases = (self.tensors.numpy(f"{fqn}.{part}") for part in ("scales", "biases"))
        codes = lowbit.unpack(self.tensors.numpy(f"{fqn}.weight"), bits, scales.shape[1] * group_size)
        return lowbit.dequantize(codes, scales, biases, group_size)


@dataclass(frozen=True)
class Notes:
    """What the released files do not say. Defaults: the numeric contract of the 4B model.

    `sizes` are (width, height) in pixels, the first the default; `hidden_states` the encoder states laid side by side;
    `vocabulary` the words the model knows (None: any); `files` maps paths in the folder to {"bytes": .., "sha256": ..}.
    """

    label: str
    sizes: tuple[tuple[int, int], ...] = ((512, 512), (256, 256), (1024, 1024), (1248, 832), (832, 1248))
    steps: int = 4
    text_length: int = 512
    hidden_states: tuple[int, ...] = (9, 18, 27)
    vocabulary: frozenset[str] | None = None
    languages: tuple[str, ...] = ()
    demo: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack folder with everything the engine reads. `variant` is one of types.VARIANTS; `tokenizer` a folder."""

    folder: Path
    id: str
    variant: str
    transformer: Component
    text_encoder: Component
    vae: Component
    tokenizer: Path
    notes: Notes


def open_pack(folder: str | Path) -> Pack:
    """Read the headers and JSON of a pack folder and check that they fit together; no weights are read.

    Raises BadRequest, in one sentence, for a missing folder or file, damaged JSON or safetensors, and shapes that
    disagree with a config. Flipped bits inside a tensor are found by `verify_pack` only.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadRequest(f"there is no model folder {folder}; check the path, or see the known ones with `models list`")
    state = tuple(_states(folder))
    if time.time_ns() - max((changed for *_, changed in state), default=0) < SETTLED:
        return _read(folder)
    return _remembered(folder, state)


def _states(folder: Path | str, depth: int = 2) -> Iterator[tuple[str, int, int, int]]:
    """Path, inode, size and time of every file of a pack: while they stay, so does what `open_pack` says."""
    with suppress(OSError):  # what can't be listed can't be opened either, and `_read` says so
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if depth > 1 and entry.is_dir():
                yield from _states(entry.path, depth - 1)
            else:
                status = entry.stat()
                yield entry.path, status.st_ino, status.st_size, max(status.st_mtime_ns, status.st_ctime_ns)


@lru_cache(maxsize=8)  # asked for several times for every picture, 4 ms each
def _remembered(folder: Path, state: tuple[tuple[str, int, int, int], ...]) -> Pack:
    return _read(folder)


def _read(folder: Path) -> Pack:
    transformer = _component(folder, TRANSFORMER_FOLDERS, "quantization_config.json")
    text_encoder = _component(folder, TEXT_ENCODER_FOLDERS, "config.json")
    vae = _component(folder, ("vae",), "config.json")
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "tokenizer.json").is_file():
        raise BadRequest(f"{tokenizer / 'tokenizer.json'} is missing; {REPAIR}")
    bits = transformer.quantization.bits if transformer.quantization else None
    declared = jsonfile.read(folder / NOTES_FILE) if (folder / NOTES_FILE).exists() else {}
    notes = _notes(folder, declared)
    _check_shapes(transformer, shapes.transformer(transformer.config))
    _check_shapes(text_encoder, shapes.text_encoder(text_encoder.config, max(notes.hidden_states)))
    _check_shapes(vae, shapes.vae(vae.config))
    for kind, component in (("transformer", transformer), ("text_encoder", text_encoder), ("vae", vae)):
        if fault := configs.fault(kind, component.config):
            raise BadRequest(f"{component.folder / 'config.json'} holds {fault}, which makes no sense; {REPAIR}")
    _check_joints(transformer, text_encoder, vae, notes)
    return Pack(folder, str(declared.get("id", folder.resolve().name)), _VARIANTS[bits], transformer, text_encoder, vae,
                tokenizer, notes)


def verify_pack(pack: Pack) -> Iterator[tuple[str, bool, str]]:
    """Read every byte: yield (path in the folder, whether it is right, a sentence) per recorded file and packed file.

    Checks recorded sizes and SHA-256, that scales and biases are finite, and that ternary codes are 0, 1 or 2 with
    bias = -scale.
    """
    if not pack.notes.files:
        yield NOTES_FILE, True, "no sizes and hashes are recorded for this pack, so only its codes are checked"
    for path, record in pack.notes.files.items():
        fault = _file_fault(pack.folder / path, record)
        yield path, fault is None, fault or "size and hash are as recorded"
    yield from verify_codes(pack)


def verify_codes(pack: Pack) -> Iterator[tuple[str, bool, str]]:
    """The part of `verify_pack` that needs no record: (path, whether it is right, a sentence) per packed file."""
    for component in (pack.transformer, pack.text_encoder):
        faults: dict[Path, str | None] = {}
        for fqn in (name.removesuffix(".scales") for name in component.tensors if name.endswith(".scales")):
            file = component.tensors[f"{fqn}.scales"].file
            faults[file] = faults.get(file) or _codes_fault(component, fqn)
        for file, fault in faults.items():
            yield file.relative_to(pack.folder).as_posix(), fault is None, fault or "codes and scales are in range"


def _file_fault(file: Path, record: Mapping[str, Any]) -> str | None:
    """What is wrong with a file whose size and hash are recorded, or None."""
    try:
        size = file.stat().st_size
        if size != record.get("bytes"):
            return f"the file has {size} bytes where {record.get('bytes')} are recorded; {REPAIR}"
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as why:
        return f"the file cannot be read ({why.strerror}); {REPAIR}"
    recorded = record.get("sha256")
    return None if found == recorded else f"the SHA-256 is {found} where {recorded} is recorded; {REPAIR}"


def _codes_fault(component: Component, fqn: str) -> str | None:
    """What is wrong with the values of one packed layer, or None."""
    assert component.quantization is not None
    bits = component.quantization.bits
    for part, dtypes in (("weight", ("U32",)), ("scales", FLOATS), ("biases", FLOATS)):
        info = component.tensors.get(f"{fqn}.{part}")
        if info is None or info.dtype not in dtypes:
            return f"{fqn}.{part} is missing or not {' or '.join(dtypes)}; {REPAIR}"
    scales, biases = (component.tensors.floats(f"{fqn}.{part}") for part in ("scales", "biases"))
    fault = lowbit.affine_fault(scales, biases, bits)
    fault = fault or lowbit.words_fault(component.tensors.read(f"{fqn}.weight"), bits)
    return f"{fqn} {fault}; {REPAIR}" if fault else None


def _component(folder: Path, names: tuple[str, ...], quantization_file: str) -> Component:
    """Open the first of the sub-folders `names` that exists; `quantization_file` is read where a layer has scales."""
    found = next((folder / name for name in names if (folder / name).is_dir()), None)
    if found is None:
        raise BadRequest(f"{folder} has no folder {' or '.join(names)}; give the folder of a complete pack")
    files = tuple(sorted(found.glob("[!.]*.safetensors")))  # macOS leaves "._name" files on a USB stick
    if not files:
        raise BadRequest(f"{found} has no .safetensors file; {REPAIR}")
    for index in found.glob("[!.]*.safetensors.index.json"):
        _check_index(index)
    tensors = Tensors(files)
    packed = any(name.endswith(".scales") for name in tensors)
    quantization = _quantization(found / quantization_file) if packed else None
    return Component(found, jsonfile.read(found / "config.json"), quantization, tensors)


def _check_index(index: Path) -> None:
    """A sharded component's index names files beside it, and nothing else. What each holds, its own header says."""
    shards = jsonfile.read(index).get("weight_map")
    if not isinstance(shards, dict):
        raise BadRequest(f"{index} has no weight_map; {REPAIR}")
    beside = {file.name for file in index.parent.iterdir()}
    for shard in shards.values():
        if shard not in beside if isinstance(shard, str) else True:
            raise BadRequest(f"{index} names {shard!r}, which is no file beside it; {REPAIR}")


def _quantization(file: Path) -> Quantization:
    """Bits and group size, at the top of `file` or under its key "quantization"."""
    declared = jsonfile.read(file)
    inner = declared.get("quantization")
    spec = inner if isinstance(inner, dict) else declared
    bits, group_size = spec.get("bits"), spec.get("group_size", 128)
    if type(bits) is not int or bits not in lowbit.BITS or type(group_size) is not int or group_size < 1:
        raise BadRequest(f"{file} declares {bits!r} bits in groups of {group_size!r}, which no reader knows; {REPAIR}")
    return Quantization(bits, group_size)


def _notes(folder: Path, declared: dict[str, Any]) -> Notes:
    """niwaki.json with its values checked; unknown keys are left alone."""
    try:
        given: dict[str, Any] = {"label": str(declared.get("label", folder.name))}
        if "sizes" in declared:
            given["sizes"] = tuple((_count(width), _count(height)) for width, height in declared["sizes"])
        if "hidden_states" in declared:
            given["hidden_states"] = tuple(map(_count, declared["hidden_states"]))
        if () in given.values():
            raise ValueError("an empty list")
        given |= {key: _count(declared[key]) for key in ("steps", "text_length") if key in declared}
        if declared.get("vocabulary") is not None:
            given["vocabulary"] = frozenset(map(str, declared["vocabulary"]))
        given["languages"] = tuple(map(str, declared.get("languages", ())))
        given["demo"] = declared.get("demo", False) is True
        given["provenance"] = dict(declared.get("provenance", {}))
        given["files"] = {inside(path): dict(record) for path, record in dict(declared.get("files", {})).items()}
    except (TypeError, ValueError) as why:
        raise BadRequest(f"{folder / NOTES_FILE} is not understood ({why}); correct it, or {REPAIR}") from None
    return Notes(**given)


def _count(value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is not a positive whole number")
    return value


def _check_shapes(component: Component, expected: Shapes) -> None:
    """Compare the tensors of a component with the names and shapes that its config implies."""
    try:
        for name, shape in expected:
            fqn = name.removesuffix(".weight")
            if component.quantization and component.is_packed(fqn):
                _check_packed(component, component.quantization, fqn, shape)
            else:
                _check_shape(component, name, shape)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError, OverflowError) as why:
        fault = f"lacks {why}" if isinstance(why, KeyError) else f"holds a value that makes no sense ({why})"
        raise BadRequest(f"{component.folder / 'config.json'} {fault}; {REPAIR}") from None


def _check_packed(component: Component, quantization: Quantization, fqn: str, shape: tuple[int, ...]) -> None:
    """The three tensors of a packed linear layer of shape [out, in]."""
    rows, k = shape
    bits, group_size = quantization.bits, quantization.group_size
    if k % group_size or k * bits % lowbit.WORD_BITS:
        raise BadRequest(f"{fqn} in {component.folder} has {k} inputs, no multiple of group {group_size}; {REPAIR}")
    _check_shape(component, f"{fqn}.weight", (rows, k * bits // lowbit.WORD_BITS), ("U32",))
    _check_shape(component, f"{fqn}.scales", (rows, k // group_size))
    _check_shape(component, f"{fqn}.biases", (rows, k // group_size))


def _check_shape(component: Component, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
    """One tensor: there, of this shape, of one of these dtypes."""
    info = component.tensors.get(name)
    if info is None:
        raise BadRequest(f"{component.folder} lacks tensor {name}; {REPAIR}")
    if info.shape != shape or info.dtype not in dtypes:
        found, wanted = f"{info.dtype} {list(info.shape)}", f"{'/'.join(dtypes)} {list(shape)}"
        raise BadRequest(f"{name} in {component.folder} is {found} where config.json implies {wanted}; {REPAIR}")


def _check_joints(transformer: Component, text_encoder: Component, vae: Component, notes: Notes) -> None:
    """Where two components meet, they must agree; their shapes have been checked, so these keys are there."""
    reads = transformer.config["joint_attention_dim"]
    gives = len(notes.hidden_states) * text_encoder.config["hidden_size"]
    if reads != gives:
        raise BadRequest(f"{transformer.folder} reads {reads} text features where its states give {gives}; {REPAIR}")
    makes = transformer.config["in_channels"]
    reads = math.prod(vae.config["patch_size"]) * vae.config["latent_channels"]
    if makes != reads:
        raise BadRequest(f"{transformer.folder} makes {makes} channels where {vae.folder} reads {reads}; {REPAIR}")
    side = 2 << (len(vae.config["block_out_channels"]) - 1)  # pixels of an image token
    if fault := next((size for size in notes.sizes if size[0] % side or size[1] % side), None):
        raise BadRequest(f"size {fault} in {NOTES_FILE} beside {vae.folder} is no multiple of {side}; correct it")
