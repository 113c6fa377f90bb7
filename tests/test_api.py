"""The public functions as other programs call them, through gradio_client."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from engine.chain import STRENGTHS
from studio import api, pictures
from tests.serving import Served, served

client = pytest.importorskip("gradio_client")


@pytest.fixture(scope="module")
def served_page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("api")) as page:
        yield page


@pytest.fixture(scope="module")
def caller(served_page: Served) -> Iterator[Any]:
    made = client.Client(served_page.address, verbose=False, analytics_enabled=False)
    yield made
    made.close()


def test_the_endpoints_are_typed_and_documented(caller: Any) -> None:
    named = caller.view_api(return_format="dict")["named_endpoints"]
    assert {f"/{name}" for name in api.NAMES} == set(named)
    generate = {parameter["parameter_name"]: parameter for parameter in named["/generate"]["parameters"]}
    assert list(generate) == ["prompt", "model", "seed", "width", "height", "steps"]
    assert generate["seed"]["python_type"]["type"] == "int" and generate["seed"]["parameter_default"] == 0
    assert "prompt" in named["/generate"]["description"].lower() or named["/generate"]["description"]


def recipe_of(page: Served, made: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe inside the PNG at the address that an answer gives."""
    with urlopen(page.address.rstrip("/") + made["address"], timeout=60) as answer:
        (folder / "a.png").write_bytes(answer.read())
    return pictures.read_recipe(folder / "a.png")


def test_generate_vary_and_find_again(caller: Any, served_page: Served, tmp_path: Path) -> None:
    made = caller.predict(prompt="a red circle", seed=7, width=64, height=64, steps=2, api_name="/generate")
    assert (made["prompt"], made["seed"], made["width"], made["steps"]) == ("a red circle", 7, 64, 2)
    assert recipe_of(served_page, made, tmp_path)["seed"] == 7
    varied = caller.predict(picture=made["id"], strength="strong", seed=9, api_name="/vary")
    assert varied["parent"] == made["id"] and varied["operation"] == "vary strong"
    assert recipe_of(served_page, varied, tmp_path)["variations"] == [[9, STRENGTHS["strong"]]]
    found = caller.predict(text="red cir", limit=5, api_name="/history")
    assert [image["id"] for image in found] == [varied["id"], made["id"]]
    assert caller.predict(kept=True, api_name="/history") == []


def test_models_and_refusals(caller: Any, served_page: Served) -> None:
    listed = caller.predict(api_name="/models")
    assert listed[0]["id"] == "seedling-ternary" and [256, 256] in listed[0]["sizes"]
    for asked, words in (
        (dict(prompt=" ", api_name="/generate"), "the prompt is empty"),
        (dict(prompt="a", width=64, api_name="/generate"), "both sides"),
        (dict(picture=999, api_name="/vary"), "picture 999 is not here"),
        (dict(limit=0, api_name="/history"), "limit 0 is out of range"),
    ):
        with pytest.raises(client.exceptions.AppError, match=words):
            caller.predict(**asked)
