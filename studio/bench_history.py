"""How quick the history is when it is full: `python -m studio.bench_history [--rows 10000] [--json]`.

Fills a history in a temporary folder with made-up rows (prompts in four languages, tags, ratings, parents; no files)
and times what the page asks for: opening, pages, search, filters, the tree. Prints the median and the 95th percentile.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from engine.types import Request
from studio import library, lineage
from studio import tables as t
from studio.history import History, index, revise
from studio.library import Filter, Page
from studio.rows import DONE, LOCAL, columns, fingerprint

WORDS = {
    "en": "red blue green small large circle square ring house tree river on a beside under morning light".split(),
    "hi": "लाल नीली हरी छोटा बड़ा नाला घर पेड़ नदी सुबह रोशनी के पास एक".split(),
    "mr": "लाल निळी हिरवी लहान मोठा नाला घर झाड नदी सकाळ प्रकाश जवळ एक".split(),
    "ta": "சிவப்பு நீலம் பச்சை சிறிய பெரிய வட்டம் வீடு மரம் ஆறு காலை ஒளி அருகில் ஒரு".split(),
}
SEARCHES = ("red", "blue circle", "नाला", "नीली", "மர", "tree besi", "x", "1234", "print")


def fill(history: History, rows: int, seed: int = 0) -> None:
    """So many pictures, in projects of five hundred and revisions of eight."""
    chance = random.Random(seed)
    for start in range(0, rows, 500):
        project = history.new_project(LOCAL, f"Project {start // 500 + 1}").id
        history.store.write(lambda db, p=project, s=start: _fill(db, p, s, min(500, rows - s), chance))  # type: ignore[misc]


def _fill(db: sa.Connection, project: int, start: int, count: int, chance: random.Random) -> None:
    ids: list[int] = []
    prompt, revision = "", 0
    for number in range(start, start + count):
        if (number - start) % 8 == 0:
            words = WORDS[chance.choice(list(WORDS))]
            prompt = " ".join(chance.choice(words) for _ in range(chance.randint(5, 25))) + f" {number}"
            revision = revise(db, project, prompt)
        request = Request(prompt, "seedling-ternary", number, 128, 128, 4)
        parent = chance.choice(ids) if ids and chance.random() < 0.6 else None
        shared = columns(request) | {"owner": LOCAL, "project": project, "revision": revision, "parent": parent}
        times = {"created_at": float(number)}
        job = db.execute(
            t.job.insert().values(**shared, **times, batch=str(number), op="make", state=DONE, place=float(number))
        ).inserted_primary_key[0]  # type: ignore[index]
        made = {
            "job": job, "op": "make", "fingerprint": fingerprint(request), "backend": "torch", "reason": "cpu",
            "seconds": 0.2, "details": '{"seconds":{"denoise":0.16,"decode":0.04}}', "path": f"pictures/{number}.png",
            "sha256": f"{number:064x}", "bytes": 20_000, "rating": chance.choice((0, 0, 0, 3, 5)),
            "kept": chance.choice((None, None, 0, 0, 1)), "note": "to print" if chance.random() < 0.02 else "",
            "deleted_at": 1.0 if chance.random() < 0.02 else None,
        }  # fmt: skip
        id = int(db.execute(t.image.insert().values(**shared, **times, **made)).inserted_primary_key[0])  # type: ignore[index]
        if chance.random() < 0.1:
            db.execute(t.tag.insert().values(image=id, name=chance.choice(("client", "poster", "लाल", "draft"))))
        ids.append(id)
    index(db, ids)


def measure(folder: Path, runs: int) -> dict[str, list[float]]:
    """Seconds of every action, each run with another page, word or project."""
    history = History(folder)
    actions = _actions(history, random.Random(1))
    times: dict[str, list[float]] = {name: [] for name in ("open", *actions)}
    for _ in range(runs):
        for name, action in actions.items():
            times[name].append(_seconds(action))
    history.close()
    for _ in range(runs):
        started = time.perf_counter()
        opened = History(folder)
        library.page(opened, LOCAL, Filter(project=opened.last_project(LOCAL).id))
        times["open"].append(time.perf_counter() - started)
        opened.close()
    return times


def _actions(history: History, chance: random.Random) -> dict[str, Callable[[], Any]]:
    projects = [project.id for project in history.projects(LOCAL)]
    last = library.page(history, LOCAL, limit=1).images[0].id

    def page(wanted: Filter) -> Page:
        return library.page(history, LOCAL, wanted)

    return {
        "first page": lambda: page(Filter()),
        "some page": lambda: library.page(history, LOCAL, before=chance.randint(61, last)),
        "search": lambda: page(Filter(text=chance.choice(SEARCHES))),
        "search and filters": lambda: page(Filter(text=chance.choice(SEARCHES), kept=True, min_rating=3)),
        "kept": lambda: page(Filter(kept=True)),
        "tag": lambda: page(Filter(tag="client")),
        "bin": lambda: page(Filter(deleted=True)),
        "count": lambda: library.count(history, LOCAL, Filter(kept=True)),
        "tags": lambda: library.tags(history, LOCAL),
        "stacks of a project": lambda: library.stacks(history, LOCAL, Filter(project=chance.choice(projects))),
        "tree of a project": lambda: lineage.tree(
            library.page(history, LOCAL, Filter(project=chance.choice(projects)), limit=500).images
        ),
        "keep": lambda: history.keep(LOCAL, [last], chance.random() < 0.5),
    }


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000, metavar="N", help="pictures in the history (%(default)s)")
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="times each action is timed (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print a machine-readable last line")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder))
        fill(history, args.rows)
        history.close()
        times = measure(Path(folder), args.runs)
    facts = {}
    for name, seconds in times.items():
        ordered = sorted(seconds)
        median, late = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]
        facts[name] = {"median": round(median, 5), "p95": round(late, 5)}
        print(f"{name:<22}{median * 1e3:7.1f} ms   95 % under {late * 1e3:7.1f} ms")
    if args.json:
        print(json.dumps({"rows": args.rows, "runs": args.runs, "seconds": facts}))


if __name__ == "__main__":
    main()
