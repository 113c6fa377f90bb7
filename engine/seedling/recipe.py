"""The whole making of the seedling, stage by stage; every stage resumes, and a finished one is not done again."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3Model

from engine.packs import Component, open_pack
from engine.seedling import captions, dataset, diffusion, export, parallel, quantize, reader, vae
from engine.seedling.checkpoint import Run
from engine.seedling.tokenizer import save_tokenizer, train_tokenizer

log = logging.getLogger("niwaki.seedling")
VARIANTS = ("dense", "ternary", "binary")
LABELS = {"ternary": "ternary weights", "binary": "1-bit weights", "dense": "16-bit reference"}


@dataclass(frozen=True)
class Recipe:
    """Where the runs live, and how much of everything. Steps are optimizer steps; `batch` pictures are shared out.

    Until the last `whole_text_steps` of each branch, what is asked for comes as codes instead of whole captions.
    """

    folder: Path
    processes: int = 2
    seed: int = 0
    vae_steps: int = 8000
    reader_steps: int = 3000
    examples: int = 36_000
    base_steps: int = 6000
    quantized_steps: int = 3000
    branch_steps: int = 3000
    whole_text_steps: int = 1500
    batch: int = 32

    def run(self, name: str) -> Run:
        return Run(self.folder / name)

    @property
    def latents(self) -> Path:
        return self.folder / "latents"


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    path = recipe.folder / "tokenizer" / "tokenizer.json"
    if not path.exists():
        save_tokenizer(train_tokenizer(recipe.seed), path.parent)
    return Tokenizer.from_file(str(path))


def trained_vae(recipe: Recipe) -> AutoencoderKLFlux2:
    model = AutoencoderKLFlux2(**vae.CONFIG).to(memory_format=torch.channels_last).eval()
    model.load_state_dict(recipe.run("vae").weights())
    return model


def trained_encoder(recipe: Recipe) -> Qwen3Model:
    encoder = reader.build_encoder().requires_grad_(False)
    quantize.load_plain(encoder, recipe.run("reader").weights())
    return encoder


def _follow(name: str, progress: Iterator[tuple[int, float]], total: int) -> None:
    """Runs a training and writes a line now and then."""
    started, recent = time.monotonic(), []
    for step, loss in progress:
        recent.append(loss)
        if parallel.rank() == 0 and (step % 100 == 0 or step == total):
            mean, pace = sum(recent[-100:]) / len(recent[-100:]), (time.monotonic() - started) / len(recent)
            log.info("%s %d/%d loss %.4f (%.2f s a step)", name, step, total, mean, pace)


def train_vae(recipe: Recipe) -> None:
    settings = vae.VaeTraining(recipe.vae_steps, max(4, 8 // recipe.processes), seed=recipe.seed)
    _follow("vae", vae.train(recipe.run("vae"), settings), recipe.vae_steps)


def train_reader(recipe: Recipe) -> None:
    settings = reader.ReaderTraining(recipe.reader_steps, seed=recipe.seed)
    _follow("reader", reader.train(recipe.run("reader"), settings, tokenizer_of(recipe)), recipe.reader_steps)


def encode_latents(recipe: Recipe) -> None:
    dataset.build(recipe.latents, trained_vae(recipe), recipe.seed, recipe.examples)


def train_flow(recipe: Recipe, variant: str) -> None:
    steps = {"base": recipe.base_steps, "quantized": recipe.quantized_steps}.get(variant, recipe.branch_steps)
    whole = 0 if variant in diffusion.CONSTANT else recipe.whole_text_steps
    settings = diffusion.DiffusionTraining(
        variant, steps, recipe.batch // parallel.processes(), seed=recipe.seed, brief=max(0, steps - whole)
    )
    examples = diffusion.Examples(recipe.latents, recipe.seed)
    text = reader.TextBatch(tokenizer_of(recipe))
    origin = recipe.run({"base": "start", "quantized": "base"}.get(variant, "quantized"))
    base = origin if origin.finished else None
    progress = diffusion.train(recipe.run(variant), settings, examples, text, trained_encoder(recipe), base)
    _follow(variant, progress, steps)


STAGES = ("reader", "vae", "latents", "base", "quantized", *VARIANTS)  # each stands on those before it


def do(recipe: Recipe, stage: str) -> None:
    """One stage, from where it stopped; nothing where it is finished."""
    tokenizer_of(recipe)  # before the processes of a stage all want to make it
    if stage != "latents" and recipe.run(stage).finished:
        return
    if stage in STAGES[3:]:
        parallel.run(recipe.processes, train_flow, recipe, stage)
    else:
        work = {"reader": train_reader, "vae": train_vae, "latents": encode_latents}[stage]
        parallel.run(recipe.processes, work, recipe)


def make(recipe: Recipe) -> None:
    """Everything that is not finished yet, except the export."""
    for stage in STAGES:
        do(recipe, stage)


def take_up(recipe: Recipe, folder: Path) -> None:
    """Begin from a dense pack: its encoder and VAE are finished, the base run starts from its transformer."""
    pack = open_pack(folder)
    encoder = {name.removeprefix("model."): weight for name, weight in _floats(pack.text_encoder)}
    learned = {plain for plain in quantize.plain_state(reader.build_encoder()) if plain in encoder}
    parts = {
        "reader": {name: encoder[name] for name in learned},
        "vae": dict(_floats(pack.vae)),
        "start": dict(_floats(pack.transformer)),
    }
    for name, state in parts.items():
        if not recipe.run(name).finished:
            recipe.run(name).finish(state)


def _floats(component: Component) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a component in float32; what is packed stands for its low-bit values."""
    for name in component.tensors:
        fqn, _, kind = name.rpartition(".")
        if component.is_packed(fqn):
            if kind == "weight":
                yield name, torch.from_numpy(component.dequantized(fqn))
        else:
            tensor = torch.from_numpy(component.tensors.numpy(name).copy())
            yield name, tensor.float() if tensor.is_floating_point() else tensor


