"""What the page says and does, without a browser."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.types import BadRequest, Request
from studio import jobs, library, models, page, views
from studio.desk import Desk
from studio.history import History
from studio.jobs import Jobs
from studio.page import Look, Page
from studio.rows import LOCAL, WAITING, Image
from studio.runs import CONTROLS, Runs
from studio.settings import Settings
from studio.shelf import Shelf
from tests.rows import InlineEngine
from tests.serving import OFFERS

STUDIO = Path(page.__file__).parent
DEFAULTS = {
    "size": "64x64", "quality": "full", "seed": 3, "lock": True, "steps": 2, "model": "seedling-ternary", "base": 0,
    "past": None,
}  # fmt: skip


class Desktop:
    """A page with everything behind it but gradio, and one tab."""

    def __init__(self, history: History, jobs: Jobs, settings: Settings) -> None:
        self.history, self.jobs = history, jobs
        self.page = Page(history, jobs, settings, OFFERS)
        self.runs, self.desk, self.shelf = Runs(self.page), Desk(self.page), Shelf(self.page)
        self.tab = self.page.tab("tab")

    def run(self, prompt: str, shown: object = None, count: int = 1, **given: Any) -> list[Look]:
        return list(self.runs.run(self.tab, prompt, DEFAULTS | given, shown, count))

    def make(self, prompt: str, **given: Any) -> Image:
        look = last(self.run(prompt, **given), "stage")
        return self.history.image(LOCAL, look["a"]["id"])


def last(looks: list[Look], name: str) -> Any:
    return next(look[name] for look in reversed(looks) if name in look)


@pytest.fixture
def desktop(tmp_path: Path) -> Iterator[Desktop]:
    settings = Settings(tmp_path, backend="fake", open_browser=False)
    with (
        closing(History(tmp_path)) as history,
        closing(Jobs(history, InlineEngine())) as jobs,
    ):
        yield Desktop(history, jobs, settings)


def test_a_run_from_enter_to_the_stage(desktop: Desktop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "GLANCE", 0.0)
    looks = desktop.run("a red circle")
    assert looks[0]["progress"]["state"] == "busy"
    steps = [look["progress"]["text"] for look in looks if look.get("progress", {}).get("text", "").startswith("Step")]
    assert steps and steps[-1].startswith("Step 2 of 2")
    stage, caption = last(looks, "stage"), last(looks, "caption")
    assert (stage["mode"], stage["b"], stage["a"]["alt"]) == ("one", "", "a red circle")
    assert [fact["text"] for fact in caption["facts"]][:4] == ["ternary", "seed 3", "64 × 64", "2 steps"]
    assert last(looks, "progress")["state"] == "idle"
    assert last(looks, "queue")["summary"] == "Queue empty"
    assert last(looks, "revisions")["rows"][0]["label"] == "r1"
    assert (desktop.history.project(LOCAL, desktop.tab.project).prompt) == "a red circle"


def test_the_second_run_shows_new_over_previous_with_the_words_that_changed(desktop: Desktop) -> None:
    first = desktop.make("a red circle on a table")
    shown = {"a": {"id": first.id}}
    looks = desktop.run("a blue circle on a table", shown, base=first.revision, steps=3)
    stage, caption = last(looks, "stage"), last(looks, "caption")
    assert (stage["mode"], stage["b"]["id"]) == ("slider", first.id)
    assert [w["text"] for w in caption["words"] if w["gone"]] == ["red"]
    assert [w["text"] for w in caption["words"] if w["added"]] == ["blue"]
    assert {"text": "2 steps → 3 steps", "kind": "differs"} in caption["facts"]
    assert {"text": "seed 3", "kind": ""} in caption["facts"]


def test_four_seeds_are_four_pictures_and_the_first_takes_the_stage(desktop: Desktop) -> None:
    looks = desktop.run("a red circle", count=4)
    strip = last(looks, "strip")
    assert len(strip["pictures"]) == 4 and len({picture["name"] for picture in strip["pictures"]}) == 4
    assert strip["batch"] == [picture["id"] for picture in strip["pictures"]]
    assert last(looks, "stage")["a"]["id"] == strip["batch"][0]
    assert "seed" not in looks[0]  # the locked seed stays what it was


def test_an_unlocked_seed_is_new_each_time_and_shown(desktop: Desktop) -> None:
    seeds = {desktop.run("a red circle", lock=False)[0]["seed"] for _ in range(3)}
    assert len(seeds) > 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "  "}, "The prompt is empty"),
        ({"seed": None}, "The seed is empty: give a whole number."),
        ({"steps": None}, "The number of steps is empty: give a whole number."),
        ({"seed": -5}, "Seed -5 is out of range"),
        ({"model": "nonsense"}, "The model 'nonsense' is not installed"),
    ],
)
def test_what_cannot_work_is_a_sentence(desktop: Desktop, given: dict[str, Any], said: str) -> None:
    prompt = given.pop("prompt", "a red circle")
    (look,) = desktop.run(prompt, **given)
    assert look["progress"]["state"] == "error" and look["progress"]["text"].startswith(said)
    assert desktop.history.jobs(LOCAL) == ()


def test_a_bug_of_ours_is_logged_and_named(desktop: Desktop, caplog: pytest.LogCaptureFixture) -> None:
    look = desktop.page.refused(ZeroDivisionError("oops"))
    assert look["progress"]["text"].startswith("Something in Niwaki broke; the details are in")
    assert "ZeroDivisionError" in caplog.text


def test_the_other_model_and_a_variation_stand_under_their_picture(desktop: Desktop) -> None:
    image = desktop.make("a red circle")
    looks = list(desktop.runs.other_model(desktop.tab, image.id))
    assert last(looks, "stage")["a"]["id"] != image.id and last(looks, "stage")["b"]["id"] == image.id
    assert {"text": "ternary → binary", "kind": "differs"} in last(looks, "caption")["facts"]
    looks = list(desktop.runs.operate(desktop.tab, "vary", image.id))
    varied = desktop.history.image(LOCAL, last(looks, "stage")["a"]["id"])
    assert (varied.parent, varied.op, len(varied.request.variations)) == (image.id, "vary subtle", 1)
    assert [(row["how"], row["depth"]) for row in last(looks, "tree")["rows"]] == [
        ("", 0), ("on binary", 1), ("vary subtle", 1),
    ]  # fmt: skip


def test_a_draft_is_refined_to_the_full_size(desktop: Desktop) -> None:
    draft = desktop.make("a red circle", quality="draft", size="256x256")
    assert (draft.request.width, draft.request.height) == (128, 128)
    looks = list(desktop.runs.operate(desktop.tab, "refine", draft.id))
    refined = desktop.history.image(LOCAL, last(looks, "stage")["a"]["id"]).request
    assert (refined.width, refined.height, refined.draft) == (256, 256, draft.request)


def test_keep_reject_and_neither(desktop: Desktop) -> None:
    image = desktop.make("a red circle")
    for rating, kept, count in (("kept", True, 1), ("rejected", False, 0), ("", None, 0)):
        look = desktop.desk.rate(desktop.tab, image.id, rating)
        assert desktop.history.image(LOCAL, image.id).kept is kept
        assert (look["strip"]["kept"], look["tree"]["rows"][0]["rating"]) == (count, rating)


def test_a_mark_that_is_refused_is_taken_back(desktop: Desktop, monkeypatch: pytest.MonkeyPatch) -> None:
    image = desktop.make("a red circle")

    def full(*_: object) -> None:
        raise BadRequest("the disk is full: make room")

    monkeypatch.setattr(desktop.history, "keep", full)
    look, second = (desktop.desk.rate(desktop.tab, image.id, "kept") for _ in range(2))
    assert look["progress"]["text"] == "The disk is full: make room."
    assert (look["stage"]["a"]["rating"], look["strip"]["pictures"][0]["rating"]) == ("", "")
    for name in ("stage", "strip", "tree"):  # gradio draws nothing again that is equal to what it drew last
        assert look[name] != second[name]


def test_tags_are_replaced_by_what_was_typed(desktop: Desktop) -> None:
    image = desktop.make("a red circle")
    desktop.desk.tag(desktop.tab, image.id, "sea,  wide   poster ,sea")
    assert desktop.history.image(LOCAL, image.id).tags == ("sea", "wide poster")
    desktop.desk.tag(desktop.tab, image.id, "sea")
    assert desktop.history.image(LOCAL, image.id).tags == ("sea",)


def test_the_bin_gives_back(desktop: Desktop) -> None:
    first, second = desktop.make("a red circle"), desktop.make("a blue circle")
    look = desktop.desk.bin(desktop.tab, second.id)
    assert look["stage"]["a"]["id"] == first.id and look["undo"] is True
    assert [picture["id"] for picture in look["strip"]["pictures"]] == [first.id]
    look = desktop.desk.undo(desktop.tab)
    assert look["stage"]["a"]["id"] == second.id and len(look["strip"]["pictures"]) == 2
    assert desktop.desk.undo(desktop.tab)["progress"]["text"] == "There is nothing to undo."


def test_a_revision_comes_back_and_the_next_run_branches_from_it(desktop: Desktop) -> None:
    first = desktop.make("a red circle")
    desktop.make("a blue circle", base=first.revision)
    look = desktop.desk.restore(desktop.tab, first.revision)
    assert (look["prompt"], look["base"], look["stage"]["a"]["id"]) == ("a red circle", first.revision, first.id)
    desktop.make("a green circle", base=look["base"])
    assert [row.label for row in desktop.history.revisions(LOCAL, desktop.tab.project)] == ["r1", "r2", "r1a"]
    names = [row["name"].split(" ")[0] for row in desktop.page.paint(desktop.tab)["tree"]["rows"]]
    assert names == ["r1", "r1a", "r2"]  # the branch stands below what it left


def test_reuse_restores_every_setting(desktop: Desktop) -> None:
    image = desktop.make("a red circle", seed=77, size="192x128", steps=3, model="seedling-binary")
    look = desktop.desk.reuse(desktop.tab, image.id)
    assert {name: look[name] for name in ("prompt", "seed", "steps", "size", "model", "base")} == {
        "prompt": "a red circle", "seed": 77, "steps": 3, "size": ("seedling-binary", "192x128"),
        "model": "seedling-binary", "base": image.revision,
    }  # fmt: skip


def test_reuse_takes_the_noise_and_the_draft_along(desktop: Desktop) -> None:
    image = desktop.make("a red circle")
    varied = last(list(desktop.runs.operate(desktop.tab, "vary", image.id)), "stage")["a"]["id"]
    refined = last(list(desktop.runs.operate(desktop.tab, "refine", varied)), "stage")["a"]["id"]
    for id, said in ((varied, "1 variation mixed in"), (refined, "Drawn from its draft of 64 × 64")):
        want = desktop.history.image(LOCAL, id).request
        look = desktop.desk.reuse(desktop.tab, id)
        assert look["unmix"].startswith(said[0].upper() + said[1:])
        controls = {name: look.get(name, DEFAULTS[name]) for name in CONTROLS} | {"size": look["size"][1]}
        assert desktop.runs.request(look["prompt"], controls) == want
        other = desktop.runs.request("a blue circle", controls)
        assert (other.prompt, other.variations) == ("a blue circle", want.variations)
        assert other.draft is None or other.draft.prompt == "a blue circle"  # words go through the whole chain
        fresh = desktop.runs.request(look["prompt"], controls | {"seed": 4})
        assert (fresh.variations, fresh.draft, fresh.start) == ((), None, 0)
    assert desktop.desk.reuse(desktop.tab, image.id)["past"] is None


def test_four_new_seeds_leave_the_reused_noise_behind(desktop: Desktop) -> None:
    image = desktop.make("a red circle")
    varied = last(list(desktop.runs.operate(desktop.tab, "vary", image.id)), "stage")["a"]["id"]
    past = desktop.desk.reuse(desktop.tab, varied)["past"]
    desktop.run("a red circle", count=4, past=past)
    assert all(not job.request.variations for job in desktop.history.jobs(LOCAL)[-4:])


def test_what_memory_cannot_hold_is_refused_before_it_is_queued(
    desktop: Desktop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_big(engine: InlineEngine, request: Request) -> int:
        raise BadRequest("a 64x64 picture needs 9.0 GB: the largest size that fits is 32x32")

    monkeypatch.setattr(InlineEngine, "foresee", too_big)
    (look,) = desktop.run("a red circle")
    assert look["progress"]["text"].endswith("the largest size that fits is 32x32.")
    assert desktop.history.jobs(LOCAL) == ()


def test_a_model_from_another_tab_is_in_the_list_within_a_tick(desktop: Desktop) -> None:
    desktop.page.whole(desktop.tab, None)
    assert "model" not in desktop.page.tick(desktop.tab)
    desktop.page.offers["bonsai-new"] = OFFERS[2]
    assert desktop.page.tick(desktop.tab)["grid_models"] is None
    assert "model" not in desktop.page.tick(desktop.tab)


def test_a_page_that_opens_is_as_it_was_left(desktop: Desktop) -> None:
    image = desktop.make("a red circle", seed=5)
    desktop.runs.save(desktop.tab, "a red circle and m", DEFAULTS | {"seed": 9, "lock": False, "base": image.revision})
    look = desktop.page.whole(desktop.page.tab("another"), None)
    assert (look["prompt"], look["seed"], look["lock"]) == ("a red circle and m", 9, False)
    assert look["stage"]["a"]["id"] == image.id
    assert [w["text"] for w in look["diff"]["words"] if w["added"]] == ["and m"]


def test_a_tab_is_followed_once(desktop: Desktop) -> None:
    follower = desktop.page.follow(desktop.tab)
    next(follower)
    assert list(desktop.page.follow(desktop.tab)) == []
    follower.close()
    assert next(desktop.page.follow(desktop.tab)) is not None


def test_a_follower_that_fell_asleep_is_replaced(desktop: Desktop, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep = desktop.page.follow(desktop.tab)
    next(asleep)
    monkeypatch.setattr(page, "ASLEEP", 0.0)
    awake = desktop.page.follow(desktop.tab)
    assert next(awake) is not None
    monkeypatch.setattr(page, "ASLEEP", 60.0)
    assert list(asleep) == []  # it wakes up, finds another in its place and leaves
    awake.close()


def test_steps_too_quick_to_read_are_not_told_and_the_picture_comes_before_the_lists(desktop: Desktop) -> None:
    looks = desktop.run("a red circle", steps=20)  # 20 ms each
    assert sum("Step" in look.get("progress", {}).get("text", "") for look in looks) < 10
    order = [name for look in looks for name in ("stage", "strip") if name in look]
    assert order.index("stage") < len(order) - 1 and order[-1] == "strip"
    assert not any("stage" in look and "strip" in look for look in looks)


def test_a_queue_read_too_early_does_not_lose_a_picture(desktop: Desktop) -> None:
    request = desktop.runs.request("a red circle", DEFAULTS | {"steps": 50})
    (job,) = desktop.jobs.submit(LOCAL, desktop.tab.project, request)
    desktop.runs.expect(desktop.tab, [job], None)
    news = list(desktop.page._news(desktop.tab, []))  # what a follower knows that looked just before
    assert not any("stage" in look for look in news) and job.id in desktop.tab.waiting
    desktop.jobs.cancel(LOCAL, job.id)
    list(desktop.page.follow(desktop.tab))
    assert desktop.tab.waiting == {}


def test_a_follower_of_an_idle_tab_lingers_and_leaves_the_last_word(
    desktop: Desktop, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = desktop.make("a red circle")
    monkeypatch.setattr(page, "BEAT", 0.0)
    monkeypatch.setattr(jobs, "HEARTBEAT", 0.01)
    desktop.page.linger = 0.2
    desktop.tab.shown |= desktop.desk.tag(desktop.tab, image.id, "sea")
    looks = list(desktop.page.follow(desktop.tab))
    assert len(looks) > 3 and not any("progress" in look for look in looks)


def test_ids_that_are_not_there_are_sentences(desktop: Desktop) -> None:
    for nonsense in (0, 99, None, "x", -1):
        assert desktop.desk.open(desktop.tab, nonsense)["progress"]["state"] == "error"
        (look,) = desktop.runs.operate(desktop.tab, "vary", nonsense)
        assert look["progress"]["state"] == "error"
    (look,) = desktop.runs.operate(desktop.tab, "rm -rf", 1)
    assert look["progress"]["text"].startswith("'rm -rf' is not an action")


def test_the_queue_is_steered_by_id(desktop: Desktop) -> None:
    project = desktop.tab.project
    request = desktop.runs.request("a red circle", DEFAULTS | {"steps": 50})
    jobs = desktop.jobs.submit(LOCAL, project, *[request] * 3)
    *_, look = desktop.runs.steer(desktop.tab, jobs[2].id, "sooner")
    waiting = [row["id"] for row in look["queue"]["rows"] if row["can_move"]]
    assert waiting.index(jobs[2].id) < waiting.index(jobs[1].id)
    *_, look = desktop.runs.steer(desktop.tab, jobs[1].id, "cancel")
    states = {row["id"]: row["state"] for row in look["queue"]["rows"]}
    assert (states[jobs[1].id], states[jobs[2].id]) == ("stopped", "waiting")
    for job in (jobs[0], jobs[2]):
        desktop.jobs.cancel(LOCAL, job.id)
    for job in desktop.jobs.watch(LOCAL, jobs[0].id):
        last_state = job.state
    assert last_state == "stopped"


def test_stop_ends_all_that_one_click_began(desktop: Desktop) -> None:
    request = desktop.runs.request("a red circle", DEFAULTS | {"steps": 50})
    four = desktop.jobs.submit(LOCAL, desktop.tab.project, *[request] * 4)
    (later,) = desktop.jobs.submit(LOCAL, desktop.tab.project, replace(request, steps=2))
    assert desktop.runs.stop(desktop.tab) == {}
    for ended in desktop.jobs.watch_batch(LOCAL, four[0].batch):
        states = [job.state for job in ended]
    assert states == ["stopped"] * 4
    *_, made = desktop.jobs.watch(LOCAL, later.id)
    assert made.state == "done"


def test_the_library_filters_pages_and_opens(desktop: Desktop, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [desktop.make(f"a red circle {number}") for number in range(3)]
    desktop.desk.rate(desktop.tab, made[0].id, "kept")
    look = desktop.shelf.look(desktop.tab, {"show": "kept"})
    assert [picture["id"] for picture in look["grid"]["pictures"]] == [made[0].id]
    look = desktop.shelf.look(desktop.tab, {"text": "circle 2"})
    assert [picture["id"] for picture in look["grid"]["pictures"]] == [made[2].id]
    look = desktop.shelf.pick(desktop.tab, made[1].id, "bin", {"show": "bin"}, [])
    assert [picture["id"] for picture in look["grid"]["pictures"]] == [made[1].id]
    look = desktop.shelf.pick(desktop.tab, made[1].id, "restore", {"show": "all"}, [])
    assert look["found"] == "1 to 3 of 3"
    assert desktop.shelf.look(desktop.tab, {"text": "nothing of it"})["found"] == "Nothing found"
    stacked = desktop.shelf.look(desktop.tab, {"stacked": True})
    assert [picture["stack"] for picture in stacked["grid"]["pictures"]] == ["1 picture"] * 3
    look = desktop.shelf.pick(desktop.tab, made[0].id, "open", {}, [])
    assert look["stage"]["a"]["id"] == made[0].id
    assert library.PAGE >= 50


def test_the_library_pages_stacks_too(desktop: Desktop, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [desktop.make(f"a red circle {number}") for number in range(3)]
    monkeypatch.setattr(library, "PAGE", 2)
    first = desktop.shelf.look(desktop.tab, {"stacked": True})
    assert (first["found"], first["back"], first["older"]) == ("1 to 2 of 3 revisions", False, True)
    second = desktop.shelf.look(desktop.tab, {"stacked": True}, [first["next"]])
    assert [picture["id"] for picture in second["grid"]["pictures"]] == [made[0].id]
    assert (second["found"], second["back"], second["older"]) == ("3 to 3 of 3 revisions", True, False)


def test_a_picture_of_another_project_opens_with_its_prompt_and_controls(desktop: Desktop) -> None:
    image, before = desktop.make("a red circle"), desktop.tab.project
    desktop.runs.save(desktop.tab, "being typed", DEFAULTS | {"seed": 77})
    desktop.page.whole(desktop.tab, desktop.history.new_project(LOCAL, "Other").id)
    look = desktop.shelf.pick(desktop.tab, image.id, "open", {}, [])
    assert (look["project"][1], look["prompt"], look["seed"]) == (before, "being typed", 77)
    assert look["stage"]["a"]["id"] == image.id


def test_what_waits_says_how_many_come_before_it(desktop: Desktop) -> None:
    (job,) = desktop.jobs.submit(LOCAL, desktop.tab.project, desktop.runs.request("a red circle", DEFAULTS))
    waiting = replace(job, state=WAITING)
    assert views.progress([waiting], lambda job: 3)["text"] == "Waiting, 3 pictures before yours"
    assert views.progress([waiting], lambda job: 1)["text"] == "Waiting, 1 picture before yours"
    (row,) = views.queue([waiting], {}, lambda job: 2)["rows"]
    assert row["text"] == "Waiting, 2 pictures before yours."


def test_the_facts_follow_the_model(desktop: Desktop) -> None:
    demo, real = (desktop.page.facts(offer.model) for offer in (OFFERS[0], OFFERS[2]))
    assert "demo model" in demo["demo"] and real["demo"] == ""
    assert demo["why"] == "Runs on cpu: a test machine."
    assert desktop.page.controls({"model": "bonsai-binary"})["size"] == ("bonsai-binary", "512x512")
    assert models.sibling(OFFERS[0], OFFERS) is OFFERS[1] and models.sibling(OFFERS[2], OFFERS) is None


def test_controls_have_one_name_everywhere() -> None:
    assert set(CONTROLS) == set(DEFAULTS)


def test_long_lists_of_words_are_cut() -> None:
    assert views.listed(tuple("abcdefghijkl")).endswith("“g”, “h” and 4 more")
