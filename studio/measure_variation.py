"""How much a variation, another seed and a refined draft really change a picture: `python -m studio.measure_variation`.

Prints two tables for SPEED.md, from which `engine.chain.STRENGTHS` and `refinement` were chosen. Knows the worker
and pixels only, so it runs on whatever model is installed.
"""

import argparse
import statistics
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from engine import catalog, chain
from engine.packs import open_pack
from engine.types import Picture, Request
from engine.worker import Worker
from studio.settings import data_dir

PROMPTS = (
    "two red lanterns at dusk",
    "four orange koi on a blue background",
    "a red maple leaf in autumn",
    "a moon above a pagoda at night",
    "a crane left of a pine",
    "three pink umbrellas in the rain",
)
STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
OTHER = 1000  # how far the seeds of variations lie from those of pictures


def pixels(worker: Worker, request: Request) -> np.ndarray:
    """float32 [height, width, 3] of one picture."""
    with closing(worker.run(request)) as run:
        return next(item for item in run if isinstance(item, Picture)).pixels.astype(np.float32)


def change(one: np.ndarray, other: np.ndarray) -> float:
    """Mean absolute difference in levels of 255."""
    return float(np.abs(one - other).mean())


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of all values around their picture's mean; 0 for a flat picture."""
    one, other = one - one.mean((0, 1)), other - other.mean((0, 1))
    scale = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / scale) if scale else 0.0


def shrunk(large: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    picture = Image.fromarray(np.rint(large).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    return np.asarray(picture, np.float32)


def variations(worker: Worker, requests: list[Request]) -> Iterator[str]:
    """Lines of the table: each strength's change beside another seed's."""
    plain = [pixels(worker, request) for request in requests]
    others = [pixels(worker, replace(request, seed=request.seed + OTHER)) for request in requests]
    seeds = statistics.fmean(map(change, plain, others))
    yield "| noise | correlation of the noise | change in levels of 255 | of another seed's |"
    yield "|---|---|---|---|"
    for strength in STRENGTHS:
        varied = [
            pixels(worker, replace(request, variations=((request.seed + OTHER, strength),))) for request in requests
        ]
        found = statistics.fmean(map(change, plain, varied))
        name = next((f" ({name})" for name, value in chain.STRENGTHS.items() if value == strength), "")
        yield f"| {strength}{name} | {(1 - strength**2) ** 0.5:.3f} | {found:.1f} | {found / seeds:.0%} |"
    yield f"| another seed | 0 | {seeds:.1f} | 100% |"


def refinements(worker: Worker, requests: list[Request], draft: tuple[int, int]) -> Iterator[str]:
    """Lines of the table: how well a refined picture, scaled down, correlates with its draft."""
    small = [replace(request, width=draft[0], height=draft[1]) for request in requests]
    drafts = [pixels(worker, request) for request in small]
    yield "| taken up at step | steps | correlation with the draft | lowest | change in levels of 255 |"
    yield "|---|---|---|---|---|"
    steps = requests[0].steps or 4
    for count in (steps, 2 * steps):
        for start in range(count // 2, count):  # before that nothing of a draft is left
            full = [
                pixels(worker, replace(request, draft=each, start=start, steps=count))
                for request, each in zip(requests, small, strict=True)
            ]
            down = [shrunk(picture, draft) for picture in full]
            close = list(map(correlation, drafts, down))
            moved = statistics.fmean(map(change, drafts, down))
            chosen = " (chosen)" if (count, start) == chain.refinement(steps) else ""
            yield f"| {start}{chosen} | {count} | {statistics.fmean(close):.3f} | {min(close):.3f} | {moved:.1f} |"
    alone = [shrunk(pixels(worker, request), draft) for request in requests]
    close = list(map(correlation, drafts, alone))
    yield f"| full size without it | {steps} | {statistics.fmean(close):.3f} | {min(close):.3f} | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="seedling-ternary")
    parser.add_argument("--seeds", type=int, default=3, help="pictures a prompt")
    args = parser.parse_args()
    folder = data_dir()
    pack = open_pack(catalog.find(args.model, folder))
    (width, height), steps = pack.notes.sizes[0], pack.notes.steps
    requests = [
        Request(prompt, args.model, seed, width, height, steps) for prompt in PROMPTS for seed in range(args.seeds)
    ]
    worker = Worker(data_dir=Path(folder))
    try:
        print(f"{args.model}, {width} x {height}, {steps} steps, {len(requests)} pictures\n")
        for line in variations(worker, requests):
            print(line, flush=True)
        print()
        for line in refinements(worker, requests, (width // 2, height // 2)):
            print(line, flush=True)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
