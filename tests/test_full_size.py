"""The 4B model with random codes on this machine's CPU: it finishes, within the promised memory, as predicted.

Memory depends neither on what the codes mean nor, but for the mean, on the number of steps, so most runs make one. One
512 x 512 run of each variant belongs to `make test-all`, the others to `make test-full` (16 GB of disk, on two idle
cores about a quarter of an hour).
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine import products
from engine.hardware import available_bytes, detect, resident_bytes
from engine.packs import open_pack
from engine.plan import complete, plan
from engine.types import Request

ROOT = Path(__file__).parent.parent
GB = 1_000_000_000
DISK, MEMORY = 12 * GB, 6 * GB
# The most of (peak, mean while denoising), libraries included, by variant and size.
PROMISED = {
    ("ternary", "512x512"): (3.2 * GB, 2.5 * GB),
    ("binary", "512x512"): (2.8 * GB, 2.1 * GB),
    ("ternary", "1024x1024"): (4.2 * GB, None),
    ("binary", "1024x1024"): (3.8 * GB, None),
}
RUNS = [
    ("mlx", "ternary", "512x512", 1),
    ("mlx", "binary", "512x512", 1),
    ("mlx", "binary", "1024x1024", 1),  # runs of one pack in a row: the next pack takes its place on the disk
    ("mlx", "binary", "512x512", 4),
    ("mlx", "ternary", "1024x1024", 1),
    ("mlx", "ternary", "512x512", 4),
    ("gemlite", "ternary", "512x512", 4),
    ("gemlite", "binary", "512x512", 4),
]
IN_TEST_ALL = RUNS[:2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's memory"),
    pytest.mark.skipif(detect().kind != "cpu", reason="the promises are those of a CPU"),
]


@dataclass
class Measured:
    """One run of `generate`: its JSON, and (seconds, resident bytes) of the engine's process every 50 ms."""

    facts: dict = field(default_factory=dict)
    samples: list[tuple[float, int]] = field(default_factory=list)
    highest: int = 0  # VmHWM of the engine's process
    parent: int = 0  # VmHWM of the command's own process

    def mean_while_denoising(self) -> float:
        """Averaged over the steps, which end `decode` seconds before the engine's process is told to go."""
        seconds = self.facts["seconds"]
        stop = self.samples[-1][0] - seconds["decode"]
        inside = [resident for at, resident in self.samples if stop - seconds["denoise"] <= at <= stop]
        return sum(inside) / len(inside)


def generate(model: Path, size: str, steps: int, folder: Path) -> Measured:
    """`python app.py generate` in a fresh process, watched until it ends."""
    out = folder / "picture.png"
    options = {"--model": model, "--size": size, "--steps": steps, "--out": out, "--data": folder / "data"}
    command = [sys.executable, "app.py", "generate", "a bonsai tree", "--backend", "torch", "--json"]
    command += [str(word) for option in options.items() for word in option]
    measured = Measured()
    with (folder / "stdout").open("w+") as stdout, (folder / "stderr").open("w+") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stdout, stderr=stderr)
        while process.poll() is None:
            measured.parent = max(measured.parent, resident_bytes(process.pid, "VmHWM"))
            engine = max(children(process.pid), key=resident_bytes, default=0)
            if resident := resident_bytes(engine):
                measured.samples.append((time.monotonic(), resident))
                measured.highest = max(measured.highest, resident_bytes(engine, "VmHWM"))
            time.sleep(0.05)
        for stream in (stdout, stderr):
            stream.seek(0)
        assert process.returncode == 0, stderr.read()
        measured.facts = json.loads(stdout.read().splitlines()[-1])
    assert out.stat().st_size > 1000
    return measured


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("full-size")
    if shutil.disk_usage(made).free < DISK or available_bytes() < MEMORY:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of disk and {MEMORY / 1e9:.0f} GB of memory")
    yield made
    shutil.rmtree(made)


def pack_of(folder: Path, layout: str, variant: str) -> Path:
    """Full-size random codes as our pack; the other packs leave the disk for it. gemlite's are imported."""
    target = folder / f"{layout}-{variant}"
    if not target.exists():
        for other in [*folder.iterdir()]:
            if other.is_dir():
                shutil.rmtree(other)
        written = folder / "written" if layout != "mlx" else target
        command = ["-m", "tests.packs.full", str(written), "--layout", layout, "--variant", variant]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        if layout != "mlx":
            command = ["app.py", "models", "import", str(written), "--data", str(folder / "data"), "--json"]
            done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True)
            shutil.move(json.loads(done.stdout.splitlines()[-1])["path"], target)
            shutil.rmtree(written)
    return target


@pytest.mark.parametrize(
    ("layout", "variant", "size", "steps"),
    [pytest.param(*run, marks=[] if run in IN_TEST_ALL else pytest.mark.full_size) for run in RUNS],
)
def test_within_the_promised_memory_and_as_predicted(
    folder: Path, layout: str, variant: str, size: str, steps: int
) -> None:
    model = pack_of(folder, layout, variant)
    measured = generate(model, size, steps, folder)
    width, height = map(int, size.split("x"))
    pack = open_pack(model)
    request = complete(Request("a bonsai tree", str(model), 0, width, height, steps), pack)
    rates = products.rates(folder / "data", detect())  # measured by the run, which may have chosen int8 for them
    decided = plan(detect(), pack, request, rates=rates)
    peak, mean = PROMISED[variant, size]
    print(f"{layout} {variant} {size} {steps}{' int8' * decided.int8}: peak {measured.highest / GB:.3f} of "
          f"{peak / GB}, predicted {decided.peak_bytes / GB:.3f}, mean while denoising "
          f"{measured.mean_while_denoising() / GB:.3f}, command {measured.parent / GB:.3f}, "
          f"{measured.facts['seconds']}")  # fmt: skip
    assert measured.highest <= peak
    assert measured.facts["peak_memory_bytes"] == pytest.approx(measured.highest, rel=0.01)
    assert abs(decided.peak_bytes / measured.highest - 1) <= 0.15
    if mean:
        assert measured.mean_while_denoising() <= mean
