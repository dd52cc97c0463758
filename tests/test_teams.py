"""Teams by look-up, through a whole sidecar: what LiteLLM is asked, and who waits for it."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.certificates import Authority
from tests.support.running import Running, running, until
from tests.support.wire import Received, Upstream, connected, upstream

pytestmark = pytest.mark.anyio

MODEL = "claude-teams"
BODY = b'{"model":"%b"}' % MODEL.encode()
ANSWER = json.dumps(
    {"id": "msg_1", "type": "message", "usage": {"input_tokens": 7, "output_tokens": 1}}
).encode()
OUTPUT = "litellm_sidecar_output_tokens_total"
LOOKUPS = "litellm_sidecar_identity_lookups_total"


@dataclass
class Proxy:
    """A stand-in for LiteLLM whose answers about keys a test can hold back or spoil."""

    status: bytes = b"200 OK"
    team: str = "t1"
    go: asyncio.Event = field(default_factory=asyncio.Event)
    asked: Counter[str] = field(default_factory=Counter)
    keys: list[bytes] = field(default_factory=list)

    async def handle(
        self, received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        target = urlsplit(received.line.split()[1].decode())
        status = b"200 OK"
        content = ANSWER
        if target.path != "/v1/messages":
            self.asked[target.path] += 1
            self.keys += received.values(b"authorization")
            await self.go.wait()
            status = self.status
            found: dict[str, Any] = {"teams": [{"team_id": "t1", "team_alias": "red"}]}
            found["teams"] += [{"team_id": "t2", "team_alias": "blue"}]
            if target.path == "/key/info":
                found = {"key": parse_qs(target.query)["key"][0], "info": {"team_id": self.team}}
            content = json.dumps(found).encode()
        writer.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (status, len(content), content)
        )


def call(key: str) -> bytes:
    """Write a request with a key."""
    head = b"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: %b\r\n" % key.encode()
    return head + b"content-length: %d\r\n\r\n%b" % (len(BODY), BODY)


async def burst(side: Running, key: str, number: int, clients: int = 16) -> None:
    """Make calls with one key, by several clients at once."""
    async with connected(side.host) as client:
        client.send(call(key))
        head = await client.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        await client.reader.readexactly(len(ANSWER))
    length = len(head) + len(ANSWER)

    async def calls(share: int) -> None:
        async with connected(side.host) as client:
            for _ in range(share):
                client.send(call(key))
                await client.reader.readexactly(length)

    await asyncio.gather(*(calls((number - 1 + place) // clients) for place in range(clients)))


@asynccontextmanager
async def beside(proxy: Proxy, **settings: Any) -> AsyncIterator[tuple[Running, Upstream]]:
    """Run a sidecar before the stand-in, with a key to ask it."""
    async with upstream(proxy.handle) as llm:
        # Without prices, which are asked for with the same key.
        values: dict[str, Any] = {"litellm_key": "sk-viewer", "identity_ttl_s": 1.0}
        values["price_sources"] = ()
        async with running(llm.url, **(values | settings)) as side:
            yield side, llm


async def test_burst_with_a_new_key_makes_one_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 requests with a key that nobody knows yet are one question, and all of them are
    counted under its team."""
    # However long the burst takes, the question is not given up meanwhile.
    monkeypatch.setattr("sidecar.account.lookups._TIMEOUT_S", 100.0)
    proxy = Proxy()
    async with beside(proxy, identity_ttl_s=120.0) as (side, _):
        await burst(side, "sk-new", 10_000)
        assert side.value(OUTPUT) == 0, "nobody has answered yet"
        proxy.go.set()
        await until(lambda: side.value(OUTPUT, team_alias="red") == 10_000)
        await burst(side, "sk-new", 100)
        assert side.value(OUTPUT, team_alias="red") == 10_100
        assert side.value(LOOKUPS, source="key_info", result="found") == 1
    assert proxy.asked == {"/key/info": 1, "/v2/team/list": 1}
    assert set(proxy.keys) == {b"Bearer sk-viewer"}


