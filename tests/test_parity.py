"""The torch backend against diffusers' Klein pipeline on small random weights: each part, then all of it together.

The oracle is diffusers and transformers as they are, in float32, holding the weights that the pack's codes mean.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from engine import lowbit, schedule
from engine.noise import noise
from engine.packs import Component, Pack, open_pack
from engine.plan import Plan
from engine.prompt import Tokenizer
from engine.torch_backend.model import Model, denoise
from engine.torch_backend.transformer import token_ids
from tests.packs.writers import Dims, write_pack

PROMPTS = ("two red circles on a blue background", "a लाल वृत्त", "வட்டம் 3, left of a square?!")
SEED, STEPS, SIZE, GRID = 42, 4, (96, 64), (4, 6)
CLOSE = 1e-4
EXACT = Plan("torch", "cpu", "float32", "")


def silent() -> None:
    pass


def meaning(component: Component) -> dict[str, torch.Tensor]:
    """All tensors of a component in float32, codes expanded by engine.lowbit."""
    state = {}
    for name in component.tensors:
        fqn, _, kind = name.rpartition(".")
        if not component.is_packed(fqn):
            state[name] = torch.from_numpy(np.array(component.tensors.numpy(name)))
        elif kind == "weight":
            words = component.tensors.numpy(name)
            scales, biases = (component.tensors.numpy(f"{fqn}.{part}") for part in ("scales", "biases"))
            bits, group_size = component.quantization.bits, component.quantization.group_size
            codes = lowbit.unpack(words, bits, words.shape[1] * 32 // bits)
            state[name] = torch.from_numpy(lowbit.dequantize(codes, scales, biases, group_size))
    return state


def oracle(pack: Pack) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel.from_config(pack.transformer.config)
    transformer.load_state_dict(meaning(pack.transformer))
    config = Qwen3Config(**{key: value for key, value in pack.text_encoder.config.items() if key != "quantization"})
    text_encoder = Qwen3ForCausalLM(config)
    text_encoder.load_state_dict(meaning(pack.text_encoder), strict=False)
    vae = AutoencoderKLFlux2.from_config(pack.vae.config)
    vae.load_state_dict(meaning(pack.vae))
    pipeline = Flux2KleinPipeline(
        transformer=transformer.eval(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        tokenizer=AutoTokenizer.from_pretrained(pack.tokenizer, local_files_only=True),
        scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(pack.folder / "scheduler", local_files_only=True),
        is_distilled=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module", params=["dense", "ternary", "binary", "4-bit"])
def pack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    folder = tmp_path_factory.mktemp("packs") / request.param
    dims = Dims(double_blocks=2, single_blocks=2, group_size=64 if request.param == "4-bit" else 128)
    return open_pack(write_pack(folder, request.param, dims))


@pytest.fixture(scope="module")
def reference(pack: Pack) -> Flux2KleinPipeline:
    return oracle(pack)


@pytest.fixture(scope="module")
def model(pack: Pack) -> Model:
    loaded = Model(pack.folder)
    loaded.load_encoder(EXACT)
    loaded.load(EXACT, silent)
    return loaded


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape and expected.norm() > 0
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def embeddings_of(model: Model, prompt: str) -> torch.Tensor:
    ids, mask, _ = model.tokenizer.encode(prompt, model.pack.notes.text_length)
    return model.text_encoder.encode(ids, mask, silent)


def reference_embeddings(reference: Flux2KleinPipeline, pack: Pack, prompt: str) -> torch.Tensor:
    with torch.inference_mode():
        length, states = pack.notes.text_length, pack.notes.hidden_states
        return reference.encode_prompt(prompt, max_sequence_length=length, text_encoder_out_layers=states)[0]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_encoder_states(pack, reference, model, prompt) -> None:  # type: ignore[no-untyped-def]
    expected = reference_embeddings(reference, pack, prompt)
    assert relative_error(embeddings_of(model, prompt), expected) < CLOSE


def test_tokens_and_template(pack, reference) -> None:  # type: ignore[no-untyped-def]
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        text = reference.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        expected = reference.tokenizer(text, padding="max_length", max_length=pack.notes.text_length)
        ids, mask, _ = Tokenizer(pack.tokenizer).encode(prompt, pack.notes.text_length)
        assert ids.tolist() == [expected["input_ids"]] and mask.tolist() == [expected["attention_mask"]]


@pytest.mark.parametrize(("tokens", "steps"), [(256, 4), (1024, 4), (4096, 4), (4056, 8), (5000, 4), (24, 1)])
def test_sigmas(reference, tokens: int, steps: int) -> None:  # type: ignore[no-untyped-def]
    evenly = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(reference.scheduler, sigmas=evenly, mu=compute_empirical_mu(tokens, steps))
    np.testing.assert_allclose(schedule.sigmas(tokens, steps), reference.scheduler.sigmas.numpy(), rtol=1e-6)


def test_one_transformer_step(pack, reference, model) -> None:  # type: ignore[no-untyped-def]
    embeddings = reference_embeddings(reference, pack, PROMPTS[0])
    img_ids, txt_ids = token_ids(embeddings.shape[1], GRID, "cpu")
    inputs = {
        "hidden_states": torch.randn(1, GRID[0] * GRID[1], pack.transformer.config["in_channels"]),
        "encoder_hidden_states": embeddings, "timestep": torch.tensor([0.717]), "img_ids": img_ids, "txt_ids": txt_ids,
    }  # fmt: skip
    with torch.inference_mode():
        expected = reference.transformer(**inputs, return_dict=False)[0]
        found = model.weights.transformer(**inputs, check=silent)
    assert relative_error(found, expected) < CLOSE


def test_decoded_picture(pack, reference, model) -> None:  # type: ignore[no-untyped-def]
    tokens = torch.randn(1, GRID[0] * GRID[1], pack.transformer.config["in_channels"])
    with torch.inference_mode():
        latents = reference._unpack_latents_with_ids(tokens, token_ids(1, GRID, "cpu")[0][None])
        bn = reference.vae.bn
        latents = latents * (bn.running_var + 1e-4).sqrt().view(1, -1, 1, 1) + bn.running_mean.view(1, -1, 1, 1)
        expected = reference.vae.decode(reference._unpatchify_latents(latents), return_dict=False)[0][0]
    assert relative_error(model.weights.decoder.image(tokens, GRID), expected) < CLOSE


def test_end_to_end(pack, reference, model) -> None:  # type: ignore[no-untyped-def]
    width, height = SIZE
    latents = reference(
        prompt=PROMPTS[0], width=width, height=height, num_inference_steps=STEPS, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(SEED), max_sequence_length=pack.notes.text_length,
        text_encoder_out_layers=pack.notes.hidden_states, output_type="latent",
    ).images  # fmt: skip
    with torch.inference_mode():
        image = reference.vae.decode(latents, return_dict=False)[0]
    expected_pixels = (reference.image_processor.postprocess(image, output_type="np")[0] * 255).round()

    channels = pack.transformer.config["in_channels"]
    start = torch.from_numpy(noise(SEED, (1, channels, *GRID))).flatten(2).transpose(1, 2)
    sigmas = schedule.sigmas(GRID[0] * GRID[1], STEPS)
    steps = list(denoise(model.weights.transformer, start, embeddings_of(model, PROMPTS[0]), sigmas, GRID, silent))
    assert len(steps) == STEPS
    assert relative_error(model.weights.decoder.image(steps[-1], GRID), image[0]) < CLOSE
    pixels = model.weights.decoder.decode(steps[-1], GRID, silent)
    assert pixels.shape == (height, width, 3) and pixels.std() > 1
    apart = np.abs(pixels - expected_pixels)
    assert apart.max() <= 1 and (apart > 0).mean() < 0.01  # a value may lie on the edge between two bytes


def test_the_4b_models_512_tokens(tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """States 9, 18, 27 of a deeper encoder, and padding to 512: the constants of the real model."""
    dims = Dims(layers=30, states=(9, 18, 27), text_length=512)
    pack = open_pack(write_pack(tmp_path, "binary", dims))
    model = Model(pack.folder)
    model.load_encoder(EXACT)
    model.load(EXACT, silent)
    expected = reference_embeddings(oracle(pack), pack, PROMPTS[0])
    assert expected.shape == (1, 512, 3 * dims.hidden)
    assert relative_error(embeddings_of(model, PROMPTS[0]), expected) < CLOSE
