"""Scores, intervals and the folders of public benchmarks, with a stand-in that draws what it is told to."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine import catalog, evaluate
from engine.fake import paint
from engine.seedling.checker import check
from engine.seedling.questions import TASKS, Question, questions
from engine.types import BadRequest, EngineError, Picture, Request, Seconds, Step
from tests.truth import truth

ASKED = {question.prompt: question for question in questions(20)}
LANGUAGES = ["en", "hi", "ta"]  # that the tiny packs know
Artist = Callable[[Request], np.ndarray]


def gradient(prompt: str, seed: int, width: int, height: int) -> np.ndarray:
    return paint(Request(prompt, "fake", seed, width, height, 4))


class Verdict:
    def __init__(self, right: bool) -> None:
        self.right = right


BLANK, DRAWN = np.zeros((64, 64, 3), np.uint8), np.ones((64, 64, 3), np.uint8)


def knows(*tasks: str) -> Artist:
    """Draws the prompts of these tasks right and leaves all others empty."""

    def draw(request: Request) -> np.ndarray:
        question = ASKED[request.prompt]
        assert request.seed == question.seed
        return DRAWN if question.task in tasks else BLANK

    return draw


class StandIn:
    """A Worker that has pictures drawn right here; `left` counts runs that were not read to their end."""

    artist: Artist = staticmethod(lambda request: gradient(request.prompt, request.seed, 32, 32))
    left = opened = closed = 0

    def __init__(self, backend: str, *, data_dir: Path) -> None:
        StandIn.opened += 1

    def run(self, request: Request) -> Iterator[Step | Picture]:
        StandIn.left += 1
        yield Step(0, 1)
        yield Picture(type(self).artist(request), request, "stand-in", "", Seconds(), 0)
        StandIn.left -= 1

    def close(self) -> None:
        StandIn.closed += 1


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "Worker", StandIn)
    monkeypatch.setattr(evaluate, "check", lambda picture, wanted: Verdict(bool(picture.any())))  # in no time
    for name in ("left", "opened", "closed"):
        monkeypatch.setattr(StandIn, name, 0)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Callable[[Artist], None]:
    return lambda artist: monkeypatch.setattr(StandIn, "artist", staticmethod(artist))


@pytest.fixture
def shipped(tiny_packs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three demo models of the catalogue, as tiny packs; returns their folder."""
    folder = tmp_path / "shipped"
    for variant in ("ternary", "binary", "dense"):
        shutil.copytree(tiny_packs / variant, folder / f"seedling-{variant}")
    monkeypatch.setattr(catalog, "SHIPPED", folder)
    return folder


def test_scores_add_up(shipped: Path, tmp_path: Path, draws) -> None:
    draws(knows("counting", "colors", "position"))
    result = evaluate.run("seedling-dense", 72, tmp_path)
    assert result["n"] == 72 and list(result["tasks"]) == list(TASKS)
    assert result["tasks"] == {task: float(task in ("counting", "colors", "position")) for task in TASKS}
    assert result["overall"] == 0.5 and result["languages"] == dict.fromkeys(LANGUAGES, 0.5)
    assert result["kinds"] == {"shapes": 0.5, "objects": 0.5} and result["interval"] == [0.5, 0.5]
    assert json.loads(json.dumps(result)) == result and "against" not in result
    assert (StandIn.opened, StandIn.closed, StandIn.left) == (1, 1, 0)


def test_languages_and_kinds_have_scores_of_their_own(shipped: Path, tmp_path: Path, draws) -> None:
    draws(partly(lambda question: question.language == "hi"))
    result = evaluate.run("seedling-dense", 72, tmp_path)
    assert result["languages"] == {"en": 0.0, "hi": 1.0, "ta": 0.0} and result["overall"] == pytest.approx(1 / 3)
    draws(partly(lambda question: not question.shapes))
    result = evaluate.run("seedling-ternary", 72, tmp_path)
    assert result["kinds"] == {"shapes": 0.0, "objects": 1.0}


def test_the_real_checker_judges(shipped: Path, tmp_path: Path, draws, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "check", check)
    rng = np.random.default_rng(0)
    draws(lambda request: truth(rng, ASKED[request.prompt].wanted, 256))
    assert evaluate.run("seedling-dense", 18, tmp_path)["overall"] > 0.9


