"""How often a demo model draws what it is asked, and pictures of a public benchmark's prompts in that benchmark's folders.

The questions and the checker are the shape world's (engine.seedling): scores of a demo model say nothing about the 4B
models, whose own benchmarks need their own judges; `export` prepares the pictures for those. Knows no page and no SQL.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine import catalog
from engine.packs import open_pack
from engine.seedling.checker import check
from engine.seedling.questions import TASKS, Question, questions
from engine.types import BadRequest, Picture, Request
from engine.worker import Worker

PER_TASK = 120
REFERENCE = "seedling-dense"
RESAMPLES = 2000


def run(model: str, limit: int | None, data_dir: Path, backend: str = "auto", lang: str = "all") -> dict[str, Any]:
    """Ask `limit` questions (None: 720), spread over the six tasks; the same questions and seeds for every model.

    Keeps the answers in `data_dir`/evaluations, so that a later run of another model is compared with the dense reference
    question by question: `interval` is the 95 % bootstrap interval of `overall`, `against` that of the ratio to the
    reference, where it was asked the same. Raises BadRequest for a model of another world or language.
    """
    notes = open_pack(catalog.find(model, data_dir)).notes
    if not notes.demo:
        raise BadRequest(f"{model} is no demo model, and these questions are about plain shapes; use --export geneval")
    if lang not in ("all", *notes.languages):
        raise BadRequest(f"{model} does not know the language {lang!r}; it knows {', '.join(notes.languages)}")
    per_task = PER_TASK if limit is None else -(-limit // len(TASKS))
    asked = questions(per_task)
    right = dict(_answers(asked, model, backend, data_dir))
    scores = _by_task(asked, right)
    tasks = {task: float(np.mean(scores[task])) for task in TASKS}
    overall = float(np.mean(list(tasks.values())))
    folder = data_dir / "evaluations"
    _keep(folder / f"{Path(model).name}.json", right)
    result = {"model": model, "n": len(asked), "overall": overall, "tasks": tasks, "languages": {"en": overall}}
    result["interval"] = _interval(np.stack([_overall(scores, draw) for draw in _draws(per_task)]))
    reference = _kept(folder / f"{REFERENCE}.json")
    if model != REFERENCE and right.keys() <= reference.keys():
        theirs = _by_task(asked, reference)
        ratios = np.stack([_overall(scores, d) / max(_overall(theirs, d), 1e-9) for d in _draws(per_task)])
        mean = overall / max(1e-9, float(np.mean([np.mean(theirs[task]) for task in TASKS])))
        result["against"] = {"model": REFERENCE, "ratio": mean, "interval": _interval(ratios)}
    return result


def pictures(asked: list[Question], model: str, backend: str, data_dir: Path) -> Iterator[tuple[Question, Picture]]:
    """Each question with the model's picture of it, at the size and steps that the pack declares."""
    worker = Worker(backend, data_dir=data_dir)
    try:
        for question in asked:
            for answer in worker.run(Request(question.prompt, model, question.seed)):
                if isinstance(answer, Picture):
                    yield question, answer
    finally:
        worker.close()


def _answers(asked: list[Question], model: str, backend: str, data_dir: Path) -> Iterator[tuple[str, bool]]:
    for question, picture in pictures(asked, model, backend, data_dir):
        yield f"{question.task}: {question.prompt}", check(picture.pixels, question.wanted).right


def _by_task(asked: list[Question], right: dict[str, bool]) -> dict[str, np.ndarray]:
    scores: dict[str, list[bool]] = defaultdict(list)
    for question in asked:
        scores[question.task].append(right[f"{question.task}: {question.prompt}"])
    return {task: np.array(answers, float) for task, answers in scores.items()}


def _draws(per_task: int) -> Iterator[np.ndarray]:
    """Bootstrap samples of question numbers [tasks, per_task], alike for every model: that makes the interval paired."""
    rng = np.random.default_rng(0)
    for _ in range(RESAMPLES):
        yield rng.integers(0, per_task, (len(TASKS), per_task))


