"""The front door: reads the command line, wires settings, engine and studio, prints. `python app.py` opens the page.

A Hugging Face Space starts this file too. It knows no model and draws no page. Everything heavier than the standard
library is imported by the command that needs it, so `--help` is instant and a missing package ends in a sentence.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from engine.packs import Pack
    from engine.types import Picture, Request
    from engine.worker import Worker

MAX_COUNT = 1000
EPILOG = "Exit status: 0 done, 2 the input can't work (one sentence says why), 1 a failure of ours."

# What a command hands back: the object that --json prints as the last line.
Facts = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a prompt may not fit the console
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except ModuleNotFoundError as error:
        way_out = "run make setup, or pip install -r requirements.txt"
        return _complain(f"the Python package {error.name} is missing: {way_out}", 1)
    except KeyboardInterrupt:
        return _complain("stopped", 130)
    except BrokenPipeError:  # `| head` has seen enough; pointing stdout elsewhere keeps Python's last flush quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    from engine.types import BadRequest, EngineError

    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["serve", *argv]
    try:
        args = _parser().parse_args(argv)
        facts = args.command(args)
    except BadRequest as error:
        return _complain(str(error), 2)
    except EngineError as error:
        return _complain(str(error), 1)
    if args.json:
        print(json.dumps(facts))
    sys.stdout.flush()
    return 0


def _complain(sentence: str, status: int) -> int:
    print(f"app.py: {sentence}", file=sys.stderr)
    return status


def serve(args: argparse.Namespace) -> Facts:
    """Open the page and stay until Ctrl-C."""
    from studio.serve import serve
    from studio.settings import Settings, data_dir

    browser = not args.no_browser and "SPACE_ID" not in os.environ
    data = data_dir(args.data)
    model = _model(args.model, data) if args.model else None
    settings = Settings(data, args.host, args.port, model, args.backend, browser)
    serve(settings, say=lambda text: print(text, flush=True))
    return {"data": str(settings.data_dir), "log": str(settings.log_file)}


def generate(args: argparse.Namespace) -> Facts:
    """Make one picture, or --count of them with consecutive seeds."""
    from engine import catalog, plan
    from engine.packs import open_pack
    from engine.types import BadRequest, Request
    from engine.worker import Worker
    from studio.settings import data_dir

    if not 1 <= args.count <= MAX_COUNT:
        raise BadRequest(f"--count {args.count} is out of range: give 1 to {MAX_COUNT}")
    data = data_dir(args.data)
    model = _model(args.model, data)
    pack = open_pack(catalog.find(model, data))
    width, height = _size(args.size) or (None, None)
    first = Request(args.prompt, model, args.seed, width, height, args.steps)
    requests = [plan.complete(replace(first, seed=args.seed + i), pack) for i in range(args.count)]
    out = Path(args.out or (f"niwaki-{args.seed}.png" if args.count == 1 else f"niwaki-{args.seed}"))
    paths = _targets(out, requests)
    who = _who(model, pack)
    pictures: list[Picture] = []
    with closing(Worker(args.backend, data_dir=data)) as worker:
        for request, path in zip(requests, paths, strict=True):
            picture = _make(worker, request, path)
            if picture.unknown_words and not pictures:
                print(f"the {who} does not know: {', '.join(picture.unknown_words)}", file=sys.stderr)
            pictures.append(picture)
            print(f"{path}  ({who}, seed {request.seed}, {picture.seconds.total:.2f} s)", flush=True)
    print(pictures[0].reason)
    return _generated(pictures, paths, out)


def _generated(pictures: list[Picture], paths: list[Path], out: Path) -> Facts:
    """The JSON of one picture; of several, with the folder as path, seconds summed, and every path and seed."""
    request = pictures[0].request
    seconds = [asdict(picture.seconds) for picture in pictures]
    facts: Facts = {
        "path": str(paths[0] if len(paths) == 1 else out),
        "model": request.model,
        "backend": pictures[0].backend,
        "prompt": request.prompt,
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "steps": request.steps,
        "seconds": {name: round(sum(each[name] for each in seconds), 4) for name in seconds[0]},
        "peak_memory_bytes": max(picture.peak_memory_bytes for picture in pictures),
    }
    if len(pictures) > 1:
        made = zip(paths, pictures, strict=True)
        facts["images"] = [{"path": str(path), "seed": picture.request.seed} for path, picture in made]
    return facts


def _make(worker: Worker, request: Request, path: Path) -> Picture:
    """Run one request, show its steps on a terminal, and save the picture."""
    from engine.types import Picture, Step
    from studio import pictures

    live = sys.stderr.isatty()
    for answer in worker.run(request):
        if isinstance(answer, Step) and live:
            print(f"\rstep {answer.index} of {answer.total} ", end="", file=sys.stderr, flush=True)
        elif isinstance(answer, Picture):
            if live:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
            pictures.save(answer, path)
            return answer
    raise AssertionError("a run ends with a picture or an error")


def _targets(out: Path, requests: Sequence[Request]) -> list[Path]:
    """The file of every picture, proven writable now: nobody should wait a minute for a picture that can't be saved."""
    from engine.types import BadRequest

    if len(requests) > 1 or out.is_dir():
        folder, paths = out, [out / f"{request.seed}.png" for request in requests]
    else:
        folder, paths = out.parent, [out]
        if out.suffix.lower() != ".png":
            raise BadRequest(f"cannot write {out}: pictures are PNG files, give a name that ends in .png or a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise BadRequest(f"cannot write {out} ({reason}): choose another place with --out") from None
    if blocked := next((path for path in paths if path.is_dir()), None):
        raise BadRequest(f"cannot write {blocked}: it is a folder, choose another place with --out")
    return paths


def doctor(args: argparse.Namespace) -> Facts:
    """What hardware, which backend, which model, how much memory, and why."""
    import platform

    from engine import catalog, measured, products
    from engine.hardware import detect
    from engine.packs import open_pack
    from engine.plan import plan
    from engine.types import Request
    from studio.settings import data_dir

    def row(name: str, value: object) -> None:
        print(f"{name:<10}{value}")

    hardware, data = detect(), data_dir(args.data)
    model = _model(args.model, data)
    packages = [_version(package) for package in ("torch", "mlx", "gradio")]
    row("hardware", hardware.reason)
    row("python", f"{platform.python_version()} on {platform.platform()}; {', '.join(packages)}")
    row("data", data)
    row("installed", ", ".join(catalog.installed(data)) or "no model")
    pack = open_pack(catalog.find(model, data))
    decided = plan(hardware, pack, Request("", model), args.backend, rates=products.rates(data, hardware))
    row("model", f"{_who(model, pack)}: {pack.notes.label}, {pack.variant}, {pack.folder}")
    row("backend", f"{decided.backend} on {decided.device} in {decided.dtype}")
    row("why", decided.why)
    for finding in measured.recall(data).values():
        row("measured", finding["sentence"])
    tried = {part: products.trial(data, pack, part) for part in products.PARTS}
    for name, error in (item for errors in tried.values() for item in errors.items()):
        if error > products.BOUND:
            row("not int8", f"{name}, which would be off by {error:.1%}")
    return {
        "hardware": {"kind": hardware.kind, "name": hardware.name, "memory_bytes": hardware.memory_bytes},
        "backend": decided.backend,
        "model": model,
        "reason": decided.why,
        "int8_errors": {part: dict(errors) for part, errors in tried.items()},
    }


def bench(args: argparse.Namespace) -> Facts:
    """Time and memory of pictures, and the bytes of the weights."""
    from engine import bench, catalog, memory, products
    from engine.hardware import detect
    from engine.packs import open_pack
    from engine.plan import plan
    from engine.types import Request
    from studio.settings import data_dir

    data = data_dir(args.data)
    model = _model(args.model, data)
    facts = bench.run(model, _size(args.size), args.steps, args.runs, args.backend, data)
    pack = open_pack(catalog.find(model, data))
    hardware = detect()
    decided = plan(hardware, pack, Request("", model), args.backend, rates=products.rates(data, hardware))
    image, weights = facts["seconds_per_image"], facts["weights_bytes"]
    print(f"{_who(model, pack)}, {facts['size']}, {facts['steps']} steps, on {facts['device']}")
    print(f"a picture     {image['median']:.3f} s (min {image['min']:.3f}, max {image['max']:.3f}, of {facts['runs']})")
    print(f"parts         step {facts['seconds_per_step']:.3f} s, encode {facts['encode_s']:.3f} s, "
          f"decode {facts['decode_s']:.3f} s, cold start {facts['load_s']:.1f} s")  # fmt: skip
    mean = f", mean {facts['mean_active_memory_bytes'] / 1e6:.0f} MB" if facts["mean_active_memory_bytes"] else ""
    predicted = facts["predicted_peak_memory_bytes"]
    foretold = f" (predicted {predicted / 1e6:.0f} MB)" if predicted else ""
    print(f"memory        peak {facts['peak_memory_bytes'] / 1e6:.0f} MB{foretold}{mean}")
    print(f"weights       transformer {weights['transformer'] / 1e6:.2f} MB on disk and "
          f"{memory.component_bytes(pack.transformer, decided.dtype) / 1e6:.2f} MB in memory ({decided.dtype}), "
          f"text encoder {weights['text_encoder'] / 1e6:.2f} MB, VAE {weights['vae'] / 1e6:.2f} MB")  # fmt: skip
    if args.reference:
        other = bench.run(_model(args.reference, data), _size(args.size), args.steps, args.runs, args.backend, data)
        facts |= {"reference": other, "times_less": bench.against(facts, other)}
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in facts["times_less"].items())
        print(f"{args.reference} takes so many times more: {ratios}")
    return facts


