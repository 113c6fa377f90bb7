"""What the page says about rows of the history: records, captions, rows of the tree and of the queue.

Knows words and order, not SQL and not gradio. Everything handed out has been through `filling`, so a template can show
whatever a person wrote.
"""

import base64
import io
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as Pixels

from studio import files, lineage
from studio.diff import GONE, NEW, SAME, Piece
from studio.models import Offer
from studio.rows import DONE, FAILED, INTERRUPTED, RUNNING, STOPPED, WAITING, Image, Job, Revision
from studio.template import Filling, filling

PROMPT_SHOWN = 160  # characters of a prompt where only a glance is wanted; captions and alt texts show all of it
PREVIEW = 256  # pixels a side of the picture that is on its way
BRANCHES = 5  # how deep the tree is indented; deeper pictures stand below each other

PLAIN = "plain"  # a picture that came from no other

Words = Sequence[Piece]
Labels = Mapping[int, str]  # revision -> label

ENDS = {STOPPED: "stopped", FAILED: "failed", INTERRUPTED: "interrupted: retry it", WAITING: "waiting"}


def record(image: Image, labels: Labels) -> dict[str, Any]:
    """A picture as strip, stage, tree and library know it."""
    request = image.request
    assert request.width and request.height, "a stored recipe is complete"
    label = labels.get(image.revision, "")
    return {
        "id": image.id,
        "url": files.picture(image),
        "thumb": files.thumb(image),
        "file": f"niwaki-{label or image.id}-{request.seed}.png",
        "alt": request.prompt,
        "name": f"{label} · {request.seed}" if label else str(request.seed),
        "ratio": round(request.width / request.height, 4),
        "rating": rating(image),
        "is_kept": str(image.kept is True).lower(),
        "is_rejected": str(image.kept is False).lower(),
        "tags": ", ".join(image.tags),
        "gone": image.deleted_at is not None,
    }


def rating(image: Image) -> str:
    return {True: "kept", False: "rejected", None: ""}[image.kept]


def strip(images: Iterable[Image], labels: Labels, batch: Sequence[int], kept: int, project: int) -> Filling:
    """Pictures in order, oldest first; `batch` are the ids that 1 to 4 pick."""
    return filling(
        pictures=[record(image, labels) for image in images], batch=list(batch), kept=kept, project=project
    )  # fmt: skip


def tree(images: Iterable[Image], revisions: Sequence[Revision]) -> Filling:
    """Every picture under the one it came from, the families in the order of the prompt's revisions.

    The main line r1, r2, r3 stays at the left; a branch such as r2a is indented below r2.
    """
    of_revision: dict[int, list[Image]] = {}
    for image in images:
        of_revision.setdefault(image.revision, []).append(image)
    labels = {revision.id: revision.label for revision in revisions}
    rows = []
    for revision in _drawn(revisions):
        for node in lineage.tree(of_revision.get(revision.id, [])):
            image, depth = node.image, node.depth + _branchings(revision.label)
            rows.append(
                {
                    "id": image.id, "thumb": files.thumb(image), "depth": min(depth, BRANCHES), "how": _how(image),
                    "name": record(image, labels)["name"], "rating": rating(image),
                }
            )  # fmt: skip
    return filling(rows=rows)


def stage(
    image: Image, other: Image | None, labels: Labels, brother: str, can: Collection[str], menu: Mapping[str, str]
) -> Filling:
    """Picture A, and B under it. `brother` names the model that could draw the same; `menu` holds further actions."""
    return filling(
        a=record(image, labels), b=record(other, labels) if other else "", mode="slider" if other else "one",
        other=brother, can_vary="vary" in can, can_refine="refine" in can,
        actions=[{"name": name, "label": label} for name, label in menu.items()],
    )  # fmt: skip


def empty(examples: Sequence[tuple[str, str]], installed: str) -> Filling:
    """The stage before the first picture: prompts that run, and what is installed."""
    shown = [{"lang": lang, "text": text, "index": index} for index, (lang, text) in enumerate(examples)]
    return filling(a="", b="", mode="one", examples=shown, installed=installed)


def no_caption() -> Filling:
    return filling(words=[], facts=[], unknown="")


