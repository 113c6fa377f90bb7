"""Who may talk to the page. Every route is asked with raw requests, as an attacker would."""

import asyncio
import http.client
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from studio import privacy
from tests.serving import Served, served

WRITES = {"POST", "PUT", "PATCH", "DELETE"}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("privacy")) as page:
        yield page


def ask(page: Served, method: str, path: str, **headers: str) -> tuple[int, str]:
    """Status and the first kilobyte; event streams never end, so no more is read."""
    netloc = urlsplit(page.address).netloc
    connection = http.client.HTTPConnection(netloc, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": netloc, "Content-Length": "0", **headers}.items():
        connection.putheader(name, value)
    connection.endheaders()
    response = connection.getresponse()
    status, text = response.status, response.read1(1024).decode(errors="replace") if method != "HEAD" else ""
    connection.close()
    return status, text


def routes(page: Served) -> list[tuple[str, str]]:
    """(method, path) of everything gradio answers to, with every parameter filled in."""

    def walk(found: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
        for route in found:
            inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
            path = prefix + getattr(route, "path", "")
            if inner:
                yield from walk(inner, path)
            for method in sorted(getattr(route, "methods", None) or ()):
                yield method, re.sub(r"{[^}]*}", "x", path)

    return sorted(set(walk(page.blocks.app.routes)))


def test_there_are_routes_to_test(page: Served) -> None:
    found = routes(page)
    assert len(found) > 40
    assert ("POST", "/gradio_api/queue/join") in found
    assert {"GET", "HEAD", "POST"} <= {method for method, _ in found}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "127.0.0.1@evil", ""])
def test_no_route_answers_a_foreign_host(page: Served, host: str) -> None:
    for method, path in routes(page):
        status, text = ask(page, method, path, Host=host)
        assert status == 400, (method, path)
        assert method == "HEAD" or "Niwaki does not answer to the host" in text, (method, path)


def test_a_second_host_header_is_refused(page: Served) -> None:
    port = urlsplit(page.address).port
    with socket.create_connection(("127.0.0.1", port or 0), timeout=60) as raw:
        lines = ("GET / HTTP/1.1", f"Host: 127.0.0.1:{port}", "Host: evil.example", "Connection: close", "", "")
        raw.sendall("\r\n".join(lines).encode())
        assert b" 400 " in raw.recv(100)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "file://", "http://127.0.0.1:1", "http://localhost:3000"]
)
def test_no_route_takes_orders_from_a_foreign_origin(page: Served, origin: str) -> None:
    asked = 0
    for method, path in routes(page):
        if method in WRITES:
            status, text = ask(page, method, path, Origin=origin)
            assert (status, "takes no orders" in text) == (403, True), (method, path)
            asked += 1
    assert asked > 8


def test_a_foreign_preflight_gets_no_permission(page: Served) -> None:
    netloc = urlsplit(page.address).netloc
    connection = http.client.HTTPConnection(netloc, timeout=60)
    headers = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    connection.request("OPTIONS", "/gradio_api/queue/join", headers=headers)
    assert connection.getresponse().getheader("Access-Control-Allow-Origin") is None
    connection.close()


def test_the_page_itself_may(page: Served) -> None:
    netloc = urlsplit(page.address).netloc
    port = urlsplit(page.address).port
    assert ask(page, "GET", "/")[0] == 200
    assert ask(page, "GET", "/", Host=f"localhost:{port}")[0] == 200
    assert ask(page, "GET", "/", Host=f"[::1]:{port}")[0] == 200
    assert ask(page, "GET", "/", Origin="https://evil.example")[0] == 200  # reading what anybody may read
    for origin in (f"http://{netloc}", f"http://{netloc}".upper()):
        assert ask(page, "POST", "/gradio_api/queue/join", Origin=origin)[0] == 422  # let in, and found empty
    assert ask(page, "POST", "/gradio_api/queue/join")[0] == 422  # a program that is no browser


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=https://example.com/a.png",
        "/gradio_api/file=HTTP://example.com/a.png",
        "/gradio_api/file=http%3A//example.com/a.png",
        "/gradio_api/proxy=https://x.hf.space/a",
        "/file=https://example.com/a.png",
    ],
)
def test_the_page_runs_no_errands(page: Served, path: str) -> None:
    for method in ("GET", "HEAD"):
        assert ask(page, method, path)[0] == 403


