"""How long a picture takes and how much memory it needs, measured as a person meets it: through the worker, from a
cold start to warm pictures, each with a prompt of its own so that the text encoder works every time.

Knows nothing of what makes a picture fast. All sizes are decimal bytes, all times wall-clock seconds.
"""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any

from engine import catalog, products
from engine.hardware import detect, resident_bytes
from engine.packs import Pack, open_pack
from engine.plan import complete, plan
from engine.sampling import sampled
from engine.types import BadRequest, Picture, Request, Step
from engine.worker import Worker

MAX_RUNS = 100
_KINDS = "circles squares triangles rings lanterns boats cranes bridges rocks umbrellas".split()
_COLORS = ("red", "blue", "green", "yellow", "purple")
_COUNTS = ("two", "three")


def run(
    model: str, size: tuple[int, int] | None, steps: int | None, runs: int, backend: str, data_dir: Path
) -> dict[str, Any]:
    """One cold picture, then `runs` warm ones; `size` and `steps` None: as the pack declares.

    `load_s` is all that comes before the first picture's encoding: starting the process, imports, reading weights.
    `mean_active_memory_bytes`, averaged over the warm pictures: with MLX and on a card the bytes of the model's and its
    work's tensors, else the engine process's resident memory (Python, torch and mapped weights included), None where it
    can't be told (a CPU without /proc). `predicted_peak_memory_bytes` is the plan's word about the peak.
    Raises BadRequest for impossible values.
    """
    if not 1 <= runs <= MAX_RUNS:
        raise BadRequest(f"{runs} runs are out of range: give 1 to {MAX_RUNS}")
    width, height = size or (None, None)
    pack = open_pack(catalog.find(model, data_dir))
    hardware = detect()
    requests = [
        complete(Request(prompt, model, seed, width, height, steps), pack)
        for seed, prompt in enumerate(islice(_prompts(), runs + 1))
    ]
    decided = plan(hardware, pack, requests[0], backend, rates=products.rates(data_dir, hardware))
    worker = Worker(backend, data_dir=data_dir)
    try:
        load, cold = _cold(worker, requests[0])
        with sampled(partial(resident_bytes, worker.pid or 0)) as samples:
            warm = [_picture(worker, request) for request in requests[1:]]
    finally:
        worker.close()
    images = [picture.seconds.total for picture in warm]
    return {
        "model": model,
        "backend": cold.backend,
        "device": f"{decided.device}: {hardware.name}" if decided.device == hardware.kind else decided.device,
        "size": f"{cold.request.width}x{cold.request.height}",
        "steps": cold.request.steps,
        "runs": runs,
        "seconds_per_image": {"median": _median(images), "min": round(min(images), 4), "max": round(max(images), 4)},
        "seconds_per_step": _median([picture.seconds.denoise / (picture.request.steps or 1) for picture in warm]),
        "encode_s": _median([picture.seconds.encode for picture in warm]),
        "decode_s": _median([picture.seconds.decode for picture in warm]),
        "load_s": round(load, 4),
        "peak_memory_bytes": max(picture.peak_memory_bytes for picture in [cold, *warm]),
        "mean_active_memory_bytes": _mean_memory(warm, samples if decided.device == "cpu" else []),
        "weights_bytes": weights_on_disk(pack),
        "predicted_peak_memory_bytes": decided.peak_bytes,
    }


def against(facts: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """How many times less the model takes than a reference that was measured in the same way."""
    times = {
        "seconds_per_image": reference["seconds_per_image"]["median"] / facts["seconds_per_image"]["median"],
        "peak_memory_bytes": reference["peak_memory_bytes"] / facts["peak_memory_bytes"],
        "transformer_bytes": reference["weights_bytes"]["transformer"] / facts["weights_bytes"]["transformer"],
    }
    return {name: round(ratio, 3) for name, ratio in times.items()}


def _mean_memory(pictures: list[Picture], resident: list[int]) -> int | None:
    """The backend's own mean, if it takes one (MLX does, over its arrays alone), else that of the process."""
    own = [picture.mean_memory_bytes for picture in pictures if picture.mean_memory_bytes]
    return round(statistics.fmean(own or resident)) if own or resident else None


def weights_on_disk(pack: Pack) -> dict[str, int]:
    """Bytes of the safetensors files, per component."""
    components = {"transformer": pack.transformer, "text_encoder": pack.text_encoder, "vae": pack.vae}
    return {name: component.bytes_on_disk for name, component in components.items()}


def _median(seconds: list[float]) -> float:
    return round(statistics.median(seconds), 4)


def _prompts() -> Iterator[str]:
    """100 different prompts, and one for the cold start, that a demo model knows and a real one doesn't mind."""
    yield "a red circle on a white background"
    for kind, color, count in product(_KINDS, _COLORS, _COUNTS):
        yield f"{count} {color} {kind}"


def _cold(worker: Worker, request: Request) -> tuple[float, Picture]:
    """(seconds until the model was ready to encode, the picture)."""
    started = time.perf_counter()
    ready = 0.0
    for answer in worker.run(request):
        if isinstance(answer, Picture):
            return max(0.0, ready - answer.seconds.encode), answer
        if isinstance(answer, Step) and answer.index == 0:
            ready = time.perf_counter() - started
    raise AssertionError("a run ends with a picture or an error")


def _picture(worker: Worker, request: Request) -> Picture:
    return next(answer for answer in worker.run(request) if isinstance(answer, Picture))
