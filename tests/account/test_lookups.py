"""Looking keys up at LiteLLM: how often it is asked, and what it costs when it fails."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest
from pytest_httpx import HTTPXMock

from sidecar.account.identity import Owner
from sidecar.account.litellm import AskError, LiteLLM
from sidecar.account.lookups import LOOKUP_RESULTS, Lookups
from tests.support.running import until

pytestmark = pytest.mark.anyio

ORIGIN = "http://litellm.test:4000"
TTL_S = 120.0


class Rig:
    """Look-ups at a LiteLLM that is told what to say, on a clock that stands still."""

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.now = 1000.0
        self.counts: dict[tuple[str, str], int] = {}
        self.faults: list[Exception] = []
        self.litellm = LiteLLM(transport or httpx.AsyncHTTPTransport(), ORIGIN, "sk-viewer")
        self.lookups = Lookups(
            self.litellm, self.count, self.faults.append, lambda: self.now, ttl_s=TTL_S
        )

    def count(self, source: str, result: str) -> None:
        assert result in LOOKUP_RESULTS[source]
        self.counts[source, result] = self.counts.get((source, result), 0) + 1

    async def owner(self, hashed: str) -> Owner:
        """Ask, and wait for the answer."""
        future: asyncio.Future[Owner] = asyncio.get_running_loop().create_future()
        owner = self.lookups.resolve(hashed, future.set_result)
        if owner is not None:
            return owner
        async with asyncio.timeout(10):
            return await future


@pytest.fixture
def rig() -> Rig:
    return Rig()


def add_key(mock: HTTPXMock, key: str, **info: Any) -> None:
    """Let LiteLLM know a key, for one question."""
    mock.add_response(url=f"{ORIGIN}/key/info?key={key}", json={"key": key, "info": info})


def add_teams(mock: HTTPXMock, teams: dict[str, str | None], page: int = 1, pages: int = 1) -> None:
    """Let LiteLLM list teams, for one question."""
    rows = [
        {"team_id": team, "team_alias": alias, "members_with_roles": [{"user_id": "u"}]}
        for team, alias in teams.items()
    ]
    mock.add_response(
        url=f"{ORIGIN}/v2/team/list?page={page}&page_size=100",
        json={"teams": rows, "total": 3, "page": page, "page_size": 100, "total_pages": pages},
    )


async def test_owner_is_what_litellm_says(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """A key's team and alias come from two questions; what is absent is `None`, as LiteLLM
    spells it; the key that asks stands where LiteLLM looks for it."""
    add_key(httpx_mock, "k1", team_id="t1", key_alias="ci", models=["x"], metadata={"a": 1})
    add_key(httpx_mock, "k2", team_id=None, key_alias=None)
    add_key(httpx_mock, "k3", team_id="t2")
    add_teams(httpx_mock, {"t1": "Réd ★", "t2": None})
    assert await rig.owner("k1") == Owner("Réd ★", "ci")
    assert await rig.owner("k2") == Owner("None", "None")
    assert await rig.owner("k3") == Owner("None", "None")
    assert rig.counts == {("key_info", "found"): 3, ("team_list", "found"): 1}
    for request in httpx_mock.get_requests():
        assert request.headers["authorization"] == "Bearer sk-viewer"


async def test_key_header_of_litellm_is_used(httpx_mock: HTTPXMock) -> None:
    """Where LiteLLM looks for keys in a header of its own, the one that asks stands there."""
    litellm = LiteLLM(httpx.AsyncHTTPTransport(), ORIGIN, "sk-viewer", "x-our-key")
    httpx_mock.add_response(url=f"{ORIGIN}/x?a=1", text="{}")
    assert await litellm.get("/x", {"a": "1"}, timeout_s=1, max_bytes=10) == b"{}"
    (request,) = httpx_mock.get_requests()
    assert request.headers["x-our-key"] == "Bearer sk-viewer"
    assert "authorization" not in request.headers


async def test_question_without_a_key_or_an_answer(httpx_mock: HTTPXMock) -> None:
    """What LiteLLM tells anybody is asked without a key; what does not come in time is an error
    that names the question and nothing else."""
    httpx_mock.add_response(url=f"{ORIGIN}/x", text="{}")
    litellm = LiteLLM(httpx.AsyncHTTPTransport(), ORIGIN, None)
    assert await litellm.get("/x", {}, timeout_s=1, max_bytes=10) == b"{}"
    (request,) = httpx_mock.get_requests()
    assert "authorization" not in request.headers
    with pytest.raises(AskError, match=r"^/x: no answer in 0\.05 s$") as caught:
        await LiteLLM(Slow(), ORIGIN, "sk-viewer").get(
            "/x", {"key": "secret"}, timeout_s=0.05, max_bytes=10
        )
    assert caught.value.result == "timeout"
    await litellm.aclose()


async def test_listing_has_an_end(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """A LiteLLM that says that there are always more pages is not believed for ever."""
    add_key(httpx_mock, "k", team_id="t")
    page = {"teams": [{"team_id": "t", "team_alias": "red"}], "total_pages": 10**9}
    httpx_mock.add_response(url=re.compile(".*/v2/team/list.*"), json=page, is_reusable=True)
    assert (await rig.owner("k")).team == "red"
    assert len(httpx_mock.get_requests()) == 101


async def test_burst_with_a_new_key_is_one_question(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """10,000 who wait for one key ask once, and are told without a long stop of the loop."""
    add_key(httpx_mock, "k", team_id="t")
    add_teams(httpx_mock, {"t": "red"})
    told: list[Owner] = []
    told_between = []
    for _ in range(10_000):
        assert rig.lookups.resolve("k", told.append) is None
    async with asyncio.timeout(10):
        while len(told) < 10_000:
            told_between.append(len(told))
            await asyncio.sleep(0)
    assert set(told) == {Owner("red", "None")}
    steps = [later - earlier for earlier, later in pairwise(told_between)]
    assert max(steps) <= 200
    assert [request.url.path for request in httpx_mock.get_requests()] == [
        "/key/info",
        "/v2/team/list",
    ]
    assert rig.lookups.resolve("k", told.append) == Owner("red", "None")


async def test_key_that_changes_team_follows(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """Within the time to live nothing is asked; after it, a key's new team is known, also one
    that is new itself."""
    add_key(httpx_mock, "k", team_id="t1")
    add_teams(httpx_mock, {"t1": "red"})
    assert (await rig.owner("k")).team == "red"
    rig.now += TTL_S - 0.1
    assert (await rig.owner("k")).team == "red"
    assert len(httpx_mock.get_requests()) == 2
    rig.now += 0.2
    add_key(httpx_mock, "k", team_id="t2")
    add_teams(httpx_mock, {"t1": "red", "t2": "blue"})
    assert (await rig.owner("k")).team == "blue"


async def test_teams_are_listed_once_for_all_keys(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """Many keys at once make one listing; a team that is not in it makes another, but not at
    once again; all pages are read."""
    for number in range(20):
        add_key(httpx_mock, f"k{number}", team_id=f"t{number % 3}")
    add_teams(httpx_mock, {"t0": "red"}, 1, 3)
    add_teams(httpx_mock, {"t1": "blue"}, 2, 3)
    add_teams(httpx_mock, {"t2": "green"}, 3, 3)
    owners = await asyncio.gather(*(rig.owner(f"k{number}") for number in range(20)))
    assert [owner.team for owner in owners[:3]] == ["red", "blue", "green"]
    assert rig.counts["team_list", "found"] == 1
    for number in (20, 21, 22):
        add_key(httpx_mock, f"k{number}", team_id="t9")
    assert (await rig.owner("k20")).team is None
    rig.now += 11
    add_teams(httpx_mock, {"t0": "red", "t1": "blue"})
    assert (await rig.owner("k21")).team is None
    assert (await rig.owner("k22")).team is None
    assert rig.counts["team_list", "found"] == 2


async def test_unknown_key_is_remembered_too(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """A key that LiteLLM has no record of is not asked for again until its time is up."""
    httpx_mock.add_response(status_code=404, json={"error": {"message": "Key not found"}})
    assert await rig.owner("k") == Owner()
    assert await rig.owner("k") == Owner()
    assert rig.counts == {("key_info", "not_found"): 1}
    rig.now += TTL_S
    add_key(httpx_mock, "k", key_alias="new")
    assert await rig.owner("k") == Owner("None", "new")


def _status(status_code: int) -> Callable[[HTTPXMock], None]:
    return lambda mock: mock.add_response(status_code=status_code, text="sk-leak")


def _text(text: str) -> Callable[[HTTPXMock], None]:
    return lambda mock: mock.add_response(text=text)


@pytest.mark.parametrize(
    ("spoil", "result"),
    [
        pytest.param(_status(500), "failed", id="500"),
        pytest.param(_status(302), "failed", id="redirect"),
        pytest.param(_status(401), "refused", id="401"),
        pytest.param(_status(403), "refused", id="403"),
        pytest.param(_text("<html>"), "failed", id="not JSON"),
        pytest.param(_text("[]"), "failed", id="other JSON"),
        pytest.param(_text('{"info": {"team_id": 5}}'), "failed", id="other type"),
        pytest.param(_text('{"info": ' + "[" * 100_000), "failed", id="deep"),
        pytest.param(_text(" " * (1024 * 1024 + 1)), "failed", id="huge"),
        pytest.param(
            lambda mock: mock.add_exception(httpx.ConnectError("no")), "failed", id="refused"
        ),
    ],
)
async def test_failure_is_followed_by_silence(
    rig: Rig,
    httpx_mock: HTTPXMock,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[HTTPXMock], None],
    result: str,
) -> None:
    """Whatever goes wrong costs the name alone. LiteLLM is asked again after 1 s, 2 s, 4 s and so
    on up to a minute; in between nobody waits. It is told once when it begins and ends."""
    caplog.set_level(logging.INFO)
    for number, silence_s in enumerate((1, 2, 4, 8, 16, 32, 60, 60), start=1):
        spoil(httpx_mock)
        assert await rig.owner("k") == Owner()
        rig.now += silence_s - 0.1
        assert await rig.owner("k") == Owner()
        assert rig.counts == {("key_info", result): number, ("key_info", "backing_off"): number}
        rig.now += 0.2
    assert len(httpx_mock.get_requests()) == 8
    add_key(httpx_mock, "k")
    assert await rig.owner("k") == Owner("None", "None")
    assert rig.faults == []
    assert [record.message for record in caplog.records if record.name.startswith("sidecar")] == [
        "identity_lookups_failed",
        "identity_lookups_recovered",
    ]
    assert "leak" not in caplog.text
    rig.now += TTL_S
    spoil(httpx_mock)
    await rig.owner("k")
    rig.now += 1.1
    add_key(httpx_mock, "k", key_alias="back")
    assert await rig.owner("k") == Owner("None", "back"), "the silence begins at 1 s again"


async def test_failing_listing_fails_the_key(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """Without a listing a key's team is not known, and that is a failure like any other."""
    add_key(httpx_mock, "k", team_id="t")
    httpx_mock.add_response(url=f"{ORIGIN}/v2/team/list?page=1&page_size=100", status_code=403)
    assert await rig.owner("k") == Owner()
    assert rig.counts == {("key_info", "refused"): 1, ("team_list", "refused"): 1}
    rig.now += 1.1
    add_key(httpx_mock, "k", team_id="t")
    httpx_mock.add_response(url=f"{ORIGIN}/v2/team/list?page=1&page_size=100", text="[]")
    assert await rig.owner("k") == Owner()
    rig.now += 2.1
    add_key(httpx_mock, "k", team_id="t")
    add_teams(httpx_mock, {"t": "red"})
    assert (await rig.owner("k")).team == "red"


