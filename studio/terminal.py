"""The commands about models, as they speak on a terminal: each prints for a person and returns the JSON for a script.

Knows no gradio; what happens is engine's business. Progress goes to standard error, and only as often as it helps.
"""

import argparse
import json
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from studio.settings import data_dir

if TYPE_CHECKING:
    from engine.download import Terms
    from engine.install import Installed
    from engine.transfer import Progress

Facts = dict[str, Any]


def list_models(args: argparse.Namespace) -> Facts:
    """The known models, what each is, and whether it is installed."""
    from engine import catalog

    data = data_dir(args.data)
    there, default = catalog.installed(data), catalog.default_id(data)
    models = [
        asdict(model)
        | {"installed": id in there, "path": str(catalog.folder_of(id, data)), "default": id == default,
           "pin": model.pin}
        for id, model in catalog.MODELS.items()
    ]  # fmt: skip
    for model in models:
        size = f"{model['bytes'] / 1e9:.1f} GB" if model["bytes"] else ""
        way = f"models get {model['id']}" if model["repository"] else f"belongs into {model['path']}"
        where = model["path"] if model["installed"] else f"not installed: {way}"
        pin = f"  ({model['pin']})" if model["pin"] else ""
        print(f"{'*' if model['default'] else ' '} {model['id']:<18}{model['label']:<40}{size:>8}  {where}{pin}")
    imported = {name: str(data / "models" / name) for name in catalog.imported(data)}
    for name, path in imported.items():
        print(f"  {name:<18}{'imported':<40}{'':>8}  {path}")
    return {"models": models, "imported": imported}


def get_model(args: argparse.Namespace) -> Facts:
    """Fetch a published model: the only connection that Niwaki ever opens."""
    from engine import download

    installed = _last(download.get(args.model, data_dir(args.data)))
    return _installed(installed)


def import_model(args: argparse.Namespace) -> Facts:
    """Bring in a pack folder from elsewhere, a USB stick say."""
    from engine import install

    steps = install.import_folder(Path(args.folder), data_dir(args.data), args.id, args.link)
    return _installed(_last(steps))


def verify_model(args: argparse.Namespace) -> Facts:
    """Check a model's files against their recorded sizes and hashes."""
    from engine import install
    from engine.types import BadRequest

    files, damaged = [], []
    for path, ok, sentence in install.verify(args.model, data_dir(args.data)):
        files.append({"path": path, "ok": ok, "sentence": sentence})
        print(f"{'ok     ' if ok else 'damaged'}  {path}: {sentence}")
        if not ok:
            damaged.append(path)
    if damaged:
        raise BadRequest(f"{args.model} is damaged ({', '.join(damaged[:3])}): replace it with a fresh copy")
    return {"model": args.model, "ok": True, "files": files}


def remove_model(args: argparse.Namespace) -> Facts:
    """Delete an installed model, or what a begun download left."""
    from engine import install
    from engine.transfer import size

    freed = install.remove(args.model, data_dir(args.data))
    print(f"{args.model} is removed, {size(freed)} are free again")
    return {"model": args.model, "freed_bytes": freed}


def pack(args: argparse.Namespace) -> Facts:
    """Compress a dense transformer folder into 1- or 2-bit codes, and report what it cost."""
    from engine import compress
    from engine.compress import Compressed

    line, done = _Line(), None
    with closing(compress.compress(Path(args.source), Path(args.target), args.bits)) as steps:
        for step in steps:
            if isinstance(step, Compressed):
                done = step
            else:
                line.show(step)
    line.end()
    assert done is not None
    for layer in done.layers:
        print(f"{layer.relative_error:.4f}  {layer.name} {list(layer.shape)}")
    print(f"{done.relative_error:.4f}  relative error of all packed weights together")
    print(f"{'component':<24}{'bytes before':>16}{'after':>16}")
    for name, (before, after) in done.sizes.items():
        print(f"{name:<24}{before:>16,}{after:>16,}")
    print(f"{done.variant}, {done.bits} bits in groups of {compress.GROUP}: {done.folder}")
    return {
        "source": args.source,
        "path": str(done.folder),
        "bits": done.bits,
        "bytes": {name: {"before": before, "after": after} for name, (before, after) in done.sizes.items()},
        "relative_error": done.relative_error,
        "layers": [asdict(layer) for layer in done.layers],
    }


