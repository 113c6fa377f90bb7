"""Whole 4B pictures on an NVIDIA card, ours and other engines', in one run: seconds, memory, and the floor.

    python -m tests.cuda [--out FOLDER] [--parts floor,int8,dense,cold,float8,plain,gemlite] [--pause PATTERN]
    python -m tests.cuda --small --device cpu          # tries the bench itself, in some minutes

The parts: `floor`, the same products and attention by torch alone; `int8` and `plain`, the engine with and without
integer products; `dense`, diffusers' pipeline with dense bfloat16 weights, eager and with compiled blocks and decoder;
`cold`, `python app.py generate` from the start of its process; `float8`, the dense pipeline with e4m3 products by row;
`gemlite`, our transformer with its packed layers as gemlite multiplies them (the package must be there). Weights are
random, shapes the 4B model's, and all weights lie in the page cache.

Every part is a process of its own. All prepare side by side, while the pack is written; then they measure one after the
other, and who has not finished preparing is stopped meanwhile. Rows go to FOLDER/cuda.jsonl as they come, at last what
all parts printed to FOLDER/cuda.log. Where a part fails or takes too long the others go on. `--pause` stops somebody
else's processes while something is timed.
"""

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cuda_bench import resume, stop
from tests.cuda_parts import PARTS, arguments

ROOT = Path(__file__).parent.parent
SECONDS = {"floor": 25, "int8": 60, "plain": 50, "cold": 120, "dense": 50, "float8": 30, "gemlite": 60}  # to measure
PREPARE = 110  # seconds; who takes longer measures last
REMARKS = (
    "written_s", "compile_s", "kernels_after_s", "tuned_s", "psnr", "ready_after_s", "imported_s", "failed",
)  # fmt: skip
Row = dict[str, Any]