def words(parts: Words, around: int | None = None) -> list[dict[str, Any]]:
    """A diff for a template; with `around`, unchanged stretches are cut to that many words next to a change."""
    shown: list[dict[str, Any]] = []
    for index, part in enumerate(parts):
        text = part.text.strip()
        if part.kind == SAME and around is not None:
            text = _shortened(text, around, first=index == 0, last=index == len(parts) - 1)
        if text:
            shown.append({"text": text, "added": part.kind == NEW, "gone": part.kind == GONE})
    return shown


def changed(parts: Words) -> bool:
    return any(part.kind != SAME for part in parts)


def caption(image: Image, other: Image | None, parts: Words, offers: Mapping[str, Offer]) -> Filling:
    """Under the stage: the prompt or how it changed, what else differs between the two, the seconds."""
    mine, theirs = _parameters(image, offers), _parameters(other, offers) if other else {}
    facts = []
    for name, value in mine.items():
        before = theirs.get(name, value)
        differs = other is not None and before != value
        text = f"{before or PLAIN} → {value or PLAIN}" if differs else value
        if text:
            facts.append({"text": text, "kind": "differs" if differs else ""})
    same = other is not None and not changed(parts)
    shown = [{"text": "Same words.", "added": False, "gone": False}] if same else words(parts)
    return filling(words=shown, facts=facts, unknown=listed(image.details.get("unknown_words") or ()))


def queue(jobs: Sequence[Job], labels: Labels, ahead: Callable[[Job], int] = lambda job: 0) -> Filling:
    """The chip and its rows: what runs and waits in order, then what ended without a picture.

    The first that waits says how many come before it, of whomever; the rows behind it are counted by looking.
    """
    running = sum(job.state == RUNNING for job in jobs)
    waiting = [job for job in jobs if job.state == WAITING]
    ended = [job for job in jobs if job.over and job.state != DONE]
    rows = []
    for job in [*(job for job in jobs if not job.over), *ended]:
        rows.append(
            {
                "id": job.id, "state": job.state, "label": _job_label(job, labels),
                "text": sentence(waiting_text(ahead(job))) if job in waiting[:1] and not job.error else job_text(job),
                "prompt": job.request.prompt[:PROMPT_SHOWN], "can_cancel": not job.over,
                "can_retry": job.over, "can_move": job.state == WAITING and len(waiting) > 1,
            }
        )  # fmt: skip
    if running or waiting:
        counts = ((running, "running"), (len(waiting), "waiting"))
        summary = ", ".join(f"{count} {state}" for count, state in counts if count)
    else:
        summary = f"{len(ended)} to retry" if ended else "Queue empty"
    return filling(state="busy" if running or waiting else "idle", summary=summary, rows=rows)


def waiting_text(ahead: int) -> str:
    """How long the queue is for a job that waits."""
    return f"Waiting, {counted(ahead)} before yours" if ahead else "Waiting"


def job_text(job: Job) -> str:
    """Where a job is, as a phrase."""
    if job.state == RUNNING and job.total:
        return f"Step {job.step} of {job.total}{_left(job.seconds_left)}"
    if job.state == RUNNING:
        return f"Getting the model ready{_left(job.seconds_left)}"
    if job.error:
        return sentence(job.error)
    return sentence(ENDS.get(job.state, job.state))


def progress(jobs: Sequence[Job], ahead: Callable[[Job], int] = lambda job: 0) -> Filling:
    """Under Generate: the running job of this tab, else the first that waits and what comes before it, else nothing."""
    job = next(iter(sorted((job for job in jobs if not job.over), key=lambda job: job.state != RUNNING)), None)
    if job is None:
        return idle()
    waiting = sum(each.state == WAITING for each in jobs) - (job.state == WAITING)
    text = job_text(job) if job.state == RUNNING else waiting_text(ahead(job))
    text += f"; {waiting} more waiting" if waiting else ""
    preview = data_address(job.preview, PREVIEW)
    return filling(state="busy", text=text, done=job.step, total=job.total, preview=preview)


