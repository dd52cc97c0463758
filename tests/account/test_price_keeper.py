"""Keeping prices fresh: how often LiteLLM is asked, and what it costs when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from pytest_httpx import HTTPXMock

from sidecar.account import price_keeper
from sidecar.account.litellm import LiteLLM
from sidecar.account.metrics import Metrics
from sidecar.account.price_file import PriceFile
from sidecar.account.price_keeper import PriceKeeper
from sidecar.account.pricing import Asked, Card
from sidecar.account.rates import ATTO, Cost, Unpriced
from sidecar.errors import ConfigError
from sidecar.exchange import Usage
from tests.account.test_ledger import exchange
from tests.account.test_pricing import MAP, NOW, deployment
from tests.support.running import until

pytestmark = pytest.mark.anyio

ORIGIN = "http://litellm.test:4000"
MAP_URL = f"{ORIGIN}/public/litellm_model_cost_map"
INFO_URL = f"{ORIGIN}/v1/model/info"
KEY = "sk-viewer"


class Rig:
    """A keeper whose times are milliseconds, on a clock that is moved by hand."""

    def __init__(
        self,
        sources: tuple[str, ...] = ("file", "model_info", "cost_map"),
        *,
        file: Path | None = None,
        key: str | None = KEY,
        refresh_s: float = 3600.0,
    ) -> None:
        self.now = NOW
        self.contained: list[Exception] = []
        self.metrics = Metrics((), compat=(), costs=True, clock=lambda: 0.0)
        assert self.metrics.costs is not None
        self.costs = self.metrics.costs
        self.keeper = PriceKeeper(
            self.costs,
            sources,
            file=file,
            litellm=LiteLLM(httpx.AsyncHTTPTransport(), ORIGIN, key),
            has_key=key is not None,
            refresh_s=refresh_s,
            clock=lambda: self.now,
        )

    def refreshes(self, source: str) -> tuple[float, float]:
        """Successes and failures."""
        child = self.costs.refreshes.child
        return child(source, "success").value, child(source, "failure").value

    def knows(self, model: str, model_id: str = "") -> bool:
        return isinstance(self.keeper.pricing.card(Asked(model, model_id=model_id)), Card)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.keeper.keep(self.contained.append))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_LOOK_S", "_FIRST_RETRY_S", "_AT_START_S", "_LAST_RETRY_S", "_SOON_S"):
        monkeypatch.setattr(price_keeper, name, 0.02)


def events(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(r.msg, r.__dict__["source"]) for r in caplog.records if "source" in r.__dict__]


async def test_litellm_is_asked_at_start(
    httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    """The cost map and the deployments, both with the key, and the time of it is shown."""
    httpx_mock.add_response(url=MAP_URL, json=MAP)
    info = {"data": [deployment("claude-own-2")]}
    httpx_mock.add_response(url=INFO_URL, json=info)
    rig = Rig()
    assert not rig.knows("claude-own-1")
    with caplog.at_level(logging.INFO):
        async with rig.running():
            await until(lambda: rig.refreshes("cost_map")[0] and rig.refreshes("model_info")[0])
    assert rig.knows("claude-own-1-20250101")
    assert rig.knows("alias", "d1")
    assert rig.costs.refreshed_at.child("cost_map").value == NOW
    assert {request.headers["authorization"] for request in httpx_mock.get_requests()} == {
        f"Bearer {KEY}"
    }
    assert sorted(events(caplog)) == [("prices_read", "cost_map"), ("prices_read", "model_info")]


async def test_without_a_key_deployments_are_not_asked_for(httpx_mock: HTTPXMock) -> None:
    """The cost map is open to all."""
    httpx_mock.add_response(url=MAP_URL, json=MAP)
    rig = Rig(key=None)
    async with rig.running():
        await until(lambda: rig.refreshes("cost_map")[0])
    (request,) = httpx_mock.get_requests()
    assert "authorization" not in request.headers


async def test_sources_that_are_not_wanted_are_not_asked(httpx_mock: HTTPXMock) -> None:
    """Nothing goes out."""
    rig = Rig(("package",))
    async with rig.running():
        await asyncio.sleep(0.1)
    assert httpx_mock.get_requests() == []
    assert rig.knows("claude-sonnet-4-5")


@pytest.mark.parametrize(
    "failure",
    [
        {"status_code": 500},
        {"status_code": 401},
        {"status_code": 404},
        {"status_code": 307, "headers": {"location": "http://elsewhere.test/"}},
        {"content": b"<html>"},
        {"json": {"error": "no"}},
    ],
    ids=str,
)
@pytest.mark.httpx_mock(can_send_already_matched_responses=True)
async def test_a_failure_keeps_the_last_good_prices(
    httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture, failure: dict[str, object]
) -> None:
    """It is tried again, told once, and once more when it has grown old; then it is told that it
    works again."""
    rig = Rig(("cost_map",), refresh_s=0.02)
    httpx_mock.add_response(url=MAP_URL, json=MAP)
    with caplog.at_level(logging.INFO):
        async with rig.running():
            await until(lambda: rig.refreshes("cost_map")[0])
            httpx_mock.reset()
            httpx_mock.add_response(url=MAP_URL, **failure)  # type: ignore[arg-type]
            await until(lambda: rig.refreshes("cost_map")[1] >= 3)
            assert rig.knows("claude-own-1-20250101")
            rig.now += 3600
            at = rig.refreshes("cost_map")[1]
            await until(lambda: rig.refreshes("cost_map")[1] >= at + 3)
            assert rig.knows("claude-own-1-20250101")
            assert rig.costs.refreshed_at.child("cost_map").value == NOW
            httpx_mock.reset()
            httpx_mock.add_response(url=MAP_URL, json={"claude-new": MAP["claude-own-2"]})
            done = rig.refreshes("cost_map")[0]
            await until(lambda: rig.refreshes("cost_map")[0] > done)
    assert rig.knows("claude-new")
    assert rig.costs.refreshed_at.child("cost_map").value == NOW + 3600
    assert events(caplog) == [
        ("prices_read", "cost_map"),
        ("prices_failed", "cost_map"),
        ("prices_stale", "cost_map"),
        ("prices_read", "cost_map"),
    ]
    assert "elsewhere" not in caplog.text


@pytest.mark.httpx_mock(can_send_already_matched_responses=True)
async def test_an_upstream_that_cannot_be_reached(
    httpx_mock: HTTPXMock, caplog: pytest.LogCaptureFixture
) -> None:
    """LiteLLM may start after the sidecar: it is asked again soon."""
    httpx_mock.add_exception(httpx.ConnectError("no"))
    rig = Rig(("cost_map",))
    async with rig.running():
        await until(lambda: rig.refreshes("cost_map")[1] >= 2)
        httpx_mock.reset()
        httpx_mock.add_response(url=MAP_URL, json=MAP)
        await until(lambda: rig.refreshes("cost_map")[0])
    (record,) = [r for r in caplog.records if r.msg == "prices_failed"]
    assert record.__dict__["reason"] == "/public/litellm_model_cost_map: ConnectError"


async def test_an_endless_answer_is_not_taken(
    httpx_mock: HTTPXMock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left where it passes the bound."""
    monkeypatch.setattr(price_keeper, "_MAX_BYTES", 1000)
    httpx_mock.add_response(url=MAP_URL, content=b" " * 1001)
    rig = Rig(("cost_map",))
    await rig.keeper.refresh()
    assert rig.refreshes("cost_map") == (0, 1)