class Child:
    """A part in a process group of its own, its rows read line by line."""

    def __init__(self, part: str, args: argparse.Namespace, rows: "Rows") -> None:
        self.part, self._rows, self._rest = part, rows, b""
        self.ready = self.over = False
        flags = ["--device", args.device, "--compiler", args.compiler, "--pictures", str(args.pictures)]
        flags += ["--work", str(args.work), "--pack", str(args.pack), *(["--small"] if args.small else [])]
        flags += ["--pause", args.pause] if args.pause else []
        caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        environment = os.environ | {key: str(args.work / f"{name}-{part}") for key, name in caches.items()}
        self.log = args.work / f"{part}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.cuda_parts", part, *flags], cwd=ROOT, env=environment, bufsize=0,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip

    def fileno(self) -> int:
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def read(self) -> None:
        """What has come; called when something has."""
        data = os.read(self.fileno(), 1 << 16)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            row = json.loads(line)
            self.ready |= "ready_after_s" in row
            self._rows.add(row)
        if not data:
            self.over = True
            if status := self._process.wait():
                self.fail(f"ended with {status}")

    def fail(self, why: str) -> None:
        text = self.log.read_text(errors="replace")
        self._rows.add({"part": self.part, "failed": why, "log": text[-1500:]})

    def go(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(b"go\n")

    def signal(self, number: int) -> None:
        with suppress(OSError):
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.over = True


class Rows:
    def __init__(self, file: Path) -> None:
        self.all: list[Row] = []
        self._file = file
        self._start = time.monotonic()
        file.write_text("")

    def add(self, row: Row) -> None:
        row["at_s"] = round(time.monotonic() - self._start, 1)
        self.all.append(row)
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        said = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        text = said.pop("log", "")
        said.pop("reason", None)
        print(json.dumps(said), *([text] if text else []), file=sys.stderr, flush=True)


def listen(children: list[Child], seconds: float, done: Any) -> bool:
    """Read until `done` or the time is over; whether it is done."""
    end = time.monotonic() + seconds
    while not done():
        alive = [child for child in children if not child.over]
        left = end - time.monotonic()
        if left <= 0 or not alive:
            return bool(done())
        for child in select.select(alive, [], [], min(left, 1))[0]:
            child.read()
    return True


def write_pack(args: argparse.Namespace, rows: Rows) -> None:
    start = time.monotonic()
    command = [sys.executable, "-m", "tests.packs.full", str(args.pack), *(["--small"] if args.small else [])]
    subprocess.run(command, cwd=ROOT, check=True, timeout=150, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if args.small:
        notes = {"hidden_states": [1, 2, 3], "text_length": 512}
        (args.pack / "niwaki.json").write_text(json.dumps(notes))
    rows.add({"part": "pack", "written_s": round(time.monotonic() - start, 1)})


def run(args: argparse.Namespace, rows: Rows) -> None:
    deadline = time.monotonic() + args.limit

    def left(seconds: float) -> float:
        return max(0.0, min(seconds, deadline - time.monotonic()))

    children = [Child(part, args, rows) for part in args.parts.split(",")]
    try:
        if not (args.pack / "model_index.json").exists():
            write_pack(args, rows)
        listen(children, left(args.patience * PREPARE), lambda: all(child.ready or child.over for child in children))
        waiting = sorted(children, key=lambda child: not child.ready)  # stable: as they were named
        for child in waiting:
            if not child.ready and not child.over:
                listen(children, left(args.patience * 60), lambda child=child: child.ready or child.over)
            measure(child, children, left(args.patience * SECONDS[child.part]))
    finally:
        for child in children:
            child.end()
        logs = (f"== {child.part}\n{child.log.read_text(errors='replace')[-20_000:]}\n" for child in children)
        (args.out / "cuda.log").write_text("".join(logs))
        if args.pause:
            resume(stop(args.pause))  # whom a killed part has left stopped goes on


def measure(child: Child, children: list[Child], seconds: float) -> None:
    if child.over:
        return
    if not child.ready or seconds <= 0:
        child.end()
        child.fail("not ready in time")
        return
    preparing = [other for other in children if not other.ready and not other.over]
    for other in preparing:
        other.signal(signal.SIGSTOP)
    child.go()
    if not listen([child], seconds, lambda: child.over):
        child.end()
        child.fail(f"took more than {seconds:.0f} s")
    for other in preparing:
        other.signal(signal.SIGCONT)


# The table


def table(rows: list[Row]) -> None:
    for row in rows:
        if "card" in row:
            print(row["card"])
        if "rates" in row:
            print(f"TFLOP/s {row['rates']}, copying {row['copy_gb_s']} GB/s (read and written)")
        if "products_tflop" in row:
            attention = f"attention {row['attention_tflop']} at {row['attention_tflop_s']} a second"
            print(f"{row['size']}: TFLOP products {row['products_tflop']}, {attention}, VAE {row['vae_tflop']}, "
                  f"encoder {row['encoder_tflop']}")  # fmt: skip
    print(f"{'':28}{'picture':>9}{'encode':>9}{'step':>9}{'decode':>9}{'peak GB':>9}{'first':>9}{'spread':>16}")
    sizes = sorted({tuple(row["size"]) for row in rows if "size" in row})
    for size in sizes:
        print("x".join(map(str, size)))
        for row in rows:
            if tuple(row.get("size", ())) == size and ("picture_s" in row or "step_s" in row):
                print(line(row))
    for row in rows:
        if "product" in row:
            times = ", ".join(f"{key} {value}" for key, value in row.items() if key.endswith("_ms"))
            print(f"product {row['product']}: {times}, gemlite's off by {row['off']}")
    for row in rows:
        if any(key in row for key in REMARKS):
            print({key: value for key, value in row.items() if key not in ("log", "reason")})


def line(row: Row) -> str:
    def cell(name: str, scale: float = 1.0, digits: int = 4) -> str:
        return f"{row[name] * scale:9.{digits}f}" if name in row else " " * 9

    name = f"{row['part']} {row.get('way', row.get('floor', ''))}"
    if row["part"] == "cold":
        return f"  {name:26} ready {row['ready_s']}, first step {row['step_s']}, picture {row['picture_s']}"
    cells = cell("picture_s") + cell("encode_s") + cell("step_s") + cell("decode_s") + cell("peak_bytes", 1e-9, 2)
    spread = f"{row['least_s']:8.4f}{row['most_s']:8.4f}" if "least_s" in row else ""
    return f"  {name:26}{cells}{cell('first_s', digits=2)}{spread}  {row.get('dtype', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description="4B pictures on an NVIDIA card against the floor and other engines.")
    parser.add_argument("--out", type=Path, default=None, help="where cuda.jsonl and cuda.log go (a temporary folder)")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit", type=float, default=300, help="seconds for everything")
    parser.add_argument("--patience", type=float, default=1, help="times the seconds that a part may take")
    arguments(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.work = args.work or Path(folder)
        args.out = args.out or args.work / "out"
        args.pack = args.pack or args.work / "pack"
        for each in (args.work, args.out):
            each.mkdir(parents=True, exist_ok=True)
        rows = Rows(args.out / "cuda.jsonl")
        try:
            run(args, rows)
        except BaseException:
            traceback.print_exc()
        table(rows.all)


if __name__ == "__main__":
    main()
