"""Models in the data folder: complete a fetched one, bring in a folder from elsewhere, verify, remove.

A model is complete when it stands in `models/ID`; while it is being made it lies in a hidden folder beside, and is
renamed as the last act, so that nothing half finished is ever taken for one. Knows no network.
"""

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine import catalog, importers, records, transfer
from engine.packs import open_pack, verify_pack
from engine.records import NOTES_FILE, Digest, Known, Record
from engine.releases import RELEASES
from engine.transfer import Meter, Progress
from engine.types import BadRequest

# What a pack is made of. Pickles (.pt, .bin), pictures and second copies of the weights stay where they are.
_FOLDERS = ("transformer", "text_encoder", "vae", "tokenizer", "scheduler")
_ENDINGS = (".safetensors", ".json", ".txt", ".jinja", ".model")
_AT_THE_TOP = ("model_index.json", "manifest.json", "README.md")


@dataclass(frozen=True, slots=True)
class Installed:
    """A model that is complete now. `note` says what a person should know about it, "" for nothing."""

    model: str
    folder: Path
    bytes: int
    note: str = ""


def wanted(path: str) -> bool:
    """Whether a file of a repository or folder belongs to the pack."""
    folder, _, name = path.rpartition("/")
    if not folder:
        return path in _AT_THE_TOP or records.LICENCE_FILES.fullmatch(path) is not None
    return folder.startswith(_FOLDERS) and not name.startswith(".") and name.endswith(_ENDINGS)


def aside(model_id: str, data_dir: Path, doing: str) -> Path:
    """The hidden folder in which a model grows."""
    return Path(data_dir) / "models" / f".{model_id}.{doing}"


@contextmanager
def alone(model_id: str, data_dir: Path) -> Iterator[None]:
    """Hold a model for one download, import or removal. Raises BadRequest where another process does. A killed process
    holds nothing."""
    from filelock import FileLock, Timeout

    lock = aside(model_id, data_dir, "lock")
    transfer.make_folder(lock.parent)
    held = FileLock(lock, thread_local=False)  # several threads may resume one generator
    with transfer.writing(lock):
        try:
            held.acquire(timeout=0)
        except Timeout:
            raise BadRequest(f"{model_id} is being fetched, imported or removed by another process: wait") from None
    try:
        yield
    finally:
        held.release()


def already(model_id: str, data_dir: Path) -> Installed:
    """The model that stands there. Raises BadRequest where a recorded file is missing or has another size."""
    folder = catalog.folder_of(model_id, data_dir)
    files = open_pack(folder).notes.files
    for path, entry in files.items():
        file = folder / path
        if not file.is_file() or file.stat().st_size != entry.get("bytes"):
            raise BadRequest(f"{file} is missing or has the wrong size: remove {model_id} first, then get it again")
    total = sum(entry["bytes"] for entry in files.values())
    return Installed(model_id, folder, total, "was there already; `models verify` reads every byte")


def finish(model_id: str, data_dir: Path, part: Path, record: Record, note: str = "") -> Installed:
    """Make a folder whose recorded files are all verified into the model: our notes, a last look, the rename."""
    for file in sorted(part.rglob("*")):
        path = file.relative_to(part).as_posix()
        if file.is_file() and path not in record.files and path != NOTES_FILE:
            file.unlink()  # of an earlier record
    files = {
        path: replace(known, sha256=known.sha256 or _sha256(part / path)) for path, known in record.files.items()
    }
    if not (part / NOTES_FILE).exists():
        records.write_json(part / NOTES_FILE, _notes(model_id, replace(record, files=files)))
    open_pack(part)
    target = Path(data_dir) / "models" / model_id
    records.write(model_id, data_dir, replace(record, files=files, notes_sha256=_sha256(part / NOTES_FILE)))
    with transfer.writing(target):
        part.rename(target)
    return Installed(model_id, target, record.bytes, note)


def _notes(model_id: str, record: Record) -> dict[str, Any]:
    """Our niwaki.json for a released folder: all else is as the formats page says, which is what silence means."""
    known = catalog.MODELS.get(model_id)
    return {
        "id": model_id,
        "label": known.label if known else model_id,
        "provenance": {"repository": record.repository, "revision": record.revision},
        "files": {path: {"bytes": file.bytes, "sha256": file.sha256} for path, file in sorted(record.files.items())},
    }


def _fault(file: Path, known: Known) -> str | None:
    digest = Digest(known)
    try:
        deque(transfer.hash_file(file, digest, "", Meter(known.bytes)), maxlen=0)
    except BadRequest as why:
        return str(why)
    return digest.fault()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# --- import ----------------------------------------------------------------------------------------------------------


