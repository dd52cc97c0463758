"""The usage log as a record: what a client has seen the end of is in it, once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidecar.account.log_file import LogFile
from tests.support.bodies import message, stream
from tests.support.calls import body_for, post, request, samples, send
from tests.support.process import coverage_environment, free_port
from tests.support.running import ROOT, SidecarProcess, running, sidecar_process, until
from tests.support.secrets import assert_no_keys
from tests.support.wire import Received, Upstream, connected, upstream

pytestmark = pytest.mark.anyio

USAGE = {"input_tokens": 7, "cache_read_input_tokens": 2101, "cache_creation_input_tokens": 0}
KEY = "sk-usage-log-2"
QUESTION = "What is the meaning of it all?"
CALL = post(
    body_for("claude-sonnet-4-5", "records", tokens=10, question=QUESTION),
    KEY,
    **{"User-Agent": "claude-cli/2.0.1"},
)
CONNECTIONS = 16


def head(call_id: str, framing: str, kind: str = "application/json") -> bytes:
    """Write the head of an answer that is known by its id."""
    lines = ["HTTP/1.1 200 OK", f"content-type: {kind}", f"x-litellm-call-id: {call_id}", framing]
    return "\r\n".join([line for line in lines if line] + ["", ""]).encode()


def chunked(*pieces: bytes) -> bytes:
    """Write a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


def answers(call_id: str) -> list[bytes]:
    """Write an answer in each of the ways in which one can end."""
    body = message(USAGE | {"output_tokens": 3}, id=f"msg_{call_id}")
    events = stream(USAGE, {"output_tokens": 3})
    sse = "text/event-stream"
    return [
        head(call_id, f"content-length: {len(body)}") + body,
        head(call_id, "transfer-encoding: chunked") + chunked(body),
        head(call_id, "transfer-encoding: chunked", sse) + chunked(events),
        head(call_id, "transfer-encoding: chunked", sse) + chunked(events[:300], events[300:]),
    ]


