"""Starting, serving and stopping: two servers in one loop, and the order of their end.

The order of a stop, which `Lifecycle.run` goes through from top to bottom: `/readyz` says 503,
requests are still taken for a while, then no more are; running answers may end, and are cut
when their time is up; a last scrape fetches the final counts; the admin port goes last.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from time import monotonic
from typing import Any, Literal, cast

import uvicorn
from starlette.types import ASGIApp

from sidecar.admin.app import rehearse
from sidecar.app import Sidecar
from sidecar.errors import StartError
from sidecar.proxy.edge import Edge, Limits, Listener, Patrol

__all__ = ["Lifecycle", "authority"]

logger = logging.getLogger("sidecar")

_SCRAPED_LATELY_S = 120.0
"""A scraper that was not seen for this long is not waited for."""
_LAST_ANSWERS_S = 1.0
"""How long the admin port may take to end."""
_CANCELLED_TASKS_S = 2.0
"""How long tasks that were cut may take to account for their exchanges."""
_LOOK_S = 0.02
"""Between two looks whether all connections have ended."""
_BACKLOG = 2048
_ADMIN_LIMITS = Limits(
    max_connections=256,
    max_head_bytes=16 * 1024,
    head_timeout_s=10.0,
    stall_timeout_s=30.0,
    # Longer than the interval at which Prometheus usually scrapes.
    keep_alive_timeout_s=75.0,
)
"""Who asks here are scrapers, probes and a few people; each of them is near."""


class _Server(uvicorn.Server):
    """A uvicorn server that leaves signals to us: two of them in one loop would take them
    from each other, and raise them again at the end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._ending = asyncio.Event()

    def end(self) -> None:
        """Begin to end."""
        self.should_exit = True
        self._ending.set()

    async def main_loop(self) -> None:
        """Wait for the end; uvicorn looks ten times a second whether it has come."""
        await self._ending.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept what waits to be accepted, and let what runs end.

        The kernel resets connections that nobody has accepted when their listener closes; the
        clients of these take themselves for connected, and may have sent their requests. What
        uvicorn does here has it wait for a tenth of a second at least.
        """
        loop = asyncio.get_running_loop()
        late = [
            loop.create_task(loop.connect_accepted_socket(self._protocol, accepted))
            for listening in sockets or ()
            for accepted in _waiting(listening)
        ]
        # Nothing comes in between.
        for server in self.servers:
            server.close()
        for listening in sockets or ():
            listening.close()
        state = self.server_state
        for connection in list(state.connections):
            cast("Edge", connection).shutdown()
        await asyncio.gather(*late, return_exceptions=True)
        while (state.connections or state.tasks) and not self.force_exit:  # noqa: ASYNC110 - sets
            await asyncio.sleep(_LOOK_S)
        if not self.force_exit:
            for server in self.servers:
                await server.wait_closed()

    def _protocol(self) -> asyncio.Protocol:
        make = cast("Callable[..., asyncio.Protocol]", self.config.http_protocol_class)
        return make(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )


class Lifecycle:
    """Runs one sidecar from its sockets to its end."""

    def __init__(self, sidecar: Sidecar) -> None:
        settings = sidecar.settings
        self._sidecar = sidecar
        self._settings = settings
        self._stop = asyncio.Event()
        self._now = asyncio.Event()
        self._signal: signal.Signals | None = None
        self._listener = _listener(sidecar)
        # Both are bound before either serves: a port that is taken must be known at once.
        self._data_socket = _bind(settings.host, settings.port, "")
        try:
            self._admin_socket = _bind(settings.admin_host, settings.admin_port, "ADMIN_")
        except StartError:
            self._data_socket.close()
            raise
        self.port: int = self._data_socket.getsockname()[1]
        self.admin_port: int = self._admin_socket.getsockname()[1]
        sidecar.live.port = self.port
        self.serving = asyncio.Event()
        """Set when both ports answer."""

    def stop(self, received: signal.Signals | None = None) -> None:
        """Begin to stop; a second call stops at once."""
        if self._stop.is_set():
            self._now.set()
        self._signal = self._signal or received
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped.

        Raises:
            StartError: a server ended by itself.
        """
        sidecar, settings = self._sidecar, self._settings
        # What these import at their first use is there before anybody's stream.
        await rehearse()
        await asyncio.to_thread(int)
        edge = partial(Edge, listener=self._listener)
        data = _server(sidecar.relay, http=edge, ws=sidecar.tunnel)
        # Both ports have the same edge: uvicorn's own has no limits for slow clients and heads.
        admin_listener = Listener(_ADMIN_LIMITS, lambda _: None, quiet_s=0.0)
        admin_edge = partial(Edge, listener=admin_listener)
        admin = _server(sidecar.admin, http=admin_edge, ws="none")
        beside = [
            _beside(Patrol(server.server_state.connections, turned_away).run())
            for server, turned_away in (
                (data, self._listener.turned_away),
                (admin, admin_listener.turned_away),
            )
        ]
        data_task = asyncio.create_task(data.serve(sockets=[self._data_socket]))
        admin_task = asyncio.create_task(admin.serve(sockets=[self._admin_socket]))
        try:
            while not (data.started and admin.started):
                await asyncio.sleep(0.01)
                _check_alive(data_task, admin_task)
            sidecar.readiness.started = True
            beside.append(_beside(sidecar.watch()))
            self.serving.set()
            logger.info(
                "serving",
                extra={
                    "address": authority(settings.host, self.port),
                    "admin": authority(settings.admin_host, self.admin_port),
                    "upstream": settings.upstream,
                },
            )
            await _first(self._stop.wait(), data_task, admin_task)
            _check_alive(data_task, admin_task)
            await self._drain(data, data_task)
            await self._end(admin, admin_task, admin_listener, _LAST_ANSWERS_S)
        finally:
            self._now.set()
            await self._end(data, data_task, self._listener, 0)
            await self._end(admin, admin_task, admin_listener, 0)
            for task in beside:
                task.cancel()
            await sidecar.aclose()

    async def _drain(self, data: _Server, data_task: asyncio.Task[None]) -> None:
        terminated = self._signal is signal.SIGTERM
        self._sidecar.readiness.draining = True
        # Whoever is answered from here on asks elsewhere next.
        self._listener.announcing = True
        logger.info("draining", extra={"signal": self._signal.name if self._signal else None})
        if terminated:
            await self._pause(self._settings.drain_delay_s)
        running = set(data.server_state.tasks)
        cut = await self._end(data, data_task, self._listener, self._settings.drain_timeout_s)
        logger.info("drained", extra={"ended": len(running - cut), "cut": len(cut)})
        # All exchanges have ended. Those whose owners are being looked up have still to be counted.
        await _first(self._sidecar.flush(), self._now.wait())
        if terminated:
            await self._await_final_scrape()

    async def _end(
        self,
        server: _Server,
        serving: asyncio.Task[None],
        listener: Listener,
        timeout_s: float,
    ) -> set[asyncio.Task[None]]:
        """End a server: let what runs end in its time, and cut the rest; returns what was cut."""
        listener.announcing = listener.closing = True
        server.end()
        await _first(serving, self._now.wait(), asyncio.sleep(timeout_s))
        cut = set(server.server_state.tasks)
        if listener is self._listener:
            # Before they end: a scrape that shows all of them at their end shows this as well.
            self._sidecar.metrics.drain_aborts.child().add(len(cut))
        for task in cut:
            task.cancel()
        if cut:
            await asyncio.wait(cut, timeout=_CANCELLED_TASKS_S)
        # What is left are clients that do not take the end of their answers.
        for connection in (*server.server_state.connections, *listener.turned_away):
            cast("Edge", connection).abort()
        server.force_exit = True
        await asyncio.wait([serving])
        return cut

    async def _await_final_scrape(self) -> None:
        """Wait for a scrape that shows every final count, if anybody scrapes.

        One that came while the last answers were long counted will do.
        """
        scrapes = self._sidecar.scrapes
        ended_at = monotonic()
        if scrapes.last_at is None or ended_at - scrapes.last_at > _SCRAPED_LATELY_S:
            return
        deadline = ended_at + self._settings.final_scrape_wait_s
        while not self._now.is_set() and monotonic() < deadline:
            if scrapes.up_to_date:
                logger.info("final_scrape")
                return
            await self._pause(0.05)
        logger.warning("no_final_scrape", extra={"waited_s": self._settings.final_scrape_wait_s})

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless told to stop at once."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._now.wait(), seconds)


