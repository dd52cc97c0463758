"""Who gets to see what on the admin port, over real sockets."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import Any

import pytest

from sidecar import lifecycle
from sidecar.admin.guard import Access, Guard, is_loopback
from sidecar.proxy.edge import Limits
from tests.support.running import Running, running
from tests.support.wire import Answer, Client, ask, connected

pytestmark = pytest.mark.anyio

NOWHERE = "http://127.0.0.1:9"
TOKEN = "sk-test-admin-7f3a"
OPEN = ("/metrics", "/healthz")
GUARDED = ("/", "/api", "/api/usage", "/absent", "//metrics", "/metrics/", "/healthz/x", "/METRICS")


async def get(
    sidecar: Running, path: str, *headers: str, method: str = "GET", host: str | None = "localhost"
) -> Answer:
    """Ask the admin port."""
    lines = [
        f"{method} {path} HTTP/1.1",
        *([f"Host: {host}"] if host is not None else []),
        *headers,
    ]
    address = ("127.0.0.1", sidecar.lifecycle.admin_port)
    return await ask(address, "\r\n".join([*lines, "", ""]).encode("latin-1"))


def basic(text: bytes) -> str:
    return f"Authorization: Basic {b64encode(text).decode()}"


async def test_loopback_is_open() -> None:
    """Who is on this machine sees all, and a path that is not there is none."""
    async with running(NOWHERE) as sidecar:
        for path in (*OPEN, "/"):
            assert (await get(sidecar, path)).status == 200
        assert (await get(sidecar, "/readyz")).status == 503
        assert (await get(sidecar, "/absent")).status == 404


async def test_other_machines_see_metrics_and_probes_alone() -> None:
    """Without a token, and without the word that it is open; whatever the path is named like."""
    async with running(NOWHERE, admin_host="0.0.0.0") as sidecar:
        for path in OPEN:
            assert (await get(sidecar, path)).status == 200
        assert (await get(sidecar, "/readyz")).status == 503
        for path in GUARDED:
            answer = await get(sidecar, path)
            assert answer.status == 403
            assert b"SIDECAR_ADMIN_TOKEN" in answer.body
    async with running(NOWHERE, admin_host="0.0.0.0", admin_open=True) as sidecar:
        assert (await get(sidecar, "/", host="admin.example.com")).status == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_token(host: str) -> None:
    """Where there is one it is wanted, on loopback too: as a bearer token or as a password."""
    async with running(NOWHERE, admin_host=host, admin_token=TOKEN) as sidecar:
        for path in OPEN:
            assert (await get(sidecar, path)).status == 200
        for path in GUARDED:
            answer = await get(sidecar, path)
            assert answer.status == 401
            challenges = answer.header(b"www-authenticate")
            assert challenges is not None
            assert {b"Basic", b"Bearer"} <= set(challenges.split())
        for good in (
            f"Authorization: Bearer {TOKEN}",
            f"authorization: bearer  {TOKEN} ",
            basic(f"anybody:{TOKEN}".encode()),
            basic(f":{TOKEN}".encode()),
        ):
            # A name is no matter: no other site's page has the token.
            assert (await get(sidecar, "/", good, host="admin.example.com")).status == 200
            assert (await get(sidecar, "/absent", good)).status == 404
        for bad in (
            f"Authorization: Bearer {TOKEN}x",
            f"Authorization: Bearer {TOKEN[:-1]}",
            "Authorization: Bearer ",
            "Authorization: Bearer",
            f"Authorization: {TOKEN}",
            f"Authorization: Digest {TOKEN}",
            f"Cookie: token={TOKEN}",
            basic(TOKEN.encode()),
            basic(f"{TOKEN}:".encode()),
            "Authorization: Basic ???",
            "Authorization: Basic \xe9",
            "Authorization: Bearer \xe9\xff",
        ):
            assert (await get(sidecar, "/", bad)).status == 401, bad
        assert (await get(sidecar, f"/?token={TOKEN}")).status == 401


async def test_metrics_can_be_guarded() -> None:
    """Probes stay open: a kubelet has no token."""
    async with running(NOWHERE, admin_token=TOKEN, admin_guard_metrics=True) as sidecar:
        assert (await get(sidecar, "/metrics")).status == 401
        assert (await get(sidecar, "/metrics", f"Authorization: Bearer {TOKEN}")).status == 200
        assert (await get(sidecar, "/healthz")).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:4002", 200),
        ("sidecar.localhost:4002", 200),
        ("127.0.0.1:4002", 200),
        ("[::1]:4002", 200),
        ("10.1.2.3", 200),
        ("rebound.example.com", 421),
        ("rebound.example.com:4002", 421),
        ("127.0.0.1.example.com", 421),
        ("localhost.example.com", 421),
        ("notlocalhost", 421),
        ("localhost:x", 421),
        ("", 421),
    ],
)
async def test_names_that_may_be_another_sites(host: str, status: int) -> None:
    """On loopback a page of another site gets nothing by having its own name point here."""
    async with running(NOWHERE) as sidecar:
        assert (await get(sidecar, "/", host=host)).status == status


async def test_no_answer_can_be_read_by_another_site() -> None:
    """Not with an origin, not in a preflight; and no type is guessed."""
    async with running(NOWHERE, admin_token=TOKEN) as sidecar:
        answers = [
            await get(sidecar, path, "Origin: https://evil.example", *more)
            for path in ("/", "/metrics", "/healthz", "/absent")
            for more in ((), (f"Authorization: Bearer {TOKEN}",))
        ]
        preflight = ("Origin: https://evil.example", "Access-Control-Request-Method: GET")
        answers.append(await get(sidecar, "/metrics", *preflight, method="OPTIONS"))
        for answer in answers:
            names = [name for name, _ in answer.headers]
            assert not [name for name in names if name.startswith(b"access-control-")]
            assert b"set-cookie" not in names
            assert answer.header(b"cross-origin-resource-policy") == b"same-origin"
            assert answer.header(b"x-content-type-options") == b"nosniff"
            assert answer.header(b"x-frame-options") == b"DENY"


@pytest.mark.parametrize("path", ["/", "/metrics", "/healthz", "/absent"])
async def test_nothing_can_be_changed(path: str) -> None:
    """Other methods than GET and HEAD are none, and a body is not read."""
    async with running(NOWHERE) as sidecar:
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
            answer = await get(sidecar, path, "Content-Length: 0", method=method)
            assert (answer.status, answer.header(b"allow")) == (405, b"GET, HEAD")
        address = ("127.0.0.1", sidecar.lifecycle.admin_port)
        async with connected(address) as client:
            # Nothing of the body has come, and none of it is waited for.
            client.send(f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n".encode())
            assert (await client.answer()).status == 405


async def test_head_has_no_body() -> None:
    """HEAD is GET without the body, on one connection with others."""
    async with (
        running(NOWHERE) as sidecar,
        connected(("127.0.0.1", sidecar.lifecycle.admin_port)) as client,
    ):
        for path in ("/", "/metrics", "/healthz", "/absent"):
            head = await client.ask(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            whole = await client.ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert (head.status, head.body) == (whole.status, b"")
            assert head.header(b"content-type") == whole.header(b"content-type")


async def test_limits_hold_on_the_admin_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is too long, one that does not end, and one connection too many do no harm."""
    limits = Limits(max_connections=3, max_head_bytes=2048, head_timeout_s=0.1)
    monkeypatch.setattr(lifecycle, "_ADMIN_LIMITS", limits)
    async with running(NOWHERE) as sidecar:
        address = ("127.0.0.1", sidecar.lifecycle.admin_port)
        answer = await get(sidecar, "/metrics", "X: " + "y" * 3000)
        assert answer.status == 431
        async with connected(address) as one, connected(address) as two, connected(address) as last:
            for client in (one, two):
                client.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\nX: ")
            last.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await last.answer()).status == 200
            assert (await get(sidecar, "/healthz")).status == 503
            assert [(await client.answer()).status for client in (one, two)] == [408, 408]
        # What is malformed there is not counted as a client of LiteLLM's that was refused.
        assert sidecar.value("litellm_sidecar_refusals_total") == 0


async def test_scrape_of_a_slow_reader_waits_for_it() -> None:
    """Metrics that nobody takes do not pile up in memory, and other answers come meanwhile."""
    async with running(NOWHERE) as sidecar:
        address = ("127.0.0.1", sidecar.lifecycle.admin_port)
        async with connected(address, limit=1024) as slow:
            slow.send(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 50)
            assert (await get(sidecar, "/healthz")).status == 200
            answers = await _answers(slow, 50)
            assert {answer.status for answer in answers} == {200}


async def _answers(client: Client, count: int) -> list[Answer]:
    return [await client.answer() for _ in range(count)]


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("sidecar.svc", False),
        ("localhost.example.com", False),
    ],
)
def test_what_is_loopback(host: str, local: bool) -> None:
    """A name other than localhost may be anything: it is not taken for this machine."""
    assert is_loopback(host) is local


async def test_what_is_added_later_is_guarded_by_default() -> None:
    """The guard stands before the application: a page needs no check of its own."""

    async def page(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("this must not be reached")

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return await asyncio.Future()

    scope = {"type": "http", "method": "GET", "path": "/live/data", "headers": []}
    await Guard(page, Access())(scope, receive, send)
    assert sent[0]["status"] == 403
