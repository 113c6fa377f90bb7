"""Fetch a published model: the only connection that Niwaki ever opens, and only when a person asks for it.

`get` is a generator: first the Terms, then Progress, at the end Installed; closing it stops the download, and the next
`get` goes on where it stopped. Files come from the hub at one commit, and are held to sizes and hashes: those that the
hub gave when the commit was first seen (`records`). Until all are right they lie in a hidden folder that nobody takes
for a model. Knows no layout: what a complete folder is, `install` says.
"""

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from engine import catalog, install, records, transfer
from engine.install import Installed
from engine.records import Digest, Known, Record
from engine.transfer import Meter, Progress
from engine.types import BadRequest, EngineError

PAUSES = (1, 2, 4, 8, 15)  # seconds before the next try, while no new byte comes; then we give up
TIMEOUT = 20  # seconds without a byte
_BUSY = (408, 429, 500, 502, 503, 504)  # answers that mean: later


@dataclass(frozen=True, slots=True)
class Terms:
    """What a person should read before anything large is fetched. `pinned`: the commit is written in our catalogue.

    `licence` is its short name, `licence_text` and `notice` the repository's own files, "" where it has none.
    """

    model: str
    repository: str
    revision: str
    pinned: bool
    licence: str
    licence_text: str
    notice: str
    files: int
    bytes: int


def get(model_id: str, data_dir: Path) -> Generator[Terms | Progress | Installed, None, None]:
    """Fetch a published model into the data folder, or finish what an earlier call began.

    Raises BadRequest for a model that cannot be fetched, too little disk space or a second download of the same model;
    EngineError, with what to do next, when the hub cannot be reached, breaks off for good, or sends other bytes than
    recorded.
    """
    model = _published(model_id)
    target, part = catalog.folder_of(model_id, data_dir), install.aside(model_id, data_dir, "get")
    with install.alone(model_id, data_dir):
        if target.exists():
            yield install.already(model_id, data_dir)
            return
        record = _record(model, data_dir)
        assert record.revision is not None
        hub = _Hub(model.repository or "", record.revision)
        meter = Meter(record.bytes)
        licences = records.licences(record.files)
        for path in licences:
            yield from _fetch(hub, part, path, record.files[path], meter)
        texts = {path: (part / path).read_text(encoding="utf-8", errors="replace") for path in licences}
        yield Terms(
            model_id, hub.repository, record.revision, model.revision is not None, model.licence,
            *_licence_and_notice(texts), len(record.files), record.bytes,
        )  # fmt: skip
        transfer.check_space(part, _missing(part, record))
        for path, known in sorted(record.files.items(), key=lambda item: item[1].bytes):
            if path not in licences:
                yield from _fetch(hub, part, path, known, meter)
        yield install.finish(model_id, data_dir, part, record)


def _published(model_id: str) -> catalog.Model:
    model = catalog.MODELS.get(model_id)
    fetched = ", ".join(known.id for known in catalog.MODELS.values() if known.repository)
    if model is None:
        raise BadRequest(f"unknown model {model_id!r}: {fetched} can be fetched; a folder comes in by `models import`")
    if model.repository is None:
        raise BadRequest(f"{model_id} is shipped with Niwaki: nothing to fetch; {fetched} can be fetched")
    return model


def _licence_and_notice(texts: dict[str, str]) -> tuple[str, str]:
    notices = [text for path, text in texts.items() if path.upper().startswith("NOTICE")]
    return "\n".join(text for text in texts.values() if text not in notices), "\n".join(notices)


def _missing(part: Path, record: Record) -> int:
    """Bytes still to come, of files that lie there whole or begun."""
    there = 0
    for path, known in record.files.items():
        for file in (part / path, _begun(part / path)):
            if file.is_file():
                there += min(file.stat().st_size, known.bytes)
                break
    return record.bytes - there


