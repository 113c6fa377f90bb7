"""The pictures that were kept, as a plain zip: the PNGs, a CSV with every prompt and recipe, the models' licences.

Knows rows and files, not the page. The zip needs nothing of ours to be read: pictures open anywhere, and the CSV opens
in a spreadsheet.
"""

import csv
import io
import os
import re
import secrets
import zipfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from engine import catalog, chain
from engine.types import BadRequest, EngineError
from studio import library
from studio.history import History
from studio.rows import Image, as_json
from studio.settings import make_folder

FOLDER = "exports"
COLUMNS = (
    "file", "prompt", "revision", "model", "seed", "width", "height", "steps", "operation", "tags", "note", "rating",
    "seconds", "backend", "made_at", "sha256", "recipe",
)  # fmt: skip
_LICENCES = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*", re.IGNORECASE)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is run by spreadsheets


def kept(history: History, owner: str, project: int | None = None) -> tuple[Image, ...]:
    """Every kept picture of the project (None: of all), oldest first."""
    found: list[Image] = []
    before: int | None = None
    while True:
        page = library.page(history, owner, library.Filter(project=project, kept=True), before=before, limit=500)
        found += page.images
        before = page.next
        if before is None:
            return tuple(reversed(found))


def write(history: History, images: Sequence[Image], folder: Path) -> Path:
    """A new zip of these pictures under `folder`; returns its path, whose own folder has an unguessable name.

    Raises BadRequest when there is nothing to write, a picture's file is gone, or the disk is full.
    """
    if not images:
        raise BadRequest("no picture is kept yet: press Keep (K) on the ones to hand over")
    path = make_folder(folder / FOLDER / secrets.token_hex(16)) / f"niwaki-{len(images)}-kept.zip"
    aside = path.with_suffix(".part")
    try:
        with zipfile.ZipFile(aside, "x", zipfile.ZIP_STORED) as archive:  # PNGs are compressed already
            names = _names(history, images)
            for image in images:
                archive.write(image.path, names[image.id])
            archive.writestr("pictures.csv", _table(history, images, names))
            for name, text in _licences(images, history.data_dir):
                archive.writestr(name, text)
        os.replace(aside, path)
    except FileNotFoundError as error:
        raise BadRequest(f"the picture {error.filename} is gone: take it out of the kept ones, then export") from error
    except OSError as error:
        raise BadRequest(f"cannot write {path} ({error.strerror or error}): free some space") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def _names(history: History, images: Sequence[Image]) -> dict[int, str]:
    labels = _labels(history, images)
    return {
        image.id: f"{number:03d}-{labels.get(image.revision, 'r')}-{image.request.seed}.png"
        for number, image in enumerate(images, start=1)
    }


def _labels(history: History, images: Sequence[Image]) -> dict[int, str]:
    of = {(image.owner, image.project) for image in images}
    return {revision.id: revision.label for owner, project in of for revision in history.revisions(owner, project)}


def _table(history: History, images: Sequence[Image], names: dict[int, str]) -> bytes:
    """With a byte-order mark, or Excel reads Hindi and Tamil as noise."""
    labels = _labels(history, images)
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(COLUMNS)
    for image in images:
        request = image.request
        made = datetime.fromtimestamp(image.created_at, UTC).isoformat(timespec="seconds")
        row = [
            names[image.id], request.prompt, labels.get(image.revision, ""), request.model, request.seed,
            request.width, request.height, request.steps, image.op, ", ".join(image.tags), image.note, image.rating,
            round(image.seconds, 3), image.backend, made, image.sha256, as_json(chain.values(request)),
        ]  # fmt: skip
        rows.writerow([_harmless(value) for value in row])
    return b"\xef\xbb\xbf" + text.getvalue().encode("utf-8", "replace")


def _harmless(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _licences(images: Sequence[Image], data_dir: Path) -> list[tuple[str, bytes]]:
    """(name in the zip, text) of every licence and notice that lies beside a model in use; ours for a shipped one."""
    found: list[tuple[str, bytes]] = []
    for model in sorted({image.request.model for image in images}):
        try:
            folder = catalog.find(model, data_dir)
        except EngineError:
            continue  # removed since; its pictures stay one's own
        shipped = folder.parent == catalog.SHIPPED
        place = catalog.SHIPPED.parent.parent if shipped else folder
        name = re.sub(r"[^\w.-]+", "-", Path(model).name) or "model"
        files = sorted(file for file in place.iterdir() if file.is_file() and _LICENCES.fullmatch(file.name))
        found += [(f"licences/{name}/{file.name}", file.read_bytes()) for file in files]
    return found