@asynccontextmanager
async def numbered() -> AsyncIterator[tuple[Upstream, list[str]]]:
    """Serve answers of all kinds, each with an id of its own; yields the ids, too."""
    ids: list[str] = []
    number = itertools.count()

    async def answer(_: Received, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call_id = f"call-{next(number)}"
        ids.append(call_id)
        kinds = answers(call_id)
        writer.write(kinds[len(ids) % len(kinds)])

    async with upstream(answer) as up:
        yield up, ids


def id_of(answer: Any) -> str:
    """Name an answer."""
    return str(dict(answer.headers)[b"x-litellm-call-id"].decode())


def usage_lines(*paths: Path) -> list[dict[str, Any]]:
    """Read all lines; every one of them has to be whole."""
    lines = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
    return [line for line in lines if line["event"] == "usage"]


async def keep_asking(sidecar: SidecarProcess, seen: list[str]) -> None:
    """Ask one question after the other, until the sidecar is gone."""
    try:
        async with connected(("127.0.0.1", sidecar.port)) as client:
            while (answer := await client.ask(CALL)).complete:
                seen.append(id_of(answer))
    except OSError:
        pass


async def test_on_record_when_the_client_sees_the_end(tmp_path: Path) -> None:
    """Whatever the answer's form: with its end there is its line, and no secret in it."""
    path = tmp_path / "usage.log"
    async with numbered() as (up, ids):
        settings = {"SIDECAR_UPSTREAM": up.url, "SIDECAR_USAGE_LOG": str(path)}
        with sidecar_process(tmp_path, settings) as sidecar:
            async with connected(("127.0.0.1", sidecar.port)) as client:
                for number in range(1, 9):
                    answer = await client.ask(CALL)
                    lines = usage_lines(path)
                    assert answer.complete
                    assert [line["call_id"] for line in lines] == ids
                    assert len(lines) == number
            assert usage_lines(sidecar.process.log) == []
    for line in lines:
        assert (line["status"], line["outcome"], line["read_tokens"]) == ("complete", "hit", 2101)
        assert (line["output_tokens"], line["user_agent"]) == (3, "claude-cli/2.0.1")
    raw = path.read_text()
    assert [secret for secret in (KEY, QUESTION, "Every word of it") if secret in raw] == []


async def test_line_goes_before_the_end_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a line is written, its answer has not ended on the client's side."""
    path = tmp_path / "usage.log"
    client = socket.socket()
    arrived: list[bytes] = []
    write = LogFile.write

    def look_and_write(log: LogFile, line: bytes) -> None:
        try:
            arrived.append(client.recv(1 << 20, socket.MSG_PEEK))
        except BlockingIOError:
            arrived.append(b"")
        write(log, line)

    monkeypatch.setattr(LogFile, "write", look_and_write)
    async with numbered() as (up, _), running(up.url, usage_log=path) as side:
        loop = asyncio.get_running_loop()
        client.setblocking(False)
        with client:
            await loop.sock_connect(client, side.host)
            for number in range(4):
                await loop.sock_sendall(client, CALL)
                answer = b""
                while not answer.endswith((b"}", b"\r\n0\r\n\r\n")):
                    answer += await loop.sock_recv(client, 1 << 20)
                assert len(arrived) == number + 1
                assert not arrived[-1] or not answer.endswith(arrived[-1])
    assert len(usage_lines(path)) == 4


async def test_killed_under_full_load(tmp_path: Path) -> None:
    """Every answer whose end a client saw is on record, once, though the process is killed in
    the middle of it all, again and again, and the file rotated every 40 lines or so."""
    path = tmp_path / "usage.log"
    seen: list[str] = []
    async with numbered() as (up, ids):
        settings = {
            "SIDECAR_UPSTREAM": up.url,
            "SIDECAR_USAGE_LOG": str(path),
            "SIDECAR_USAGE_LOG_MAX_BYTES": "30000",
            "SIDECAR_USAGE_LOG_FILES": "100",
        }
        for kill in (1, 2):
            with sidecar_process(tmp_path, settings) as sidecar:
                clients = [
                    asyncio.create_task(keep_asking(sidecar, seen)) for _ in range(CONNECTIONS)
                ]
                await until(lambda: len(seen) > 400 * kill, 30)  # noqa: B023
                sidecar.process.send(signal.SIGKILL)
                await asyncio.wait_for(asyncio.gather(*clients), 10)
    files = [entry for entry in await asyncio.to_thread(os.listdir, tmp_path) if "usage" in entry]
    recorded = [line["call_id"] for line in usage_lines(*(tmp_path / name for name in files))]
    assert set(seen) <= set(recorded) <= set(ids)
    assert len(recorded) == len(set(recorded))
    assert len(files) >= 15


async def test_drained_under_full_load(tmp_path: Path) -> None:
    """Each request that LiteLLM got is on record, once: those that end in the drain, and
    those during which something else renamed the file."""
    path = tmp_path / "usage.log"
    seen: list[str] = []
    async with numbered() as (up, ids):
        settings = {"SIDECAR_UPSTREAM": up.url, "SIDECAR_USAGE_LOG": str(path)}
        with sidecar_process(tmp_path, settings) as sidecar:
            clients = [asyncio.create_task(keep_asking(sidecar, seen)) for _ in range(CONNECTIONS)]
            await until(lambda: len(seen) > 200, 30)
            path.rename(tmp_path / "usage.log.old")
            await until(path.exists, 5)
            sidecar.process.send(signal.SIGTERM)
            await asyncio.wait_for(asyncio.gather(*clients), 10)
            assert await asyncio.to_thread(sidecar.process.exit_code, timeout_s=10) == 0
    recorded = [line["call_id"] for line in usage_lines(path, tmp_path / "usage.log.old")]
    assert sorted(recorded) == sorted(ids)


async def test_answers_without_an_end(tmp_path: Path) -> None:
    """A client that leaves, an upstream that breaks off, one that is cut in the drain and one
    that could not be reached: each has its line, with what was known."""
    path = tmp_path / "usage.log"
    events = stream(USAGE, {"output_tokens": 3})
    begun = events[: events.index(b"event: message_delta")]
    go_on = asyncio.Event()

    async def half(given: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = given.values(b"user-agent")[0]
        writer.write(head(kind.decode(), "transfer-encoding: chunked", "text/event-stream"))
        writer.write(chunked(begun)[:-5])
        await go_on.wait()
        if kind == b"upstream":
            writer.close()
        else:
            await asyncio.sleep(60)

    def call(name: str) -> bytes:
        return post(body_for("m", "x", tokens=10), KEY, **{"User-Agent": name})

    async with upstream(half) as up:
        settings = {
            "SIDECAR_UPSTREAM": up.url,
            "SIDECAR_USAGE_LOG": str(path),
            "SIDECAR_DRAIN_TIMEOUT_S": "0.2",
        }
        with sidecar_process(tmp_path, settings) as sidecar:
            address = ("127.0.0.1", sidecar.port)
            async with (
                connected(address) as gone,
                connected(address) as cut,
                connected(address) as drained,
            ):
                for client, name in ((gone, "client"), (cut, "upstream"), (drained, "drain")):
                    client.send(call(name))
                    await client.receive(b"\n", 12)
                gone.reset()
                await until(lambda: path.read_bytes().count(b"\n") == 1)
                go_on.set()
                assert not (await cut.answer()).complete
                sidecar.process.send(signal.SIGTERM)
                assert not (await drained.answer()).complete
            assert await asyncio.to_thread(sidecar.process.exit_code, timeout_s=10) == 0
    lines = {line["call_id"]: line for line in usage_lines(path)}
    ends = {name: (line["end"], line["upstream_failure"]) for name, line in lines.items()}
    assert ends == {
        "client": ("client_left", None),
        "upstream": ("upstream_cut", "body_cut"),
        "drain": ("upstream_cut", None),
    }
    for line in lines.values():
        assert (line["status"], line["read_tokens"]) == ("partial", 2101)


# Standard output.


@dataclass(frozen=True)
class SidecarAt:
    """Where a sidecar answers."""

    address: tuple[str, int]
    admin_url: str

    async def failures(self) -> dict[tuple[str, str], float]:
        """Read what has failed, by log and reason."""
        answer = await send(self.admin_url, request("GET", "/metrics"))
        return {
            (labels["log"], labels["reason"]): value
            for name, labels, value in samples(answer.body.decode())
            if name == "litellm_sidecar_log_failures_total" and value
        }


@contextmanager
def started(
    tmp_path: Path, up: str, *wrapper: str, stdout: int | None = None
) -> Iterator[tuple[SidecarAt, subprocess.Popen[bytes]]]:
    """Start a sidecar, by a wrapper if there is one; do not wait until it answers."""
    port, admin_port = free_port(), free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "SIDECAR_UPSTREAM": up,
        "SIDECAR_PORT": str(port),
        "SIDECAR_ADMIN_PORT": str(admin_port),
        "SIDECAR_DRAIN_DELAY_S": "0",
        "SIDECAR_FINAL_SCRAPE_WAIT_S": "0",
    }
    child = subprocess.Popen(
        [*wrapper, sys.executable, "-m", "sidecar", "serve"],
        cwd=tmp_path,
        env=environment | coverage_environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
    )
    try:
        yield SidecarAt(("127.0.0.1", port), f"http://127.0.0.1:{admin_port}"), child
    finally:
        child.kill()
        child.wait(10)
        if child.stdout is not None and not child.stdout.closed:
            with child.stdout as rest:
                assert_no_keys(rest.read(), "the sidecar's output")


@contextmanager
def piped_sidecar(tmp_path: Path, up: str) -> Iterator[tuple[SidecarAt, subprocess.Popen[bytes]]]:
    """Run a sidecar whose standard output is a pipe, of which only the beginning was read."""
    with started(tmp_path, up, stdout=subprocess.PIPE) as (sidecar, child):
        assert child.stdout is not None
        beginning = child.stdout.readline()
        assert b'"serving"' in beginning
        assert_no_keys(beginning, "the sidecar's output")
        yield sidecar, child


async def ask_often(address: tuple[str, int], count: int, model: str = "m") -> None:
    """Ask many questions on one connection; each has to be answered in time."""
    call = post(body_for(model, "x", tokens=10), KEY)
    async with connected(address) as client:
        for _ in range(count):
            assert (await client.ask(call)).status == 200


async def test_standard_output_that_is_never_read(tmp_path: Path) -> None:
    """Neither does it hold up the end of the process."""
    async with upstream(answers("c" * 200)[0]) as up:
        with piped_sidecar(tmp_path, up.url) as (sidecar, child):
            await ask_often(sidecar.address, 200, "m" * 200)
            child.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(child.wait, 15) == 0


async def test_standard_output_that_is_closed(tmp_path: Path) -> None:
    """All goes on without logs, and each line that was lost is counted."""
    async with upstream(answers("c")[0]) as up:
        with piped_sidecar(tmp_path, up.url) as (sidecar, child):
            assert child.stdout is not None
            child.stdout.close()
            await ask_often(sidecar.address, 20)
            async with asyncio.timeout(10):
                while (await sidecar.failures()).get(("usage", "closed")) != 20:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            child.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(child.wait, 10) == 0


async def test_standard_output_that_nobody_reads(tmp_path: Path) -> None:
    """Every request is answered all the same; what is too much is dropped and counted, and what
    was kept comes out in whole lines when somebody reads on. The end is not held up either."""
    long = "\U0001f4be" * 200
    body = message(USAGE | {"output_tokens": 3}, id=long, model=long)
    async with upstream(head("c" * 200, f"content-length: {len(body)}") + body) as up:
        with piped_sidecar(tmp_path, up.url) as (sidecar, child):
            assert child.stdout is not None
            # Lines of 3.3 KB: 4 MiB are full after 1,300 of them.
            asking = [ask_often(sidecar.address, 200, long) for _ in range(8)]
            await asyncio.wait_for(asyncio.gather(*asking), 60)
            failures = await sidecar.failures()
            assert failures["usage", "buffer_full"] > 0
            assert set(failures) <= {("usage", "buffer_full"), ("process", "buffer_full")}

            reading = asyncio.create_task(asyncio.to_thread(child.stdout.read))
            await ask_often(sidecar.address, 1)
            lost = (await sidecar.failures())["usage", "buffer_full"]
            child.send_signal(signal.SIGTERM)
            lines = [json.loads(line) for line in (await reading).splitlines()]
            assert await asyncio.to_thread(child.wait, 10) == 0
    events = [line["event"] for line in lines]
    assert events.count("usage") == 1601 - lost
    assert events[-3:] == ["draining", "drained", "stopped"]


async def test_without_standard_output(tmp_path: Path) -> None:
    """Where the descriptor is closed, its number may be that of a connection: nothing of the
    logs gets into an answer."""
    async with upstream(answers("c")[0]) as up:
        with started(tmp_path, up.url, "sh", "-c", 'exec "$@" >&-', "sh") as (sidecar, child):
            async with asyncio.timeout(20):
                while not await listens(sidecar.address):  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)
            direct = await send(up.url, CALL)
            async with connected(sidecar.address) as client:
                relayed = await client.ask(CALL)
            assert (relayed.body, relayed.complete) == (direct.body, True)
            child.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(child.wait, 10) == 0


