"""The whole training path in small: tokenizer, reader, VAE, latents, base run, branches, packs; and runs repeated.

`made` is everything once, with a handful of steps and pictures. What is trained to nothing still has the shapes, the
names and the low-bit values of the real thing, so that reading it back is held against the training's own modules.
"""

from collections.abc import Iterator
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
from engine.seedling import captions, dataset, diffusion, quantize, reader, recipe, scenes, vae
from engine.seedling.checkpoint import Run
from engine.seedling.recipe import Recipe
from engine.types import Picture, Request, Step

SHARD = 20  # examples a file, instead of 500
TINY = dict(processes=1, vae_steps=2, reader_steps=2, examples=SHARD, base_steps=2, branch_steps=2, batch=2)


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "SHARD", SHARD)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, small_shards: None) -> tuple[Recipe, Path]:
    """A finished recipe and the folder of its packs."""
    settings = Recipe(tmp_path_factory.mktemp("runs"), **TINY)  # type: ignore[arg-type]
    recipe.make(settings)
    packs = tmp_path_factory.mktemp("packs")
    recipe.write_packs(settings, packs)
    return settings, packs


@pytest.fixture(scope="module")
def examples(made: tuple[Recipe, Path]) -> diffusion.Examples:
    settings, _ = made
    return diffusion.Examples(settings.latents, recipe.tokenizer_of(settings), settings.seed)


@pytest.fixture(scope="module")
def encoder(made: tuple[Recipe, Path]) -> nn.Module:
    return recipe.trained_encoder(made[0])


def pack_of(made: tuple[Recipe, Path], variant: str) -> Pack:
    return open_pack(made[1] / f"seedling-{variant}")


def packed_layers(component: Component) -> list[str]:
    return [name.removesuffix(".scales") for name in component.tensors if name.endswith(".scales")]


@pytest.mark.parametrize("variant", recipe.VARIANTS)
def test_the_packs_open_and_every_byte_is_as_recorded(made: tuple[Recipe, Path], variant: str) -> None:
    pack = pack_of(made, variant)
    assert (pack.id, pack.variant, pack.notes.demo) == (f"seedling-{variant}", variant, True)
    assert "demo model" in pack.notes.label and pack.notes.vocabulary == captions.vocabulary()
    assert pack.notes.sizes == tuple((size.width, size.height) for size in dataset.SIZES)
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
    from engine.torch_backend.backend import Model
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
        request = Request("two purple hexagons", str(made[1] / f"seedling-{variant}"), width=96, height=160)
        *steps, picture = TorchBackend(detect(), tmp_path).generate(request, lambda: False)
        assert steps == [Step(index, 4) for index in range(5)] and isinstance(picture, Picture)
        assert picture.pixels.shape == (160, 96, 3) and picture.unknown_words == ("hexagons",)


