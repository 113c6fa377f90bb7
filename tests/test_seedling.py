"""The whole training path in small: tokenizer, reader, VAE, latents, base run, quantized run, branches, packs; and
runs repeated.

`made` is everything once, with a handful of steps and pictures. What is trained to nothing still has the shapes, the
names and the low-bit values of the real thing, so that reading it back is held against the training's own modules.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from torch import nn

from engine.hardware import detect
from engine.packs import Component, Pack, open_pack, verify_pack
from engine.plan import Plan
from engine.schedule import sigmas
from engine.seedling import captions, dataset, diffusion, quantize, reader, recipe, scenes, vae
from engine.seedling.backdrops import COLORS, OUTDOORS, SEASONS, TIMES, WEATHERS, WHITE, Backdrop
from engine.seedling.checkpoint import Run
from engine.seedling.recipe import Recipe
from engine.seedling.scenes import KINDS, Scene, Thing
from engine.types import Picture, Request, Step

SHARD = 20  # examples a file, instead of 500
TINY = dict(
    processes=1, vae_steps=2, reader_steps=2, examples=SHARD, base_steps=2, quantized_steps=2, branch_steps=2, batch=4
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Few examples, and latents measured on few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "SHARD", SHARD)
        patch.setattr(vae, "measure_latents", partial(vae.measure_latents, count=16))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small: None) -> tuple[Recipe, Path]:
    """A finished recipe and the folder of its packs."""
    settings = Recipe(tmp_path_factory.mktemp("runs"), **TINY)  # type: ignore[arg-type]
    recipe.make(settings)
    packs = tmp_path_factory.mktemp("packs")
    recipe.write_packs(settings, packs)
    return settings, packs


@pytest.fixture(scope="module")
def examples(made: tuple[Recipe, Path]) -> diffusion.Examples:
    settings, _ = made
    return diffusion.Examples(settings.latents, settings.seed)


@pytest.fixture(scope="module")
def encoder(made: tuple[Recipe, Path]) -> nn.Module:
    return recipe.trained_encoder(made[0])


@pytest.fixture(scope="module")
def text(made: tuple[Recipe, Path]) -> reader.TextBatch:
    return reader.TextBatch(recipe.tokenizer_of(made[0]))


def pack_of(made: tuple[Recipe, Path], variant: str) -> Pack:
    return open_pack(made[1] / f"seedling-{variant}")


def packed_layers(component: Component) -> list[str]:
    return [name.removesuffix(".scales") for name in component.tensors if name.endswith(".scales")]


@pytest.mark.parametrize("variant", recipe.VARIANTS)
def test_the_packs_open_and_every_byte_is_as_recorded(made: tuple[Recipe, Path], variant: str) -> None:
    pack = pack_of(made, variant)
    assert (pack.id, pack.variant, pack.notes.demo) == (f"seedling-{variant}", variant, True)
    assert "demo model" in pack.notes.label and pack.notes.vocabulary == captions.vocabulary()
    assert pack.notes.languages == ("en", "hi", "mr", "ta")
    assert pack.notes.sizes == ((256, 256), (128, 128), (320, 192), (192, 320))
    assert not [sentence for _, right, sentence in verify_pack(pack) if not right]
    recorded = {path.relative_to(pack.folder).as_posix() for path in pack.folder.rglob("*") if path.is_file()}
    assert pack.notes.files.keys() == recorded - {"niwaki.json"}


def test_the_packs_share_encoder_vae_and_tokenizer(made: tuple[Recipe, Path]) -> None:
    notes = [pack_of(made, variant).notes.files for variant in recipe.VARIANTS]
    shared = [name for name in notes[0] if name.startswith(("text_encoder", "vae", "tokenizer", "scheduler"))]
    assert len(shared) >= 7 and all(files[name] == notes[0][name] for files in notes for name in shared)


@pytest.mark.parametrize(("variant", "most"), [("ternary", 3), ("binary", 2)])
def test_every_group_has_few_values(made: tuple[Recipe, Path], variant: str, most: int) -> None:
    transformer = pack_of(made, variant).transformer
    layers = packed_layers(transformer)
    assert len(layers) == 12 * diffusion.TRANSFORMER["num_layers"] + 2 * diffusion.TRANSFORMER["num_single_layers"]
    for fqn in layers:
        groups = np.sort(transformer.dequantized(fqn).reshape(-1, quantize.TRANSFORMER_GROUP))
        assert (np.diff(groups) > 0).sum(axis=1).max() < most, fqn


def trained(made: tuple[Recipe, Path], variant: str) -> nn.ModuleDict:
    """The modules of training, as they stood at the end of a branch."""
    transformer = diffusion.build_transformer(variant)
    quantize.load_plain(transformer, made[0].run(variant).weights())
    return nn.ModuleDict({"encoder": recipe.trained_encoder(made[0]), "transformer": transformer})


@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_the_pack_holds_what_training_computed_with(made: tuple[Recipe, Path], variant: str) -> None:
    """Codes bit for bit; the outer projections and norms rounded to bfloat16."""
    module, pack = trained(made, variant), pack_of(made, variant)
    parts = (("transformer", pack.transformer, ""), ("encoder", pack.text_encoder, "model."))
    for name, component, prefix in parts:
        plain = quantize.plain_state(module[name])
        for key, value in plain.items():
            fqn = prefix + key.removesuffix(".weight")
            if component.is_packed(fqn):
                seen = module[name].get_submodule(key.removesuffix(".weight")).weight.detach().numpy()
                np.testing.assert_array_equal(component.dequantized(fqn), seen, err_msg=fqn)
            else:
                np.testing.assert_array_equal(component.tensors.numpy(prefix + key), value.bfloat16().float().numpy())


def test_the_backend_computes_what_training_computed(made: tuple[Recipe, Path]) -> None:
    """One velocity, from prompt to output: they differ by the bfloat16 rounding of norms and outer projections."""
    from engine.torch_backend.model import Model
    from engine.torch_backend.transformer import token_ids

    module, model = trained(made, "ternary"), Model(made[1] / "seedling-ternary")
    exact = Plan("torch", "cpu", "float32", "")
    model.load_encoder(exact)
    model.load(exact, lambda: None)
    prompt = "two red circles on a blue background"
    ids, mask = reader.TextBatch(recipe.tokenizer_of(made[0]))([prompt])
    theirs_ids, theirs_mask, _ = model.tokenizer.encode(prompt, reader.TEXT_LENGTH)
    np.testing.assert_array_equal(ids.numpy(), theirs_ids)
    np.testing.assert_array_equal(mask.numpy(), theirs_mask)
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.7])
    image_ids, text_ids = diffusion.positions(4, 4)
    with torch.no_grad():
        states = reader.encode(module["encoder"], ids, mask)
        theirs_states = model.text_encoder.encode(theirs_ids, theirs_mask, lambda: None)
        velocity = module["transformer"](
            hidden_states=x, encoder_hidden_states=states, timestep=sigma, img_ids=image_ids, txt_ids=text_ids,
            return_dict=False,
        )[0]  # fmt: skip
        grid = token_ids(reader.TEXT_LENGTH, (4, 4), "cpu")
        theirs = model.weights.transformer(x, theirs_states, sigma, *grid, lambda: None)
    assert torch.linalg.norm(states - theirs_states) < 0.01 * torch.linalg.norm(states)
    assert torch.linalg.norm(velocity - theirs) < 0.02 * torch.linalg.norm(velocity)


def test_the_backend_makes_a_picture(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    from engine.torch_backend.backend import TorchBackend

    for variant in recipe.VARIANTS:
        request = Request("two purple hexagons", str(made[1] / f"seedling-{variant}"), width=128, height=192)
        *steps, picture = TorchBackend(detect(), tmp_path).generate(request, lambda: False)
        assert steps == [Step(index, 4) for index in range(5)] and isinstance(picture, Picture)
        assert picture.pixels.shape == (192, 128, 3) and picture.unknown_words == ("hexagons",)


def test_what_is_finished_is_not_done_again(made: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = made
    before = {path: path.stat().st_mtime_ns for path in settings.folder.rglob("*") if path.is_file()}
    for stage in (reader, vae, diffusion):
        monkeypatch.setattr(stage, "train", None)
    monkeypatch.setattr(dataset, "normalized_latents", None)
    recipe.make(settings)
    assert {path: path.stat().st_mtime_ns for path in settings.folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(("later", "earlier"), [("quantized", "base"), *((v, "quantized") for v in recipe.VARIANTS)])
def test_each_run_starts_from_the_one_before_and_moves_everywhere(
    made: tuple[Recipe, Path], later: str, earlier: str
) -> None:
    before, after = made[0].run(earlier).weights(), made[0].run(later).weights()
    assert after.keys() == before.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)  # two small steps


def test_base_and_dense_alone_compute_with_the_weights_behind_the_low_bit_ones() -> None:
    for variant in ("base", "quantized", *recipe.VARIANTS):
        transformer = diffusion.build_transformer(variant)
        seen = transformer.transformer_blocks[0].attn.to_q.weight.detach().reshape(-1, quantize.TRANSFORMER_GROUP)
        few = {"quantized": 3, "ternary": 3, "binary": 2}.get(variant)
        values = max(len(group.unique()) for group in seen[:50])
        assert values == few if few else values > 100, variant


Parts = tuple[diffusion.Examples, reader.TextBatch, nn.Module]


def losses(
    folder: Path, settings: diffusion.DiffusionTraining, parts: Parts, base: Run | None = None, stop: int | None = None
) -> list[float]:
    """Of one run in `folder`, which keeps its state every three steps; `stop` leaves it after so many."""
    return [loss for _, loss in islice(diffusion.train(Run(folder, every=3), settings, *parts, base), stop)]


@pytest.fixture
def parts(examples: diffusion.Examples, text: reader.TextBatch, encoder: nn.Module) -> Parts:
    return examples, text, encoder


def test_the_loss_falls_and_a_run_can_be_repeated_and_resumed(parts: Parts, tmp_path: Path) -> None:
    """Codes, then captions; with drafts all the way."""
    settings = diffusion.DiffusionTraining("base", steps=12, batch=4, warmup=4, brief=5)
    whole = losses(tmp_path / "whole", settings, parts)
    assert len(whole) == 12 and np.mean(whole[-4:]) < 0.9 * np.mean(whole[:3])
    first = losses(tmp_path / "broken", settings, parts, stop=8)  # what was kept is step 6
    assert first == whole[:8]
    assert losses(tmp_path / "broken", settings, parts) == whole[6:]
    ends = [Run(tmp_path / name).weights() for name in ("whole", "broken")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["quantized", "ternary", "binary"])
def test_a_branch_can_be_resumed(made: tuple[Recipe, Path], parts: Parts, tmp_path: Path, variant: str) -> None:
    settings = diffusion.DiffusionTraining(variant, steps=5, batch=4, warmup=2, brief=3)
    base = made[0].run("base")
    whole = losses(tmp_path / "whole", settings, parts, base)
    assert losses(tmp_path / "broken", settings, parts, base, stop=4) == whole[:4]
    assert losses(tmp_path / "broken", settings, parts, base) == whole[3:]


def test_brief_steps_read_no_caption(examples: diffusion.Examples, tmp_path: Path) -> None:
    """Neither tokenizer nor encoder are asked."""
    settings = diffusion.DiffusionTraining("base", steps=2, batch=2, brief=2)
    assert len(losses(tmp_path, settings, (examples, None, None))) == 2  # type: ignore[arg-type]


def test_the_recipe_ends_each_branch_and_nothing_else_with_whole_captions(
    made: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def train(run: Run, settings: diffusion.DiffusionTraining, *parts: Any) -> Iterator[tuple[int, float]]:
        base = parts[-1].folder.name if parts[-1] else None
        asked[settings.variant] = (run.folder.name, settings.steps, settings.brief, base)
        yield from ()

    monkeypatch.setattr(diffusion, "train", train)
    settings = replace(made[0], base_steps=9, quantized_steps=7, branch_steps=5, whole_text_steps=2)
    for stage in recipe.STAGES[3:]:
        recipe.train_flow(settings, stage)
    assert asked == {
        "base": ("base", 9, 9, None), "quantized": ("quantized", 7, 7, "base"),
        **{variant: (variant, 5, 3, "quantized") for variant in recipe.VARIANTS},
    }  # fmt: skip


def test_another_seed_gives_other_losses(parts: tuple, tmp_path: Path) -> None:
    one, two = (
        losses(tmp_path / str(seed), diffusion.DiffusionTraining("base", steps=2, batch=2, seed=seed), parts)
        for seed in (0, 1)
    )
    assert one != two


def vae_losses(folder: Path, steps: int, stop: int | None = None) -> list[float]:
    settings = vae.VaeTraining(steps=steps, batch=4)
    return [loss for _, loss in islice(vae.train(Run(folder, every=3), settings), stop)]


@pytest.mark.slow
def test_the_vae_learns_and_its_run_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "measure_latents", lambda model, seed: None)  # 256 pictures, and not what is tested here
    torch.manual_seed(0)
    fresh = vae.AutoencoderKLFlux2(**vae.CONFIG).eval()
    vae.start_as_identity(fresh)
    before = vae.psnr(fresh, count=8)  # of the same pictures: from batch to batch the loss follows what is on them
    whole = vae_losses(tmp_path / "whole", 12)
    fresh.load_state_dict(Run(tmp_path / "whole").weights())
    assert vae.psnr(fresh, count=8) > before + 0.3  # decibels
    assert vae_losses(tmp_path / "broken", 12, stop=7) == whole[:7]
    assert vae_losses(tmp_path / "broken", 12) == whole[6:]


@pytest.mark.slow
def test_the_reader_learns_and_its_run_can_be_resumed(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    settings = reader.ReaderTraining(steps=30, batch=16)

    def wrong(name: str, stop: int | None = None) -> list[float]:
        """Shares of wrong answers."""
        steps = reader.train(Run(tmp_path / name, every=3), settings, recipe.tokenizer_of(made[0]))
        return [share for _, share in islice(steps, stop)]

    whole = wrong("whole")
    assert np.mean(whole[-4:]) < np.mean(whole[:3]) - 0.05
    assert wrong("broken", stop=7) == whole[:7]
    assert wrong("broken") == whole[6:]


def test_examples_are_a_function_of_seed_and_step(examples: diffusion.Examples) -> None:
    one, two, other, elsewhere = (
        examples.batch((0, order), step, 8) for order, step in ((2, 5), (2, 5), (2, 6), (1, 5))
    )
    for part in ("latents", "shown", "noise", "sigma", "there", "wanted"):
        assert torch.equal(getattr(one, part), getattr(two, part))
    assert one.captions == two.captions and one.size == two.size and len(set(one.captions)) > 4
    for changed in (other, elsewhere):  # a run that goes on from another sees other examples
        assert not torch.equal(one.sigma, changed.sigma) and one.captions != changed.captions
    assert torch.equal(one.shown, one.latents)  # until there is somebody to make drafts
    assert one.latents.shape[1:] == (one.size.width * one.size.height // 1024, 64)
    assert ((one.sigma > 0) & (one.sigma <= 1)).all()


def test_captions_and_questions_of_a_batch_are_about_its_latents(
    examples: diffusion.Examples, monkeypatch: Any
) -> None:
    seen: list[Scene] = []
    monkeypatch.setattr(diffusion, "caption", lambda rng, scene: seen.append(scene) or repr(scene))
    batch = examples.batch((0, 0), 5, 8)
    assert batch.captions == [repr(scene) for scene in seen] and not any(scene.held_out for scene in seen)
    assert batch.wanted.tolist() == [reader.answers(scene) for scene in seen]
    np.testing.assert_array_equal(batch.there.numpy(), np.stack([diffusion.lying(s, batch.size) for s in seen]))
    stored = examples.latents[batch.size]
    places = [dataset.scene_of(0, batch.size, i) for i in range(len(stored))]
    rows = stored.rows(np.array([places.index(scene) for scene in seen]))
    np.testing.assert_array_equal(batch.latents.numpy(), rows)


def test_several_things_are_shown_twice_as_often_as_one(examples: diffusion.Examples) -> None:
    size = diffusion.SIZES[0]
    singles = np.mean([len(scene.things) == 1 for scene in examples.scenes[size]])
    batches = (examples.batch((0, 0), step, 50) for step in range(60))
    shown = np.concatenate([batch.wanted[:, 3] == 0 for batch in batches if batch.size == size])  # the count, from 1 on
    assert len(shown) > 2000 and 0 < singles < 1
    assert abs(shown.mean() - singles / (singles + 2 * (1 - singles))) < 0.03


def test_noise_tells_what_the_caption_leaves_open_and_is_noise_all_the_same() -> None:
    rng = np.random.default_rng(0)
    freedom = rng.random((4000, len(scenes.FREEDOM)))
    noise = diffusion.telling_noise(rng, 16, 8, freedom).astype(np.float64)
    told = noise.mean(axis=1)[:, : freedom.shape[1]] * np.sqrt(16)
    np.testing.assert_allclose(ndtr(told), freedom, atol=1e-5)
    flat = noise.reshape(len(noise), -1)
    assert abs(flat.mean()) < 0.01 and np.abs(np.cov(flat.T) - np.eye(flat.shape[1])).max() < 0.1
    np.testing.assert_allclose(np.quantile(flat, [0.05, 0.25, 0.75, 0.95]), [-1.645, -0.674, 0.674, 1.645], atol=0.01)


def test_the_noise_of_a_batch_belongs_to_its_scenes(examples: diffusion.Examples, monkeypatch: Any) -> None:
    seen: list[Scene] = []
    monkeypatch.setattr(diffusion, "caption", lambda rng, scene: seen.append(scene) or "")
    batch = examples.batch((0, 0), 5, 20)
    told = ndtr(batch.noise.mean(dim=1)[:, : len(scenes.FREEDOM)].double().numpy() * np.sqrt(batch.noise.shape[1]))
    agrees = np.abs(told - [scene.freedom for scene in seen]).max(axis=1) < 1e-5
    np.testing.assert_array_equal(agrees, batch.sigma.numpy() > diffusion.TELLING)
    assert 0 < agrees.sum() < 20


def test_each_token_is_asked_for_the_thing_nearest_to_it() -> None:
    size = dataset.SIZES[2]  # 320 x 192: ten tokens wide
    koi, circle = Thing("koi", "red", 0.25, 0.5, 0.18), Thing("circle", "blue", 0.75, 0.5, 0.18)
    there = diffusion.lying(Scene(WHITE, (koi, circle), "left of", (0.5, 0.5, 1.0, 0.5)), size)
    assert there.shape == (60, diffusion.LYING)
    grid = there.reshape(6, 10, -1)
    for row, column in ((0, 0), (5, 4), (0, 5), (3, 9)):
        thing = koi if column < 5 else circle
        x, y = 32 * column + 16 + 64 * grid[row, column, 0], 32 * row + 16 + 64 * grid[row, column, 1]
        assert (x / 320, y / 192) == pytest.approx((thing.x, thing.y))
        kind, color = grid[row, column, 3:-3], grid[row, column, -3:]
        assert len(kind) == len(KINDS) and KINDS[kind.argmax()] == thing.kind
        assert kind.sum() == 4 and grid[row, column, 2] == 2
        np.testing.assert_allclose((color + 1) * 127.5, COLORS[thing.color], atol=1e-3)


def test_what_lies_at_tokens_varies_by_about_one() -> None:
    """So no number is much louder than the others in the head's error; a channel of colour alone varies less."""
    size = dataset.SIZES[0]
    spread = np.concatenate([diffusion.lying(dataset.scene_of(0, size, i), size) for i in range(300)]).var(axis=0)
    assert spread[:-3].min() > 0.3 and spread[-3:].min() > 0.2 and spread.max() < 2, spread


