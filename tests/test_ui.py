"""What the page says and does, without a browser; and what our own markup may not contain."""

import logging
import re
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

from engine import catalog
from engine.prompt import unknown_words
from engine.types import BadRequest, Cancelled, EngineError, Picture, Request, Seconds, Step
from studio import models, serve, ui
from studio.settings import Settings
from studio.template import ASSETS, filling
from tests.serving import OFFERS


class Scripted:
    """An engine that does as it was told: yields what is given, raises what is an exception."""

    def __init__(self, *script: Step | Picture | Exception) -> None:
        self.script = script
        self.asked: list[Request] = []

    def run(self, request: Request) -> Generator[Step | Picture, None, None]:
        self.asked.append(request)
        for item in self.script:
            if isinstance(item, Exception):
                raise item
            yield item

    def stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(tmp_path, open_browser=False)
    serve.prepare(settings)  # before gradio is first imported
    return settings


def press_generate(engine: Scripted, settings: Settings, **given: object) -> list[ui.Shown]:
    values = {"prompt": "a red circle", "size": "256x256", "seed": 3, "steps": 4, "model": "seedling-ternary"} | given
    return list(ui.Page(engine, settings, OFFERS).generate("tab", **values))  # type: ignore[arg-type]


def a_picture(unknown: tuple[str, ...] = ()) -> Picture:
    request = Request("a red circle", "seedling-ternary", 3, 16, 8, 4)
    return Picture(np.zeros((8, 16, 3), np.uint8), request, "fake", "because", Seconds(total=0.25), 0, unknown)


def test_a_run_from_click_to_picture(settings: Settings) -> None:
    engine = Scripted(Step(0, 2), Step(1, 2), Step(2, 2), a_picture(("astronaut",)))
    shown = press_generate(engine, settings)
    assert engine.asked == [Request("a red circle", "seedling-ternary", 3, 256, 256, 4)]
    texts = [progress["text"] for _, progress, *_ in shown]
    assert texts == ["Getting ready", "Model ready, 2 steps to go", "Step 1 of 2", "Step 2 of 2", ""]
    image, progress, note, go, stop = shown[-1]
    assert Path(image["value"]).is_relative_to(settings.cache) and Path(image["value"]).is_file()
    assert image["alt_text"] == "a red circle"
    assert progress["state"] == "done"
    assert note["caption"] == "16 × 8, seed 3, 4 steps, 0.25 s"
    assert note["unknown"] == "“astronaut”"
    assert Path(note["where"]).is_relative_to(settings.pictures)
    assert (go["interactive"], stop["interactive"]) == (True, False)
    assert [stop["interactive"] for *_, stop in shown[:-1]] == [True] * 4


@pytest.mark.parametrize(
    ("error", "state", "said"),
    [
        (BadRequest("the prompt is empty: say something"), "error", "The prompt is empty: say something."),
        (EngineError("the engine died: try again"), "error", "The engine died: try again."),
        (Cancelled("stopped on request"), "stopped", "Stopped. Nothing was saved."),
    ],
)
def test_a_failure_is_a_sentence(settings: Settings, error: Exception, state: str, said: str) -> None:
    *_, last = press_generate(Scripted(Step(0, 2), error), settings)
    assert (last[1]["state"], last[1]["text"]) == (state, said)
    assert (last[3]["interactive"], last[4]["interactive"]) == (True, False)
    assert list(settings.pictures.rglob("*")) == []


