"""From Request to Picture on torch: what is yielded, stopping, repeating, switching models, and failing well."""

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine import plan
from engine.embeddings import EmbeddingCache
from engine.hardware import Hardware
from engine.torch_backend import backend as backend_module
from engine.torch_backend import model as model_module
from engine.torch_backend import transformer
from engine.torch_backend.backend import TorchBackend
from engine.torch_backend.model import Model, give_back
from engine.types import BadRequest, Cancelled, EngineError, Picture, Request, Step
from tests.packs.writers import Dims, write_pack
from tests.peak import PeakMemory

HARDWARE = Hardware("cpu", "test processor", 0, 1, frozenset(), "cpu: test processor")
PROMPT = "two red circles on a blue background"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packs")
    for variant in ("ternary", "dense"):
        write_pack(root / variant, variant, Dims(double_blocks=2, single_blocks=2))
    return root


@pytest.fixture(scope="module")
def backend(packs: Path) -> Iterator[TorchBackend]:
    made = TorchBackend(HARDWARE, packs)
    yield made
    made.close()


@pytest.fixture
def request_(packs: Path) -> Request:
    return Request(prompt=PROMPT, model=str(packs / "ternary"), seed=3, width=96, height=64)


def never() -> bool:
    return False


def after(calls: int) -> Callable[[], bool]:
    """Turns true at the call with this number."""
    left = iter([False] * calls)
    return lambda: next(left, True)


def picture_of(backend: TorchBackend, request: Request) -> Picture:
    *_, picture = backend.generate(request, never)
    assert isinstance(picture, Picture)
    return picture


def test_steps_then_a_picture(backend: TorchBackend, request_: Request) -> None:
    *steps, picture = backend.generate(request_, never)
    assert steps == [Step(index, 4) for index in range(5)]
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (64, 96, 3) and picture.pixels.dtype == np.uint8 and picture.pixels.std() > 1
    assert picture.request == replace(request_, steps=4) and picture.backend == "torch"
    assert picture.reason.startswith("cpu: test processor")
    seconds = picture.seconds
    assert seconds.denoise > 0 and seconds.decode > 0
    assert seconds.load + seconds.encode + seconds.denoise + seconds.decode <= seconds.total + 1e-9
    assert 50e6 < picture.peak_memory_bytes < 100e9


def test_defaults_come_from_the_pack(backend: TorchBackend, packs: Path) -> None:
    picture = picture_of(backend, Request(prompt=PROMPT, model=str(packs / "ternary")))
    assert (picture.request.width, picture.request.height, picture.request.steps) == (64, 64, 4)


def test_one_seed_is_one_picture(backend: TorchBackend, request_: Request) -> None:
    first, again = picture_of(backend, request_), picture_of(backend, request_)
    assert first.pixels.tobytes() == again.pixels.tobytes()
    assert picture_of(backend, replace(request_, seed=4)).pixels.tobytes() != first.pixels.tobytes()
    assert picture_of(backend, replace(request_, prompt="a green square")).pixels.tobytes() != first.pixels.tobytes()
    fresh = picture_of(TorchBackend(HARDWARE, backend.data_dir), request_)
    assert fresh.pixels.tobytes() == first.pixels.tobytes()


def test_the_second_picture_neither_loads_nor_encodes(backend: TorchBackend, request_: Request) -> None:
    picture_of(backend, request_)
    again = picture_of(backend, replace(request_, seed=9))
    assert again.seconds.load == 0 and again.seconds.encode == 0
    other = picture_of(backend, replace(request_, prompt="three green squares and a circle"))
    assert other.seconds.load == 0 and other.seconds.encode > 0


def test_ternary_and_its_dense_twin_draw_the_same(backend: TorchBackend, request_: Request, packs: Path) -> None:
    ternary = picture_of(backend, request_).pixels.astype(int)
    dense = picture_of(backend, replace(request_, model=str(packs / "dense"))).pixels.astype(int)
    assert np.abs(ternary - dense).max() <= 1