def guess(hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any) -> tuple[torch.Tensor, ...]:
    """A lesson's answer that depends on all it sees; the heads' are nothing."""
    velocity = 0.5 * hidden_states + rest["timestep"].view(-1, 1, 1) * encoder_hidden_states.mean()
    return (
        velocity,
        hidden_states[:, :, : len(scenes.FREEDOM)] * 0,
        torch.zeros(*hidden_states.shape[:2], diffusion.LYING),
    )


def test_the_first_quarter_learns_from_its_own_first_guess(examples: diffusion.Examples) -> None:
    """At the last of the four levels, where they are shown just what denoising would bring them to with one long
    step; the others see the truth."""
    batch = examples.batch((0, 0), 5, 8)
    states, asked = torch.randn(8, 7, 384, generator=torch.Generator().manual_seed(0)), []

    def lesson(**inputs: Any) -> tuple[torch.Tensor, ...]:
        asked.append(inputs)
        return guess(**inputs)

    shown = diffusion.with_drafts(lesson, states, batch)
    assert diffusion.drafted(8) == 2 and diffusion.drafted(16) == 4
    assert torch.equal(asked[0]["hidden_states"], batch.noise[:2]) and torch.equal(asked[0]["timestep"], torch.ones(2))
    assert torch.equal(asked[0]["encoder_hidden_states"], states[:2])
    velocity = guess(**asked[0])[0]
    torch.testing.assert_close(shown.shown[:2], batch.noise[:2] - velocity)
    assert torch.equal(shown.shown[2:], batch.latents[2:]) and torch.equal(shown.latents, batch.latents)
    last = sigmas(batch.latents.shape[1], diffusion.STEPS)[diffusion.STEPS - 1]
    assert batch.sigma[:2].tolist() == pytest.approx([last, last]) and last > diffusion.TELLING
    diffusion.flow_loss(lesson, states, shown)
    torch.testing.assert_close(asked[1]["hidden_states"][:2], batch.noise[:2] + (float(last) - 1) * velocity)