def _overall(scores: dict[str, np.ndarray], draw: np.ndarray) -> float:
    return float(np.mean([scores[task][chosen].mean() for task, chosen in zip(TASKS, draw, strict=True)]))


def _interval(samples: np.ndarray) -> list[float]:
    return [float(edge) for edge in np.percentile(samples, (2.5, 97.5))]


def _keep(path: Path, right: dict[str, bool]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(right, ensure_ascii=False, indent=0), encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"can't keep the answers in {path}: {error.strerror}; choose another folder with --data") from None


def _kept(path: Path) -> dict[str, bool]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def export(kind: str, folder: Path, prompts: Path, model: str, data_dir: Path, backend: str = "auto") -> dict[str, Any]:
    """Pictures for a public benchmark, from its own prompt file, in the folders that its judge reads.

    geneval: a JSONL file with "prompt" in every line -> NNNNN/metadata.jsonl and NNNNN/samples/0000.png .. 0003.png.
    dpg: a folder of NAME.txt, or one such file -> NAME.png, four pictures in a 2 x 2 grid.
    hps: a JSON list of prompts -> NNNNN.jpg (quality 95). Raises BadRequest for a file that is not of that form.
    """
    jobs = {"geneval": _geneval, "dpg": _dpg, "hps": _hps}[kind](prompts)
    done = 0
    worker = Worker(backend, data_dir=data_dir)
    try:
        for name, prompt, about in jobs:
            made = [_one(worker, prompt, model, seed) for seed in range(1 if kind == "hps" else 4)]
            _write(kind, folder, name, made, about)
            done += len(made)
    except OSError as error:
        raise BadRequest(f"can't write into {folder}: {error.strerror}; choose another folder") from None
    finally:
        worker.close()
    return {"model": model, "layout": kind, "folder": str(folder), "prompts": len(jobs), "pictures": done}


Job = tuple[str, str, str]
"""name, prompt, the line of the prompt file"""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"can't read the prompt file {path}: {error}; give the benchmark's own file") from None


def _geneval(path: Path) -> list[Job]:
    lines = [line for line in _read(path).splitlines() if line.strip()]
    try:
        return [(f"{number:05}", str(json.loads(line)["prompt"]), line) for number, line in enumerate(lines)]
    except (ValueError, KeyError, TypeError):
        raise BadRequest(f"{path} is not GenEval's JSON lines with a prompt in each; give its evaluation_metadata.jsonl") from None


def _dpg(path: Path) -> list[Job]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise BadRequest(f"{path} holds no .txt files; give DPG-Bench's folder of prompts")
    return [(file.stem, _read(file).strip(), "") for file in files]


def _hps(path: Path) -> list[Job]:
    try:
        prompts = json.loads(_read(path))
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError
    except ValueError:
        raise BadRequest(f"{path} is not a JSON list of prompts; give one of HPS's benchmark files") from None
    return [(f"{number:05}", prompt, "") for number, prompt in enumerate(prompts)]


def _one(worker: Worker, prompt: str, model: str, seed: int) -> Image.Image:
    picture = next(a for a in worker.run(Request(prompt, model, seed)) if isinstance(a, Picture))
    return Image.fromarray(picture.pixels)


def _write(kind: str, folder: Path, name: str, made: list[Image.Image], about: str) -> None:
    if kind == "geneval":
        samples = folder / name / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        (folder / name / "metadata.jsonl").write_text(about + "\n", encoding="utf-8")
        for number, image in enumerate(made):
            image.save(samples / f"{number:04}.png")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "hps":
        made[0].save(folder / f"{name}.jpg", quality=95)
        return
    width, height = made[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(made):
        grid.paste(image, (number % 2 * width, number // 2 * height))
    grid.save(folder / f"{name}.png")