@pytest.mark.parametrize(
    ("fails", "longest"), [("start", 10), ("refused", 300), ("later", 300)], ids=str
)
async def test_what_was_never_read_is_asked_for_often(
    httpx_mock: HTTPXMock, monkeypatch: pytest.MonkeyPatch, fails: str, longest: int
) -> None:
    """What is answered before LiteLLM has told its prices has none. Where it does not take the
    key, or the old prices hold, it is asked ever more rarely."""
    for name, seconds in (("_FIRST_RETRY_S", 5.0), ("_AT_START_S", 10.0), ("_LAST_RETRY_S", 300.0)):
        monkeypatch.setattr(price_keeper, name, seconds)
    waits: list[float] = []
    done = asyncio.Event()
    rig = Rig(("cost_map",))

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 10:
            done.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    if fails == "later":
        httpx_mock.add_response(url=MAP_URL, json=MAP)
        await rig.keeper.refresh()
    if fails == "refused":
        httpx_mock.add_response(url=MAP_URL, status_code=401, is_reusable=True)
    else:
        httpx_mock.add_exception(httpx.ConnectError("no"), is_reusable=True)
    # The keeper's alone: other threads of this process have servers that sleep, too.
    names = vars(asyncio) | {"sleep": sleep}
    monkeypatch.setattr(price_keeper, "asyncio", SimpleNamespace(**names))
    async with rig.running():
        await asyncio.wait_for(done.wait(), 10)
    assert (waits[0], max(waits)) == (5, longest)


async def test_the_time_of_what_was_never_read_is_that_of_the_start(httpx_mock: HTTPXMock) -> None:
    """So an alert on old prices fires without any."""
    httpx_mock.add_exception(httpx.ConnectError("no"), is_reusable=True)
    rig = Rig(("cost_map", "model_info"))
    rig.now += 3600
    await rig.keeper.refresh()
    for source in ("cost_map", "model_info"):
        assert rig.costs.refreshed_at.child(source).value == NOW


