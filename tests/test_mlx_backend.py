"""From Request to Picture on MLX: what is yielded, stopping, memory, failing well, and that it needs no torch."""

import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from engine import plan, worker  # noqa: E402
from engine.hardware import Hardware  # noqa: E402
from engine.mlx_backend import backend as backend_module  # noqa: E402
from engine.mlx_backend import transformer, tuning  # noqa: E402
from engine.mlx_backend.backend import MlxBackend, Model  # noqa: E402
from engine.types import BadRequest, Cancelled, EngineError, Picture, Request, Step  # noqa: E402
from tests.packs.writers import Dims, write_pack  # noqa: E402

ROOT = Path(__file__).parent.parent
HARDWARE = Hardware("cpu", "test processor", 0, 1, frozenset(), "cpu: test processor")
PROMPT = "two red circles on a blue background"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packs")
    for variant in ("ternary", "dense"):
        write_pack(root / variant, variant, Dims(double_blocks=2, single_blocks=2))
    return root


@pytest.fixture(scope="module")
def backend(packs: Path) -> Iterator[MlxBackend]:
    made = MlxBackend(HARDWARE, packs)
    yield made
    made.close()


@pytest.fixture
def request_(packs: Path) -> Request:
    return Request(prompt=PROMPT, model=str(packs / "ternary"), seed=3, width=64, height=32, steps=2)


def never() -> bool:
    return False


def after(calls: int) -> Callable[[], bool]:
    """Turns true at the call with this number."""
    left = iter([False] * calls)
    return lambda: next(left, True)


def picture_of(backend: MlxBackend, request: Request) -> Picture:
    *_, picture = backend.generate(request, never)
    assert isinstance(picture, Picture)
    return picture


def test_steps_then_a_picture(backend: MlxBackend, request_: Request) -> None:
    *steps, picture = backend.generate(request_, never)
    assert steps == [Step(index, 2) for index in range(3)]
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (32, 64, 3) and picture.pixels.dtype == np.uint8 and picture.pixels.std() > 1
    assert picture.request == request_ and picture.backend == "mlx"
    assert picture.reason.startswith("cpu: test processor; mlx because it was asked for")
    seconds = picture.seconds
    assert seconds.denoise > 0 and seconds.decode > 0
    assert seconds.load + seconds.encode + seconds.denoise + seconds.decode <= seconds.total + 1e-9
    assert 0 < picture.mean_memory_bytes <= picture.peak_memory_bytes < 1e9


def test_one_seed_is_one_picture_and_the_second_neither_loads_nor_encodes(
    backend: MlxBackend, request_: Request
) -> None:
    first, again = picture_of(backend, request_), picture_of(backend, request_)
    assert first.pixels.tobytes() == again.pixels.tobytes()
    assert again.seconds.load < 0.1 and again.seconds.encode == 0
    other = picture_of(backend, replace(request_, seed=4, prompt="three green squares"))
    assert other.pixels.tobytes() != first.pixels.tobytes() and other.seconds.encode > 0


def test_cancel_inside_a_step(backend: MlxBackend, request_: Request) -> None:
    """Warm, each step asks four times: 2 + 2 blocks. The seventh answer falls into the second step."""
    whole = picture_of(backend, request_)
    seen = []
    with pytest.raises(Cancelled, match="cancelled"):
        for event in backend.generate(request_, after(6)):
            seen.append(event)
    assert seen == [Step(0, 2), Step(1, 2)]
    assert picture_of(backend, request_).pixels.tobytes() == whole.pixels.tobytes()


def test_a_cold_start_can_be_stopped_anywhere(packs: Path, request_: Request) -> None:
    layers, blocks, decoder = 1 + 3, 4, 1 + 4
    fresh, stopped = MlxBackend(HARDWARE, packs), 0
    for calls in range(0, 40, 3):
        try:
            events = list(fresh.generate(replace(request_, steps=1), after(calls)))
        except Cancelled:
            stopped += 1
    assert stopped > (layers + blocks + decoder) // 3 - 2
    assert isinstance(events[-1], Picture)
    assert events[-1].pixels.tobytes() == picture_of(fresh, replace(request_, steps=1)).pixels.tobytes()