def _begun(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


# --- the hub ---------------------------------------------------------------------------------------------------------


def _record(model: catalog.Model, data_dir: Path) -> Record:
    """What this model's files have to be: as recorded, or, the first time, as the hub says now."""
    known = records.read(model.id, data_dir)
    if known and known.repository == model.repository and known.revision and model.revision in (None, known.revision):
        return known
    record = _ask_hub(model)
    records.write(model.id, data_dir, record)
    return record


def _ask_hub(model: catalog.Model) -> Record:
    """Resolve the pinned revision, or the branch where there is none, to a commit with its files."""
    library = _library()
    assert model.repository is not None
    with _in_words(model.repository):
        api = library.HfApi(token=_token(), library_name="niwaki")
        info = api.model_info(model.repository, revision=model.revision, files_metadata=True, timeout=TIMEOUT)
    files: dict[str, Known] = {}
    for sibling in info.siblings or ():
        if not install.wanted(sibling.rfilename):
            continue
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        if sibling.size is None or not (sha256 or sibling.blob_id):
            raise EngineError(f"the hub gives no size or hash for {sibling.rfilename} of {model.repository}: try later")
        try:
            files[records.inside(sibling.rfilename)] = Known(
                sibling.size, sha256, None if sha256 else sibling.blob_id
            )
        except ValueError as why:
            raise EngineError(f"{model.repository} is not to be trusted ({why}): nothing was fetched") from None
    if not info.sha or not any(path.endswith(".safetensors") for path in files):
        raise EngineError(f"{model.repository} holds no weights in safetensors: import a folder with `models import`")
    if model.revision not in (None, info.sha):
        raise EngineError(f"the hub answers with commit {info.sha} where {model.revision} was asked for: try later")
    return Record(model.repository, info.sha, files)


@dataclass(frozen=True)
class _Hub:
    repository: str
    revision: str

    @contextmanager
    def open(self, path: str, start: int, total: int) -> Iterator[tuple[int, Iterator[bytes]]]:
        """(first byte, the bytes from there on) of a file: from `start`, or from 0 where the server ignores ranges.
        Raises EngineError where the hub announces another size than `total`."""
        library = _library()
        url = library.hf_hub_url(self.repository, path, revision=self.revision)
        # identity: a compressed answer has no ranges, and other bytes than those we hash
        headers = {"user-agent": "niwaki", "accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        if token := _token():
            headers["authorization"] = f"Bearer {token}"
        with library.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as answer:
            if answer.status_code not in (200, 206):
                _refuse(answer.status_code, self.repository, path)
            begins = answer.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
            first = int(begins) if answer.status_code == 206 and begins.isdigit() else 0
            comes = answer.headers.get("content-length")
            if comes is not None and first + int(comes) != total:
                size = first + int(comes)
                raise EngineError(f"{path} of {self.repository} has {size} bytes where {total} are recorded: try later")
            yield first, answer.iter_bytes()


class _Later(Exception):
    """The connection broke, or the hub is busy: worth another try."""


def _refuse(status: int, repository: str, path: str) -> NoReturn:
    if status in _BUSY or status == 416:
        raise _Later(f"the hub answers {status}")
    if status in (401, 403):
        raise EngineError(f"the hub does not hand out {repository} ({status}): accept its terms there and set HF_TOKEN")
    raise EngineError(f"the hub answers {status} for {path} of {repository}: see `models list`, or try later")


def _library() -> Any:
    """huggingface_hub, told to add neither telemetry nor what else is installed to what it sends."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # read at import, which somebody else may have done
    return huggingface_hub


def _token() -> str | bool:
    """A token only where the person set one for this: who is logged in for other reasons fetches anonymously."""
    return os.environ.get("HF_TOKEN") or False


def _broken() -> tuple[type[Exception], ...]:
    """What a broken connection raises. The hub's HTTP client changed twice; its errors' base is also the base of
    huggingface_hub's own."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"), OSError)


@contextmanager
def _in_words(repository: str) -> Iterator[None]:
    """Turn what the hub's library raises into a sentence."""
    try:
        yield
    except _broken() as why:
        if _forbidden(why):
            raise EngineError(_FORBIDDEN) from None
        status = getattr(getattr(why, "response", None), "status_code", None)
        if status in (401, 403, 404):
            raise EngineError(
                f"the hub does not hand out {repository} ({status}): it moved, or its terms must be accepted there "
                "first and HF_TOKEN be set"
            ) from None
        raise EngineError(_offline(repository, f"answer {status}" if status else _brief(why))) from None


_FORBIDDEN = "HF_HUB_OFFLINE is set, so nothing is fetched: unset it, or use `models import FOLDER`"


def _forbidden(why: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return isinstance(why, OfflineModeIsEnabled)


def _offline(repository: str, why: str) -> str:
    return (
        f"the hub cannot be reached for {repository} ({why}): check the network, or bring the folder on a stick and "
        "use `models import FOLDER`"
    )


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


# --- one file --------------------------------------------------------------------------------------------------------


def _fetch(hub: _Hub, part: Path, path: str, known: Known, meter: Meter) -> Iterator[Progress]:
    """Bring one file into `part`: verified, under its own name. A file with wrong bytes is fetched once more."""
    file = part / path
    transfer.make_folder(file.parent)
    if file.is_file():  # by an earlier call; hashed again, because what lies on a disk may have changed
        file.replace(_begun(file))
    fault: str | None = None
    for _ in range(2):
        digest = Digest(known)
        yield from _transfer(hub, _begun(file), path, known, digest, meter)
        fault = digest.fault()
        if fault is None:
            _begun(file).replace(file)
            return
        meter.found(-_begun(file).stat().st_size)
        _begun(file).unlink()
    raise EngineError(f"{path} of {hub.repository} came twice with wrong bytes ({fault}): try later")


def _transfer(hub: _Hub, begun: Path, path: str, known: Known, digest: Digest, meter: Meter) -> Iterator[Progress]:
    """Bytes into the begun file until it has its size, over as many connections as that takes."""
    done = 0
    if begun.is_file():
        if begun.stat().st_size > known.bytes:
            begun.unlink()
        else:
            yield from transfer.hash_file(begun, digest, path, meter)
            done = begun.stat().st_size
    broken: tuple[type[Exception], ...] = (_Later, *_broken())
    tries = 0  # in vain, one after the other
    while done < known.bytes or not begun.exists():
        first = done
        try:
            for size in _receive(hub, begun, path, known.bytes, done, digest):
                meter.moved(size - done)
                done = size
                if meter.due():
                    yield meter.progress(path)
            if done < known.bytes:
                raise _Later(f"the connection ended after {done} of {known.bytes} bytes")
        except broken as why:
            tries = 0 if done > first else tries + 1
            if _forbidden(why) or tries > (len(PAUSES) if meter.came else 1):
                raise _gave_up(hub, path, done, known.bytes, meter, why) from None
            pause = PAUSES[max(0, tries - 1)]
            yield meter.progress(path, pause)
            time.sleep(pause)


def _receive(hub: _Hub, begun: Path, path: str, total: int, done: int, digest: Digest) -> Iterator[int]:
    """Append what one connection brings to the begun file, which has `done` bytes; yields its size as it grows."""
    with transfer.writing(begun):
        out = begun.open("ab")
    with out, hub.open(path, done, total) as (start, chunks):
        if start > done:
            raise _Later(f"the server begins at byte {start} where {done} was asked for")
        skip = done - start  # a server without ranges sends again what we already have
        for chunk in chunks:
            fresh = chunk[skip : skip + total - done]
            skip = max(0, skip - len(chunk))
            if fresh:
                with transfer.writing(begun):
                    out.write(fresh)
                    out.flush()  # or the disk would be found full where nobody knows which file it was
                digest.update(fresh)
                done += len(fresh)
                yield done
            if done == total:
                return


def _gave_up(hub: _Hub, path: str, done: int, total: int, meter: Meter, why: Exception) -> EngineError:
    if _forbidden(why):
        return EngineError(_FORBIDDEN)
    if not meter.came:
        return EngineError(_offline(hub.repository, _brief(why)))
    return EngineError(
        f"the connection broke {len(PAUSES) + 1} times in a row at byte {done} of {total} of {path} ({_brief(why)}): "
        "get the model again, it goes on there"
    )