def test_a_batch_too_small_for_a_draft_is_left_as_it_is(examples: diffusion.Examples) -> None:
    batch = examples.batch((0, 0), 5, 2)
    assert diffusion.drafted(2) == 0 and diffusion.with_drafts(guess, torch.zeros(2, 7, 384), batch) is batch


def test_drafts_are_made_without_gradients(examples: diffusion.Examples) -> None:
    batch = examples.batch((0, 0), 5, 4)
    states = torch.zeros(4, 7, 384, requires_grad=True)
    assert not diffusion.with_drafts(guess, states, batch).shown.requires_grad


@pytest.mark.parametrize("step", [5, 6, 7])
@pytest.mark.parametrize("drafts", [True, False])
def test_what_is_trained_on_leads_to_the_true_latents(examples: diffusion.Examples, step: int, drafts: bool) -> None:
    """Whoever goes from what is shown straight to the truth makes no mistake, after a draft or without."""
    states, batch = torch.zeros(8, 7, 384), examples.batch((0, 0), step, 8)
    if drafts:
        batch = diffusion.with_drafts(guess, states, batch)
    told = batch.noise.mean(1, keepdim=True)[:, :, : len(scenes.FREEDOM)] * batch.noise.shape[1] ** 0.5

    def right(hidden_states: torch.Tensor, timestep: torch.Tensor, **rest: Any) -> tuple[torch.Tensor, ...]:
        return (hidden_states - batch.latents) / timestep.view(-1, 1, 1), told, batch.there

    loss, missed = diffusion.flow_loss(right, states, batch)
    assert loss < 1e-6 and missed == 0

    def usual(**rest: Any) -> tuple[torch.Tensor, ...]:
        return batch.noise - batch.latents, told, batch.there

    assert (diffusion.flow_loss(usual, states, batch)[0] < 1e-10) == (not drafts)