def test_at_most_one_block_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is waited for when the next is put, so a cancel is never further away than that."""
    wait = mx.eval
    queue, waited = transformer.Queue(), []
    monkeypatch.setattr(mx, "eval", lambda *results: waited.append(results) or wait(*results))
    first, second = mx.zeros(1) + 1, mx.zeros(1) + 2
    queue.put(first)
    queue.put(second)
    assert [len(each) for each in waited] == [0, 1] and waited[1][0] is first


def test_closing_the_generator_stops_the_work(backend: MlxBackend, request_: Request) -> None:
    whole = picture_of(backend, request_)
    running = backend.generate(request_, never)
    assert next(running) == Step(0, 2) and next(running) == Step(1, 2)
    running.close()
    assert picture_of(backend, request_).pixels.tobytes() == whole.pixels.tobytes()


def test_switching_drops_the_old_model_first(packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = MlxBackend(HARDWARE, packs)
    picture_of(backend, request_)
    old = backend._model
    watched = [weakref.ref(old.transformer), weakref.ref(old.text_encoder), weakref.ref(old.decoder)]
    del old
    alive: list[int] = []
    load = Model.load_text_encoder
    monkeypatch.setattr(
        Model,
        "load_text_encoder",
        lambda *how: alive.append(sum(each() is not None for each in watched)) or load(*how),
    )
    picture_of(backend, replace(request_, model=str(packs / "dense")))
    assert alive == [0]


def test_the_text_encoder_leaves_memory_after_encoding(
    packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = plan.plan
    monkeypatch.setattr(plan, "plan", lambda *how: replace(decide(*how), keep_text_encoder=False))
    backend = MlxBackend(HARDWARE, packs)
    running = backend.generate(request_, never)
    next(running)
    model = backend._model
    assert model.text_encoder is None and model.transformer is not None
    *_, first = running
    again = picture_of(backend, replace(request_, seed=5))  # the embeddings stayed: no encoder is read for another seed
    assert again.seconds.encode == 0 and model.text_encoder is None
    assert isinstance(first, Picture) and first.pixels.tobytes() != again.pixels.tobytes()


def test_limits_follow_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, int] = {}
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: asked.update(cache=limit))
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: asked.update(wired=limit))
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 3 << 30})
    decided = plan.Plan("mlx", "mps", "bfloat16", "", peak_bytes=2 << 30, working_bytes=1 << 30)
    backend_module.set_limits(decided)
    assert asked == {"cache": 1 << 30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    backend_module.set_limits(replace(decided, peak_bytes=4 << 30, working_bytes=0))
    assert asked == {"cache": backend_module.SMALLEST_CACHE, "wired": 3 << 30}


@pytest.mark.parametrize(
    "change", [{"prompt": " "}, {"width": 97}, {"seed": -1}, {"model": "no-such-model"}, {"prompt": "red " * 90}]
)
def test_a_bad_request_leaves_the_model_alone(
    backend: MlxBackend, request_: Request, packs: Path, change: dict[str, object]
) -> None:
    picture_of(backend, request_)
    kept = backend._model
    with pytest.raises(BadRequest):
        list(backend.generate(replace(request_, **{"model": str(packs / "dense")} | change), never))
    assert backend._model is kept and kept is not None


def test_out_of_memory_is_a_sentence(packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise RuntimeError("[metal::malloc] Attempting to allocate 9000000000 bytes which is greater than the maximum")

    backend = MlxBackend(HARDWARE, packs)
    monkeypatch.setattr(backend_module, "denoise", exhausted)
    with pytest.raises(EngineError, match="too little free memory.*smaller size"):
        list(backend.generate(request_, never))
    assert backend._model is None
    monkeypatch.setattr(backend_module, "denoise", lambda *_: (_ for _ in ()).throw(RuntimeError("[matmul] shapes")))
    with pytest.raises(RuntimeError, match="shapes"):
        list(backend.generate(request_, never))


def test_gray_noise_is_refused_before_a_picture(
    packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "multiply", lambda x, weight, *rest: mx.ones((x.shape[0], weight.shape[0])))
    with pytest.raises(EngineError, match="would give gray noise"):
        list(MlxBackend(HARDWARE, packs).generate(request_, never))


def test_an_old_mlx_is_refused_before_a_model_is_opened(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.check_version, "__defaults__", ("0.31.0",))
    with pytest.raises(EngineError, match="too old"):
        MlxBackend(HARDWARE, packs)


def test_the_worker_takes_mlx_where_the_plan_says_so(packs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(worker._open("mlx", packs), MlxBackend)
    monkeypatch.setattr(worker.hardware, "detect", lambda: replace(HARDWARE, kind="mps"))
    assert isinstance(worker._open("auto", packs), MlxBackend)
    monkeypatch.setitem(sys.modules, "engine.mlx_backend.backend", None)  # as if its library were missing
    with pytest.raises(EngineError, match=r"mlx can't be loaded here .*mlx\[cpu\]"):
        worker._open("mlx", packs)


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "safetensors", "accelerate"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
"""


def test_a_picture_without_torch(tmp_path: Path) -> None:
    """In the worker's child too: it reads the same environment, and sitecustomize before anything else."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "NIWAKI_DATA": str(tmp_path / "data")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "app.py", "generate", PROMPT, "--size", "64x64", "--steps", "1", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    blocked = run("--backend", "torch", "--out", str(tmp_path / "torch.png"))
    assert blocked.returncode == 1 and "torch is missing" in blocked.stderr
    made = run("--backend", "mlx", "--out", str(tmp_path / "mlx.png"))
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "mlx.png").stat().st_size > 1000
