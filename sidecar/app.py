"""The composition root: the only module that knows all rooms, and hands each what it needs."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from sidecar.account.compat import UpstreamVersion
from sidecar.account.exposition import (
    OPENMETRICS_TYPE,
    TEXT_TYPE,
    Scrapes,
    render,
    wants_openmetrics,
)
from sidecar.account.history import History
from sidecar.account.identity import Identities, KeyReader, TeamFile
from sidecar.account.ledger import Ledger
from sidecar.account.litellm import LiteLLM
from sidecar.account.live import Live, Setting
from sidecar.account.log_file import LogFile
from sidecar.account.lookups import LOOKUP_RESULTS, Lookups
from sidecar.account.metrics import Metrics
from sidecar.account.misses import MissTracker
from sidecar.account.price_keeper import PriceKeeper
from sidecar.account.usage_log import UsageLog
from sidecar.admin.app import create_admin
from sidecar.admin.guard import Access, is_loopback
from sidecar.admin.readiness import Readiness
from sidecar.config import Settings, shown_settings
from sidecar.descriptors import Descriptors
from sidecar.errors import ConfigError, UpstreamError
from sidecar.exchange import (
    Dialect,
    LogFault,
    Observer,
    RawHeaders,
    RequestReader,
    Rewrite,
    Route,
    Tap,
)
from sidecar.lines import Channel, LineWriter, Losses
from sidecar.observe.prefix import PrefixReader
from sidecar.observe.recall import Recall
from sidecar.observe.request import BodyReader
from sidecar.observe.rewrite import Rewriter
from sidecar.observe.tap import outcome_of, tap_for
from sidecar.proxy.capacity import Capacity
from sidecar.proxy.headers import ForwardedRule
from sidecar.proxy.relay import Relay
from sidecar.proxy.transport import Timeouts, Transport
from sidecar.proxy.tunnel import tunnel_protocol

__all__ = ["Sidecar"]

logger = logging.getLogger("sidecar")

_PROBE_TIMEOUT_S = 2.0
_WATCH_S = 1.0
_FLUSH_S = 2.0
"""How long the end waits for look-ups that run."""
_SETTLED_SERIES = 1000
"""New series after which the garbage collector is told of them: a full collection goes
through a thousand in less than 1 ms."""


class _Observer:
    """Makes the readers of `observe` for the relay."""

    def __init__(
        self, max_request_bytes: int, prices: PriceKeeper | None, *, prefixes: bool
    ) -> None:
        self._max_request_bytes = max_request_bytes
        self._prices = prices
        salt = secrets.randbits(64)
        self._prefixes: dict[Dialect, PrefixReader] = {}
        if prefixes:
            recall = Recall(salt)
            self._prefixes = {dialect: PrefixReader(dialect, salt, recall) for dialect in Dialect}

    def _ttls_wanted(self) -> bool:
        return self._prices is not None and self._prices.pricing.ttls_wanted

    def read_request(self, route: Route, dialect: Dialect, headers: RawHeaders) -> RequestReader:
        return BodyReader(
            headers,
            self._max_request_bytes,
            ttls=self._ttls_wanted(),
            dialect=dialect,
            prefixes=self._prefixes.get(dialect),
        )

    def tap(self, dialect: Dialect, status_code: int, headers: RawHeaders) -> Tap:
        return tap_for(dialect, status_code, headers)


class Sidecar:
    """One sidecar, put together from its settings; `lifecycle` runs it.

    Args:
        registry: where the metrics are registered; a fresh one if not given.
        observer: replaces the readers of requests and responses.
        stdout: where the lines of the usage log go if they are to go to standard output; without
            it there are none.

    Raises:
        ConfigError: the team file, the price file or the file of the usage log cannot be used.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        registry: CollectorRegistry | None = None,
        observer: Observer | None = None,
        stdout: LineWriter | None = None,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics(
            settings.labels,
            compat=settings.compat,
            costs=bool(settings.price_sources),
            misses=settings.miss_reasons,
            clock=time.time,
        )
        self.registry = registry or CollectorRegistry()
        self.registry.register(self.metrics.store)
        # The process's own metrics are the library's affair; they are written by it, too.
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)
        PlatformCollector(registry=self._process)
        self.registry.register(self._process)
        tls = (
            ssl.create_default_context(cafile=settings.upstream_ca_file)
            if settings.upstream_ca_file
            else None
        )
        self._teams = self._read_teams(settings.team_file)
        self._stdout = stdout
        self._usage_lines = self._open_usage_log(settings, stdout)
        self._usage_log = UsageLog(self._usage_lines, self.metrics) if self._usage_lines else None
        # On connections of its own, so that neither way waits for the other.
        self._litellm = self._way_to_litellm(settings, tls)
        self._lookups: Lookups | None = None
        self.prices = self._price_keeper(settings)
        conflict = self.metrics.compat_conflict
        self._upstream_version = UpstreamVersion(
            self.metrics.upstream_info,
            conflict.child("v1.100") if "v1.100" in settings.compat else None,
        )
        self.misses = self._miss_tracker(settings)
        self.ledger = Ledger(
            self.metrics,
            outcome_of,
            identities=self._identities(settings),
            keys=KeyReader(settings.key_header),
            pricing=self.prices.pricing if self.prices is not None else None,
            misses=self.misses,
            usage_log=self._usage_log,
            upstream=self._upstream_version,
            max_label_values=settings.max_label_values,
            max_series=settings.max_series,
        )
        self.scrapes = Scrapes(self.metrics.store, lambda: self.ledger.submitted, time.monotonic)
        timeouts = Timeouts(
            connect_s=settings.connect_timeout_s or None,
            send_s=settings.send_timeout_s or None,
            first_byte_s=settings.first_byte_timeout_s or None,
            idle_s=settings.idle_timeout_s or None,
        )
        self.descriptors = Descriptors()
        self.upstream = Transport(
            settings.upstream, timeouts, tls=tls, has_room=self.descriptors.has_room
        )
        self.readiness = Readiness(self._probe, time.monotonic)
        forwarded = ForwardedRule(settings.trusted_proxies)
        capacity = Capacity(settings.max_concurrent_requests or None)
        self.relay = Relay(
            self.upstream,
            observer
            or _Observer(
                settings.max_request_capture_bytes, self.prices, prefixes=self.misses is not None
            ),
            self.ledger,
            forwarded,
            rewriting=self._rewriter(settings),
            max_request_body_bytes=settings.max_request_body_bytes or None,
            capacity=capacity,
        )
        self.tunnel = tunnel_protocol(
            self.upstream,
            self.ledger,
            forwarded,
            first_byte_timeout_s=timeouts.first_byte_s,
            capacity=capacity,
        )
        self.history = History(self.metrics, _steady_clock())
        self.live = Live(
            self.metrics,
            self.history,
            ready=self.readiness.reason,
            settings=_described(settings),
            upstream=settings.upstream,
            settle=self._count_log_failures,
        )
        self.admin = create_admin(
            self._render, self.readiness, _access(settings), self.live.documents()
        )
        self._settled_series = -_SETTLED_SERIES

    async def watch(self) -> None:
        """Do what has to be done from time to time, until cancelled."""
        self._settle()
        works = [self._look_at_upstream(), self._look_round()]
        if self.prices is not None:
            works.append(self.prices.keep(self._contain))
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(self._by_itself(work))

    async def _by_itself(self, work: Coroutine[Any, Any, None]) -> None:
        """Do a work whose faults must not end the others."""
        try:
            await work
        except Exception as exc:
            self._contain(exc)

    async def _look_at_upstream(self) -> None:
        reason = await self._probe()
        if reason is not None:
            logger.warning("upstream_unreachable", extra={"reason": reason})

    async def _look_round(self) -> None:
        # What else takes descriptors shows here.
        looks: list[Callable[[], object]] = [self._settle, self.descriptors.has_room]
        if self._usage_log is not None:
            looks.append(self._usage_log.look_after)
        if self.misses is not None:
            looks.append(self.misses.sweep)
        while True:
            await asyncio.sleep(_WATCH_S)
            self._upstream_version.due = True
            # Each for itself: what fails in one must not end the others.
            for look in looks:
                try:
                    look()
                except Exception as exc:
                    self._contain(exc)
            try:
                await self.history.look_after()
            except Exception as exc:
                self._contain(exc)
            if self._teams is not None:
                await self._look_at_teams(self._teams)

    def _settle(self) -> None:
        """Take what stays for good, modules and series, out of the garbage collector's rounds.

        With 30,000 series a full collection stops the loop for 40 ms. What comes and goes is
        frozen too if it is there at the moment; it is freed as before, but for cycles.
        """
        series = self.metrics.store.births
        if series - self._settled_series >= _SETTLED_SERIES:
            self._settled_series = series
            gc.collect(1)
            gc.freeze()

    async def flush(self) -> None:
        """Count what waits for a look-up, under what is known by then."""
        if self._lookups is not None:
            await self._lookups.flush(_FLUSH_S)

    async def aclose(self) -> None:
        """Let go of the upstream."""
        gc.unfreeze()
        if self._lookups is not None:
            await self._lookups.flush(0)
        await self._litellm.aclose()
        await self.upstream.aclose()
        if isinstance(self._usage_lines, LogFile):
            self._usage_lines.close()

    async def _probe(self) -> str | None:
        try:
            status_code = await self.upstream.probe(_PROBE_TIMEOUT_S)
        except UpstreamError as error:
            reason = error.fault.value
        else:
            if status_code < 500:
                return None
            # So answers a load balancer behind which there is no LiteLLM.
            reason = f"answers {status_code}"
        return f"LiteLLM at {self.settings.upstream} (SIDECAR_UPSTREAM): {reason}"

    def _render(self, accept: str, scraper: str | None) -> tuple[str, Iterator[bytes]]:
        self._count_log_failures()
        openmetrics = wants_openmetrics(accept)
        content_type = OPENMETRICS_TYPE if openmetrics else TEXT_TYPE
        return content_type, self._slices(scraper, openmetrics=openmetrics)

    def _slices(self, scraper: str | None, *, openmetrics: bool) -> Iterator[bytes]:
        store, others = self.metrics.store, self._process
        if scraper is None:
            yield from render(store, others, openmetrics=openmetrics)
        else:
            scrape = self.scrapes.begin(scraper)
            yield from render(store, others, openmetrics=openmetrics, watermark=scrape.watermark)
            self.scrapes.end(scrape)

    def _count_log_failures(self) -> None:
        """What a thread writes fails in that thread: it is counted when somebody asks."""
        if self._usage_log is not None:
            self._usage_log.account_failures()
        losses = self._stdout.process.losses if self._stdout is not None else Losses()
        for fault in LogFault:
            self.metrics.log_failures.child("process", fault).value = losses.by_fault[fault]

    def _read_teams(self, path: Path | None) -> TeamFile | None:
        for result in ("success", "failure"):
            self.metrics.team_file_reloads.child(result)
        if path is None:
            return None
        teams = TeamFile(path)
        self._teams_read()
        return teams

    def _open_usage_log(
        self, settings: Settings, stdout: LineWriter | None
    ) -> LogFile | Channel | None:
        if settings.usage_log == "off":
            return None
        if settings.usage_log == "stdout":
            return stdout.usage if stdout is not None else None
        try:
            return LogFile(
                settings.usage_log,
                max_bytes=settings.usage_log_max_bytes,
                files=settings.usage_log_files,
            )
        except OSError as exc:
            raise ConfigError(
                [
                    f"SIDECAR_USAGE_LOG={settings.usage_log} must be stdout, off, or the path of "
                    f"a file that can be written to ({exc.strerror})"
                ]
            ) from None

    def _way_to_litellm(self, settings: Settings, tls: ssl.SSLContext | None) -> LiteLLM:
        way = Transport(settings.upstream, Timeouts(settings.connect_timeout_s or None), tls=tls)
        scheme = "https" if settings.upstream.startswith("https:") else "http"
        key = settings.litellm_key
        return LiteLLM(
            way,
            f"{scheme}://{way.authority.decode()}",
            key.get_secret_value() if key is not None else None,
            settings.key_header or "authorization",
        )

    def _price_keeper(self, settings: Settings) -> PriceKeeper | None:
        if self.metrics.costs is None:
            return None
        return PriceKeeper(
            self.metrics.costs,
            settings.price_sources,
            file=settings.price_file,
            litellm=self._litellm,
            has_key=settings.litellm_key is not None,
            refresh_s=settings.price_refresh_s,
            clock=time.time,
        )

    def _miss_tracker(self, settings: Settings) -> MissTracker | None:
        if self.metrics.misses is None:
            return None
        evicted = self.metrics.misses.evicted.child()
        return MissTracker(time.monotonic, evicted, max_conversations=settings.max_conversations)

    def _identities(self, settings: Settings) -> Identities | None:
        """Put together what knows keys; None where nothing does."""

        def count(source: str, result: str) -> None:
            self.metrics.identity_lookups.child(source, result).add(1)

        if self._teams is not None:
            for result in ("found", "not_found"):
                self.metrics.identity_lookups.child("file", result)
        if settings.litellm_key is not None:
            for source, results in LOOKUP_RESULTS.items():
                for result in results:
                    self.metrics.identity_lookups.child(source, result)
            self._lookups = Lookups(
                self._litellm,
                count,
                self._contain,
                time.monotonic,
                ttl_s=settings.identity_ttl_s,
            )
        if self._lookups is None and self._teams is None:
            return None
        return Identities(self._lookups, self._teams, count)

    def _rewriter(self, settings: Settings) -> Rewriter | None:
        if settings.rewrite_usage == "off":
            return None
        for result in Rewrite:
            self.metrics.rewrites.child(result)
        return Rewriter(full=settings.rewrite_usage == "openai-full", only=settings.rewrite_only)

    def _teams_read(self) -> None:
        self.metrics.team_file_reloads.child("success").add(1)
        self.metrics.team_file_success.child().value = time.time()

    async def _look_at_teams(self, teams: TeamFile) -> None:
        """Read the team file again if it has changed."""
        try:
            if await asyncio.to_thread(teams.changed):
                keys = await asyncio.to_thread(teams.load)
                self._teams_read()
                logger.info("team_file_read", extra={"keys": keys})
        except ConfigError as error:
            self.metrics.team_file_reloads.child("failure").add(1)
            logger.error("team_file_failed", extra={"faults": error.faults, "kept": "the old map"})
        except Exception as exc:
            self.metrics.team_file_reloads.child("failure").add(1)
            self._contain(exc)

    def _contain(self, exc: Exception) -> None:
        self.ledger.contain("account", exc)


def _steady_clock() -> Callable[[], float]:
    """Make a clock of Unix time that is never set back, or forth."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset


def _described(settings: Settings) -> list[Setting]:
    """Put what is in force into words, secrets masked."""
    return [
        Setting(
            name=name,
            value=value,
            changed=getattr(settings, field_name) != field.default,
            purpose=field.description or "",
        )
        for (name, value), (field_name, field) in zip(
            shown_settings(settings).items(), Settings.model_fields.items(), strict=True
        )
    ]


def _access(settings: Settings) -> Access:
    token = settings.admin_token
    return Access(
        token_hash=sha256(token.get_secret_value().encode()).digest() if token else None,
        open=settings.admin_open,
        local=is_loopback(settings.admin_host),
        metrics_guarded=settings.admin_guard_metrics,
    )