@pytest.mark.parametrize(("limit", "asked"), [(18, 18), (35, 18), (36, 36), (10**9, 1080)])
def test_a_limit_is_an_upper_limit(limit: int, asked: int, shipped: Path, tmp_path: Path, monkeypatch) -> None:
    """And every task is asked in every language that the model knows."""
    result = evaluate.run("seedling-ternary", limit, tmp_path)
    assert result["n"] == asked and list(result["languages"]) == LANGUAGES and list(result["tasks"]) == list(TASKS)


@pytest.mark.parametrize("limit", [17, 5, 0, -1])
def test_a_limit_below_the_number_of_tasks_is_refused(limit: int, shipped: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=f"a limit of {limit} .* give 18 or more"):
        evaluate.run("seedling-ternary", limit, tmp_path)
    with pytest.raises(BadRequest, match="give 6 or more"):
        evaluate.run("seedling-ternary", min(limit, 5), tmp_path, lang="hi")


def every_third(question: Question) -> bool:
    return question.seed % 3 == 0


def partly(right: Callable[[Question], bool]) -> Artist:
    def draw(request: Request) -> np.ndarray:
        question = ASKED[request.prompt]
        return DRAWN if right(question) else BLANK

    return draw


def test_the_interval_holds_the_score_and_narrows_with_more_questions(shipped: Path, tmp_path: Path, draws) -> None:
    draws(partly(every_third))
    widths = []
    for limit in (72, 288):
        result = evaluate.run("seedling-dense", limit, tmp_path)
        low, high = result["interval"]
        assert low < result["overall"] < high
        widths.append(high - low)
    assert widths[1] < 0.75 * widths[0]


def test_the_comparison_is_paired(shipped: Path, tmp_path: Path, draws) -> None:
    """The same answers give a ratio of exactly one: each resample takes the same questions of both models."""
    draws(partly(every_third))
    evaluate.run("seedling-dense", 180, tmp_path)
    against = evaluate.run("seedling-ternary", 72, tmp_path)["against"]  # part of what the reference was asked
    assert against == {
        "model": "seedling-dense", "difference": 0.0, "difference_interval": [0.0, 0.0], "ratio": 1.0,
        "interval": [1.0, 1.0],
    }  # fmt: skip
    draws(partly(lambda question: question.seed % 6 == 0))
    against = evaluate.run("seedling-binary", 180, tmp_path)["against"]
    assert against["interval"][0] < against["ratio"] < against["interval"][1] < 1 and 0.2 < against["ratio"] < 0.6


def test_there_is_no_ratio_to_a_reference_that_is_hardly_ever_right(shipped: Path, tmp_path: Path, draws) -> None:
    draws(partly(lambda question: question.seed % 40 == 0))  # one in each task of 30
    evaluate.run("seedling-dense", 180, tmp_path)
    draws(partly(every_third))
    against = evaluate.run("seedling-binary", 180, tmp_path)["against"]
    assert "ratio" not in against and 0.2 < against["difference"] < 0.4
    assert 0 < against["difference_interval"][0] < against["difference"] < against["difference_interval"][1]


@pytest.mark.parametrize("fault", [EngineError("the card fell out"), KeyboardInterrupt()])
def test_a_run_that_is_cut_off_loses_no_answer(fault: BaseException, shipped: Path, tmp_path: Path, draws) -> None:
    asked: list[str] = []
    artist = partly(every_third)

    def fails_late(request: Request) -> np.ndarray:
        asked.append(request.prompt)
        if len(asked) == 26:
            raise fault
        return artist(request)

    draws(fails_late)
    said: list[str] = []
    with pytest.raises(type(fault)):
        evaluate.run("seedling-dense", 36, tmp_path, say=said.append)
    assert [line.partition(": ")[0] for line in said] == list(TASKS)[:4] and said[0] == "single_object: 2 of 6 right"
    whole = evaluate.run("seedling-dense", 36, tmp_path, say=said.append)
    assert said[4] == "25 of 36 questions were answered before the last run was cut off"
    assert len(asked) == 37 and len(set(asked)) == 36
    draws(artist)
    assert evaluate.run("seedling-dense", 36, tmp_path) == whole
    assert [path.name for path in (tmp_path / "evaluations").iterdir()] == ["seedling-dense.json"]