def test_a_text_encoder_that_leaves_comes_back_for_a_new_prompt(
    packs: Path, backend: TorchBackend, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = picture_of(backend, request_).pixels
    other = picture_of(backend, replace(request_, prompt="a green square")).pixels
    monkeypatch.setattr(plan, "BIG_ENCODER", 1)
    frugal = TorchBackend(HARDWARE, packs)
    first = picture_of(frugal, request_)
    assert "leaves memory" in first.reason and np.array_equal(first.pixels, kept)
    model = frugal._model
    assert model.text_encoder is None
    maps = Path("/proc/self/maps")
    file = str(model.pack.text_encoder.files[0])
    backend.close()  # it had the same file open
    assert not maps.exists() or file not in maps.read_text()
    again = picture_of(frugal, replace(request_, seed=9))
    assert again.seconds.load == 0 and again.seconds.encode == 0
    new = picture_of(frugal, replace(request_, prompt="a green square"))
    assert new.seconds.load > 0 and new.seconds.encode > 0 and model.text_encoder is None
    assert np.array_equal(new.pixels, other)


def test_a_cancelled_encoding_leaves_no_text_encoder_behind(
    packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "BIG_ENCODER", 1)
    frugal = TorchBackend(HARDWARE, packs)
    with pytest.raises(Cancelled):
        list(frugal.generate(request_, after(1)))
    assert frugal._model.text_encoder is None
    assert picture_of(frugal, request_).pixels.std() > 1


def test_the_plan_decides_how_the_picture_is_decoded(
    backend: TorchBackend, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = picture_of(backend, request_).pixels.astype(int)
    monkeypatch.setattr(plan, "WHOLE_PIXELS", 32 * 32)
    monkeypatch.setattr(plan, "VAE_TILES", (64,))
    tiled = picture_of(backend, request_)
    assert "tiles of 64 pixels" in tiled.reason
    assert np.abs(tiled.pixels - whole).max() <= 1  # so small that the statistics come from all of it


def test_a_picture_that_does_not_fit_is_refused_before_anything_is_loaded(
    packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = TorchBackend(HARDWARE, packs)
    with monkeypatch.context() as patch:
        patch.setattr(backend_module, "available_bytes", lambda: 1)
        patch.setattr(backend_module, "resident_bytes", lambda: 100 << 20)
        with pytest.raises(BadRequest, match="needs .* GB where 0.1 GB are available"):
            list(fresh.generate(request_, never))
    assert fresh._model is None
    assert picture_of(fresh, request_).pixels.std() > 1


def test_attention_never_holds_the_scores() -> None:
    """The joint sequence of a 512 x 512 picture: 1,536 tokens."""
    heads, tokens, width = 2, 1536, 64
    query, key, value = (torch.randn(1, tokens, heads, width) for _ in range(3))
    with torch.inference_mode(), PeakMemory() as memory:
        out = transformer.attention(query, key, value)
    scores = heads * tokens * tokens * 4
    assert memory.peak < scores / 4
    weights = (query[0, :, 1] @ key[0, :, 1].T / width**0.5).softmax(-1)
    torch.testing.assert_close(out[0, :, width:], weights @ value[0, :, 1], rtol=1e-4, atol=1e-4)


def test_cancel_inside_a_step(backend: TorchBackend, request_: Request) -> None:
    """Warm, each of the four steps asks four times: 2 + 2 blocks. The seventh answer falls into the second step."""
    whole = picture_of(backend, request_)
    seen = []
    with pytest.raises(Cancelled, match="cancelled"):
        for event in backend.generate(request_, after(6)):
            seen.append(event)
    assert seen == [Step(0, 4), Step(1, 4)]
    assert picture_of(backend, request_).pixels.tobytes() == whole.pixels.tobytes()


def test_cancel_is_asked_everywhere(packs: Path, request_: Request) -> None:
    """Stopping a cold start at every question it asks ends it there, and never spoils the next run."""
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    whole = list(TorchBackend(HARDWARE, packs).generate(request_, count))[-1]
    assert isinstance(whole, Picture)
    layers, blocks, decoder = 1 + 3, 4 * 4, 1 + 4
    assert asked >= layers + blocks + decoder
    fresh, stopped = TorchBackend(HARDWARE, packs), 0
    events: list[Step | Picture] = []
    while not events:
        try:
            events = list(fresh.generate(request_, after(stopped)))
        except Cancelled:
            stopped += 1  # later: by now the model is loaded, and then the prompt encoded
    assert stopped >= blocks + decoder
    assert isinstance(events[-1], Picture) and events[-1].pixels.tobytes() == whole.pixels.tobytes()


def test_closing_the_generator_stops_the_work(backend: TorchBackend, request_: Request) -> None:
    whole = picture_of(backend, request_)
    calls: list[int] = []
    hook = backend._model.weights.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    running = backend.generate(request_, never)
    assert next(running) == Step(0, 4) and next(running) == Step(1, 4)
    running.close()
    hook.remove()
    assert len(calls) == 1
    assert picture_of(backend, request_).pixels.tobytes() == whole.pixels.tobytes()


def test_inference_mode_stays_inside_whichever_thread_resumes(backend: TorchBackend, request_: Request) -> None:
    expected = picture_of(backend, request_)
    running = backend.generate(request_, never)
    events: list[Step | Picture] = []

    def resume() -> None:
        events.append(next(running))
        assert not torch.is_inference_mode_enabled()

    for _ in range(6):
        thread = threading.Thread(target=resume)
        thread.start()
        thread.join()
    assert not torch.is_inference_mode_enabled()
    assert isinstance(events[-1], Picture) and np.array_equal(events[-1].pixels, expected.pixels)


def test_switching_drops_the_old_model_first(
    packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TorchBackend(HARDWARE, packs)
    picture_of(backend, request_)
    old, encoder = backend._model.weights, backend._model.text_encoder
    watched = [weakref.ref(old.transformer), weakref.ref(encoder.model), weakref.ref(old.decoder.vae)]
    del old, encoder
    alive_at_load: list[int] = []
    load = Model.load

    def spy(self: Model, *args: object) -> object:
        alive_at_load.append(sum(reference() is not None for reference in watched))
        return load(self, *args)

    monkeypatch.setattr(Model, "load", spy)
    picture_of(backend, replace(request_, model=str(packs / "dense")))
    assert alive_at_load == [0]


@pytest.mark.parametrize(
    "change",
    [{"prompt": " "}, {"width": 97}, {"steps": 0}, {"seed": -1}, {"model": "no-such-model"}, {"prompt": "red " * 90}],
)
def test_a_bad_request_leaves_the_model_alone(
    backend: TorchBackend, request_: Request, packs: Path, change: dict[str, object]
) -> None:
    picture_of(backend, request_)
    kept = backend._model
    with pytest.raises(BadRequest):
        list(backend.generate(replace(request_, **{"model": str(packs / "dense")} | change), never))
    assert backend._model is kept and kept is not None


def test_a_variation_changes_the_picture_and_its_whole_strength_is_the_other_seed(
    backend: TorchBackend, request_: Request
) -> None:
    plain, varied = picture_of(backend, request_), picture_of(backend, replace(request_, variations=((4, 0.2),)))
    whole = picture_of(backend, replace(request_, variations=((4, 1.0),)))
    other = picture_of(backend, replace(request_, seed=4))
    assert whole.pixels.tobytes() == other.pixels.tobytes()
    change = np.abs(varied.pixels.astype(int) - plain.pixels).mean()
    assert 0 < change < np.abs(other.pixels.astype(int) - plain.pixels).mean()


def test_a_refined_draft_is_the_same_whether_its_latents_are_remembered_or_not(
    packs: Path, request_: Request
) -> None:
    draft = replace(request_, steps=4, variations=((4, 0.3),))
    refined = replace(request_, steps=4, seed=8, width=192, height=128, draft=draft, start=3)
    backend = TorchBackend(HARDWARE, packs)
    picture_of(backend, draft)
    *steps, warm = backend.generate(refined, never)
    assert steps == [Step(0, 1), Step(1, 1)]
    *steps, cold = TorchBackend(HARDWARE, packs).generate(refined, never)
    assert steps == [Step(index, 5) for index in range(6)]
    assert warm.pixels.shape == (128, 192, 3)
    assert warm.pixels.tobytes() == cold.pixels.tobytes()
    late = picture_of(backend, replace(refined, start=2))
    assert late.pixels.tobytes() != warm.pixels.tobytes()


def test_unknown_words_are_told(backend: TorchBackend, request_: Request) -> None:
    assert picture_of(backend, request_).unknown_words == ()
    assert picture_of(backend, replace(request_, prompt="a red elephant")).unknown_words == ("elephant",)


def test_tensors_that_do_not_fit_make_one_sentence(tmp_path: Path, request_: Request) -> None:
    from safetensors.torch import load_file, save_file

    file = write_pack(tmp_path / "spoilt", "dense") / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["decoder.surplus.weight"] = torch.zeros(1)
    save_file(tensors, file)
    with pytest.raises(EngineError, match="unexpected decoder.surplus.weight") as refused:
        list(TorchBackend(HARDWARE, tmp_path).generate(replace(request_, model=str(tmp_path / "spoilt")), never))
    assert "\n" not in str(refused.value)


def test_bfloat16_draws_the_same_picture_roughly(
    packs: Path, backend: TorchBackend, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number format of CUDA, and of big packs on a CPU that multiplies it. Weights stay as small as the files."""
    exact = picture_of(backend, request_).pixels.astype(int)
    monkeypatch.setattr(plan, "plan", lambda *_, **__: plan.Plan("torch", "cpu", "bfloat16", "asked for"))
    half = TorchBackend(HARDWARE, packs)
    rough = picture_of(half, request_).pixels.astype(int)
    assert 0 < np.abs(rough - exact).mean() < 2
    model = half._model
    for module, component in (
        (model.weights.transformer, model.pack.transformer),
        (model.text_encoder.model, model.pack.text_encoder),
    ):
        assert sum(tensor.nbytes for tensor in module.state_dict().values()) <= component.bytes_on_disk


def test_out_of_memory_is_a_sentence(
    packs: Path, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    backend = TorchBackend(HARDWARE, packs)
    monkeypatch.setattr(model_module, "denoise", exhausted)
    with pytest.raises(EngineError, match="smaller size"):
        list(backend.generate(request_, never))
    monkeypatch.undo()
    assert picture_of(backend, request_).pixels.std() > 1


def test_embedding_cache_is_bounded_and_forgets_the_oldest() -> None:
    cache = EmbeddingCache(max_bytes=2 * 400)
    one, two, three = (torch.full((100,), float(number)) for number in range(3))
    cache.put("one", one)
    cache.put("two", two)
    assert cache.get("one") is one  # used again, so "two" is the oldest now
    cache.put("three", three)
    assert cache.get("two") is None and cache.get("one") is one and cache.get("three") is three
    cache.put("big", torch.zeros(1000))
    assert cache.get("big") is not None and cache.get("one") is None


def test_a_drafts_latents_are_waited_for_before_they_are_read(
    backend: TorchBackend, request_: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card they come to the processor when it gets to that, and nobody else waits in between."""
    done: list[object] = []
    real = model_module.outset
    monkeypatch.setattr(model_module, "outset", lambda request, *how: done.append(request.draft) or real(request, *how))
    monkeypatch.setattr(model_module, "finish", lambda device: done.append("waited"))
    draft = replace(request_, steps=2, seed=77)
    picture_of(backend, replace(request_, steps=4, width=192, height=128, draft=draft, start=2))
    assert done[:2] == [None, "waited"] and len(done) == 3


@pytest.mark.parametrize(("quick", "order"), [
    (60.0, "queue1 wait1 give1 queue2 queue3 wait2 give2 give3"),
    (0.0, "queue1 wait1 give1 queue2 wait2 give2 queue3 wait3 give3"),
])  # fmt: skip
def test_a_card_is_given_the_next_quick_step_before_anybody_waits(
    monkeypatch: pytest.MonkeyPatch, quick: float, order: str
) -> None:
    done: list[str] = []

    def steps() -> Iterator[torch.Tensor]:
        for number in (1, 2, 3):
            done.append(f"queue{number}")
            yield torch.tensor(number)

    def event() -> SimpleNamespace:
        number = done[-1].removeprefix("queue")
        return SimpleNamespace(synchronize=lambda: done.append(f"wait{number}"))

    monkeypatch.setattr(backend_module, "QUICK", quick)
    clock = backend_module.Clock()
    clock.device = torch.device("cuda")
    monkeypatch.setattr(clock, "_event", event)
    for step in clock.done(steps()):
        done.append(f"give{step.item()}")
    assert " ".join(done) == order


def test_a_picture_needs_no_library_that_takes_seconds_to_import(packs: Path, tmp_path: Path) -> None:
    code = f"""
import sys
for name in ("transformers", "diffusers", "sympy", "torch._dynamo"):  # the last two: torch's compiler
    sys.modules[name] = None
from pathlib import Path
from engine.hardware import detect
from engine.torch_backend.backend import TorchBackend
from engine.types import Request
backend = TorchBackend(detect(), Path({str(tmp_path)!r}))
*_, picture = backend.generate(Request("two red circles", {str(packs / "ternary")!r}), lambda: False)
print(picture.pixels.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("("), done.stderr[-500:]


def test_a_thread_for_each_core_unless_the_user_says_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    backend_module.use_cores(replace(HARDWARE, cores=3))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    backend_module.use_cores(replace(HARDWARE, cores=3))
    assert told == [3]


def test_a_model_in_a_circle_still_goes_where_libraries_are_frozen(packs: Path) -> None:
    gc.freeze()
    try:
        circle: list[object] = []
        circle.append(circle)
        seen = weakref.ref(model := Model(packs / "ternary"))
        circle.append(model)
        del circle, model
        give_back()
        assert seen() is None
    finally:
        gc.unfreeze()
