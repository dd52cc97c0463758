"""The demo: the sidecar before a stand-in provider, traffic, and counts held against the truth.

Everything runs in this process and on one loop, on loopback ports that were free. The counts
are read over HTTP, as a scraper reads them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from time import monotonic
from typing import Any, cast
from urllib.parse import quote

import httpx
import uvicorn
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource
from rich.console import Console
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sidecar.app import Sidecar
from sidecar.config import Settings
from sidecar.demo.comparison import Played, counted, differences, truth
from sidecar.demo.provider import Books, PromptCache, create_provider
from sidecar.demo.show import (
    make_console,
    show_litellm_series,
    show_page,
    show_played,
    show_tables,
    show_verdict,
    show_where_to_look,
)
from sidecar.demo.traffic import KEYS, Ending, send, the_round, the_trickle
from sidecar.lifecycle import Lifecycle
from sidecar.logs import set_up_logging

__all__ = ["run_demo"]

_CALL_TIMEOUT_S = 10.0
_SETTLE_S = 5.0
"""How long the last exchange may take to be counted, and the provider to see a client leave."""
_POLL_S = 0.02
_TRICKLE_EVERY_S = 1.0
_TRICKLE_FOR_S = 3600.0
_BACKLOG = 128
_TEAM_FILE = "teams.json"
_USAGE_LOG = "usage.log"


async def run_demo(*, once: bool) -> int:
    """Run the demo, until a signal comes or an hour has passed.

    Args:
        once: end after the comparison.

    Returns:
        The exit code: 0 if every count is true, 1 if one is not, or if `once` was interrupted
        before anything was compared.
    """
    set_up_logging("warning")
    console = make_console()
    stop = asyncio.Event()
    books = Books()
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(_signals(stop))
        directory = stack.enter_context(_directory())
        upstream = await stack.enter_async_context(_provider(books))
        lifecycle = await stack.enter_async_context(_sidecar(upstream, directory, stop))
        client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{lifecycle.port}",
                trust_env=False,
                timeout=_CALL_TIMEOUT_S,
            )
        )
        if not once:
            show_page(console, lifecycle.admin_port)
        metrics_url = f"http://127.0.0.1:{lifecycle.admin_port}/metrics"
        played = await _play_round(client, books, stop)
        if stop.is_set():
            console.print("Stopped before all calls were made; nothing was compared.")
            return 1 if once else 0
        exposition = await _settled_metrics(client, metrics_url, books, played)
        code = _compare(console, exposition, books, played)
        show_litellm_series(console, exposition)
        if once:
            return code
        show_where_to_look(console, lifecycle.port, lifecycle.admin_port, directory / _USAGE_LOG)
        console.print(
            "\nOne call a second goes on, for an hour at most. Ctrl-C ends it.", style="bold"
        )
        made = await _trickle(client, stop)
        console.print(f"Ended after {made} more calls.")
        return code


async def _play_round(client: httpx.AsyncClient, books: Books, stop: asyncio.Event) -> list[Played]:
    """Make each call of a round after the other, and note where the books have it."""
    played = []
    for ask in the_round():
        if stop.is_set():
            break
        before = len(books.entries)
        ending = await send(client, ask)
        entered = books.entries[before:]
        played.append(Played(ask, ending, entered[0].sequence if entered else None))
    return played


async def _settled_metrics(
    client: httpx.AsyncClient, url: str, books: Books, played: list[Played]
) -> str:
    """Scrape until every exchange has ended on both sides, or its time is up.

    An answer that was read to its end is counted by then; one that broke, or that the client
    left, is counted as soon as the sidecar knows.
    """
    left = [one.sequence for one in played if one.ending is Ending.LEFT and one.sequence]
    deadline = monotonic() + _SETTLE_S
    while True:
        exposition = (await client.get(url)).raise_for_status().text
        requests = sum(sums["requests"] for sums in counted(exposition).by_route.values())
        gone = all(books.entries[at - 1].closed_at is not None for at in left)
        if (requests >= len(played) and gone) or monotonic() > deadline:
            return exposition
        await asyncio.sleep(_POLL_S)


def _compare(console: Console, exposition: str, books: Books, played: list[Played]) -> int:
    """Show the counts beside the truth; returns the exit code."""
    count, true = counted(exposition), truth(books.entries, played, KEYS)
    faults = [str(difference) for difference in differences(count, true)]
    faults += [
        f"{one.ask.model}, {one.ask.about!r}: should end {one.ask.ends}, "
        f"but the client saw {one.ending}"
        for one in played
        if one.ending is not one.ask.ends
    ]
    show_played(console, played)
    show_tables(console, count, true)
    show_verdict(console, faults)
    return 1 if faults else 0


async def _trickle(client: httpx.AsyncClient, stop: asyncio.Event) -> int:
    """Make a call a second; returns how many were made."""
    made = 0
    deadline = monotonic() + _TRICKLE_FOR_S
    for ask in the_trickle():
        if stop.is_set() or monotonic() > deadline:
            break
        await send(client, ask)
        made += 1
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _TRICKLE_EVERY_S)
    return made


# The parts.


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop.set)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Make a directory for the usage log, with the teams that no callback names."""
    teams = {key.hashed: key.team for key in KEYS if not key.named_by_callback}
    with tempfile.TemporaryDirectory(prefix="sidecar-demo-") as directory:
        path = Path(directory)
        (path / _TEAM_FILE).write_text(json.dumps(teams))
        yield path


class _Settings(Settings):
    """Settings that the environment has no say in: the demo counts the same everywhere."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)


@contextlib.asynccontextmanager
async def _sidecar(upstream: str, directory: Path, stop: asyncio.Event) -> AsyncIterator[Lifecycle]:
    """Run a sidecar; if it ends by itself, the demo stops, and says why."""
    settings = _Settings(
        upstream=upstream,
        port=0,
        admin_port=0,
        team_file=directory / _TEAM_FILE,
        usage_log=directory / _USAGE_LOG,
        price_sources=("package",),  # there is no LiteLLM to ask
        drain_timeout_s=1,
    )
    lifecycle = Lifecycle(Sidecar(settings))
    running = asyncio.create_task(lifecycle.run())
    running.add_done_callback(lambda _: stop.set())
    serving = asyncio.create_task(lifecycle.serving.wait())
    await asyncio.wait({running, serving}, return_when=asyncio.FIRST_COMPLETED)
    serving.cancel()
    try:
        yield lifecycle
    finally:
        lifecycle.stop()
        await running


class _Server(uvicorn.Server):
    """A server that leaves signals to the demo."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def _provider(books: Books) -> AsyncIterator[str]:
    """Run the stand-in provider behind a stand-in for LiteLLM's callback; yields its address."""
    app = _CallbackHeaders(create_provider(books=books, cache=PromptCache()))
    config = uvicorn.Config(
        cast("Any", app),
        http="httptools",
        ws="none",
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        listener.setblocking(False)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


class _CallbackHeaders:
    """Names the team of some keys in a response header, as LiteLLM does with the callback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._teams = {
            key.secret.encode(): quote(key.team, safe="").encode()
            for key in KEYS
            if key.named_by_callback
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        team = self._teams.get(dict(scope["headers"]).get(b"x-api-key", b""))

        async def send_named(message: Message) -> None:
            if team is not None and message["type"] == "http.response.start":
                headers = [*message["headers"], (b"x-litellm-team-alias", team)]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_named)