def evaluate(args: argparse.Namespace) -> Facts:
    """Score a model on held-out prompts, or write pictures in the folder layout of a public benchmark."""
    from engine import evaluate as evaluation
    from engine.types import BadRequest
    from studio.settings import data_dir

    data = data_dir(args.data)
    if args.retention:
        from engine import retention

        kept = retention.table(data)
        retention.write(Path(args.retention), kept)
        print(retention.markdown(kept))
        return {"plot": args.retention, "models": kept}
    model = _model(args.model, data)
    if args.export:
        kind, folder = args.export
        if kind not in ("geneval", "dpg", "hps"):
            raise BadRequest(f"unknown layout {kind!r} for --export: give geneval, dpg or hps")
        if not args.prompts:
            raise BadRequest(f"--export {kind} needs --prompts FILE: the benchmark's own prompt file")
        return dict(evaluation.export(kind, Path(folder), Path(args.prompts), model, data, args.backend))
    if args.prompts:
        raise BadRequest("--prompts belongs to --export: without it the held-out prompts of the project are used")
    say = partial(print, file=sys.stderr, flush=True)  # it takes minutes: each task's score as it comes
    facts = dict(evaluation.run(model, args.limit, data, args.backend, args.lang, say))
    for scores in (facts["tasks"], facts["languages"], facts["kinds"]):
        for name, score in scores.items():
            print(f"{name:<15}{score:.3f}")
    print(f"{'overall':<15}{facts['overall']:.3f}  ({facts['n']} prompts, {model})")
    return facts


