"""The history: revisions and their names, keep and reject, tags, the bin, search, and owners kept apart."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from engine.types import BadRequest, Picture, Request, Seconds
from studio import bench_history, library, lineage
from studio import tables as t
from studio.history import History, revise
from studio.library import Filter
from studio.rows import LOCAL, RUNNING, columns, fingerprint, request_of
from studio.saving import Saved, insert_image, save


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    opened = History(tmp_path / "data")
    yield opened
    opened.close()


def made(history: History, prompt: str, owner: str = LOCAL, parent: int | None = None, seed: int = 1) -> int:
    """A picture as a job leaves it; returns its id."""
    project = history.last_project(owner).id
    request = Request(prompt, "seedling-ternary", seed, 16, 16, 4)

    def insert(db: sa.Connection) -> int:
        values = dict(
            columns(request), owner=owner, project=project, revision=revise(db, project, prompt), batch="b", op="make",
            parent=parent, state=RUNNING, place=0.0, created_at=0.0,
        )  # fmt: skip
        return int(db.execute(t.job.insert().values(**values)).inserted_primary_key[0])

    job = history.job(owner, history.store.write(insert))
    picture = Picture(np.zeros((16, 16, 3), np.uint8), request, "fake", "because", Seconds(total=0.5), 7)
    saved = save(Saved(picture), job, history)
    return history.store.write(lambda db: insert_image(db, job, saved, history.data_dir))


def found(history: History, owner: str = LOCAL, **wanted: object) -> list[int]:
    return [image.id for image in library.page(history, owner, Filter(**wanted)).images]


def test_a_picture_comes_back_as_it_went_in(history: History) -> None:
    id = made(history, "two red circles", seed=7)
    image = history.image(LOCAL, id)
    assert image.request == Request("two red circles", "seedling-ternary", 7, 16, 16, 4)
    assert image.path.is_file() and image.thumb and image.thumb.is_file()
    assert (image.seconds, image.backend, image.kept, image.rating, image.tags) == (0.5, "fake", None, 0, ())
    assert history.find(LOCAL, image.request) == image
    assert history.find(LOCAL, Request("two red circles", "seedling-ternary", 8, 16, 16, 4)) is None


def test_revisions_are_named_by_where_they_branched(history: History) -> None:
    project = history.last_project(LOCAL).id

    def add(prompt: str, base: str | None = None) -> str:
        ids = {revision.label: revision.id for revision in history.revisions(LOCAL, project)}
        id = history.store.write(lambda db: revise(db, project, prompt, ids[base] if base else None))
        return history.revision(LOCAL, id).label

    assert [add("one"), add("two"), add("three")] == ["r1", "r2", "r3"]
    assert add(" two ") == "r2"  # the same words are the same revision
    assert [add("four", "r2"), add("five", "r2"), add("six", "r2a")] == ["r2a", "r2b", "r2a2"]
    assert add("seven", "r2a") == "r2aa"
    assert add("eight", "r3") == "r4"
    many = [add(f"more {n}", "r1") for n in range(30)]
    assert len(set(many)) == 30 and many[0] == "r1a" and many[26] == "r1za"


def test_keep_rate_tag_and_the_bin(history: History) -> None:
    one, two = made(history, "a red circle"), made(history, "a blue circle")
    history.keep(LOCAL, [one], True)
    history.keep(LOCAL, [two], False)
    assert (found(history, kept=True), found(history, kept=False), found(history, decided=False)) == ([one], [two], [])
    history.rate(LOCAL, [two], 4)
    assert found(history, min_rating=3) == [two]
    history.tag(LOCAL, [one, two], "  for   Asha ")
    history.untag(LOCAL, [two], "for Asha")
    assert library.tags(history, LOCAL) == (("for Asha", 1),) and found(history, tag="for Asha") == [one]
    assert found(history, text="asha") == [one]
    history.note(LOCAL, two, "print this")
    assert found(history, text="print th") == [two]
    history.delete(LOCAL, [one])
    assert (found(history), found(history, deleted=True), library.count(history, LOCAL)) == ([two], [one], 1)
    history.restore(LOCAL, [one])
    assert found(history) == [two, one]


NALA, NILI = "एक नाला", "एक नीली कार"


def test_search_knows_vowel_signs_phrases_and_half_words(history: History) -> None:
    prompts = (NALA, NILI, "two red circles", "circles two", 'say "NEAR(x)" <img> 🌲', "தமிழ் மரம்")
    ids = {prompt: made(history, prompt) for prompt in prompts}
    for text, hits in {
        "नाला": [NALA], "नीली": [NILI], "नी": [NILI], "न": [NALA, NILI], "red cir": ["two red circles"],
        "circles red": [], "TWO": ["two red circles", "circles two"], '"NEAR(': ['say "NEAR(x)" <img> 🌲'],
        "🌲": ['say "NEAR(x)" <img> 🌲'], "%": [], "தமிழ்": ["தமிழ் மரம்"], "மர": ["தமிழ் மரம்"],
        "two ": ["two red circles", "circles two"],
    }.items():  # fmt: skip
        assert sorted(found(history, text=text)) == sorted(ids[hit] for hit in hits), text


def test_pages_end_and_stacks_show_what_was_kept(history: History) -> None:
    ids = [made(history, "a circle", seed=seed) for seed in range(5)] + [made(history, "a ring")]
    history.keep(LOCAL, [ids[1]], True)
    first = library.page(history, LOCAL, limit=4)
    second = library.page(history, LOCAL, before=first.next, limit=4)
    assert [image.id for image in (*first.images, *second.images)] == ids[::-1] and second.next is None
    ring, circle = library.stacks(history, LOCAL)
    assert (ring.count, circle.count, circle.kept, circle.cover.id) == (1, 5, 1, ids[1])


def test_the_tree_skips_what_is_not_there(history: History) -> None:
    root = made(history, "a circle")
    child = made(history, "a red circle", parent=root)
    leaf, other = made(history, "a red ring", parent=child), made(history, "a blue circle", parent=root)
    images = library.page(history, LOCAL).images
    drawn = [(node.image.id, node.depth, node.children) for node in lineage.tree(images)]
    assert drawn == [(root, 0, 2), (child, 1, 1), (leaf, 2, 0), (other, 1, 0)]
    assert [image.id for image in lineage.chain(history, LOCAL, leaf)] == [root, child, leaf]
    assert lineage.steps_between(lineage.chain(history, LOCAL, leaf))[1:] == (
        {"prompt": "a red circle"},
        {"prompt": "a red ring"},
    )


def test_owners_never_meet(history: History) -> None:
    mine, theirs = made(history, "a circle"), made(history, "a circle", owner="visitor")
    assert (found(history), found(history, owner="visitor")) == ([mine], [theirs])
    assert history.find("third", history.image(LOCAL, mine).request) is None
    for forbidden in (
        lambda: history.image(LOCAL, theirs), lambda: history.keep(LOCAL, [mine, theirs], True),
        lambda: history.delete(LOCAL, [theirs]), lambda: history.tag(LOCAL, [theirs], "x"),
        lambda: history.note(LOCAL, theirs, "x"), lambda: history.project("visitor", history.last_project(LOCAL).id),
    ):  # fmt: skip
        with pytest.raises(BadRequest, match="not here"):
            forbidden()
    assert history.image(LOCAL, mine).kept is None
    assert library.tags(history, "visitor") == () and history.revisions("visitor", history.last_project(LOCAL).id) == ()


def test_the_prompt_being_typed_is_kept_whatever_it_is(history: History) -> None:
    project = history.last_project(LOCAL)
    history.save_draft(LOCAL, project.id, "half a \ud83d", seed=4, size="16x16")
    again = history.last_project(LOCAL)
    assert again.prompt == "half a ?" and again.controls == {"seed": 4, "size": "16x16"}


def test_a_recipe_with_a_draft_and_variations_survives_its_columns() -> None:
    draft = Request("a circle", "m", 3, 16, 16, 4, variations=((5, 0.3), (6, 0.5)))
    request = Request("a circle", "m", 4, 32, 32, 4, draft=draft, start=3)
    assert request_of(columns(request)) == request
    assert len({fingerprint(request), fingerprint(draft), fingerprint(Request("a circle", "m", 3, 16, 16, 4))}) == 3
    # The address of a plain recipe must never change: pictures made last year are found by it.
    assert fingerprint(Request("a", "m", 1, 2, 3, 4)) == (
        "0fdcf653b87660a21191cc249473635c9e7ebdbbf7fe2f2eba318b745618bbda"
    )


def test_the_benchmark_times_every_action(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["bench_history", "--rows", "80", "--runs", "2", "--json"])
    bench_history.main()
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["rows"] == 80 and {"open", "some page", "search", "tree of a project"} <= set(facts["seconds"])
    assert all(0 < seconds["median"] <= seconds["p95"] for seconds in facts["seconds"].values())