async def test_last_word_holds_while_litellm_fails(rig: Rig, httpx_mock: HTTPXMock) -> None:
    """A key that was known keeps its team while LiteLLM fails, but not for ever."""
    add_key(httpx_mock, "k", team_id="t")
    add_teams(httpx_mock, {"t": "red"})
    await rig.owner("k")
    httpx_mock.add_response(status_code=500, is_reusable=True)
    rig.now += TTL_S
    assert (await rig.owner("k")).team == "red"
    assert (await rig.owner("k")).team == "red"
    rig.now += 3601
    assert await rig.owner("k") == Owner()


async def test_fault_of_ours_is_contained(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, httpx_mock: HTTPXMock
) -> None:
    """What should not happen is counted, and costs the name alone."""

    async def fail(*_: object, **__: object) -> bytes:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(rig.litellm, "get", fail)
        assert await rig.owner("k") == Owner()
    assert [type(fault) for fault in rig.faults] == [ZeroDivisionError]
    assert rig.counts == {("key_info", "failed"): 1}
    rig.now += 1.1
    add_key(httpx_mock, "k")
    assert await rig.owner("k") == Owner("None", "None")


class Slow(httpx.AsyncBaseTransport):
    """A LiteLLM that answers when it is told to, and counts who waits."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.asked: list[str] = []
        self.at_once = self.most_at_once = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request.url.params.get("key", ""))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.go.wait()
        finally:
            self.at_once -= 1
        return httpx.Response(200, stream=httpx.ByteStream(b'{"info": {"key_alias": "late"}}'))


async def test_many_keys_are_asked_for_a_few_at_a_time() -> None:
    """What waits is bounded, and so is what is asked at once; the rest is told at once that its
    owner is not known, and counted."""
    slow = Slow()
    rig = Rig(slow)
    told: list[Owner] = []
    for number in range(2000):
        owner = rig.lookups.resolve(f"k{number}", told.append)
        assert owner == (None if number < 1024 else Owner())
    for number in range(20_000):
        owner = rig.lookups.resolve("k0", told.append)
        assert owner == (None if number < 16_384 - 1024 else Owner())
    assert rig.counts == {("key_info", "queue_full"): 976 + 20_000 - (16_384 - 1024)}
    await until(lambda: len(slow.asked) == 4)
    await asyncio.sleep(0.05)
    assert (len(slow.asked), told) == (4, [])
    slow.go.set()
    await until(lambda: len(told) == 16_384, 20)
    assert set(told) == {Owner("None", "late")}
    assert (slow.most_at_once, len(slow.asked), len(set(slow.asked))) == (4, 1024, 1024)
    assert rig.lookups.resolve("more", told.append) is None, "there is room again"
    await rig.lookups.flush(5)


async def test_remembered_keys_are_bounded() -> None:
    """The key that was asked for first is forgotten first."""
    slow = Slow()
    slow.go.set()
    rig = Rig(slow)
    for start in range(0, 10_500, 500):
        await asyncio.gather(*(rig.owner(f"k{start + number}") for number in range(500)))
    assert len(slow.asked) == 10_500
    await rig.owner("k600")
    await rig.owner("k10499")
    assert len(slow.asked) == 10_500
    await rig.owner("k499")
    assert len(slow.asked) == 10_501


async def test_flush_tells_all_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the process nobody waits any more: those without an answer are told so, in
    bounded time, and those whose answer comes in time are told that."""
    slow = Slow()
    rig = Rig(slow)
    told: list[Owner] = []
    for number in range(300):
        rig.lookups.resolve(f"k{number % 8}", told.append)
    await rig.lookups.flush(0.05)
    assert told == [Owner()] * 300
    assert slow.at_once == 0
    told.clear()
    rig.lookups.resolve("k", told.append)
    asyncio.get_running_loop().call_later(0.02, slow.go.set)
    await rig.lookups.flush(5)
    assert told == [Owner("None", "late")]
    await rig.lookups.flush(0)


