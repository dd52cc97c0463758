"""Starting and stopping, as a process, and the admin port."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from sidecar.account.identity import TeamFile
from sidecar.app import Sidecar
from sidecar.lifecycle import _server
from sidecar.proxy.edge import Edge, Limits, Listener
from tests.support.bodies import stream
from tests.support.edges import Served, answering
from tests.support.process import free_port
from tests.support.running import running, sidecar_process, until
from tests.support.wire import Received, ask, connected, read_answer, upstream

pytestmark = pytest.mark.anyio

POST = (
    b"POST /v1/messages HTTP/1.1\r\nHost: llm.test\r\nContent-Length: 14\r\n\r\n"
    + b'{"model": "m"}'
)
STREAM = stream({"input_tokens": 7, "output_tokens": 1, "cache_read_input_tokens": 2101}, {})
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n" % len(
    STREAM
)
CACHED = "litellm_cached_tokens_metric_total{"
PROMETHEUS = {"x-prometheus-scrape-timeout-seconds": "10"}


def log_of(directory: Path) -> list[dict[str, object]]:
    lines = (directory / "sidecar.log").read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


async def get(url: str, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as client:
        return await client.get(url, headers=headers)


async def test_sigterm_drains(tmp_path: Path) -> None:
    """A running stream ends whole, /readyz says 503 meanwhile, a last scrape sees the final
    counts, and the process ends with 0."""
    go = asyncio.Event()

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + STREAM[:200])
        await go.wait()
        writer.write(STREAM[200:])

    async with upstream(serve) as up:
        settings = {
            "SIDECAR_UPSTREAM": up.url,
            "SIDECAR_DRAIN_DELAY_S": "0.3",
            "SIDECAR_DRAIN_TIMEOUT_S": "10",
            "SIDECAR_FINAL_SCRAPE_WAIT_S": "10",
        }
        with sidecar_process(tmp_path, settings) as side:
            await get(f"{side.admin_url}/metrics", **PROMETHEUS)
            reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
            writer.write(POST)
            await reader.readuntil(b"\r\n\r\n")
            side.process.send(signal.SIGTERM)
            await asyncio.to_thread(_await_refusal, side.port)
            ready = await get(f"{side.admin_url}/readyz")
            assert (ready.status_code, ready.text) == (503, "draining\n")
            go.set()
            assert (await reader.readexactly(len(STREAM))) == STREAM
            writer.close()
            scrapes = []
            with contextlib.suppress(httpx.TransportError):
                for _ in range(500):
                    scrapes.append(await get(f"{side.admin_url}/metrics", **PROMETHEUS))
                    await asyncio.sleep(0.01)
            assert await asyncio.to_thread(side.process.exit_code, timeout_s=10) == 0
    cached = [line for line in scrapes[-1].text.splitlines() if line.startswith(CACHED)]
    assert [line.rsplit(" ", 1)[1] for line in cached] == ["2101.0"]
    events = [line["event"] for line in log_of(tmp_path)]
    assert events[-5:] == ["draining", "usage", "drained", "final_scrape", "stopped"]


def _await_refusal(port: int) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.01)
    raise AssertionError("new connections are still taken")


@pytest.mark.parametrize("twice", [False, True], ids=["time-out", "second signal"])
async def test_stream_that_does_not_end_is_cut(tmp_path: Path, twice: bool) -> None:
    """When the time is up, or at a second signal, what still runs is cut, and counted."""

    async def serve(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + STREAM[:200])
        await asyncio.sleep(3600)

    async with upstream(serve) as up:
        timeout = "60" if twice else "0.5"
        settings = {"SIDECAR_UPSTREAM": up.url, "SIDECAR_DRAIN_TIMEOUT_S": timeout}
        with sidecar_process(tmp_path, settings) as side:
            reader, writer = await asyncio.open_connection("127.0.0.1", side.port)
            writer.write(POST)
            await reader.readuntil(b"\r\n\r\n")
            side.process.send(signal.SIGTERM)
            if twice:
                await asyncio.to_thread(_await_refusal, side.port)
                side.process.send(signal.SIGTERM)
            assert await asyncio.to_thread(side.process.exit_code, timeout_s=10) == 0
            assert await reader.read() == STREAM[:200]
            writer.close()
    (drained,) = [line for line in log_of(tmp_path) if line["event"] == "drained"]
    assert drained["cut"] == 1


@pytest.mark.parametrize("twice", [False, True], ids=["in time", "at a second signal"])
async def test_request_without_an_answer_is_told(twice: bool, tmp_path: Path) -> None:
    """Whom LiteLLM has not answered when the time is over gets 503, and it is counted as that, not
    as a client that left."""

    async def serve(_: Received, __: asyncio.StreamReader, ___: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with upstream(serve) as up:
        lines = tmp_path / "usage.jsonl"
        environment = {
            "SIDECAR_UPSTREAM": up.url,
            "SIDECAR_USAGE_LOG": str(lines),
            "SIDECAR_DRAIN_TIMEOUT_S": "60" if twice else "0.2",
        }
        with sidecar_process(tmp_path, environment) as side:
            asking = asyncio.create_task(ask(("127.0.0.1", side.port), POST))
            await until(lambda: up.received)
            side.process.send(signal.SIGTERM)
            if twice:
                await until(lambda: any(line["event"] == "draining" for line in log_of(tmp_path)))
                side.process.send(signal.SIGTERM)
            answer = await asking
            assert await asyncio.to_thread(side.process.exit_code, timeout_s=10) == 0
    assert (answer.status, answer.complete) == (503, True)
    assert answer.header(b"x-sidecar-error") == b"draining"
    assert json.loads(answer.body)["error"]["type"] == "overloaded_error"
    line = json.loads(lines.read_text())
    assert (line["http_status"], line["status"], line["end"]) == (503, "error", "complete")


async def test_connection_that_waits_to_be_accepted_is_served() -> None:
    """Its client takes itself for connected, and has sent its request, when the port closes."""
    listener = Listener(Limits(), lambda _: None)
    edge = functools.partial(Edge, listener=listener)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        server = _server(answering()(Served()), http=edge, ws="none")
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        await until(lambda: server.started)
        with socket.create_connection(listening.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: llm.test\r\n\r\n")
            answer = asyncio.get_running_loop().run_in_executor(None, client.recv, 1000)
            # Nothing has been awaited since: the loop had no occasion to accept it.
            listener.announcing = listener.closing = True
            stopping = server.shutdown([listening])
            server.force_exit = True  # it has no patrol
            await stopping
            assert (await answer).startswith(b"HTTP/1.1 200 OK\r\n")
        serving.cancel()
        await asyncio.wait([serving])


async def test_work_beside_the_servers_that_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and requests are served without it."""

    async def watch(_: Sidecar) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(Sidecar, "watch", watch)
    async with upstream(HEAD + STREAM) as up, running(up.url) as side:
        assert (await ask(side.host, POST)).status == 200
    (said,) = [record for record in caplog.records if record.message == "task_failed"]
    assert said.exc_info is not None


