"""A Space as its visitors meet it over HTTP: a banner, no library, no stranger's pictures, nothing left behind."""

import json
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as Ask
from urllib.request import urlopen

import pytest

from studio import space
from studio import tables as t
from tests.serving import Served, served

client = pytest.importorskip("gradio_client")
SMALL = dict(seed=7, width=64, height=64, steps=2)


@pytest.fixture(scope="module")
def visited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPACE_ID", "somebody/niwaki")
        with served(tmp_path_factory.mktemp("space")) as page:
            yield page


def visitor(page: Served) -> Any:
    return client.Client(page.address, verbose=False, analytics_enabled=False)


def owners(page: Served) -> set[str]:
    """Everybody who has a row of any kind."""
    import sqlalchemy as sa

    columns = (t.project.c.owner, t.job.c.owner, t.image.c.owner)
    query = sa.union(*(sa.select(column) for column in columns))
    return set(page.history.store.read(lambda db: list(db.execute(query).scalars())))


def status(address: str) -> int:
    try:
        with urlopen(address, timeout=30) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def call(page: Served, name: str, *data: Any) -> Any:
    """An endpoint without a session, as curl calls it."""
    base = f"{page.address}gradio_api/call/{name}"
    body = json.dumps({"data": data}).encode()
    with urlopen(Ask(base, body, {"Content-Type": "application/json"}), timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urlopen(f"{base}/{event}", timeout=60) as answer:
        lines = answer.read().decode().split("\n")
    assert "event: complete" in lines, lines
    return json.loads(next(line for line in lines if line.startswith("data: "))[6:])[0]


def test_the_page_has_a_banner_and_no_library_and_no_data_folder(visited: Served) -> None:
    with urlopen(f"{visited.address}config", timeout=30) as answer:
        text = answer.read().decode()
    parts = {part["props"].get("elem_id"): part["props"] for part in json.loads(text)["components"]}
    assert "your prompt leaves your device" in parts["brand"]["value"]["reach"] and parts["brand"]["value"]["open"]
    assert {"library", "open-library", "storage", "empty-bin"}.isdisjoint(parts)
    assert {"name", "rename", "drop-project"} <= set(parts)  # a visitor's own project is theirs to name and delete
    assert str(visited.settings.data_dir) not in text


def test_strangers_see_nothing_of_each_other_and_leave_nothing(visited: Served) -> None:
    ann, bob = visitor(visited), visitor(visited)
    made = ann.predict(prompt="a secret", **SMALL, api_name="/generate")
    address = visited.address.rstrip("/") + made["address"]
    assert status(address) == 200
    assert [image["id"] for image in ann.predict(api_name="/history")] == [made["id"]]
    assert bob.predict(api_name="/history") == []
    with pytest.raises(client.exceptions.AppError, match="not here"):
        bob.predict(picture=made["id"], api_name="/vary")
    theirs = bob.predict(prompt="another secret", **SMALL, api_name="/generate")
    assert [image["id"] for image in bob.predict(api_name="/history")] == [theirs["id"]]
    ann.close()
    until = time.monotonic() + 60
    while space.owner(ann.session_hash) in owners(visited):
        assert time.monotonic() < until, "what a visitor made stays after the visit"
        time.sleep(0.05)
    assert status(address) == 404 and status(visited.address.rstrip("/") + theirs["address"]) == 200
    bob.close()


@pytest.mark.slow
def test_callers_without_a_session_are_strangers_too_and_are_forgotten(
    visited: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = call(visited, "generate", "a third secret", "", 7, 64, 64, 2)
    assert made["prompt"] == "a third secret"
    assert call(visited, "history", "", False, 20) == []
    monkeypatch.setattr(space, "IDLE", 0.0)
    again = call(visited, "generate", "a fourth secret", "", 7, 64, 64, 2)
    assert status(visited.address.rstrip("/") + made["address"]) == 404
    assert status(visited.address.rstrip("/") + again["address"]) == 200