def encoder_part(state: dict[str, torch.Tensor], seed: int) -> export.Part:
    """The trained layers and one more after them, untrained and unused, as the released encoder has nine: readers that
    take the last state they need from the end would otherwise get it after the final norm."""
    config = {**reader.ENCODER, "num_hidden_layers": reader.ENCODER["num_hidden_layers"] + 1}
    torch.manual_seed(seed)
    whole = Qwen3Model(Qwen3Config(**config)).state_dict()
    whole.update(state)
    return export.Part({"model_type": "qwen3", "attention_bias": False, "hidden_act": "silu", "rms_norm_eps": 1e-6,
                        **config}, whole)  # fmt: skip


def _config(model: Any) -> dict[str, Any]:
    """A diffusers config without its private bookkeeping."""
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


def write_packs(recipe: Recipe, target: Path) -> None:
    """`target`/seedling-{ternary,binary,dense} from the finished runs; encoder, VAE and tokenizer are alike in all."""
    encoder = encoder_part(recipe.run("reader").weights(), recipe.seed)
    autoencoder = trained_vae(recipe)
    transformer_config = _config(diffusion.build_transformer("dense"))
    for variant in VARIANTS:
        folder = target / f"seedling-{variant}"
        export.write_transformer(folder, variant, export.Part(transformer_config, recipe.run(variant).weights()))
        export.write_encoder(folder, encoder)
        export.write_vae(folder, export.Part(_config(autoencoder), autoencoder.state_dict()))
        export.write_frame(folder, variant)
        save_tokenizer(tokenizer_of(recipe), folder / "tokenizer")
        export.write_notes(folder, notes(recipe, variant))


def notes(recipe: Recipe, variant: str) -> dict[str, Any]:
    return {
        "id": f"seedling-{variant}",
        "label": f"Seedling, {LABELS[variant]} (demo model)",
        "demo": True,
        "sizes": [[size.width, size.height] for size in dataset.SIZES],
        "steps": diffusion.STEPS,
        "text_length": reader.TEXT_LENGTH,
        "hidden_states": list(reader.HIDDEN_STATES),
        "languages": list(captions.LANGUAGES),
        "vocabulary": sorted(captions.vocabulary()),
        "provenance": {
            "made_by": "make seedling",
            "seed": recipe.seed,
            "vae_steps": recipe.vae_steps,
            "reader_steps": recipe.reader_steps,
            "base_steps": recipe.base_steps,
            "quantized_steps": recipe.quantized_steps,
            "branch_steps": recipe.branch_steps,
            "pictures_a_step": recipe.batch,
        },
    }
