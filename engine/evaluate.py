"""How often a demo model draws what it is asked; and pictures of a public benchmark's prompts in its own folders.

The questions and the checker are the ink garden's (engine.seedling): scores of a demo model say nothing about the 4B
models, whose own benchmarks need their own judges; `export` prepares the pictures for those. Knows no page and no SQL.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from engine import catalog
from engine.packs import NOTES_FILE, open_pack
from engine.seedling.captions import LANGUAGES
from engine.seedling.checker import check
from engine.seedling.questions import TASKS, Question, questions
from engine.types import BadRequest, Picture, Request
from engine.worker import Worker

PER_TASK = 60  # and language
REFERENCE = "seedling-dense"
RESAMPLES = 2000
LEAST = 0.05  # what the reference surely reaches before a ratio to it is given: next to zero, a ratio is chance

Say = Callable[[str], None]


def run(
    model: str, limit: int | None, data_dir: Path, backend: str = "auto", lang: str = "all",
    say: Say = lambda text: None,
) -> dict[str, Any]:  # fmt: skip
    """Ask at most `limit` questions (None: 360 in each language), as many of each task in each language that the model
    knows, or in `lang` alone; the same with the same seeds for all models.

    Scores come by task, by language, and by `kinds`: questions about plain shapes alone, and those about objects.

    Keeps the answers in `data_dir`/evaluations, so that a later run of another model is compared with the dense
    reference question by question: `interval` is the 95 % bootstrap interval of `overall`, `against` the difference to
    the reference and the ratio, where it was asked the same. The answers of a run that is cut off are kept too, and the
    next one goes on from there. `say` is told each task's score as it comes.
    Raises BadRequest for a model of another world or language, a limit that leaves a task without a question, and a
    data folder that cannot be written.
    """
    folder = catalog.find(model, data_dir)
    notes = open_pack(folder).notes
    if not notes.demo:
        raise BadRequest(
            f"{model} is no demo model, and these questions are about a garden of their own; use --export geneval"
        )
    if lang not in ("all", *notes.languages):
        raise BadRequest(f"{model} does not know the language {lang!r}; it knows {', '.join(notes.languages)}")
    languages = [each for each in LANGUAGES if each in notes.languages and lang in ("all", each)]
    least = len(TASKS) * len(languages)
    per_task = PER_TASK if limit is None else min(PER_TASK, limit // least)
    if per_task < 1:
        raise BadRequest(f"a limit of {limit} leaves a task without a question in some language; give {least} or more")
    kept = data_dir / "evaluations"
    _make_writable(kept)
    asked = [question for question in questions(per_task) if question.language in languages]
    name = Path(model).name
    unfinished = kept / f"{name}.{backend}.unfinished.json"
    known = _kept(unfinished, folder)
    right = _answers(asked, known, model, backend, data_dir, say, partial(_keep, unfinished, folder))
    _keep(kept / f"{name}.json", folder, right)
    unfinished.unlink(missing_ok=True)
    reference = {} if model == REFERENCE else answers(REFERENCE, data_dir)
    return {"model": model, **scored(asked, right, reference)}


def scored(asked: list[Question], right: dict[str, bool], reference: dict[str, bool]) -> dict[str, Any]:
    """Scores of what was `asked`, and against the reference where that was asked the same."""
    scores = _by_task(asked, right)
    draws = _draws(scores.shape[1])
    facts: dict[str, Any] = {"n": len(asked), "overall": float(scores.mean()), **parts(asked, right)}
    facts["interval"] = _interval(_overall(scores, draws))
    if {_key(question) for question in asked} <= reference.keys():
        facts["against"] = _against(scores, _by_task(asked, reference), draws)
    return facts


def answers(model: str, data_dir: Path) -> dict[str, bool]:
    """What the pack that lies there answered when it was last asked, by question; nothing if it never was."""
    return _kept(data_dir / "evaluations" / f"{Path(model).name}.json", catalog.find(model, data_dir))


def answered(per_task: int, *kept: dict[str, bool]) -> list[Question]:
    """The longest beginning of every task that all of these answered, in the languages that all of them did; [] where
    there is none."""
    for number in range(per_task, 0, -1):
        asked = questions(number)
        spoken = [
            language for language in LANGUAGES
            if all(_key(q) in answers for q in asked if q.language == language for answers in kept)
        ]  # fmt: skip
        if spoken:
            return [question for question in asked if question.language in spoken]
    return []


def parts(asked: list[Question], right: dict[str, bool]) -> dict[str, dict[str, float]]:
    """The share of right answers by task, by language and by kind of thing; of what was asked."""
    sorts: dict[str, Callable[[Question], str]] = {
        "tasks": lambda question: question.task,
        "languages": lambda question: question.language,
        "kinds": lambda question: "shapes" if question.shapes else "objects",
    }
    scores: dict[str, dict[str, float]] = {}
    for sort, of in sorts.items():
        answers: dict[str, list[bool]] = {}
        for question in asked:
            answers.setdefault(of(question), []).append(right[_key(question)])
        scores[sort] = {name: sum(given) / len(given) for name, given in answers.items()}
    return scores


def _answers(
    asked: list[Question], known: dict[str, bool], model: str, backend: str, data_dir: Path, say: Say,
    keep: Callable[[dict[str, bool]], None],
) -> dict[str, bool]:  # fmt: skip
    """Whether each question is answered right. Only those that are not `known` are asked; if that breaks off, `keep`
    is given what there is."""
    right = {_key(question): known[_key(question)] for question in asked if _key(question) in known}
    if right:
        say(f"{len(right)} of {len(asked)} questions were answered before the last run was cut off")
    try:
        left = [question for question in asked if _key(question) not in right]
        for question, picture in pictures(left, model, backend, data_dir):
            right[_key(question)] = check(picture.pixels, question.wanted).right
            task = [right.get(_key(each)) for each in asked if each.task == question.task]
            if None not in task:
                say(f"{question.task}: {sum(map(bool, task))} of {len(task)} right")
    except BaseException:  # Ctrl-C too
        with suppress(BadRequest):  # what broke it off is what has to be said
            keep(right)
        raise
    return right


def _against(ours: np.ndarray, theirs: np.ndarray, draws: np.ndarray) -> dict[str, Any]:
    """The reference's score beside ours: the difference, and the ratio where the reference is clear of zero."""
    our_samples, their_samples = _overall(ours, draws), _overall(theirs, draws)
    facts: dict[str, Any] = {
        "model": REFERENCE, "difference": float(ours.mean() - theirs.mean()),
        "difference_interval": _interval(our_samples - their_samples),
    }  # fmt: skip
    if _interval(their_samples)[0] >= LEAST:
        ratios = our_samples / np.maximum(their_samples, 1e-9)  # one sample in 2000 may be 0
        facts |= {"ratio": float(ours.mean() / theirs.mean()), "interval": _interval(ratios)}
    return facts


