"""The packs in assets/models: complete, small, alike where they should be, and as good as the README says."""

import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from engine import catalog, evaluate, lowbit
from engine.packs import open_pack, verify_pack
from engine.seedling.backdrops import Backdrop
from engine.seedling.captions import vocabulary
from engine.seedling.checker import Wanted, check
from engine.types import Picture, Request
from engine.worker import Worker

ROOT = Path(__file__).parent.parent
VARIANTS = ("ternary", "binary", "dense")


def folder(variant: str) -> Path:
    return catalog.SHIPPED / f"seedling-{variant}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shipped_pack_opens_and_verifies(variant: str) -> None:
    pack = open_pack(folder(variant))
    assert (pack.id, pack.variant, pack.notes.demo) == (f"seedling-{variant}", variant, True)
    assert all(right for _, right, _ in verify_pack(pack))
    assert set(pack.notes.files) == {
        path.relative_to(pack.folder).as_posix()
        for path in pack.folder.rglob("*")
        if path.is_file() and path.name != "niwaki.json"
    }


def test_they_declare_a_full_a_half_and_a_non_square_size_and_their_words() -> None:
    for variant in VARIANTS:
        notes = open_pack(folder(variant)).notes
        (width, height), *others = notes.sizes
        assert (width // 2, height // 2) in others
        assert any(w != h for w, h in others)
        assert notes.vocabulary == vocabulary()


def test_they_are_small_and_share_encoder_vae_and_tokenizer() -> None:
    files = {v: {k: f for k, f in open_pack(folder(v)).notes.files.items()} for v in VARIANTS}
    assert sum(record["bytes"] for of in files.values() for record in of.values()) < 42e6
    shared = [name for name in files["dense"] if name.startswith(("text_encoder", "vae", "tokenizer"))]
    assert len(shared) >= 5
    for name in shared:
        assert len({files[v][name]["sha256"] for v in VARIANTS}) == 1, name


@pytest.mark.parametrize(("variant", "values"), [("ternary", 3), ("binary", 2)])
def test_every_group_of_every_block_linear_has_at_most_so_many_values(variant: str, values: int) -> None:
    pack = open_pack(folder(variant))
    quantization = pack.transformer.quantization
    assert quantization is not None
    packed = [name.removesuffix(".scales") for name in pack.transformer.tensors if name.endswith(".scales")]
    assert len(packed) == 2 * 12 + 4 * 2  # twelve linears in a double block, two in a single one
    for fqn in packed:
        scales, biases = (pack.transformer.tensors.numpy(f"{fqn}.{part}") for part in ("scales", "biases"))
        k = scales.shape[1] * quantization.group_size
        codes = lowbit.unpack(pack.transformer.tensors.numpy(f"{fqn}.weight"), quantization.bits, k)
        weights = lowbit.dequantize(codes, scales, biases, quantization.group_size)
        groups = np.sort(weights.reshape(-1, quantization.group_size), axis=1)
        assert int((np.diff(groups, axis=1) > 0).sum(axis=1).max()) + 1 <= values


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with closing(Worker(data_dir=tmp_path_factory.mktemp("data"))) as worker:
        yield worker


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_red_circles_on_a_blue_background(variant: str, worker: Worker) -> None:
    answers = list(worker.run(Request("two red circles on a blue background", f"seedling-{variant}")))
    assert isinstance(answers[-1], Picture)
    verdict = check(answers[-1].pixels, Wanted(Backdrop("blue"), (("circle", "red"), ("circle", "red"))))
    assert verdict.right, verdict.reason


def readme_table() -> dict[str, dict[str, float]]:
    """Model -> row -> score, from the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    head, _, *rows = re.findall(r"^\|(.*)\|$", text.split("<!-- scores -->")[1].split("<!-- end -->")[0], re.M)
    models = [cell.strip() for cell in head.split("|")][1:]
    table: dict[str, dict[str, float]] = {model: {} for model in models}
    for row in rows:
        name, *cells = (cell.strip(" *") for cell in row.split("|"))
        for model, cell in zip(models, cells, strict=True):
            if re.fullmatch(r"[\d.]+", cell):
                table[model][name] = float(cell)
    return table


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_evaluate_gives_the_scores_of_the_readme(tmp_path: Path) -> None:
    """All questions to all packs. Another processor rounds differently, which turns a few pictures of 1,440."""
    table = readme_table()
    for variant in ("dense", "ternary", "binary"):
        model = f"seedling-{variant}"
        result = evaluate.run(model, None, tmp_path)
        assert result["n"] >= 1200
        assert abs(result["overall"] - table[model]["overall"]) <= 0.02
        for sort in ("tasks", "languages", "kinds"):
            for name, score in result[sort].items():
                assert abs(score - table[model][name]) <= 0.05, (model, name)
