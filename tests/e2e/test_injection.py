"""Names and targets that are meant to be more than that: none has any effect."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from tests.support.requirements import require
from tests.support.running import Running, running, until
from tests.support.wire import Received, ask, upstream

pytestmark = pytest.mark.anyio

NAMES = [
    'x"} 1\nforged_total{a="b',
    "x\nforged_total 1",
    "x\r\nforged_total 1\r\n",
    "x\r\n\r\nHTTP/1.1 200 OK\r\nX-Forged: 1\r\n\r\n",
    "x\\",
    '\\"',
    "\\n",
    "# HELP forged_total x",
    "x\x00y",
    "\x1b[2J\x1b]0;owned\x07",
    "x\x7f\x9b2J\x85",
    "x\u2028y\u2029",
    "\u202eevil",
    "\ufeffx",
    "💥 Ünïcödé",
    '"}},"event":"forged"',
    "{{ x }} ${x} %s %n <script>alert(1)</script>",
    "\ud83d half an emoji",
    "y" * 1000,
    "z" * 100_000,
    " ",
]
LABELS = "model,team_alias,response_model,model_id,client"


async def hostile(
    received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer with the model's name wherever a name can stand."""
    name = json.loads(received.body)["model"]
    body = json.dumps(
        {"type": "message", "id": name, "model": name, "usage": {"input_tokens": 1}}
    ).encode()
    alias = quote(name.encode("utf-8", "replace")[:1000])
    head = [
        "HTTP/1.1 200 OK",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-litellm-team-alias: {alias}",
        f"x-litellm-model-id: {alias}",
    ]
    writer.write("\r\n".join([*head, "", ""]).encode() + body)


def call(model: str, agent: bytes = b"x") -> bytes:
    body = json.dumps({"model": model}).encode()
    head = b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nUser-Agent: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (agent, len(body)) + body


async def scraped(sidecar: Running, accept: str) -> str:
    request = f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n"
    answer = await ask(("127.0.0.1", sidecar.lifecycle.admin_port), request.encode())
    assert answer.status == 200
    return answer.body.decode()


async def test_names_are_names(tmp_path: Path) -> None:
    """Whatever a model, a team or a client is called, it is a label's value or `other`: no series,
    header or line of a log comes of it."""
    log = tmp_path / "usage.jsonl"
    async with (
        upstream(hostile) as server,
        running(server.url, labels=LABELS, usage_log=str(log)) as sidecar,
    ):
        await ask(sidecar.host, call("plain"))
        plain = {
            sample.name
            for family in read_text(await scraped(sidecar, "text/plain"))
            for sample in family.samples
        }
        for name in NAMES:
            agent = "".join(filter(str.isprintable, name))  # the rest cannot stand in a header
            answer = await ask(sidecar.host, call(name, agent.encode()[:1000]))
            assert (answer.status, answer.complete) == (200, True)
            assert [key for key, _ in answer.headers] == [
                b"content-type",
                b"content-length",
                b"x-litellm-team-alias",
                b"x-litellm-model-id",
            ]
        text = await scraped(sidecar, "text/plain")
        openmetrics = await scraped(sidecar, "application/openmetrics-text")
    samples = [sample for family in read_text(text) for sample in family.samples]
    assert {sample.name for sample in samples} == plain
    models = {sample.labels["model"] for sample in samples if "model" in sample.labels}
    fitting = {name.encode("utf-8", "replace").decode() for name in NAMES if len(name) < 1000}
    assert models == fitting | {"plain", "other", "unknown"}
    assert max(len(value) for sample in samples for value in sample.labels.values()) <= 200
    families = {family.name for family in read_openmetrics(openmetrics)}
    assert not [name for name in families if "forged" in name]

    raw = log.read_bytes()
    assert not set(raw.decode()) & {chr(code) for code in (*range(32), *range(127, 160))} - {"\n"}
    assert "\u2028" not in raw.decode()
    lines = [json.loads(line) for line in raw.splitlines()]
    assert [line["event"] for line in lines] == ["usage"] * (len(NAMES) + 1)
    for name, line in zip(NAMES, lines[1:], strict=True):
        # What is longer than 4 KB is no name.
        known = name.encode("utf-8", "replace").decode()[:200] if len(name) <= 4096 else None
        assert line["model"] == known


async def test_prometheus_reads_such_names() -> None:
    """Its own parser takes the text and finds nothing wrong with it."""
    promtool = require(shutil.which("promtool"), "promtool")
    async with upstream(hostile) as server, running(server.url, labels=LABELS) as sidecar:
        for name in NAMES:
            await ask(sidecar.host, call(name))
        text = await scraped(sidecar, "text/plain")
    done = await asyncio.to_thread(
        subprocess.run,
        [promtool, "check", "metrics"],
        input=text.encode(),
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert b"error" not in done.stderr.lower(), done.stderr


async def test_nothing_that_is_asked_chooses_the_upstream() -> None:
    """Neither a target, nor Host, nor a header, nor a redirect takes a request elsewhere."""
    ok = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
    async with upstream(ok) as other:
        there = f"127.0.0.1:{other.port}"
        redirect = f"HTTP/1.1 307 Go\r\nlocation: {other.url}/x\r\ncontent-length: 0\r\n\r\n"
        async with upstream(redirect.encode()) as server, running(server.url) as sidecar:
            lines = [
                f"GET http://{there}/x HTTP/1.1\r\nHost: {there}",
                f"GET http://user:password@{there}/x HTTP/1.1\r\nHost: a",
                f"GET //{there}/x HTTP/1.1\r\nHost: {there}",
                f"GET /@{there}/x HTTP/1.1\r\nHost: a@{there}",
                f"GET /x HTTP/1.1\r\nHost: {there}",
                f"GET /x HTTP/1.1\r\nHost: a\r\nX-Forwarded-Host: {there}\r\nForwarded: {there}",
                f"GET /x HTTP/1.1\r\nHost: a\r\nX-Original-URL: {other.url}\r\nX-Rewrite-URL: /y",
            ]
            for line in lines:
                answer = await ask(sidecar.host, f"{line}\r\n\r\n".encode())
                assert answer.status == 307
            for line in (f"GET {there} HTTP/1.1", f"CONNECT {there} HTTP/1.1"):
                answer = await ask(sidecar.host, f"{line}\r\nHost: {there}\r\n\r\n".encode())
                assert answer.status in (400, 501)
            upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n"
            shake = f"GET ws://{there}/x HTTP/1.1\r\nHost: {there}\r\n{upgrade}"
            assert (await ask(sidecar.host, shake.encode())).status == 307
            await until(lambda: len(server.received) == len(lines) + 1)
            targets = [received.line.split()[1] for received in server.received]
            assert not [target for target in targets if not target.startswith(b"/")]
        assert other.connections == 0