async def test_clients_of_the_admin_port_hold_up_nothing(tmp_path: Path) -> None:
    """Not one that is idle, nor one that asks for more and more and reads nothing."""
    with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": "http://127.0.0.1:9"}) as side:
        address = ("127.0.0.1", side.admin_port)
        async with connected(address) as idle, connected(address, limit=1024) as stuck:
            metrics = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
            assert (await idle.ask(metrics)).status == 200
            stuck.send(metrics * 1000)
            await until(lambda: side.logged("serving"))
            side.process.send(signal.SIGTERM)
            assert await asyncio.to_thread(side.process.exit_code, timeout_s=8) == 0


@pytest.mark.parametrize("setting", ["SIDECAR_PORT", "SIDECAR_ADMIN_PORT"])
def test_port_that_is_taken(tmp_path: Path, setting: str) -> None:
    """A port that is taken ends the start with 1 and says which it is."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with sidecar_process(tmp_path, {setting: port}, wait=False) as side:
            assert side.process.exit_code(timeout_s=10) == 1
    said = (tmp_path / "sidecar.log").read_text()
    assert f"cannot listen on 127.0.0.1:{port} ({setting})" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"SIDECAR_DRAIN_DELAY_S": "x", "SIDECAR_UPSTREAM": "y"}, "SIDECAR_DRAIN_DELAY_S='x'"),
        ({"SIDECAR_TEAM_FILE": "teams.json"}, "teams.json: must be one mapping"),
        ({"SIDECAR_PRICE_FILE": "prices.yaml"}, "prices.yaml line 2: is neither JSON nor YAML"),
    ],
)
def test_broken_settings(tmp_path: Path, settings: dict[str, str], said: str) -> None:
    """Settings that cannot be used end the start with 2 and a sentence for each."""
    (tmp_path / "teams.json").write_text("[]")
    (tmp_path / "prices.yaml").write_text('\n"\\UFFFFFFFF": {input: 3}\n')
    with sidecar_process(tmp_path, settings, wait=False) as side:
        assert side.process.exit_code(timeout_s=10) == 2
    assert said in (tmp_path / "sidecar.log").read_text()


async def test_no_upstream(tmp_path: Path) -> None:
    """Without LiteLLM the start says so, /readyz says 503 and why, /healthz is fine."""
    address = f"http://127.0.0.1:{free_port()}"
    with sidecar_process(tmp_path, {"SIDECAR_UPSTREAM": address, "SIDECAR_X": "1"}) as side:
        ready = await get(f"{side.admin_url}/readyz")
        assert (ready.status_code, "connect_failed" in ready.text) == (503, True)
        assert (await get(f"{side.admin_url}/healthz")).status_code == 200
        assert (await ask(("127.0.0.1", side.port), POST)).status == 502
    events = {line["event"]: line for line in log_of(tmp_path)}
    assert "SIDECAR_UPSTREAM" in str(events["upstream_unreachable"]["reason"])
    assert events["unknown_setting"]["detail"] == "SIDECAR_X is not a setting"


async def test_team_file_is_read_again(tmp_path: Path) -> None:
    """A file that changes is read again; a broken one keeps the old map and is counted."""
    path = tmp_path / "teams.json"
    path.write_text("{}")
    async with upstream(HEAD + STREAM) as up, running(up.url, team_file=path) as side:
        reloads = "litellm_sidecar_team_file_reloads_total"
        assert side.value(reloads, result="success") == 1
        path.write_text("{ broken")
        await until(lambda: side.value(reloads, result="failure") == 1)
        path.write_text('{"' + "0" * 64 + '": "red"}')
        await until(lambda: side.value(reloads, result="success") == 2)


async def test_no_file_ends_what_is_done_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the parser cannot take is a failure like any other; so is a fault of ours, which is
    counted beside it. Whatever fails, the other files are read again."""
    teams, prices = tmp_path / "teams.yaml", tmp_path / "prices.yaml"
    teams.write_text("{}")
    prices.write_text("m: {input: 3}")
    async with (
        upstream(HEAD + STREAM) as up,
        running(up.url, team_file=teams, price_file=prices) as side,
    ):

        def read(result: str) -> list[float | None]:
            return [
                side.value("litellm_sidecar_team_file_reloads_total", result=result),
                side.value("litellm_sidecar_price_refreshes_total", source="file", result=result),
            ]

        for path in (teams, prices):
            path.write_text('"\\UFFFFFFFF": {input: 3}')
        await until(lambda: read("failure") == [1, 1])
        monkeypatch.setattr(type(side.sidecar.descriptors), "has_room", lambda _: 1 / 0)
        monkeypatch.setattr(TeamFile, "changed", lambda _: 1 / 0)
        errors = "litellm_sidecar_internal_errors_total"
        await until(lambda: (side.value(errors, room="account") or 0) >= 2)
        prices.write_text("m: {input: 44}")
        await until(lambda: read("success") == [1, 2])
        monkeypatch.undo()
        teams.write_text("{}  # mended")
        await until(lambda: read("success") == [2, 2])


async def test_metrics_in_both_formats() -> None:
    """/metrics speaks text and OpenMetrics, gzipped when asked, with the process's own."""
    async with upstream(HEAD + STREAM) as up, running(up.url) as side:
        reader, writer = await asyncio.open_connection(*side.host)
        writer.write(POST)
        await read_answer(reader)
        writer.close()
        text = await get(f"{side.admin_url}/metrics")
        accept = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
        openmetrics = await get(f"{side.admin_url}/metrics", accept=accept)
        page = await get(f"{side.admin_url}/")
    assert text.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert text.headers["content-encoding"] == "gzip"
    assert "process_resident_memory_bytes" in text.text
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.count("# EOF") == 1
    assert openmetrics.text.endswith("# EOF\n")
    assert "litellm_cached_tokens_metric_total" in text.text
    assert (page.status_code, "/metrics" in page.text) == (200, True)
