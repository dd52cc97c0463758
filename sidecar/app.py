"""The composition root: the only module that knows all rooms, and hands each what it needs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from sidecar.account.exposition import (
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    Scrapes,
    render,
    wants_openmetrics,
)
from sidecar.account.identity import TeamFile
from sidecar.account.ledger import Ledger
from sidecar.account.metrics import Metrics
from sidecar.admin.app import create_admin
from sidecar.admin.readiness import Readiness
from sidecar.config import Settings
from sidecar.errors import ConfigError, UpstreamError
from sidecar.exchange import Dialect, Observer, RawHeaders, RequestReader, Route, Tap
from sidecar.observe.request import BodyReader
from sidecar.observe.tap import outcome_of, tap_for
from sidecar.proxy.headers import ForwardedRule
from sidecar.proxy.relay import Relay
from sidecar.proxy.transport import Timeouts, Upstream
from sidecar.proxy.tunnel import tunnel_protocol

__all__ = ["Sidecar"]

logger = logging.getLogger("sidecar")

_PROBE_TIMEOUT_S = 2.0
_TEAM_FILE_POLL_S = 1.0


class _Observer:
    """Makes the readers of `observe` for the relay."""

    def __init__(self, max_request_bytes: int) -> None:
        self._max_request_bytes = max_request_bytes

    def read_request(self, route: Route, dialect: Dialect, headers: RawHeaders) -> RequestReader:
        return BodyReader(headers, self._max_request_bytes)

    def tap(self, dialect: Dialect, status_code: int, headers: RawHeaders) -> Tap:
        return tap_for(dialect, status_code, headers)


class Sidecar:
    """One sidecar, put together from its settings; `lifecycle` runs it.

    Args:
        registry: where the metrics are registered; a fresh one if not given.
        observer: replaces the readers of requests and responses.

    Raises:
        ConfigError: the team file cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        registry: CollectorRegistry | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics(settings.labels, compat=settings.compat != "off", clock=time.time)
        self.registry = registry or CollectorRegistry()
        self.registry.register(self.metrics.store)
        # The process's own metrics are the library's affair; they are written by it, too.
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        self.registry.register(self._process)
        self.scrapes = Scrapes(self.metrics.store, time.monotonic)
        self._teams = self._read_teams(settings.team_file)
        self.ledger = Ledger(
            self.metrics,
            outcome_of,
            teams=self._teams,
            max_label_values=settings.max_label_values,
            max_series=settings.max_series,
        )
        timeouts = Timeouts(
            connect_s=settings.connect_timeout_s or None,
            first_byte_s=settings.first_byte_timeout_s or None,
            idle_s=settings.idle_timeout_s or None,
        )
        self.upstream = Upstream(
            settings.upstream,
            timeouts,
            ca_file=str(settings.upstream_ca_file) if settings.upstream_ca_file else None,
        )
        self.readiness = Readiness(self._probe, time.monotonic)
        forwarded = ForwardedRule(settings.trusted_proxies)
        self.relay = Relay(
            self.upstream,
            observer or _Observer(settings.max_request_capture_bytes),
            self.ledger,
            forwarded,
            max_request_body_bytes=settings.max_request_body_bytes or None,
        )
        self.tunnel = tunnel_protocol(
            self.upstream, self.ledger, forwarded, first_byte_timeout_s=timeouts.first_byte_s
        )
        self.admin = create_admin(self._render, self.readiness)

    async def watch(self) -> None:
        """Do what has to be done from time to time, until cancelled."""
        reason = await self._probe()
        if reason is not None:
            logger.warning("upstream_unreachable", extra={"reason": reason})
        while self._teams is not None:
            await asyncio.sleep(_TEAM_FILE_POLL_S)
            if await asyncio.to_thread(self._teams.changed):
                await self._reload_teams(self._teams)

    async def aclose(self) -> None:
        """Let go of the upstream."""
        await self.upstream.aclose()

    async def _probe(self) -> str | None:
        try:
            await self.upstream.probe(_PROBE_TIMEOUT_S)
        except UpstreamError as error:
            return f"LiteLLM at {self.settings.upstream} (SIDECAR_UPSTREAM): {error.fault.value}"
        return None

    def _render(self, accept: str, scraper: str | None) -> tuple[str, Iterator[bytes]]:
        openmetrics = wants_openmetrics(accept)
        watermark = None if scraper is None else self.scrapes.begin(scraper)
        slices = render(
            self.metrics.store, self._process, openmetrics=openmetrics, watermark=watermark
        )
        return OPENMETRICS_TYPE if openmetrics else TEXT_TYPE, slices

    def _read_teams(self, path: Path | None) -> TeamFile | None:
        for result in ("success", "failure"):
            self.metrics.team_file_reloads.child(result)
        if path is None:
            return None
        teams = TeamFile(path)
        self._teams_read()
        return teams

    def _teams_read(self) -> None:
        self.metrics.team_file_reloads.child("success").add(1)
        self.metrics.team_file_success.child().value = time.time()

    async def _reload_teams(self, teams: TeamFile) -> None:
        try:
            keys = await asyncio.to_thread(teams.load)
        except ConfigError as error:
            self.metrics.team_file_reloads.child("failure").add(1)
            logger.error("team_file_failed", extra={"faults": error.faults, "kept": "the old map"})
        else:
            self._teams_read()
            logger.info("team_file_read", extra={"keys": keys})
