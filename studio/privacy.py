"""Who may talk to the page: this machine, through a page of ours, and nobody else.

Knows HTTP headers, not gradio. Listening on 127.0.0.1 is not enough: any web page can send a form there (a foreign
Origin), and a name that an attacker points at 127.0.0.1 (a foreign Host, "DNS rebinding") even lets it read answers.
"""

import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HERE = ("127.0.0.1", "localhost", "[::1]")
EVERYWHERE = ("0.0.0.0", "::", "[::]")
READING = ("GET", "HEAD", "OPTIONS")

# Gradio's routes that fetch an address of the caller's choice on the server's side: our page never asks for one.
ERRANDS = re.compile(r"/(file=/*https?:|proxy=)", re.IGNORECASE)

# What the browser itself enforces. Gradio's page is built on inline scripts and compiles templates, hence the unsafe-*.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; object-src 'none'; base-uri 'self'"
)


def trusted_hosts(host: str) -> tuple[str, ...]:
    """Names under which the page may be asked for: this machine, the given --host, and a Space's own address."""
    names = [*HERE, _bracketed(host)]
    if host in EVERYWHERE:
        names.append(socket.gethostname())
    if os.environ.get("SPACE_ID") and os.environ.get("SPACE_HOST"):
        names.append(os.environ["SPACE_HOST"])
    return tuple(dict.fromkeys(name.lower() for name in names))


def reach(host: str) -> tuple[str, bool]:
    """What the page promises about where prompts and pictures go, and whether others than this machine can reach it."""
    if os.environ.get("SPACE_ID"):
        return "runs on a Hugging Face Space: your prompt leaves your device", True
    if host in EVERYWHERE or _bracketed(host) not in HERE:
        return "open to your network: others there can use this page", True
    return "nothing leaves this machine", False


def guard(host: str) -> list[Middleware]:
    """The `middleware` list for launch(app_kwargs=..) of a page that listens on `host`."""
    return [Middleware(Guard, hosts=trusted_hosts(host), any_address=host in EVERYWHERE)]


class Guard:
    """Pure ASGI: refuses foreign Hosts (400), writes and sockets of foreign Origins (403), and errands (403).

    `any_address`: the person asked to listen everywhere, so every literal IP address is a Host of ours; an attacker
    needs a name. Starlette's TrustedHostMiddleware can't say that, nor answer with a sentence.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], any_address: bool = False) -> None:
        self.app, self.hosts, self.any_address = app, hosts, any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, receive, _with_policy(send))
        elif scope["type"] == "websocket":
            await receive()  # the handshake, which has to be read before it can be refused
            await send({"type": "websocket.close", "code": 1008, "reason": refusal[1][:120]})
        else:
            await PlainTextResponse(refusal[1] + "\n", status_code=refusal[0])(scope, receive, send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._ours(_name(host)):
            known = ", ".join(self.hosts)
            return 400, f"Niwaki does not answer to the host {host[:80]!r}: open it under one of {known}."
        writes = scope["type"] == "websocket" or scope["method"] not in READING
        if writes and any(not self._same(origin, host) for origin in headers.getlist("origin")):
            origin = headers["origin"][:80]
            return 403, f"Niwaki takes no orders from {origin!r}: use its own page."
        if ERRANDS.search(scope["path"]):
            return 403, "Niwaki fetches nothing from other addresses."
        return None

    def _ours(self, name: str) -> bool:
        return name in self.hosts or (self.any_address and _is_address(name))

    @staticmethod
    def _same(origin: str, host: str) -> bool:
        """Whether an Origin is the page that this very Host serves: name and port; another local server is foreign."""
        try:
            parts = urlsplit(origin)
            default = {"http": 80, "https": 443}[parts.scheme]
            asked = urlsplit(f"{parts.scheme}://{host}")
            return (parts.hostname, parts.port or default) == (asked.hostname, asked.port or default)
        except (ValueError, KeyError):  # "null", "file://", a port that is none
            return False


def _with_policy(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
        await send(message)

    return sending


_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


def _name(host: str) -> str:
    """The Host header without its port, lower case; "" for what is no host at all."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/@?#\s]+)(:\d{1,5})?", host)
    return match[1].lower() if match else ""


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
