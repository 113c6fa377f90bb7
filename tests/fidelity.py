"""What int8 changes in a demo model's pictures: against the same engine without it, and judged by the checker.

    python -m tests.fidelity [MODEL] [--prompts 50] [--torch]

Prints a JSON line: mean, median and least PSNR in dB of the int8 pictures against the plain ones, and how many of each
are right in everything their prompt asks for. Both are made here, in one process, in a data folder of their own.
With 1440 prompts it asks all that `evaluate` asks. Ends with 1 where the pictures are further apart than PSNR and SCORE
allow. --torch: without compiled passes.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine import catalog, products
from engine.hardware import detect
from engine.seedling.captions import LANGUAGES
from engine.seedling.checker import check
from engine.seedling.questions import TASKS, Question, questions
from engine.torch_backend.backend import TorchBackend
from engine.types import Picture, Request
from studio.settings import data_dir

PSNR = 30.0  # dB on average
SCORE = 0.01  # of the prompts, by which the number of right pictures may differ


def compare(model: str, prompts: int, folder: Path, compiled: bool = True) -> dict[str, Any]:
    """Ask `model` at least `prompts` questions, as many of each task and language, with int8 and without."""
    asked = questions(-(-prompts // (len(TASKS) * len(LANGUAGES))))
    hardware = detect() if compiled else replace(detect(), features=frozenset())
    backends = {name: TorchBackend(hardware, folder, int8=name == "int8") for name in ("int8", "plain")}
    pictures = {name: [_pixels(backend, question, model) for question in asked] for name, backend in backends.items()}
    decibels = [psnr(*pair) for pair in zip(pictures["int8"], pictures["plain"], strict=True)]
    right = {
        name: sum(check(pixels, question.wanted).right for question, pixels in zip(asked, made, strict=True))
        for name, made in pictures.items()
    }
    admitted = backends["int8"]._model
    assert admitted and admitted.admission, "no layer of this model was tried in int8"
    return {
        "model": Path(model).name,
        "prompts": len(asked),
        "psnr": {"mean": round(float(np.mean(decibels)), 2), "median": round(float(np.median(decibels)), 2),
                 "least": round(min(decibels), 2)},
        "right": right,
        "int8": products.errors_in_words(admitted.admission.errors()),
        "passes": [passes.name for passes in admitted.admission.ways],
    }  # fmt: skip


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise in dB of two uint8 pictures; 99 for equal ones."""
    square = float(np.mean((a.astype(np.float64) - b) ** 2))
    return 99.0 if square == 0 else float(10 * np.log10(255**2 / square))


def _pixels(backend: TorchBackend, question: Question, model: str) -> np.ndarray:
    *_, last = backend.generate(Request(question.prompt, model, question.seed), lambda: False)
    assert isinstance(last, Picture)
    return last.pixels


def main() -> None:
    parser = argparse.ArgumentParser(description="int8's pictures against those without it.")
    parser.add_argument("model", nargs="?", default="seedling-ternary")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--torch", action="store_true", help="torch's passes instead of compiled ones")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = str(catalog.find(args.model, data_dir(None)))
        found = compare(model, args.prompts, Path(folder), not args.torch)
    print(json.dumps(found))
    apart = abs(found["right"]["int8"] - found["right"]["plain"]) / found["prompts"]
    sys.exit(found["psnr"]["mean"] < PSNR or apart > SCORE)


if __name__ == "__main__":
    main()
