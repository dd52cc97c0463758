"""What a sidecar still has of a key, a prompt and an answer some seconds after they passed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.process import ManagedProcess, free_port
from tests.support.running import ROOT, until
from tests.support.wire import Received, ask, connected, upstream

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read through Linux's /proc"),
]

CHILD = """
import asyncio, gc, signal, sys

from sidecar.app import Sidecar
from sidecar.config import load_settings
from sidecar.lifecycle import Lifecycle


def holders(backwards):
    # Go through all that can be reached from any object; name what holds a marked text. The mark
    # itself is here backwards alone.
    gc.unfreeze()
    seen, found = set(), []
    stack = [gc.get_objects()]
    while stack:
        holder = stack.pop()
        for each in gc.get_referents(holder):
            if id(each) in seen or each is stack or each is found:
                continue
            seen.add(id(each))
            if isinstance(each, (bytes, bytearray)):
                if backwards.encode() in each[::-1]:
                    found.append(type(holder).__name__)
            elif isinstance(each, str):
                if backwards in each[::-1]:
                    found.append(type(holder).__name__)
            else:
                stack.append(each)
    return found


async def main():
    lifecycle = Lifecycle(Sidecar(load_settings()))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, lifecycle.stop)
    loop.add_signal_handler(
        signal.SIGUSR1, lambda: print("holders", len(holders(sys.argv[1])), flush=True)
    )
    running = asyncio.create_task(lifecycle.run())
    await lifecycle.serving.wait()
    print("serving", flush=True)
    await running


asyncio.run(main())
"""

KEYS = 200


def memory_of(pid: int) -> Iterator[bytes]:
    """Read all that a process can write to."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place, rights = line.split()[:2]
            begin, end = (int(part, 16) for part in place.split("-"))
            if rights.startswith("rw"):
                memory.seek(begin)
                try:
                    yield memory.read(end - begin)
                except OSError:  # a device's
                    pass


async def holders(process: ManagedProcess) -> int:
    """Have the sidecar count the objects that hold a marked text."""
    asked = process.log.read_text().count("holders ")
    process.send(signal.SIGUSR1)
    await until(lambda: process.log.read_text().count("holders ") > asked, 30)
    return int(process.log.read_text().rpartition("holders ")[2].split()[0])


def request_with(key: str, number: int) -> bytes:
    """Ask in one of the ways in which keys come; the prompt is marked, too."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": key}]}).encode()
    target = f"/v1/messages?key={key}" if number % 4 == 1 else "/v1/messages"
    headers = [f"Host: {key}.test", f"authorization: Bearer {key}", f"cookie: a={key}"]
    if number % 4 == 2:
        headers.append("transfer-encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        headers.append(f"content-length: {len(body)}")
    if number % 4 == 3:
        headers.append("connection: close")
    return "\r\n".join([f"POST {target} HTTP/1.1", *headers, "", ""]).encode() + body


async def test_what_is_left_of_a_key(tmp_path: Path) -> None:
    """No object holds a key, a prompt or an answer any more, and what is left of them in memory
    that was freed is soon used again."""
    mark = f"mark-{os.urandom(6).hex()}"
    held = asyncio.Event()

    async def answer(
        received: Received, _: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if b"-held-" in received.head:
            await held.wait()
        found = re.search(mark.encode() + rb"-\w+-end", received.body)
        key = found[0] if found else b""  # else it is the sidecar that asks
        body = b'{"type":"message","usage":{"input_tokens":1},"content":"%b"}' % key
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        writer.write(head % len(body) + body)

    async with upstream(answer) as server:
        port = free_port()
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        environment |= {"SIDECAR_UPSTREAM": server.url, "SIDECAR_ADMIN_PORT": "0"}
        process = ManagedProcess(
            [sys.executable, "-c", CHILD, mark[::-1]],
            directory=tmp_path,
            log=tmp_path / "log",
            environment=environment | {"SIDECAR_PORT": str(port)},
        )
        try:
            await until(lambda: "serving" in process.log.read_text(), 20)
            address = ("127.0.0.1", port)
            async with connected(address) as client:
                client.send(request_with(f"{mark}-held-end", 0))
                await until(lambda: any(b"-held-" in each.head for each in server.received))
                # So it is seen where there is one.
                assert await holders(process) > 0
                held.set()
                assert (await client.answer()).status == 200
            for number in range(KEYS):
                answered = await ask(address, request_with(f"{mark}-{number}-end", number))
                assert answered.status == 200
            async with asyncio.timeout(10):
                while await holders(process):  # noqa: ASYNC110 - it is another process
                    await asyncio.sleep(0.2)
            whole = mark.encode() + rb"-\w+-end"
            left = {key for part in memory_of(process.pid) for key in re.findall(whole, part)}
        finally:
            process.stop()
    print(f"{len(left)} of {KEYS} keys are still in memory that was freed")
    assert len(left) < KEYS / 4
