"""Cold start: from the start of `python app.py generate` to its first denoising step.

    python -m tests.cold PACK [--size 512x512] [--data FOLDER]

The better of two runs each: with the pack's files out of the page cache (and the system asked whether they are), and
with them in it; Python's own files are in it in both. `imported_s`: a fresh Python has imported what the engine's
process imports. `ready_s`: the prompt is encoded, the transformer is open, the first step begins. `step_s`: it is made;
then the command is stopped. A pack's first picture also tries its layers; `--data` names a data folder where that has
happened.
"""

import argparse
import ctypes
import json
import mmap
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTS = """
import gc; gc.disable()
import app, engine.torch_backend.backend
print("imported", flush=True)
"""
Seconds = dict[str, float]


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache. Raises RuntimeError where the system keeps them."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached(path) > 0.05:
            raise RuntimeError(f"{path} stays in memory: is it in use?")


def warm(folder: Path) -> None:
    for path in files(folder):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.safetensors") if path.is_file())


def cached(path: Path) -> float:
    """The share of a file's pages that are in memory, as the system says: reading a byte would fetch its neighbours."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        where = ctypes.c_char.from_buffer(pages)
        resident = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        failed = ctypes.CDLL(None).mincore(ctypes.byref(where), ctypes.c_size_t(len(pages)), resident)
        del where
    assert not failed
    return sum(each & 1 for each in resident) / len(resident)


def imported() -> float:
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", IMPORTS], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"imported\n"
        return time.perf_counter() - start  # Python's own end takes another half a second


def started(pack: Path, size: str, data: Path, whole: bool = False) -> Seconds:
    """The seconds after which the command says `step 0` and `step 1` on a terminal; with `whole` also those after which
    it has ended, its picture saved."""
    command = [sys.executable, "app.py", "generate", "a bonsai tree in a quiet ceramic studio", "--model", str(pack)]
    command += ["--size", size, "--data", str(data), "--out", str(data / "cold.png")]
    terminal, end = pty.openpty()
    start, text, seconds = time.perf_counter(), b"", {}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=end)
    os.close(end)
    try:
        while "step_s" not in seconds or whole:
            try:
                text += os.read(terminal, 4096)
            except OSError:  # the command has ended
                if not whole or process.wait():
                    raise RuntimeError(text.decode(errors="replace")) from None
                return seconds | {"picture_s": round(time.perf_counter() - start, 2)}
            for name, sign in (("ready_s", b"step 0 of"), ("step_s", b"step 1 of")):
                if sign in text and name not in seconds:
                    seconds[name] = round(time.perf_counter() - start, 2)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        os.close(terminal)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="From the start of the command to the first denoising step.")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    facts: dict[str, object] = {"size": args.size, "cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as folder:
        data = args.data or Path(folder)
        facts["imported_s"] = round(min(imported() for _ in range(3)), 2)
        for name, prepare in {"cold": drop, "warm": warm}.items():
            runs = []
            for _ in range(2):
                prepare(args.pack)
                runs.append(started(args.pack, args.size, data))
            facts[name] = min(runs, key=lambda run: run["ready_s"])
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