def test_more_than_half_practise_the_levels_that_are_visited() -> None:
    drawn = diffusion.draw_sigmas(np.random.default_rng(0), 20000, 64)
    visited = sigmas(64, diffusion.STEPS)[: diffusion.STEPS].astype(np.float32)
    shares = [(drawn == level).mean() for level in visited]
    np.testing.assert_allclose(shares, diffusion.VISITED_SHARE * np.array(diffusion.VISITS), atol=0.01)
    assert 0 < drawn.min() < 0.1 and drawn.max() == 1


def test_the_lesson_looks_at_image_tokens_alone_and_leaves_no_trace(examples: diffusion.Examples) -> None:
    """What a token answers changes with the picture there, and the transformer computes what it computes without."""
    torch.manual_seed(0)
    transformer, batch = diffusion.build_transformer("dense").eval(), examples.batch((0, 0), 5, 2)
    lesson = diffusion.Lesson(transformer)
    image_ids, text_ids = diffusion.positions(
        batch.size.height // dataset.PIXELS_A_TOKEN, batch.size.width // dataset.PIXELS_A_TOKEN
    )
    inputs = dict(hidden_states=batch.latents, encoder_hidden_states=torch.randn(2, 7, 384), timestep=batch.sigma,
                  img_ids=image_ids, txt_ids=text_ids[-7:])  # fmt: skip
    with torch.no_grad():
        velocity, heard, seen = lesson(**inputs)
        plain = transformer(**inputs, return_dict=False)[0]
    assert torch.equal(velocity, plain) and velocity.shape == batch.latents.shape
    assert heard.shape[:2] == seen.shape[:2] == batch.latents.shape[:2]
    assert lesson.seen.shape[1] == 7 + batch.latents.shape[1]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_for_200_steps(parts: tuple, tmp_path: Path) -> None:
    settings = diffusion.DiffusionTraining("base", steps=200, batch=1, warmup=20)
    one, two = (losses(tmp_path / name, settings, parts) for name in ("one", "two"))
    assert one == two and np.mean(one[-20:]) < 0.8 * np.mean(one[:5])