def test_only_the_cache_is_handed_out(page: Served) -> None:
    data = page.settings.data_dir
    (data / "pictures").mkdir(exist_ok=True)
    (data / "pictures" / "private.png").write_bytes(b"private")
    (page.settings.cache / "shown.png").write_bytes(b"shown")
    assert ask(page, "GET", f"/gradio_api/file={page.settings.cache}/shown.png") == (200, "shown")
    for path in (
        data / "pictures" / "private.png",
        page.settings.log_file,
        page.settings.cache / ".." / "pictures" / "private.png",
        Path(__file__),
        "/etc/passwd",
    ):
        assert ask(page, "GET", f"/gradio_api/file={path}")[0] in (403, 404), path


def test_the_browser_is_told_to_load_nothing_from_elsewhere(page: Served) -> None:
    connection = http.client.HTTPConnection(urlsplit(page.address).netloc, timeout=60)
    connection.request("GET", "/")
    policy = connection.getresponse().getheader("Content-Security-Policy") or ""
    connection.close()
    assert "default-src 'self'" in policy
    assert "http" not in policy and "*" not in policy


def handshake(hosts: tuple[str, ...], any_address: bool, **headers: str) -> list[dict[str, Any]]:
    """What a WebSocket handshake is answered with, and [] when it was let through."""
    sent: list[dict[str, Any]] = []

    async def app(*_: Any) -> None: ...

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "websocket", "path": "/ws", "headers": raw}
    asyncio.run(privacy.Guard(app, hosts, any_address)(scope, receive, send))
    return sent


def test_sockets_are_held_to_the_same_rules() -> None:
    hosts = privacy.trusted_hosts("127.0.0.1")
    assert handshake(hosts, False, Host="127.0.0.1:7860", Origin="http://127.0.0.1:7860") == []
    assert handshake(hosts, False, Host="127.0.0.1:7860", Origin="http://evil.example")[0]["type"] == "websocket.close"
    assert handshake(hosts, False, Host="evil.example", Origin="http://evil.example")[0]["type"] == "websocket.close"


def test_listening_everywhere_means_addresses_not_names() -> None:
    hosts = privacy.trusted_hosts("0.0.0.0")
    assert handshake(hosts, True, Host="192.168.1.5:7860", Origin="http://192.168.1.5:7860") == []
    assert handshake(hosts, True, Host="[fe80::1]:7860", Origin="http://[fe80::1]:7860") == []
    assert handshake(hosts, True, Host=socket.gethostname(), Origin=f"http://{socket.gethostname()}") == []
    assert handshake(hosts, True, Host="evil.example", Origin="http://evil.example") != []
    assert handshake(privacy.trusted_hosts("192.168.1.5"), False, Host="192.168.1.5:1") == []
    assert handshake(privacy.trusted_hosts("192.168.1.5"), False, Host="192.168.1.6:1") != []


def test_a_space_answers_to_its_own_address(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"Host": "someone-niwaki.hf.space", "Origin": "https://someone-niwaki.hf.space"}
    assert handshake(privacy.trusted_hosts("0.0.0.0"), True, **there) != []
    monkeypatch.setenv("SPACE_ID", "someone/niwaki")
    monkeypatch.setenv("SPACE_HOST", "someone-niwaki.hf.space")
    assert handshake(privacy.trusted_hosts("0.0.0.0"), True, **there) == []
    assert "leaves your device" in privacy.reach("0.0.0.0")[0]


def test_the_promise_is_only_made_where_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert privacy.reach("127.0.0.1") == ("nothing leaves this machine", False)
    assert privacy.reach("::1")[1] is False
    assert privacy.reach("0.0.0.0")[1] is True
    assert privacy.reach("192.168.1.5")[1] is True
