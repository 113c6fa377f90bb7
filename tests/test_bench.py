"""The table's numbers: the keys scripts rely on, and sizes that agree with the files."""

import time
from pathlib import Path

import pytest

from engine import bench
from engine.packs import open_pack
from engine.prompt import unknown_words
from engine.sampling import sampled
from engine.seedling import captions
from engine.types import BadRequest
from tests.packs.writers import write_packs

KEYS = (
    "model backend device size steps runs seconds_per_image seconds_per_step encode_s decode_s load_s "
    "peak_memory_bytes mean_active_memory_bytes weights_bytes predicted_peak_memory_bytes"
).split()


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_packs(tmp_path_factory.mktemp("packs"))


def test_the_keys_and_what_they_mean(packs: Path, tmp_path: Path) -> None:
    facts = bench.run(str(packs / "ternary"), (96, 64), 2, 3, "fake", tmp_path)
    assert list(facts) == KEYS
    assert (facts["backend"], facts["size"], facts["steps"], facts["runs"]) == ("fake", "96x64", 2, 3)
    image = facts["seconds_per_image"]
    assert list(image) == ["median", "min", "max"]
    assert 0.02 < image["min"] <= image["median"] <= image["max"]
    assert 0.01 < facts["seconds_per_step"] < image["max"]
    assert facts["load_s"] > 0.05  # a process was started
    assert list(facts["weights_bytes"]) == ["transformer", "text_encoder", "vae"]


def test_resident_memory_is_that_of_the_engine_process(packs: Path, tmp_path: Path) -> None:
    facts = bench.run(str(packs / "ternary"), None, None, 1, "fake", tmp_path)
    mean = facts["mean_active_memory_bytes"]
    if Path("/proc/self/status").exists():
        assert 10e6 < mean < 300e6  # Python and NumPy, not the torch of the process that runs the tests
    else:
        assert mean is None


def test_bytes_on_disk_are_the_files(packs: Path) -> None:
    pack = open_pack(packs / "binary")
    files = (packs / "binary" / "transformer-packed-mflux").glob("*.safetensors")
    assert bench.weights_on_disk(pack)["transformer"] == sum(file.stat().st_size for file in files)


def test_a_reference_is_measured_in_the_same_way() -> None:
    small = {"seconds_per_image": {"median": 2.0}, "peak_memory_bytes": 100, "weights_bytes": {"transformer": 10}}
    big = {"seconds_per_image": {"median": 1.0}, "peak_memory_bytes": 400, "weights_bytes": {"transformer": 82}}
    ratios = bench.against(small, big)
    assert ratios == {"seconds_per_image": 0.5, "peak_memory_bytes": 4.0, "transformer_bytes": 8.2}


def test_samples_stop_where_nothing_can_be_told() -> None:
    values = iter([5, 7, 0])
    with sampled(lambda: next(values)) as samples:
        while len(samples) < 2:
            time.sleep(0.01)
    assert samples == [5, 7]


def test_every_picture_has_a_prompt_of_its_own() -> None:
    prompts = list(bench._prompts())
    assert len(set(prompts)) == len(prompts) == bench.MAX_RUNS + 1
    assert unknown_words(" ".join(prompts), captions.vocabulary()) == ()  # a demo model's pictures mean something too


@pytest.mark.parametrize("runs", [0, -1, 101])
def test_impossible_runs_are_refused(packs: Path, tmp_path: Path, runs: int) -> None:
    with pytest.raises(BadRequest, match=f"{runs} runs .* 1 to 100"):
        bench.run(str(packs / "ternary"), None, None, runs, "fake", tmp_path)