def test_training_goes_on_from_a_dense_pack(made: tuple[Recipe, Path], tmp_path: Path) -> None:
    settings, packs = made
    elsewhere = Recipe(tmp_path / "runs", **TINY)  # type: ignore[arg-type]
    recipe.take_up(elsewhere, packs / "seedling-dense")
    assert elsewhere.run("reader").finished and elsewhere.run("vae").finished and not elsewhere.run("base").finished
    before = settings.run("dense").weights()
    start = elsewhere.run("start").weights()
    assert start.keys() == before.keys()
    assert all(torch.equal(start[name], before[name].bfloat16().float()) for name in start)
    again, reads = recipe.trained_encoder(elsewhere), recipe.trained_encoder(settings)
    for name in quantize.plain_state(reads):
        seen = reads.get_submodule(name.removesuffix(".weight")).weight
        torch.testing.assert_close(again.get_submodule(name.removesuffix(".weight")).weight, seen, atol=0.01, rtol=0)
    recipe.make(elsewhere)
    after = elsewhere.run("base").weights()
    moved = max((after[name] - start[name]).abs().max().item() for name in start)
    assert 0 < moved < 0.1  # two steps from those weights, not from fresh ones


def test_the_reader_is_asked_what_the_caption_says() -> None:
    red, blue = Thing("koi", "red", 0.7, 0.5, 0.1), Thing("circle", "blue", 0.3, 0.5, 0.1)
    colors = list(COLORS)
    koi, circle = KINDS.index("koi"), KINDS.index("circle")
    white, unsaid = colors.index("white"), reader.UNSAID
    beside = Scene(WHITE, (red, blue), "right of")  # told from the left: the circle comes first
    expected = [white, unsaid, unsaid, 1, 2, circle, colors.index("blue"), koi, colors.index("red")]
    assert reader.answers(beside) == expected
    assert reader.answers(Scene(WHITE, (blue, red), "left of")) == expected
    assert reader.answers(Scene(WHITE, (red, blue), "and")) == [*expected[:4], 1, *expected[5:]]
    assert reader.answers(Scene(WHITE, (red, blue), "below")) == [*expected[:4], 3, *expected[5:]]
    group = reader.answers(Scene(Backdrop("black"), (red, red, red)))
    assert group == [colors.index("black"), unsaid, unsaid, 2, 0, koi, colors.index("red"), unsaid, unsaid]


