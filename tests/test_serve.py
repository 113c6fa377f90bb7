"""Serving as a person does it: another process, its words, its log, its end; and no connection to the outside."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from engine.types import BadRequest
from studio import pictures, serve
from studio.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60  # seconds in which a server ends or answers on the busiest machine

START = """
import sys
from pathlib import Path
from studio.serve import serve
from studio.settings import Settings
data, port, model, backend = sys.argv[1:]
settings = Settings(Path(data), port=int(port), model=model, backend=backend, open_browser=False)
serve(settings, say=lambda text: print(text, flush=True))
"""

# Python imports this module in every process it starts, the engine's child too: who is talked to is written down.
SPY = """
import os, socket
def note(text):
    with open(os.environ["SPY_FILE"], "a") as file:
        file.write(f"{text}\\n")
note(f"watching {os.getpid()}")
def spied(real):
    def call(*args, **kwargs):
        note([arg for arg in args if not isinstance(arg, socket.socket)])
        return real(*args, **kwargs)
    return call
class Spied(socket.socket):
    connect, connect_ex, sendto = (spied(getattr(socket.socket, name)) for name in ("connect", "connect_ex", "sendto"))
socket.socket, socket.getaddrinfo = Spied, spied(socket.getaddrinfo)
"""


@contextmanager
def running(tmp_path: Path, port: int, model: str = "seedling-ternary", backend: str = "fake") -> Iterator[Any]:
    """`serve` in its own process, watched by the spy; yields (process, lines said until it was open, address)."""
    (tmp_path / "spy").mkdir(exist_ok=True)
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)
    paths = f"{tmp_path / 'spy'}{os.pathsep}{ROOT}"
    environment = os.environ | {"PYTHONPATH": paths, "SPY_FILE": str(tmp_path / "spied"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START, str(tmp_path / "data"), str(port), model, backend]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line.strip())
            if "data" in line and "lie in" in line:
                break
        address = re.search(r"http://\S+", " ".join(said))
        assert address is not None, said
        yield process, said, address[0]
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def generate(address: str, prompt: str, size: str, until: bytes) -> list[dict[str, Any]]:
    """Press Generate over HTTP; returns the messages that a page would show, up to one that has `until` in it."""
    netloc = urlsplit(address).netloc

    def ask(method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(netloc, timeout=PATIENCE)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse()

    config = json.load(ask("GET", "/config"))
    button = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "generate")
    event = next(each for each in config["dependencies"] if [button, "click"] in each["targets"])
    parts = {part["id"]: part["props"] for part in config["components"]}
    typed = {"prompt": prompt, "size": size, "seed": 5, "steps": 2}
    data = [typed.get(parts[id].get("elem_id"), parts[id].get("value")) for id in event["inputs"]]
    body = json.dumps({"data": data, "fn_index": event["id"], "session_hash": "test"})
    assert ask("POST", "/gradio_api/queue/join", body).status == 200
    messages = []
    for line in ask("GET", "/gradio_api/queue/data?session_hash=test"):
        if line.startswith(b"data: "):
            messages.append(json.loads(line[6:]))
            if until in line:
                return messages
    raise AssertionError(messages)


def outside(spied: Path) -> list[str]:
    """What was asked of the network, without this machine's own addresses."""
    own = ("watching ", "['127.0.0.1',", "[('127.0.0.1',", "['localhost',", "[('::1',")
    return [line for line in spied.read_text().splitlines() if not line.startswith(own)]


PICTURE, END = b"/niwaki/picture/", b"process_completed"  # the second when an idle tab is no longer followed, 30 s on


def check_a_whole_session(tmp_path: Path, model: str, backend: str, size: str, until: bytes) -> None:
    with running(tmp_path, serve.free_port("127.0.0.1", 8700), model, backend) as (process, said, address):
        messages = generate(address, "two red circles", size, until)
        assert messages[-1]["success"], messages[-1]
        (path,) = (tmp_path / "data" / "pictures").rglob("*.png")
        assert pictures.read_recipe(path)["seed"] == 5
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0
        assert (tmp_path / "spied").read_text().count("watching") > 1  # the engine's process too
        assert outside(tmp_path / "spied") == []
        assert not list(tmp_path.rglob(".gradio")), "gradio wrote outside the data folder"
        assert str(tmp_path / "data") in said[-1]
        assert "stopped" in (tmp_path / "data" / "logs" / "niwaki.log").read_text()


def test_a_session_talks_to_nobody_and_ends_cleanly(tmp_path: Path) -> None:
    check_a_whole_session(tmp_path, "seedling-ternary", "fake", "128x128", PICTURE)


@pytest.mark.slow
def test_a_session_with_a_real_engine_talks_to_nobody(tmp_path: Path, tiny_packs: Path) -> None:
    check_a_whole_session(tmp_path, str(tiny_packs / "ternary"), "auto", "64x64", END)


def test_another_port_is_taken_and_said_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with running(tmp_path, port) as (process, said, address):
            used = urlsplit(address).port
            assert used is not None and used > port
            assert said[0] == f"Port {port} is taken, using {used}."
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0
            assert rest.strip() == "Stopping."
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", used), timeout=2).close()


def test_a_damaged_start_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="unknown model 'nonsense'"):
        serve.serve(Settings(tmp_path, model="nonsense", open_browser=False))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BadRequest, match="cannot write to"):
        serve.serve(Settings(tmp_path / "file" / "data", open_browser=False))


def test_impossible_ports_and_hosts_are_sentences() -> None:
    with pytest.raises(BadRequest, match="port 70000 is impossible"):
        serve.free_port("127.0.0.1", 70_000)
    with pytest.raises(BadRequest, match="port -1 is impossible"):
        serve.free_port("127.0.0.1", -1)
    with pytest.raises(BadRequest, match=r"cannot listen on host '203.0.113.7'.*use 127.0.0.1"):
        serve.free_port("203.0.113.7", 7860)


def test_gradio_is_told_to_keep_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "intranet")
    settings = Settings(tmp_path)
    serve.prepare(settings)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert Path(os.environ["GRADIO_TEMP_DIR"]) == settings.cache
    assert os.environ["NO_PROXY"].split(",") == ["intranet", "127.0.0.1", "localhost"]
    options = serve.launch_options(settings)
    off = ("share", "run_history", "enable_monitoring", "ssr_mode", "show_error", "mcp_server", "pwa")
    assert {name: options[name] for name in off} == dict.fromkeys(off, False)
    assert (options["allowed_paths"], options["footer_links"], options["strict_cors"]) == ([], [], True)
    assert options["server_name"] == "127.0.0.1"
