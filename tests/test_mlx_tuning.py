"""What is asked of the machine before the first picture: the version, right products, and when to expand a layer."""

from pathlib import Path

import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mlx[cpu]'")

from engine import measured  # noqa: E402
from engine.mlx_backend import tuning  # noqa: E402
from engine.types import EngineError  # noqa: E402


@pytest.mark.parametrize("version", ["0.31.2", "0.32.3", "0.9.0"])
def test_an_old_mlx_is_refused_with_the_version_it_needs(version: str) -> None:
    with pytest.raises(EngineError, match=rf"mlx {version} is too old to read 1-bit weights.*mlx>=0\.32\.4"):
        tuning.check_version(version)


@pytest.mark.parametrize("version", ["0.32.4", "0.32.10", "0.33.0.dev20260101+abc", "1.0"])
def test_a_newer_one_is_not(version: str) -> None:
    tuning.check_version(version)


def test_this_machine_multiplies_rightly() -> None:
    for bits, group_size in ((1, 128), (2, 128), (4, 64)):
        tuning.check_products(bits, group_size, mx.float32)
        tuning.check_products(bits, group_size, mx.bfloat16)


@pytest.mark.parametrize("wrong", ["noise", "zero", "nan", "swapped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_miscompiled_kernel_is_caught(wrong: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gray noise of some mlx builds on M5 chips: nothing fails, the numbers are wrong."""
    multiply = tuning.multiply

    def broken(x: mx.array, weight: mx.array, *rest: object) -> mx.array:
        right = multiply(x, weight, *rest)
        if x.shape[0] == 1:  # the vector kernel is fine, the matrix kernel isn't
            return right
        return {
            "noise": mx.random.normal(right.shape).astype(right.dtype) * 10,
            "zero": mx.zeros_like(right),
            "nan": right * float("nan"),
            "swapped": multiply(x, mx.view(mx.view(weight, mx.uint8)[:, ::-1], mx.uint32), *rest),
        }[wrong]

    monkeypatch.setattr(tuning, "multiply", broken)
    with pytest.raises(EngineError, match="1-bit weights wrongly.*gray noise.*--backend torch") as refused:
        tuning.check_products(1, 128, getattr(mx, dtype))
    assert "\n" not in str(refused.value)


def test_a_measurement_is_made_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tuning, "measure", lambda *how: asked.append(how) or (64, "layers are expanded from 64 rows"))
    assert [tuning.expand_from(2, 128, mx.bfloat16, tmp_path) for _ in range(3)] == [64] * 3
    assert tuning.expand_from(1, 128, mx.bfloat16, tmp_path) == 64
    assert len(asked) == 2
    sentences = [finding["sentence"] for finding in measured.recall(tmp_path).values()]
    assert len(sentences) == 2 and "2 bits in groups of 128, bfloat16: layers are expanded" in sentences[0]


def test_the_faster_way_wins_only_clearly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stubbed clocks: packed takes `pace` a row, expanded a constant."""

    def finding(pace: float, constant: float) -> int | None:
        rows = iter([pace * n if kind else constant for n in tuning.ROWS for kind in (1, 0)])
        monkeypatch.setattr(tuning, "seconds", lambda work: next(rows))
        return tuning.measure(2, 128, mx.float32)[0]

    assert finding(1e-5, 1e-3) == 256
    assert finding(1e-5, 1e-5 * 1024) is None  # equal at the end: packed needs less memory
    assert finding(1e-5, 1e-4) == 16
    assert finding(1e-2, 10.0) is None  # gave up at 16 rows, already too slow to go on


def test_a_real_measurement_ends_in_an_answer() -> None:
    rows, sentence = tuning.measure(4, 64, mx.float32)
    assert rows is None or rows in tuning.ROWS
    assert sentence.startswith("layers are ") and "ms" in sentence


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1}', '{"a": {"rows": 1}}', "{"])
def test_damaged_findings_are_forgotten(content: str, tmp_path: Path) -> None:
    (tmp_path / measured.FILE).write_text(content)
    assert measured.recall(tmp_path) == {}
    measured.keep(tmp_path, "key", {"sentence": "found", "expand_from": None})
    assert measured.recall(tmp_path) == {"key": {"sentence": "found", "expand_from": None}}


def test_a_folder_that_cannot_be_written_is_no_error() -> None:
    measured.keep(Path("/proc/niwaki"), "key", {"sentence": "found"})