def test_no_comparison_with_other_questions_or_another_reference(shipped: Path, tmp_path: Path, draws) -> None:
    draws(partly(every_third))
    evaluate.run("seedling-dense", 72, tmp_path)
    assert "against" not in evaluate.run("seedling-ternary", 90, tmp_path)
    assert "against" in evaluate.run("seedling-ternary", 72, tmp_path)
    (shipped / "seedling-dense" / "niwaki.json").write_text('{"demo": true, "hidden_states": [1, 2, 3]}')
    assert "against" not in evaluate.run("seedling-ternary", 72, tmp_path)  # it was trained again since


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"pack": null}', "\0"])
def test_damaged_answers_of_the_reference_count_as_none(text: str, shipped: Path, tmp_path: Path, draws) -> None:
    draws(partly(every_third))
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "seedling-dense.json").write_text(text)
    assert "against" not in evaluate.run("seedling-ternary", 18, tmp_path)


def test_only_languages_the_model_knows(shipped: Path, tmp_path: Path, draws) -> None:
    draws(knows())
    result = evaluate.run("seedling-ternary", 12, tmp_path, lang="hi")
    assert result["languages"] == {"hi": 0.0} and result["n"] == 12
    with pytest.raises(BadRequest, match="does not know the language 'mr'; it knows en, hi, ta"):
        evaluate.run("seedling-ternary", 18, tmp_path, lang="mr")


def test_models_of_another_world_are_refused(shipped: Path, tmp_path: Path) -> None:
    notes = shipped / "seedling-ternary" / "niwaki.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"demo": False}))
    with pytest.raises(BadRequest, match="no demo model"):
        evaluate.run("seedling-ternary", 18, tmp_path)
    with pytest.raises(BadRequest, match="unknown model 'nobody'"):
        evaluate.run("nobody", 6, tmp_path)


def test_an_unwritable_data_folder_is_found_out_before_the_first_picture(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadRequest, match="can't write into .*file.*choose another folder"):
        evaluate.run("seedling-ternary", 18, tmp_path / "file")
    assert StandIn.opened == 0


GENEVAL = [{"tag": "colors", "include": [{"class": "dog"}], "prompt": "a dog"}, {"tag": "x", "prompt": "a \u2028 cat"}]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_geneval_layout(tmp_path: Path) -> None:
    """As djghosh13/geneval's evaluation reads it: digits as folder names, one JSON object, digits.png under samples."""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in GENEVAL)
    out = tmp_path / "out"
    result = evaluate.export("geneval", out, write(tmp_path / "evaluation_metadata.jsonl", lines), "m", tmp_path)
    samples = [f"samples/{number:04}.png" for number in range(4)]
    assert tree(out) == sorted(f"{n:05}/{name}" for n in range(2) for name in ["metadata.jsonl", *samples])
    for number, entry in enumerate(GENEVAL):
        assert json.loads((out / f"{number:05}" / "metadata.jsonl").read_text(encoding="utf-8")) == entry
    pixels = [np.array(Image.open(out / "00000" / name)) for name in samples]
    for seed in range(4):
        np.testing.assert_array_equal(pixels[seed], gradient("a dog", seed, 32, 32))
    assert result == {"model": "m", "layout": "geneval", "folder": str(out), "prompts": 2, "pictures": 8}
    assert (StandIn.opened, StandIn.closed, StandIn.left) == (1, 1, 0)


@pytest.mark.parametrize("whole_folder", [True, False])
def test_dpg_layout(whole_folder: bool, tmp_path: Path) -> None:
    """One PNG under the prompt file's name, four pictures in reading order, and no other file in the folder."""
    for name in ("0", "partiprompts10"):
        write(tmp_path / "prompts" / f"{name}.txt", f"a long prompt {name}\n")
    out = tmp_path / "out"
    prompts = tmp_path / "prompts" if whole_folder else tmp_path / "prompts" / "0.txt"
    evaluate.export("dpg", out, prompts, "m", tmp_path)
    assert tree(out) == (["0.png", "partiprompts10.png"] if whole_folder else ["0.png"])
    grid = np.array(Image.open(out / "0.png"))
    assert grid.shape == (64, 64, 3)
    for seed, (x, y) in enumerate([(0, 0), (32, 0), (0, 32), (32, 32)]):
        np.testing.assert_array_equal(grid[y : y + 32, x : x + 32], gradient("a long prompt 0", seed, 32, 32))