def import_folder(
    source: Path, data_dir: Path, model_id: str | None = None, link: bool = False
) -> Generator[Progress | Installed, None, None]:
    """Bring a pack folder, on a USB stick say, into the data folder: copied, or linked where `link`.

    Every file is hashed on the way and held to what is known of it: the record of an earlier download, else the
    folder's own niwaki.json; what nobody knew is recorded now. Raises BadRequest for a folder that is no pack, damaged
    or incomplete, an id that is taken, and too little disk space.
    """
    source = Path(source).expanduser()
    if source.is_dir() and importers.is_foreign(source):
        yield from _converted(source, data_dir, _id(source, model_id))
        return
    pack = open_pack(source)
    model_id = _id(source, model_id)
    with alone(model_id, data_dir):
        target = Path(data_dir) / "models" / model_id
        if target.exists():
            raise BadRequest(f"{target} exists: remove {model_id} first, or import under another name with --id")
        record = _expected(source, model_id, data_dir, pack.notes.files)
        part = aside(model_id, data_dir, "import")
        _delete(part)
        if not link:
            transfer.check_space(part, record.bytes)
        files, meter = {}, Meter(record.bytes)
        for path, known in sorted(record.files.items()):
            digest = Digest(known)
            if link:
                yield from transfer.hash_file(source / path, digest, path, meter)
            else:
                yield from transfer.copy_file(source / path, part / path, digest, path, meter)
            if fault := digest.fault():
                _delete(part)
                raise BadRequest(f"{source / path} is damaged: {fault}; copy or fetch it again")
            if link:
                _link(source / path, part / path)
            files[path] = replace(known, sha256=digest.sha256)
        if (source / NOTES_FILE).exists():
            transfer.make_folder(part)
            shutil.copyfile(source / NOTES_FILE, part / NOTES_FILE)
        unknown = sum(known.sha256 is None and known.git_sha1 is None for known in record.files.values())
        note = f"nobody knew the hashes of {unknown} of its {len(files)} files: recorded now" if unknown else ""
        yield finish(model_id, data_dir, part, replace(record, files=files), note)


def _converted(source: Path, data_dir: Path, model_id: str) -> Generator[Progress | Installed, None, None]:
    """A folder in a foreign layout becomes a pack of ours; every file of it is recorded as it was written. Where it is
    one of the releases whose hashes are known, its files are held to them first."""
    with alone(model_id, data_dir):
        target = Path(data_dir) / "models" / model_id
        release = _release(source)
        if release and not target.exists():
            yield from _hold(source, release)
        for step in importers.import_folder(source, target):
            if isinstance(step, Progress):
                yield step
                continue
            listed = open_pack(target).notes.files
            files = {path: Known(entry["bytes"], entry["sha256"]) for path, entry in listed.items()}
            records.write(model_id, data_dir, Record(None, None, files, _sha256(target / NOTES_FILE)))
            checked = f"the files are those of {release.repository} at {release.revision}" if release else ""
            note = "; ".join(filter(None, (f"converted from the {step.layout} layout", checked, *step.remarks)))
            yield Installed(model_id, target, step.bytes, note)


def _release(source: Path) -> Record | None:
    """The published release that a folder seems to be, by the size of its transformer."""
    for release in RELEASES.values():
        path, known = max(release.files.items(), key=lambda item: (item[0].startswith("transformer"), item[1].bytes))
        if (source / path).is_file() and (source / path).stat().st_size == known.bytes:
            return release
    return None


def _hold(source: Path, release: Record) -> Iterator[Progress]:
    """Read a folder and refuse what is missing or differs from the release."""
    meter = Meter(release.bytes)
    for path, known in sorted(release.files.items()):
        if not (source / path).is_file():
            if known.sha256:
                raise BadRequest(f"{source} lacks {path} of {release.repository}: copy the whole folder again")
            continue  # a tuning table, say: not read, and whoever needs it says so
        digest = Digest(known)
        yield from transfer.hash_file(source / path, digest, path, meter)
        if fault := digest.fault():
            raise BadRequest(f"{source / path} is damaged: {fault}; copy or fetch it again")


def _expected(source: Path, model_id: str, data_dir: Path, notes: dict[str, dict[str, Any]]) -> Record:
    """The files of a folder and what they have to be."""
    there = {
        path: file.stat().st_size
        for file in sorted(source.rglob("*"))
        if file.is_file() and (wanted(path := file.relative_to(source).as_posix()) or path in notes)
    }
    record = records.read(model_id, data_dir) or Record(None, None)
    known = record.files or {
        path: Known(entry.get("bytes", 0), entry.get("sha256")) for path, entry in notes.items()
    }
    if missing := sorted(known.keys() - there.keys()):
        raise BadRequest(f"{source} lacks {', '.join(missing[:3])}, which {model_id} has: copy the whole folder again")
    return replace(record, files={path: known.get(path) or Known(size) for path, size in there.items()})