def data_address(pixels: np.ndarray | None, side: int = 0) -> str:
    """A picture that has no file, as an address that holds it, at most `side` pixels a side; "" for none."""
    if pixels is None:
        return ""
    buffer, picture = io.BytesIO(), Pixels.fromarray(pixels)
    if side:
        picture.thumbnail((side, side))
    picture.save(buffer, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def idle(state: str = "idle", text: str = "") -> Filling:
    """`state` idle, done, stopped or error, with its sentence."""
    return filling(state=state, text=text, done=0, total=1, preview="")


def past_words(past: Mapping[str, Any]) -> str:
    """What is taken over from a picture whose settings were reused, beyond what the controls show."""
    mixed, draft = len(past.get("variations") or ()), past.get("draft")
    parts = [f"{counted(mixed, 'variation')} mixed in"] if mixed else []
    if isinstance(draft, Mapping):
        parts.append(f"drawn from its draft of {draft.get('width')} × {draft.get('height')}")
    return sentence(" and ".join(parts))[:-1] if parts else ""


def revisions(rows: Sequence[Revision], diffs: Mapping[int, Words], counts: Mapping[int, int], current: int) -> Filling:
    """Newest first, each with the words that changed from its parent, or its first words."""
    listed_rows = []
    for revision in reversed(rows):
        parts = diffs.get(revision.id) or [Piece(SAME, revision.prompt[:PROMPT_SHOWN])]
        count = counts.get(revision.id, 0)
        listed_rows.append(
            {
                "id": revision.id, "label": revision.label, "current": revision.id == current,
                "words": words(parts, around=1 if changed(parts) else None),
                "count": counted(count) if count > 1 else "",
            }
        )  # fmt: skip
    return filling(rows=listed_rows)


def listed(items: Sequence[str]) -> str:
    """“a”, “b” and “c”; from a long list the first eight, and how many more there are."""
    parts = [f"“{word}”" for word in items[:8]]
    if len(items) > 8:
        parts.append(f"{len(items) - 8} more")
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def counted(count: int, what: str = "picture") -> str:
    """A number with its noun."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def sentence(text: str) -> str:
    """A message as the page shows it: a capital first, a full stop last."""
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."


def _parameters(image: Image, offers: Mapping[str, Offer]) -> dict[str, str]:
    request = image.request
    offer = offers.get(request.model)
    return {
        "model": offer.short if offer else request.model,
        "seed": f"seed {request.seed}",
        "size": f"{request.width} × {request.height}",
        "steps": counted(request.steps or 0, "step"),
        "how": "" if image.op.startswith("on ") else _how(image),  # "on binary": the model says it
        "seconds": f"{image.seconds:.2f} s",
    }


def _how(image: Image) -> str:
    return "" if image.op in ("", "make") else image.op


def _drawn(revisions: Sequence[Revision]) -> Iterator[Revision]:
    """Every revision, then the branches that leave it, then the one that follows it on its own line."""
    known = {revision.id for revision in revisions}
    after: dict[int | None, list[Revision]] = {}
    for revision in revisions:
        after.setdefault(revision.parent if revision.parent in known else None, []).append(revision)
    ahead = after.get(None, [])[::-1]
    while ahead:
        revision = ahead.pop()
        yield revision
        depth = _branchings(revision.label)
        ahead += sorted(after.get(revision.id, []), key=lambda r: (_branchings(r.label) > depth, -r.id))


def _branchings(label: str) -> int:
    """How often a label leaves the main line: r2 never, r2a once, r2a3b twice."""
    return len(re.findall(r"[a-z]+", label[1:]))


def _job_label(job: Job, labels: Labels) -> str:
    return f"{labels.get(job.revision, f'job {job.id}')} · {job.request.seed}"


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 90:
        return f", about {max(seconds, 0.1):.1f} s left" if seconds < 10 else f", about {seconds:.0f} s left"
    return f", about {seconds / 60:.0f} min left"


def _shortened(text: str, around: int, first: bool, last: bool) -> str:
    parts = text.split(" ")
    head = [] if first else parts[:around]
    tail = [] if last else parts[-around:]
    if len(head) + len(tail) >= len(parts):
        return text
    return " ".join(itertools.chain(head, ["…"], tail))