def _listener(sidecar: Sidecar) -> Listener:
    settings, descriptors = sidecar.settings, sidecar.descriptors
    limits = Limits(
        max_connections=settings.max_connections or None,
        max_head_bytes=settings.max_head_bytes,
        head_timeout_s=settings.head_timeout_s or None,
        stall_timeout_s=settings.stall_timeout_s or None,
        keep_alive_timeout_s=settings.keep_alive_timeout_s,
    )
    return Listener(
        limits,
        sidecar.ledger.refuse,
        admits=descriptors.admits,
        max_turned_away=min(128, descriptors.reserved // 4),
    )


def _server(
    app: ASGIApp,
    *,
    http: Callable[..., asyncio.Protocol],
    ws: type[asyncio.Protocol] | Literal["none"],
) -> _Server:
    config = uvicorn.Config(
        cast("Any", app),
        # Annotated as a class, but only ever called.
        http=cast("Any", http),
        ws=ws,
        loop="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        # `date` and `server` are the upstream's.
        server_header=False,
        date_header=False,
        # uvicorn would rewrite the peer's address before we see it.
        proxy_headers=False,
        forwarded_allow_ips="",
        workers=1,
        backlog=_BACKLOG,
        # It would cancel tasks and not wait for them; `_end` does both.
        timeout_graceful_shutdown=None,
    )
    return _Server(config)


def authority(host: str, port: int) -> str:
    """Write host and port as a URL does: an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _bind(host: str, port: int, prefix: str) -> socket.socket:
    name = authority(host, port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as exc:
        raise StartError(
            f"cannot listen on {name} (SIDECAR_{prefix}HOST): {exc.strerror}"
        ) from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(address)
        # Two processes can bind one port with SO_REUSEADDR; only one can listen.
        bound.listen(_BACKLOG)
        bound.setblocking(False)
    except OSError as exc:
        bound.close()
        setting = "HOST" if exc.errno == errno.EADDRNOTAVAIL else "PORT"
        hint = "; is another process using it?" if exc.errno == errno.EADDRINUSE else ""
        raise StartError(
            f"cannot listen on {name} (SIDECAR_{prefix}{setting}): {exc.strerror}{hint}"
        ) from None
    return bound


def _waiting(listening: socket.socket) -> Iterator[socket.socket]:
    """Accept the connections that are there."""
    # Else the end of the queue, or of the file descriptors.
    with contextlib.suppress(OSError):
        while True:
            yield listening.accept()[0]


async def _first(*awaitables: Any) -> None:
    """Wait for the first to end, without ending the tasks among the others."""
    own = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    await asyncio.wait(own, return_when=asyncio.FIRST_COMPLETED)
    for awaitable, task in zip(awaitables, own, strict=True):
        if task is not awaitable:
            task.cancel()


def _beside(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run what goes on beside the servers. They go on without it, but not without a word."""

    def say(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (fault := task.exception()) is not None:
            logger.error("task_failed", exc_info=fault)

    task = asyncio.create_task(work)
    task.add_done_callback(say)
    return task


def _check_alive(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        if task.done():
            raise StartError(f"a server ended by itself: {task.exception()!r}")