def test_a_bug_of_ours_is_logged_and_named(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        *_, last = press_generate(Scripted(ZeroDivisionError("oops")), settings)
    assert last[1]["text"] == f"Something in Niwaki broke; the details are in {settings.log_file}."
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("field", ["seed", "steps"])
def test_an_empty_number_is_a_sentence(settings: Settings, field: str) -> None:
    engine = Scripted()
    *_, last = press_generate(engine, settings, **{field: None})
    assert "is empty: give a whole number" in last[1]["text"]
    assert engine.asked == []


def test_a_full_disk_is_a_sentence_on_the_page(settings: Settings) -> None:
    settings.pictures.write_text("a file in the way")
    *_, last = press_generate(Scripted(a_picture()), settings)
    assert last[1]["state"] == "error"
    assert "cannot save" in last[1]["text"].lower()


def test_long_lists_of_words_are_cut(settings: Settings) -> None:
    *_, last = press_generate(Scripted(a_picture(tuple("abcdefghijkl"))), settings)
    assert last[2]["unknown"].endswith("“g”, “h” and 4 more")


def test_the_facts_follow_the_model(settings: Settings) -> None:
    page = ui.Page(Scripted(), settings, OFFERS)
    demo, real = (page.facts(offer.model) for offer in OFFERS)
    assert "demo model" in demo["demo"] and real["demo"] == ""
    assert demo["why"] == "Runs on cpu: a test machine."
    assert page.choices("bonsai-binary") == ([("512 × 512", "512x512"), ("96 × 64", "96x64")], 6)


def test_strings_for_templates_are_escaped_all_the_way_down() -> None:
    assert filling(a="${x}", b=[{"c": "C:\\new"}], d=1, e=True) == {
        "a": "\\${x}",
        "b": [{"c": "C:\\\\new"}],
        "d": 1,
        "e": True,
    }


@pytest.mark.parametrize("file", sorted(ASSETS.glob("*.html")), ids=lambda file: file.name)
def test_templates_hold_no_live_parts(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    for live in ("${", "{{{", "{{&", "`", "\\", "<script", "style=", "javascript:", "http:", "https:"):
        assert live not in text, f"{live} in {file.name}"
    assert not re.search(r"\son\w+=", text)
    assert set(re.findall(r"{{[#/]?(\w+)", text)) <= {"if", "each", "else", "value", "this"}


def test_colours_stand_in_the_token_blocks_only() -> None:
    css = (ASSETS / "studio.css").read_text(encoding="utf-8")
    tokens = "".join(re.findall(r"(?:^:root|^\.dark) {.*?^}", css, re.DOTALL | re.MULTILINE))
    rest = css.replace(tokens, "")
    for block in re.findall(r"(?:^:root|^\.dark) {.*?^}", css, re.DOTALL | re.MULTILINE):
        rest = rest.replace(block, "")
    assert "--nw-accent" in tokens
    assert re.findall(r"#[0-9a-fA-F]{3,8}\b(?=\s*[;,)])|rgba?\(|hsl", rest) == []
    assert "url(" not in css and "@import" not in css


def test_the_page_stays_a_gradio_page() -> None:
    """The budget of ../shared/studio.md section 5: few templates, little script, none of it in Python strings."""
    assert len(list(ASSETS.glob("*.html"))) <= 7
    assert sum(len(file.read_text().splitlines()) for file in ASSETS.glob("*.js")) <= 600
    for file in Path(ui.__file__).parent.glob("*.py"):
        assert not re.search(r"<\w+[ >].*</|style=", file.read_text(encoding="utf-8")), file


def test_importing_the_page_does_not_import_gradio() -> None:
    for file in Path(ui.__file__).parent.glob("*.py"):
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not re.match(r"(import|from) gradio", line), file


def test_offers_come_from_the_packs(tmp_path: Path, tiny_packs: Path) -> None:
    offers = models.offers(Settings(tmp_path, model=str(tiny_packs / "binary"), backend="torch"))
    assert offers[0].model == str(tiny_packs / "binary")
    assert offers[0].label == "Tiny binary test pack"
    assert (offers[0].demo, offers[0].steps, offers[0].sizes[0]) == (True, 4, (64, 64))
    assert offers[0].words
    assert "cpu" in offers[0].why or "cuda" in offers[0].why
    with pytest.raises(BadRequest):
        models.offers(Settings(tmp_path, model=str(tmp_path)))


def test_a_damaged_pack_is_left_out(
    tmp_path: Path, tiny_packs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "none")
    folder = tmp_path / "models" / "bonsai-binary"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    offers = models.offers(Settings(tmp_path, model=str(tiny_packs / "ternary"), backend="torch"))
    assert [offer.model for offer in offers] == [str(tiny_packs / "ternary")]
    assert "bonsai-binary is not offered" in caplog.text
    assert [model.id for model in models.installable(tmp_path)] == ["bonsai-ternary", "klein-dense"]


def test_the_examples_use_only_words_that_the_shipped_model_knows(tmp_path: Path) -> None:
    if "seedling-ternary" not in catalog.installed(tmp_path):
        pytest.skip("the seedling has not been exported yet")
    from engine.packs import open_pack

    vocabulary = open_pack(catalog.find("seedling-ternary", tmp_path)).notes.vocabulary
    assert {example: unknown_words(example, vocabulary) for example in ui.EXAMPLES} == dict.fromkeys(ui.EXAMPLES, ())