def convert(folder: Path, data: Path) -> Path:
    """Convert a model folder in a foreign layout, once, and say so on standard error; returns the pack's folder."""
    from engine import importers
    from engine.transfer import Progress

    target, layout = importers.converted(folder, data), importers.recognise(folder)
    if not target.is_dir():
        print(f"{folder} is in the {layout} layout: converting it once, into {target}", file=sys.stderr, flush=True)
    line = _Line()
    with closing(importers.convert(folder, data)) as steps:
        for step in steps:
            if isinstance(step, Progress):
                line.show(step)
            else:
                line.end()
                print(*step.remarks, sep="\n", end="\n" if step.remarks else "", file=sys.stderr)
    return target


def accept(args: argparse.Namespace) -> Facts:
    """On a machine with the real weights: turn "not checked" into facts, as a file and a page to share."""
    from engine import accept as acceptance
    from engine import catalog
    from engine.packs import open_pack
    from engine.types import EngineError
    from studio import accept_page

    data = data_dir(args.data)
    model = args.model or catalog.default_id(data)
    pack = open_pack(catalog.find(model, data))
    verdict = None
    for answer in acceptance.run(model, data, args.backend):
        if isinstance(answer, acceptance.Acceptance):
            verdict = answer
        else:
            word = {True: "passed", False: "FAILED", None: "-"}[answer.passed]
            print(f"{word:<8}{answer.name:<11}{answer.sentence}", flush=True)
    assert verdict is not None
    folder = acceptance.place(pack, data)
    file, page = acceptance.write(verdict, folder), accept_page.write(verdict, folder)
    print(f"written: {file}\nto share: {page}")
    facts = verdict.facts() | {"path": str(file), "page": str(page)}
    if not verdict.passed:
        if args.json:
            print(json.dumps(facts))
        failed = ", ".join(row.name for row in verdict.rows if row.passed is False)
        raise EngineError(f"{model} is not accepted on this machine ({failed}): see {page}")
    return facts


def _installed(installed: "Installed") -> Facts:
    from engine.transfer import size

    print(f"{installed.model}  {size(installed.bytes)} in {installed.folder}")
    if installed.note:
        print(installed.note)
    return {"model": installed.model, "path": str(installed.folder), "bytes": installed.bytes, "note": installed.note}


def _last(steps: "Generator[Terms | Progress | Installed, None, None]") -> "Installed":
    """Show what comes by, until the model is there. Leaving early (Ctrl-C) closes the work, which keeps what it has."""
    from engine.download import Terms
    from engine.transfer import Progress

    line = _Line()
    with closing(steps):
        for step in steps:
            if isinstance(step, Terms):
                line.end()
                _print_terms(step)
            elif isinstance(step, Progress):
                line.show(step)
            else:
                line.end()
                return step
    raise AssertionError("a download ends with a model or an error")


def _print_terms(terms: "Terms") -> None:
    from engine.transfer import size

    pin = "" if terms.pinned else ", a branch's commit, not pinned by us: recorded now and held to from here on"
    print(f"{terms.model}: {size(terms.bytes)} in {terms.files} files of {terms.repository} at {terms.revision}{pin}")
    own = [line.strip() for line in terms.licence_text.splitlines() if line.strip()]
    text = f" ({', '.join(own[:2])}; the full text comes with the files)" if own else ""
    print(f"Licence: {terms.licence}{text}", *terms.notice.splitlines(), sep="\n", flush=True)


class _Line:
    """Progress: one line that is rewritten on a terminal, a line for every tenth elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._tenth = 0

    def show(self, step: "Progress") -> None:
        tenth = 10 * step.done // max(1, step.total)
        if self._live:
            print(f"\r\033[K{describe(step)}", end="", file=sys.stderr, flush=True)
        elif tenth > self._tenth or step.waiting:
            print(describe(step), file=sys.stderr, flush=True)
        self._tenth = max(tenth, self._tenth)

    def end(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def describe(step: "Progress") -> str:
    """1.20 of 3.89 GB, 11.3 MB/s, 4 min left: transformer/x.safetensors"""
    from engine.transfer import size

    parts = [f"{size(step.done)} of {size(step.total)}"]
    if step.waiting:
        parts.append(f"the connection broke, trying again in {step.waiting:.0f} s")
    else:
        parts += [f"{size(step.rate)}/s"] if step.rate else []
        parts += [f"{_duration(step.seconds_left)} left"] if step.seconds_left is not None else []
    return f"{', '.join(parts)}: {step.path}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