def _id(source: Path, given: str | None) -> str:
    """The id a folder is kept under: the given one, its own, that of the release it is named after, or its name."""
    repositories = {str(m.repository).rpartition("/")[2]: m.id for m in catalog.MODELS.values() if m.repository}
    repositories |= {str(release.repository).rpartition("/")[2]: name for name, release in RELEASES.items()}
    words = [word for part in source.absolute().parts for word in part.split("--")]  # a hub cache joins with --
    named = [repositories[word] for word in words if word in repositories]
    declared = None
    with suppress(OSError, ValueError, KeyError, TypeError):
        declared = str(json.loads((source / NOTES_FILE).read_bytes())["id"])
    model_id = given or declared or (named[-1] if named else source.absolute().name)
    if not catalog.is_name(model_id):
        if given or declared:
            raise BadRequest(f"{model_id!r} cannot be a model's id: choose letters, digits, '-', '_' and '.' with --id")
        model_id = re.sub(r"[^A-Za-z0-9._-]+", "-", str(model_id)).strip("-._") or "imported"
    known = catalog.MODELS.get(model_id)
    if known and known.repository is None:
        raise BadRequest(f"{model_id} is shipped with Niwaki: import the folder under another name with --id")
    return str(model_id)


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes on one disk, a symbolic link across disks."""
    transfer.make_folder(target.parent)
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        with transfer.writing(target):
            target.symlink_to(source)


# --- verify and remove -----------------------------------------------------------------------------------------------


def verify(model: str, data_dir: Path) -> Iterator[tuple[str, bool, str]]:
    """Read every byte of a model: yield (path, whether it is right, a sentence) per file.

    niwaki.json itself is held to the record of the download or import, so that no bit of the folder can change unseen;
    weights that nobody recorded, which would be loaded too, are found as well.
    """
    folder = catalog.find(model, data_dir)
    managed = folder.parent == Path(data_dir) / "models"
    record = records.read(folder.name, data_dir) if managed else None
    if record and record.notes_sha256 and (folder / NOTES_FILE).is_file():
        same = _sha256(folder / NOTES_FILE) == record.notes_sha256
        changed = "the SHA-256 is not the recorded one; remove the model and get it again"
        yield NOTES_FILE, same, "as recorded" if same else changed
    pack = open_pack(folder)
    if pack.notes.files:
        loaded = {file for part in (pack.transformer, pack.text_encoder, pack.vae) for file in part.files}
        for file in sorted(loaded - {folder / path for path in pack.notes.files}):
            yield file.relative_to(folder).as_posix(), False, "the file is not recorded, but would be loaded; delete it"
    yield from verify_pack(pack)
    for path, known in record.files.items() if record else ():
        if path not in pack.notes.files:  # what came along without being in the folder's own list: licence, notice
            fault = _fault(folder / path, known)
            yield path, fault is None, fault or "size and hash are as recorded"


def remove(model_id: str, data_dir: Path) -> int:
    """Delete a model and what a begun download left; returns the bytes of the files. Its record stays, so that a later
    download is held to it. Raises BadRequest for a shipped or absent model."""
    known = catalog.MODELS.get(model_id)
    if known and known.repository is None:
        raise BadRequest(f"{model_id} is shipped with Niwaki and cannot be removed")
    folders = [aside(model_id, data_dir, doing) for doing in ("get", "import", "removed")]
    target = Path(data_dir) / "models" / model_id
    if not catalog.is_name(model_id) or not any(os.path.lexists(folder) for folder in (target, *folders)):
        there = ", ".join((*catalog.installed(data_dir), *catalog.imported(data_dir)))
        raise BadRequest(f"{model_id!r} is not installed in {Path(data_dir) / 'models'}; installed: {there}")
    with alone(model_id, data_dir):
        freed = 0
        if os.path.lexists(target):
            _delete(folders[-1])
            with transfer.writing(target):
                target.rename(folders[-1])  # at one blow: half a removed model is no model
        for folder in folders:
            freed += _delete(folder)
        return freed


def _delete(folder: Path) -> int:
    """Delete a folder, or a link to one, and say how many bytes its own files had."""
    if folder.is_symlink():
        folder.unlink()
        return 0
    if not folder.exists():
        return 0
    total = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    with transfer.writing(folder):
        shutil.rmtree(folder)
    return total