def test_the_reader_is_asked_for_sky_ground_and_air_outdoors() -> None:
    one = (Thing("crane", "white", 0.5, 0.5, 0.3),)
    rest = [0, 0, KINDS.index("crane"), list(COLORS).index("white"), reader.UNSAID, reader.UNSAID]
    assert reader.answers(Scene(Backdrop("", "night", "winter", "snow"), one)) == [10 + 3, 1 + 3, 1 + 1, *rest]
    assert reader.answers(Scene(Backdrop("", "dawn"), one)) == [10, 0, 0, *rest]  # no season is an answer too
    told = {tuple(reader.answers(Scene(backdrop, one))[:3]) for backdrop in OUTDOORS}
    assert len(told) == len(OUTDOORS) == len(TIMES) * (1 + len(SEASONS)) * (1 + len(WEATHERS))
    questions = list(reader.ANSWERS.values())
    assert all(0 <= answer < questions[i] for answers in told for i, answer in enumerate(answers))


def test_answers_differ_where_captions_must() -> None:
    """Scenes with equal answers are the same but for the freedom and the side that the relation is told from."""
    rng, alike = np.random.default_rng(0), {}
    for _ in range(2000):
        scene = scenes.random_scene(rng)
        things = [(thing.kind, thing.color) for thing in scene.things]
        ordered = sorted(things, key=scenes.order) if scene.relation in ("", "and") else things
        relation = scene.relation
        if relation in ("right of", "below"):
            ordered, relation = ordered[::-1], scenes.MIRROR[relation]
        shows = (scene.backdrop, relation, tuple(ordered))
        assert alike.setdefault(tuple(reader.answers(scene)), shows) == shows