def test_what_is_finished_is_not_done_again(made: tuple[Recipe, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    settings, _ = made
    before = {path: path.stat().st_mtime_ns for path in settings.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(diffusion, "train", None)
    monkeypatch.setattr(vae, "train", None)
    recipe.make(settings)
    assert {path: path.stat().st_mtime_ns for path in settings.folder.rglob("*") if path.is_file()} == before


def test_branches_start_from_the_base_and_move_everywhere(made: tuple[Recipe, Path]) -> None:
    base = made[0].run("base").weights()
    for variant in recipe.VARIANTS:
        branch = made[0].run(variant).weights()
        assert branch.keys() == base.keys()
        assert not [name for name in base if torch.equal(base[name], branch[name])]
        assert all(torch.allclose(base[name], branch[name], atol=1e-3) for name in base)  # two small steps


def losses(
    folder: Path, settings: diffusion.DiffusionTraining, parts: tuple, base: Run | None = None, stop: int | None = None
) -> list[float]:
    """Of one run in `folder`, which keeps its state every three steps; `stop` leaves it after so many."""
    examples, encoder = parts
    return [loss for _, loss in islice(diffusion.train(Run(folder, every=3), settings, examples, encoder, base), stop)]


@pytest.fixture
def parts(examples: diffusion.Examples, encoder: nn.Module) -> tuple[diffusion.Examples, nn.Module]:
    return examples, encoder


def test_the_loss_falls_and_a_run_can_be_repeated_and_resumed(parts: tuple, tmp_path: Path) -> None:
    settings = diffusion.DiffusionTraining("base", steps=12, batch=2, warmup=4)
    whole = losses(tmp_path / "whole", settings, parts)
    assert len(whole) == 12 and np.mean(whole[-4:]) < 0.9 * np.mean(whole[:3])
    first = losses(tmp_path / "broken", settings, parts, stop=8)  # what was kept is step 6
    assert first == whole[:8]
    assert losses(tmp_path / "broken", settings, parts) == whole[6:]
    ends = [Run(tmp_path / name).weights() for name in ("whole", "broken")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ternary", "binary"])
def test_a_branch_can_be_resumed(made: tuple[Recipe, Path], parts: tuple, tmp_path: Path, variant: str) -> None:
    settings = diffusion.DiffusionTraining(variant, steps=5, batch=2, warmup=2)
    base = made[0].run("base")
    whole = losses(tmp_path / "whole", settings, parts, base)
    assert losses(tmp_path / "broken", settings, parts, base, stop=4) == whole[:4]
    assert losses(tmp_path / "broken", settings, parts, base) == whole[3:]


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
    settings = reader.ReaderTraining(steps=15, batch=16)

    def wrong(name: str, stop: int | None = None) -> list[float]:
        """Shares of wrong answers."""
        steps = reader.train(Run(tmp_path / name, every=3), settings, recipe.tokenizer_of(made[0]))
        return [share for _, share in islice(steps, stop)]

    whole = wrong("whole")
    assert np.mean(whole[-4:]) < np.mean(whole[:3]) - 0.05
    assert wrong("broken", stop=7) == whole[:7]
    assert wrong("broken") == whole[6:]


def test_examples_are_a_function_of_seed_and_step(examples: diffusion.Examples) -> None:
    one, two, other = (examples.batch(0, step, 3) for step in (5, 5, 6))
    for part in ("latents", "noise", "sigma", "there", "ids", "mask"):
        assert torch.equal(getattr(one, part), getattr(two, part))
    assert not torch.equal(one.sigma, other.sigma)
    assert one.latents.shape[1:] == (one.size.width * one.size.height // 256, 64)
    assert ((one.sigma > 0) & (one.sigma <= 1)).all()


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
    seen: list[scenes.Scene] = []
    draw = diffusion.scene_of
    monkeypatch.setattr(diffusion, "scene_of", lambda *key: seen.append(draw(*key)) or seen[-1])
    batch = examples.batch(0, 5, 20)
    told = ndtr(batch.noise.mean(dim=1)[:, : len(scenes.FREEDOM)].double().numpy() * np.sqrt(batch.noise.shape[1]))
    agrees = np.abs(told - [scene.freedom for scene in seen]).max(axis=1) < 1e-5
    np.testing.assert_array_equal(agrees, batch.sigma.numpy() > diffusion.TELLING)
    assert 0 < agrees.sum() < 20


def test_each_token_is_asked_for_the_thing_nearest_to_it() -> None:
    size = dataset.SIZES[2]  # 160 x 96: ten tokens wide
    ring, circle = scenes.Thing("ring", "red", 0.25, 0.5, 0.18), scenes.Thing("circle", "blue", 0.75, 0.5, 0.18)
    there = diffusion.lying(scenes.Scene("white", (ring, circle), "left of", (0.5, 0.5, 1.0, 0.5)), size)
    assert there.shape == (60, diffusion.LYING)
    grid = there.reshape(6, 10, -1)
    for row, column in ((0, 0), (5, 4), (0, 5), (3, 9)):
        thing = ring if column < 5 else circle
        x, y = 16 * column + 8 + 32 * grid[row, column, 0], 16 * row + 8 + 32 * grid[row, column, 1]
        assert (x / 160, y / 96) == pytest.approx((thing.x, thing.y))
        shape, color = grid[row, column, 3:-3], grid[row, column, -3:]
        assert scenes.SHAPES[shape.argmax()] == thing.shape and shape.sum() == grid[row, column, 2] == 2
        np.testing.assert_allclose((color + 1) * 127.5, scenes.COLORS[thing.color], atol=1e-3)


def test_the_lesson_looks_at_image_tokens_alone_and_leaves_no_trace(examples: diffusion.Examples) -> None:
    """What a token answers changes with the picture there, and the transformer computes what it computes without."""
    torch.manual_seed(0)
    transformer, batch = diffusion.build_transformer("dense").eval(), examples.batch(0, 5, 2)
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
    red, blue = scenes.Thing("ring", "red", 0.7, 0.5, 0.1), scenes.Thing("circle", "blue", 0.3, 0.5, 0.1)
    colors, shapes = list(scenes.COLORS), scenes.SHAPES
    ring, circle = shapes.index("ring"), shapes.index("circle")
    beside = scenes.Scene("white", (red, blue), "right of")  # told from the left: the circle comes first
    expected = [colors.index("white"), 1, 2, circle, colors.index("blue"), ring, colors.index("red")]
    assert reader.answers(beside) == expected
    assert reader.answers(scenes.Scene("white", (blue, red), "left of")) == expected
    group = reader.answers(scenes.Scene("black", (red, red, red)))
    assert group == [colors.index("black"), 2, 0, ring, colors.index("red"), reader.UNSAID, reader.UNSAID]


def test_a_state_of_the_right_codes_alone_is_read_without_loss() -> None:
    table = reader.codes()
    torch.testing.assert_close(table @ table.T, torch.eye(len(table)) * table[0].square().sum())
    wanted = torch.tensor([[3, 1, 2, 0, 5, 1, 7], [0, 2, 0, 3, 9, reader.UNSAID, reader.UNSAID]])
    starts = np.cumsum([0, *list(reader.ANSWERS.values())[:-1]])
    states = torch.stack([
        sum(table[start + answer] for start, answer in zip(starts, row, strict=True) if answer != reader.UNSAID)
        for row in wanted.tolist()
    ]).repeat(1, len(reader.HIDDEN_STATES))  # fmt: skip
    assert states.square().mean(1)[0] == pytest.approx(1)
    loss, given = reader.reading_loss(states, wanted)
    assert torch.equal(given[wanted != reader.UNSAID], wanted[wanted != reader.UNSAID])
    assert loss < 0.01 < reader.reading_loss(states.flip(0), wanted)[0]


def test_the_reader_is_asked_behind_the_prompt_padding_included() -> None:
    end = 9
    ids = torch.tensor([[1, 2, 3, end, 4, 0, 0], [1, end, 4, 0, 0, 0, 0]])
    assert reader.behind_the_prompt(ids, end).sum(1).tolist() == [4, 6]
    assert not reader.behind_the_prompt(ids, end)[0, :3].any()