async def test_a_new_deployment_is_asked_for_soon(httpx_mock: HTTPXMock) -> None:
    """Not at the next hour, and no more often than a bound."""
    httpx_mock.add_response(url=INFO_URL, json={"data": []})
    rig = Rig(("model_info",))
    async with rig.running():
        await until(lambda: rig.refreshes("model_info")[0])
        await asyncio.sleep(0.1)
        assert rig.refreshes("model_info") == (1, 0)
        # A replica that does not know it yet answers first.
        for rows in ([], [deployment("m", {"input_cost_per_token": 1e-06})]):
            httpx_mock.add_response(url=INFO_URL, json={"data": rows})
        assert rig.keeper.pricing.card(Asked("alias", model_id="d1")) is Unpriced.UNKNOWN_MODEL
        await until(lambda: rig.knows("alias", "d1"))
    assert rig.refreshes("model_info") == (3, 0)


async def test_the_file_is_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A change holds soon; a broken one is told with its line, and keeps the old prices."""
    path = tmp_path / "prices.yaml"
    path.write_text("mine: {input: 3}\n")
    rig = Rig(("file",), file=path)
    assert rig.refreshes("file") == (1, 0)
    with caplog.at_level(logging.INFO):
        async with rig.running():
            path.write_text("mine: {input: three}\n")
            await until(lambda: rig.refreshes("file")[1])
            assert rig.knows("mine")
            path.write_text("yours: {input: 44}\n")
            await until(lambda: rig.refreshes("file")[0] == 2)
            assert rig.knows("yours")
            assert not rig.knows("mine")
    failed, read = caplog.records
    assert (failed.msg, failed.levelname) == ("price_file_failed", "ERROR")
    assert failed.__dict__["faults"] == [
        f"{path} line 1: 'three' is not a price: 0 or more, in USD, as in 3.75"
    ]
    assert (read.msg, read.__dict__["models"]) == ("price_file_read", 1)


async def test_no_edit_of_the_file_ends_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what the parser cannot take, nor a fault of ours: each is counted once, and the
    next good file is read."""
    path = tmp_path / "prices.yaml"
    path.write_text("mine: {input: 3}\n")
    rig = Rig(("file",), file=path)
    async with rig.running():
        for number, text in enumerate(
            (b'"\\UFFFFFFFF": {input: 3}\n', b'"\\U00110000": {input: 3}\n', b"\xff"), start=1
        ):
            path.write_bytes(text)
            await until(lambda number=number: rig.refreshes("file")[1] == number)
        assert rig.contained == []
        with monkeypatch.context() as patched:
            patched.setattr(PriceFile, "changed", lambda _: 1 / 0)
            await until(lambda: len(rig.contained) >= 2)
        path.write_text("yours: {input: 44}\n")
        await until(lambda: rig.knows("yours"))
    assert {type(exc) for exc in rig.contained} == {ZeroDivisionError}
    assert rig.refreshes("file") == (2, 3 + len(rig.contained))


async def test_a_file_that_is_no_source_is_not_read(tmp_path: Path) -> None:
    """And one that is, and is broken, is refused at the start."""
    path = tmp_path / "prices.yaml"
    path.write_text("mine: {input: three}\n")
    Rig(("cost_map",), file=path)
    with pytest.raises(ConfigError, match="line 1: 'three' is not a price"):
        Rig(("file",), file=path)


async def test_a_price_that_holds_from_a_day_on() -> None:
    """Opus 4.6 lost its long-context prices on a day of March 2026: nobody has to start anew."""
    rig = Rig(("package",), refresh_s=0.02)
    day = datetime(2026, 3, 13, tzinfo=UTC).timestamp()
    rig.now = day - 1
    before = exchange(model="claude-opus-4-6", usage=Usage(300_000, 0), response_model=None)
    assert before.observation is not None
    observation = before.observation

    def cost() -> float:
        found = rig.keeper.pricing.price(before, observation)
        assert isinstance(found, Cost)
        return found.total / ATTO

    assert cost() == 3  # 300,000 at 10 USD per million
    rig.now = day
    assert cost() == 3
    async with rig.running():
        await until(lambda: cost() == 1.5)


async def test_each_source_in_use_has_counters_from_the_start() -> None:
    """At zero; what is not in use has none."""
    rig = Rig(key=None)
    assert {child.values: child.value for child in rig.costs.refreshes.children.values()} == {
        ("cost_map", "success"): 0,
        ("cost_map", "failure"): 0,
    }


async def test_whatever_goes_wrong_is_contained(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of ours costs a refresh, and nothing else."""

    def broken(body: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(price_keeper, "CostMap", broken)
    monkeypatch.setattr(LiteLLM, "get", lambda *_, **__: asyncio.sleep(0, b""))
    rig = Rig(("cost_map",))
    async with rig.running():
        await until(lambda: rig.refreshes("cost_map")[1] >= 2)
    (record,) = [r for r in caplog.records if r.msg == "prices_failed"]
    assert record.__dict__["reason"] == "ZeroDivisionError"