async def listens(address: tuple[str, int]) -> bool:
    """Say whether somebody takes connections."""
    try:
        _, writer = await asyncio.open_connection(*address)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


# Settings.


@pytest.mark.parametrize("command", ["serve", "check"])
def test_unusable_path_is_a_fault_of_the_settings(command: str, tmp_path: Path) -> None:
    """It ends with 2 and one line that names setting, path and reason."""
    path = tmp_path / "absent" / "usage.log"
    done = subprocess.run(
        [sys.executable, "-m", "sidecar", command],
        env={"PATH": os.environ["PATH"], "SIDECAR_USAGE_LOG": str(path)} | coverage_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"sidecar: SIDECAR_USAGE_LOG={path} must be stdout, off, or the path of a file that can "
        "be written to (No such file or directory)\n"
    )


@pytest.mark.parametrize(("setting", "count"), [("off", 0), ("stdout", 1), ("", 1)])
async def test_where_lines_go(setting: str, count: int, tmp_path: Path) -> None:
    """By default, and where the setting is empty, to standard output; or nowhere."""
    async with upstream(answers("call-1")[0]) as up:
        settings = {"SIDECAR_UPSTREAM": up.url, "SIDECAR_USAGE_LOG": setting}
        with sidecar_process(tmp_path, settings) as sidecar:
            await ask_often(("127.0.0.1", sidecar.port), 1)
            sidecar.process.send(signal.SIGTERM)
            assert await asyncio.to_thread(sidecar.process.exit_code, timeout_s=10) == 0
    assert len(usage_lines(sidecar.process.log)) == count