WANTED = torch.tensor(
    [[3, reader.UNSAID, reader.UNSAID, 1, 2, 0, 5, 14, 7], [12, 2, 0, 2, 0, 19, 9, reader.UNSAID, reader.UNSAID],
     [13, 4, 2, 1, 3, 4, 3, 13, 8]]
)  # fmt: skip


def sums(table: torch.Tensor) -> torch.Tensor:
    """Of the codes of WANTED, worked out one by one."""
    starts = np.cumsum([0, *list(reader.ANSWERS.values())[:-1]])
    return torch.stack([
        sum(table[start + answer] for start, answer in zip(starts, row, strict=True) if answer != reader.UNSAID)
        for row in WANTED.tolist()
    ])  # fmt: skip


def test_a_state_of_the_right_codes_alone_is_read_without_loss() -> None:
    table = reader.codes()
    assert len(table) == sum(reader.ANSWERS.values()) == 90
    torch.testing.assert_close(table @ table.T, torch.eye(len(table)) * table[0].square().sum())
    torch.testing.assert_close(reader.spoken(WANTED), sums(table))
    states = sums(table).repeat(1, len(reader.HIDDEN_STATES))
    assert states.square().mean(1)[2] == pytest.approx(1)  # where all is answered
    loss, given = reader.reading_loss(states, WANTED)
    assert torch.equal(given[WANTED != reader.UNSAID], WANTED[WANTED != reader.UNSAID])
    assert loss < 0.01 < reader.reading_loss(states.roll(1, 0), WANTED)[0]


def test_brief_states_are_what_an_encoder_without_mistakes_says(encoder: nn.Module, text: reader.TextBatch) -> None:
    states = diffusion.brief_states(WANTED)
    real = reader.encode(encoder, *text(["a moon"] * 3))[:, -diffusion.BRIEF_TEXT :]
    assert states.shape == real.shape and states.dtype == real.dtype
    for token in range(diffusion.BRIEF_TEXT):
        assert torch.equal(states[:, token], sums(reader.codes()).repeat(1, len(reader.HIDDEN_STATES)))
    assert reader.reading_loss(states[:, 0], WANTED)[0] < 0.01


def test_the_reader_is_asked_behind_the_prompt_padding_included() -> None:
    end = 9
    ids = torch.tensor([[1, 2, 3, end, 4, 0, 0], [1, end, 4, 0, 0, 0, 0]])
    assert reader.behind_the_prompt(ids, end).sum(1).tolist() == [4, 6]
    assert not reader.behind_the_prompt(ids, end)[0, :3].any()