async def test_answer_that_does_not_come_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An exchange waits for some seconds, the time in the queue included; then LiteLLM has
    failed, and what is still in the queue is not asked for."""
    monkeypatch.setattr("sidecar.account.lookups._TIMEOUT_S", 0.2)
    slow = Slow()
    rig = Rig(slow)
    began = asyncio.get_running_loop().time()
    owners = await asyncio.gather(*(rig.owner(f"k{number}") for number in range(50)))
    assert asyncio.get_running_loop().time() - began < 5
    assert set(owners) == {Owner()}
    assert len(slow.asked) <= 8
    assert slow.at_once == 0
    assert sum(rig.counts.values()) == 50
    assert rig.counts["key_info", "timeout"] >= 4
    assert [record.message for record in caplog.records] == ["identity_lookups_failed"]


async def test_environment_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that is set for other programs is not used, nor are credentials of a .netrc."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    slow = Slow()
    slow.go.set()
    assert await Rig(slow).owner("k") == Owner("None", "late")


async def test_a_long_queue_is_no_failure_of_litellm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose turn does not come in time has no name, but LiteLLM answers and goes on being asked."""
    monkeypatch.setattr("sidecar.account.lookups._TIMEOUT_S", 0.5)

    class Steady(Slow):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            await asyncio.sleep(0.1)
            self.go.set()
            return await super().handle_async_request(request)

    rig = Rig(Steady())
    owners = await asyncio.gather(*(rig.owner(f"k{number}") for number in range(200)))
    assert set(owners) == {Owner(), Owner("None", "late")}
    assert set(rig.counts) == {("key_info", "found"), ("key_info", "queue_full")}
    assert sum(rig.counts.values()) == 200
    assert not caplog.records
    assert await rig.owner("k0") == Owner("None", "late")