async def test_nobody_waits_for_a_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """While LiteLLM does not answer questions about keys, clients have their answers all the
    same; when its time is up they are counted without a name, and later under one again."""
    monkeypatch.setattr("sidecar.account.lookups._TIMEOUT_S", 0.5)
    proxy = Proxy()
    async with beside(proxy) as (side, _):
        await burst(side, "sk-one", 50)
        assert (proxy.asked["/key/info"], side.value(OUTPUT)) == (1, 0)
        assert side.value("litellm_sidecar_http_requests_total", code="200") == 50
        await until(lambda: side.value(OUTPUT, team_alias="unknown") == 50)
        # It is left alone for a second, and then asked again.
        await burst(side, "sk-one", 20)
        assert side.value(OUTPUT, team_alias="unknown") == 70
        assert side.value(LOOKUPS, source="key_info", result="backing_off") == 20
        assert proxy.asked["/key/info"] == 1
        proxy.go.set()
        async with asyncio.timeout(10):
            while not side.value(OUTPUT, team_alias="red"):
                await burst(side, "sk-one", 1)
                await asyncio.sleep(0.02)
        assert side.value(LOOKUPS, source="key_info", result="timeout") == 1


async def test_refused_key_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A key of the operator's that LiteLLM refuses costs the names, and the log says so."""
    proxy = Proxy(status=b"403 Forbidden")
    proxy.go.set()
    async with beside(proxy) as (side, _):
        for key in ("sk-one", "sk-two"):
            await burst(side, key, 5)
        await until(lambda: side.value(OUTPUT, team_alias="unknown") == 10)
    told = [record for record in caplog.records if record.message == "identity_lookups_failed"]
    assert len(told) == 1
    assert told[0].__dict__["reason"] == "/key/info: LiteLLM refuses the key (403)"


async def test_key_that_changes_team_follows() -> None:
    """The team of a key is asked for anew when its time is up."""
    proxy = Proxy()
    proxy.go.set()
    async with beside(proxy) as (side, _):
        await burst(side, "sk-one", 1)
        await until(lambda: side.value(OUTPUT, team_alias="red") == 1)
        proxy.team = "t2"
        changed = asyncio.get_running_loop().time()
        async with asyncio.timeout(10):
            while not side.value(OUTPUT, team_alias="blue"):
                await burst(side, "sk-one", 1)
                await asyncio.sleep(0.02)
        assert asyncio.get_running_loop().time() - changed < 5
        assert proxy.asked["/v2/team/list"] <= proxy.asked["/key/info"]


async def test_what_waits_is_counted_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of the process waits a little for look-ups, and then counts without them."""
    monkeypatch.setattr("sidecar.app._FLUSH_S", 0.2)
    proxy = Proxy()
    async with beside(proxy) as (side, _):
        await burst(side, "sk-one", 30)
        assert side.value(OUTPUT) == 0
        side.lifecycle.stop()
        async with asyncio.timeout(10):
            await side.task
        assert side.value(OUTPUT, team_alias="unknown") == 30


async def test_header_of_its_own_for_keys() -> None:
    """Where LiteLLM takes keys from another header, clients and the sidecar put them there."""
    proxy = Proxy()
    proxy.go.set()
    async with beside(proxy, key_header="x-our-key") as (side, llm):
        async with connected(side.host) as client:
            await client.ask(call("sk-one"))
            assert side.value(OUTPUT, team_alias="unknown") == 1, "there is no key to look up"
            await client.ask(call("sk-one").replace(b"x-api-key: ", b"X-Our-Key: Bearer "))
        await until(lambda: side.value(OUTPUT, team_alias="red") == 1)
    asked = [request for request in llm.received if b"/key/info" in request.line]
    assert [request.values(b"x-our-key") for request in asked] == [[b"Bearer sk-viewer"]]
    assert proxy.keys == []


@pytest.mark.parametrize("way", ["unix", "https"])
async def test_look_ups_take_the_way_of_the_requests(way: str, tmp_path: Path) -> None:
    """A Unix socket, or TLS against the operator's own authority."""
    proxy = Proxy()
    proxy.go.set()
    options: dict[str, Any] = {}
    settings: dict[str, Any] = {"litellm_key": "sk-viewer"}
    if way == "unix":
        options["path"] = str(tmp_path / "litellm.sock")
    else:
        authority = Authority(tmp_path)
        options["tls"] = authority.server("127.0.0.1")
        settings["upstream_ca_file"] = authority.file
    async with upstream(proxy.handle, **options) as llm, running(llm.url, **settings) as side:
        await burst(side, "sk-one", 1)
        await until(lambda: side.value(OUTPUT, team_alias="red") == 1)