@pytest.mark.parametrize("whole_folder", [True, False])
def test_hps_layout(whole_folder: bool, tmp_path: Path) -> None:
    """STYLE/NNNNN.jpg by the number of the prompt in STYLE.json; the prompt itself beside it."""
    for style in ("anime", "concept-art"):
        write(tmp_path / "benchmark" / f"{style}.json", json.dumps([f"{style} one", f"{style} two"]))
    out = tmp_path / "out"
    prompts = tmp_path / "benchmark" if whole_folder else tmp_path / "benchmark" / "anime.json"
    result = evaluate.export("hps", out, prompts, "m", tmp_path)
    styles = ["anime", "concept-art"] if whole_folder else ["anime"]
    assert tree(out) == [f"{style}/{n:05}.{kind}" for style in styles for n in range(2) for kind in ("jpg", "txt")]
    assert result["pictures"] == result["prompts"] == 2 * len(styles)
    image = Image.open(out / "anime" / "00001.jpg")
    assert image.format == "JPEG" and image.size == (32, 32)
    assert np.abs(np.array(image).astype(int) - gradient("anime two", 0, 32, 32)).mean() < 3
    assert (out / "anime" / "00001.txt").read_text() == "anime two"


@pytest.mark.parametrize(
    ("kind", "name", "text", "words"),
    [
        ("geneval", "p.jsonl", "a dog\n", "is not JSON lines"),
        ("geneval", "p.jsonl", '{"prompt": 3}', "is not JSON lines"),
        ("geneval", "p.jsonl", '["prompt"]', "is not JSON lines"),
        ("geneval", "p.jsonl", '{"text": "a dog"}', "is not JSON lines"),
        ("geneval", "p.jsonl", "\n", "is not JSON lines"),
        ("hps", "anime.json", "{}", "is not a JSON list"),
        ("hps", "anime.json", "[1]", "is not a JSON list"),
        ("hps", "anime.json", "[]", "is not a JSON list"),
        ("hps", "anime.json", "[", "is not a JSON list"),
    ],
)
def test_prompt_files_of_another_form_are_refused(kind: str, name: str, text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(BadRequest, match=words) as caught:
        evaluate.export(kind, tmp_path / "out", path, "m", tmp_path)
    assert str(path) in str(caught.value) and "give " in str(caught.value)
    assert StandIn.opened == 0 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["geneval", "dpg", "hps"])
def test_prompt_files_that_cannot_be_read_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00a")
    (tmp_path / "empty").mkdir()
    for name, words in (("missing", "can't read the prompts"), ("bytes", "is not text in UTF-8"), ("empty", "empty")):
        with pytest.raises(BadRequest, match=words) as caught:
            evaluate.export(kind, tmp_path / "out", tmp_path / name, "m", tmp_path)
        assert name in str(caught.value) and "Errno" not in str(caught.value)


@pytest.mark.parametrize("kind", ["geneval", "dpg", "hps"])
def test_an_unwritable_folder_is_found_out_before_the_first_picture(kind: str, tmp_path: Path) -> None:
    text = {"geneval": '{"prompt": "a dog"}', "dpg": "a dog", "hps": '["a dog"]'}[kind]
    path = write(tmp_path / "prompts", text)
    for folder in (path, path / "below"):
        with pytest.raises(BadRequest, match="can't write into .*choose another folder"):
            evaluate.export(kind, folder, path, "m", tmp_path)
    assert StandIn.opened == 0


def test_a_file_in_the_way_is_a_sentence(tmp_path: Path) -> None:
    write(tmp_path / "out" / "00000", "in the way")
    with pytest.raises(BadRequest, match="can't write into"):
        evaluate.export("geneval", tmp_path / "out", write(tmp_path / "p", '{"prompt": "a dog"}'), "m", tmp_path)
    assert StandIn.closed == 1


def test_the_real_worker_serves_it(tmp_path: Path, tiny_packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.worker import Worker

    monkeypatch.setattr(evaluate, "Worker", Worker)
    path = write(tmp_path / "p", '{"prompt": "a dog"}')
    result = evaluate.export("geneval", tmp_path / "out", path, str(tiny_packs / "ternary"), tmp_path, "fake")
    assert result["pictures"] == 4
    made = np.array(Image.open(tmp_path / "out" / "00000" / "samples" / "0003.png"))
    np.testing.assert_array_equal(made, gradient("a dog", 3, 64, 64))