def _model(given: str | None, data: Path) -> str:
    """The model to use. A folder in a foreign layout is converted first, into the data folder, and said so."""
    from engine import catalog, importers
    from engine.types import BadRequest
    from studio import terminal

    if given is None or given in catalog.MODELS:
        return given or catalog.default_id(data)
    try:
        folder = catalog.find(given, data)
    except BadRequest:  # whoever opens it says so, in its own time
        return given
    return str(terminal.convert(folder, data)) if importers.is_foreign(folder) else given


def _who(model: str, pack: Pack) -> str:
    """The model's id, with the word that keeps a demo model from being taken for the real one."""
    return f"demo model {model}" if pack.notes.demo else model


def _size(text: str | None) -> tuple[int, int] | None:
    from engine.types import BadRequest

    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (width.isascii() and width.isdigit() and height.isascii() and height.isdigit() and len(text) < 20):
        raise BadRequest(f"size {text!r} is impossible: give WIDTHxHEIGHT in pixels, like 512x512")
    return int(width), int(height)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} missing"


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one sentence of ours instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        from engine.types import BadRequest

        raise BadRequest(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    from studio import terminal

    parser = _Parser(prog="app.py", description="Niwaki: pictures from low-bit models, on this machine.", epilog=EPILOG)
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)

    command = _command(commands, "serve", serve, engine=True)
    everywhere = "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1"  # a Space is reached through its host's proxy
    command.add_argument("--host", default=everywhere, help="address to listen on (%(default)s)")
    command.add_argument("--port", type=int, default=7860, help="first port to try (%(default)s)")
    command.add_argument("--no-browser", action="store_true", help="do not open the page in a browser")

    command = _command(commands, "generate", generate, engine=True)
    command.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same picture (%(default)s)")
    command.add_argument("--count", type=int, default=1, metavar="N", help="pictures, with consecutive seeds")
    command.add_argument("--out", metavar="FILE", help="the PNG file, or a folder; with --count always a folder")
    _picture_options(command)

    models = commands.add_parser("models", help="known and installed models: list, get, import, verify", epilog=EPILOG)
    actions = models.add_subparsers(dest="action", metavar="ACTION", required=True)
    _command(actions, "list", terminal.list_models)
    command = _command(actions, "get", terminal.get_model)
    command.add_argument("model", metavar="ID", help="a published model of `models list`")
    command = _command(actions, "import", terminal.import_model)
    command.add_argument("folder", metavar="FOLDER", help="a downloaded pack, in any released layout")
    command.add_argument("--id", metavar="ID", help="the name to keep it under (its own)")
    command.add_argument("--link", action="store_true", help="link to the files instead of copying them")
    command = _command(actions, "verify", terminal.verify_model)
    command.add_argument("model", metavar="ID", help="a model's id, or the path of a pack folder")
    command = _command(actions, "remove", terminal.remove_model)
    command.add_argument("model", metavar="ID", help="an installed model's id")

    _command(commands, "accept", terminal.accept, engine=True)

    command = _command(commands, "pack", terminal.pack)
    command.add_argument("source", metavar="SRC", help="a dense transformer folder, or a model folder with one in it")
    command.add_argument("target", metavar="DST", help="the folder to make")
    command.add_argument("--bits", type=int, required=True, metavar="1|2", help="1: binary, 2: ternary")

    _command(commands, "doctor", doctor, engine=True)

    command = _command(commands, "bench", bench, engine=True)
    command.add_argument("--runs", type=int, default=5, metavar="N", help="warm pictures to time (%(default)s)")
    command.add_argument("--reference", metavar="ID", help="a model to compare with, the dense one of the family say")
    _picture_options(command)

    command = _command(commands, "evaluate", evaluate, engine=True)
    command.add_argument("--limit", type=int, metavar="N", help="at most N prompts")
    languages = ("all", "en", "hi", "mr", "ta")
    command.add_argument("--lang", choices=languages, default="all", help="only prompts of one language")
    command.add_argument("--export", nargs=2, metavar=("LAYOUT", "DIR"), help="write pictures for geneval, dpg or hps")
    command.add_argument("--prompts", metavar="FILE", help="with --export: the benchmark's prompt file")
    command.add_argument("--retention", metavar="FILE.svg", help="compare the kept answers of the demo models instead")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], Facts], *, engine: bool = False) -> _Parser:
    text = (run.__doc__ or "").rstrip(".")
    command: _Parser = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
    command.set_defaults(command=run)
    command.add_argument("--json", action="store_true", help="print a machine-readable last line")
    command.add_argument("--data", metavar="DIR", help="data folder (NIWAKI_DATA, else the platform's own place)")
    if engine:
        command.add_argument("--model", metavar="ID", help="a model's id, or the path of a pack folder")
        command.add_argument("--backend", default="auto", metavar="NAME", help="auto, torch, mlx or fake (%(default)s)")
    return command


def _picture_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--size", metavar="WxH", help="pixels, like 512x512 (the model's own first size)")
    command.add_argument("--steps", type=int, metavar="N", help="Euler steps (the model's own number)")


if __name__ == "__main__":
    sys.exit(main())
