"""What the bench for NVIDIA cards counts and whom it stops. Its parts are tried by `--small --device cpu`."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda_bench import resume, stop
from tests.floor import products
from tests.packs.content import TRANSFORMER_4B


@pytest.mark.parametrize(("image", "tflop"), [(1024, 37.69), (4096, 113.07)])
def test_products_of_four_steps_of_the_4b_model(image: int, tflop: float) -> None:
    counted = products(TRANSFORMER_4B, (image, 512))
    assert round(4 * 2e-12 * sum(m * k * n * count for (m, k, n), count in counted.items()), 2) == tflop
    # with as many image as text tokens, one weight of a double block meets 512 tokens, one of a single block 1,024
    even = products(TRANSFORMER_4B, (512, 512))
    double, single = 5 * 2 * (4 * 3072**2 + 3 * 3072 * 9216), 20 * (27648 + 12288) * 3072
    assert double + single == 3_680_501_760
    assert sum(m * k * n * count for (m, k, n), count in even.items()) == 512 * double + 1024 * single


@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_who_is_stopped_and_goes_on() -> None:
    def state(process: subprocess.Popen) -> str:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]

    command = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
    theirs, other, ours = (
        subprocess.Popen([*command, word], stdout=subprocess.PIPE)
        for word in ("niwaki-train", "niwaki-other", "niwaki-train for tests.cuda")
    )
    try:
        for process in (theirs, other, ours):
            assert process.stdout is not None and process.stdout.readline()
        stopped = stop("niwaki-train")
        try:
            assert stopped == [theirs.pid]
            while state(theirs) != "T":
                pass
            assert "T" not in (state(other), state(ours))
        finally:
            resume(stopped)
        while state(theirs) == "T":
            pass
    finally:
        for process in (theirs, other, ours):
            process.kill()
            process.communicate()