def pictures(asked: list[Question], model: str, backend: str, data_dir: Path) -> Iterator[tuple[Question, Picture]]:
    """Each question with the model's picture of it, at the size and steps that the pack declares."""
    with closing(Worker(backend, data_dir=data_dir)) as worker:
        for question in asked:
            yield question, _picture(worker, question.prompt, model, question.seed)


def _picture(worker: Worker, prompt: str, model: str, seed: int) -> Picture:
    """The end of a run, which is read to its last word: leaving it earlier would cancel it."""
    return [answer for answer in worker.run(Request(prompt, model, seed)) if isinstance(answer, Picture)][-1]


def _key(question: Question) -> str:
    return f"{question.task} {question.language}: {question.prompt}"


def _by_task(asked: list[Question], right: dict[str, bool]) -> np.ndarray:
    """Answers as 0 or 1, float [tasks, questions of each]."""
    return np.array([[right[_key(q)] for q in asked if q.task == task] for task in TASKS], float)


def _draws(of_each: int) -> np.ndarray:
    """Bootstrap samples of question numbers [samples, tasks, questions of each], alike for all models."""
    return np.random.default_rng(0).integers(0, of_each, (RESAMPLES, len(TASKS), of_each))


def _overall(scores: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The mean of the tasks' means in every bootstrap sample, float [samples]."""
    return scores[np.arange(len(TASKS))[:, None], draws].mean(axis=(1, 2))


def _interval(samples: np.ndarray) -> list[float]:
    return [float(edge) for edge in np.percentile(samples, (2.5, 97.5))]


def _make_writable(folder: Path) -> None:
    """Make a folder and try it: better refused now than after an hour of pictures."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise BadRequest(f"can't write into {folder}: {error.strerror}; choose another folder") from None


def _digest(folder: Path) -> str | None:
    """Stands for everything in a pack, since its notes hold the hashes of the other files."""
    notes = folder / NOTES_FILE
    return hashlib.sha256(notes.read_bytes()).hexdigest() if notes.is_file() else None


def _keep(path: Path, pack: Path, right: dict[str, bool]) -> None:
    try:
        text = json.dumps({"pack": _digest(pack), "right": right}, ensure_ascii=False, indent=0)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadRequest(f"can't keep the answers in {path}: {error.strerror}; choose another --data folder") from None


def _kept(path: Path, pack: Path) -> dict[str, bool]:
    """The answers that exactly this pack gave before; none where it was never asked or has changed since."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return dict(kept["right"]) if kept["pack"] == _digest(pack) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def export(kind: str, folder: Path, prompts: Path, model: str, data_dir: Path, backend: str = "auto") -> dict[str, Any]:
    """Pictures for a public benchmark, from its own prompt file, in the folders that its judge reads.

    geneval: evaluation_metadata.jsonl -> NNNNN/metadata.jsonl (that line) and NNNNN/samples/0000.png .. 0003.png.
    dpg: the folder of NAME.txt, or one such file -> NAME.png, four pictures in a 2 x 2 grid; the judge's RESOLUTION is
    the width of one. hps: a list of prompts STYLE.json, or a folder of them -> STYLE/NNNNN.jpg as HPSv2 reads it, and
    the prompt beside it in NNNNN.txt for HPSv3. Raises BadRequest for prompts that are not of that form, and for a
    folder that cannot be written.
    """
    read, write, count = _LAYOUTS[kind]
    jobs = read(prompts)
    _make_writable(folder)
    try:
        with closing(Worker(backend, data_dir=data_dir)) as worker:
            for name, prompt, line in jobs:
                made = [_picture(worker, prompt, model, seed).pixels for seed in range(count)]
                write(folder / name, [Image.fromarray(pixels) for pixels in made], line)
    except OSError as error:
        raise BadRequest(f"can't write into {folder}: {error.strerror}; choose another folder") from None
    return {
        "model": model, "layout": kind, "folder": str(folder), "prompts": len(jobs), "pictures": count * len(jobs),
    }  # fmt: skip


Job = tuple[str, str, str]
"""Where it goes, below the folder; the prompt; what the layout keeps of the prompt file."""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadRequest(f"can't read the prompts {path}: {error.strerror}; give the benchmark's own file") from None
    except UnicodeDecodeError:
        raise BadRequest(f"{path} is not text in UTF-8; give the benchmark's own prompt file") from None


def _files(path: Path, ending: str) -> list[Path]:
    """The file itself, or those of a folder that end so."""
    if not path.is_dir():
        return [path]
    if files := sorted(path.glob(f"[!.]*{ending}")):
        return files
    raise BadRequest(f"{path} holds no {ending} files; give the benchmark's own folder of prompts")


def _read_geneval(path: Path) -> list[Job]:
    lines = [line for line in _text(path).split("\n") if line.strip()]  # not splitlines: JSON may hold other breaks
    try:
        jobs = [(f"{number:05}", json.loads(line)["prompt"], line.strip()) for number, line in enumerate(lines)]
    except (ValueError, KeyError, TypeError):
        jobs = []
    if not jobs or not all(isinstance(prompt, str) for _, prompt, _ in jobs):
        raise BadRequest(f"{path} is not JSON lines with a prompt in each; give GenEval's evaluation_metadata.jsonl")
    return jobs


def _read_dpg(path: Path) -> list[Job]:
    return [(f"{file.stem}.png", _text(file).strip(), "") for file in _files(path, ".txt")]


def _read_hps(path: Path) -> list[Job]:
    jobs = []
    for file in _files(path, ".json"):
        try:
            prompts = json.loads(_text(file))
        except ValueError:
            prompts = None
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise BadRequest(f"{file} is not a JSON list of prompts; give HPSv2's benchmark files, such as anime.json")
        jobs += [(f"{file.stem}/{number:05}.jpg", prompt, prompt) for number, prompt in enumerate(prompts)]
    return jobs


def _write_geneval(target: Path, made: list[Image.Image], line: str) -> None:
    (target / "samples").mkdir(parents=True, exist_ok=True)
    (target / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    for number, image in enumerate(made):
        image.save(target / "samples" / f"{number:04}.png")


def _write_dpg(target: Path, made: list[Image.Image], line: str) -> None:
    width, height = made[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for number, image in enumerate(made):
        grid.paste(image, (number % 2 * width, number // 2 * height))
    grid.save(target)


def _write_hps(target: Path, made: list[Image.Image], line: str) -> None:
    target.parent.mkdir(exist_ok=True)
    made[0].save(target, quality=95)  # JPEG because the judge looks for that name
    target.with_suffix(".txt").write_text(line, encoding="utf-8")


Reader = Callable[[Path], list[Job]]
Writer = Callable[[Path, list[Image.Image], str], None]
_LAYOUTS: dict[str, tuple[Reader, Writer, int]] = {
    "geneval": (_read_geneval, _write_geneval, 4),
    "dpg": (_read_dpg, _write_dpg, 4),
    "hps": (_read_hps, _write_hps, 1),
}
