"""The usage log: one JSON line for each exchange on an observed route.

`UsageLine` is the format, and what `docs/usage-log.md` is written from. A key is in it as the
beginning of its hash; of prompts, answers and bodies there is nothing.

`UsageLog.write` is called for every exchange before its last byte goes out. It never waits and
never raises: where lines cannot be written it counts that, and says so once.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from sidecar.account.metrics import Metrics
from sidecar.exchange import (
    Exchange,
    LogFault,
    MissReason,
    Observation,
    Outcome,
    Usage,
    first_values,
    header,
)
from sidecar.lines import Losses

__all__ = ["Lines", "UsageLine", "UsageLog"]

logger = logging.getLogger("sidecar.account")

_MAX_CHARS = 200
"""Longest text of a field, in characters: what a client says has no other bound."""
_KEY_CHARS = 16
_QUIET_S = 60.0
"""A failure that was logged is not logged again within this time."""
# What JSON lets stand as it is, and a terminal may obey: DEL, C1 controls, line separators.
_CONTROLS = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]")
_REMEDIES = {
    LogFault.NO_SPACE: "make room, or lower SIDECAR_USAGE_LOG_MAX_BYTES or _FILES",
    LogFault.UNAVAILABLE: "make the directory of SIDECAR_USAGE_LOG, and let this user write to it",
    LogFault.CLOSED: "start what reads standard output again, or set SIDECAR_USAGE_LOG to a file",
    LogFault.BUFFER_FULL: "see to what reads standard output, or set SIDECAR_USAGE_LOG to a file",
    LogFault.IO_ERROR: "see to the file system of SIDECAR_USAGE_LOG",
    LogFault.ROTATION: "let this user rename files in the directory of SIDECAR_USAGE_LOG",
}


class UsageLine(msgspec.Struct, tag="usage", tag_field="event", gc=False):
    """One line. Texts are cut after 200 characters."""

    time: str
    """When the exchange ended: RFC 3339, UTC, ms."""
    route: str
    """The path, spelled as in the label `route`."""
    http_status: int
    """Status code sent to the client; 499 where it left before a head."""
    status: str
    """What could be read of the answer, as in the label `status`."""
    fault: str | None
    """Why that is not `complete`, in words for a person."""
    outcome: str | None
    """What the cache did, as in the label `outcome`; null if not 2xx."""
    end: str
    """How the answer ended: `complete`, `upstream_cut` (by LiteLLM, a time-out or the end of a
    drain), `client_left`."""
    upstream_failure: str | None
    """Why LiteLLM gave no answer, or not all of it."""
    model: str | None
    """What the client asked for."""
    response_model: str | None
    """`model` of the answer, as the provider spells it."""
    model_id: str | None
    """LiteLLM's deployment (`x-litellm-model-id`)."""
    provider: str
    """As in the label `provider`."""
    team_alias: str
    """The team's name, as known at that moment; `None` for a key without a team, `unknown`
    where it was not known."""
    key_hash: str | None
    """First 16 digits of the key's sha256; null without a key."""
    user_agent: str | None
    """The client's `User-Agent`."""
    stream: bool | None
    """Whether a stream was asked for."""
    uncached_tokens: int | None
    """Prompt tokens neither read from the cache nor written to it."""
    read_tokens: int | None
    """Prompt tokens read from the cache."""
    write_5m_tokens: int | None
    """Prompt tokens written to the cache for 5 minutes."""
    write_1h_tokens: int | None
    """Prompt tokens written to the cache for 1 hour."""
    write_unknown_tokens: int | None
    """Prompt tokens written, where the answer does not say for how long."""
    output_tokens: int | None
    """Tokens generated."""
    duration_s: float
    """Seconds from the request's head to the answer's end."""
    first_byte_s: float | None
    """Seconds to the head of LiteLLM's answer."""
    first_token_s: float | None
    """Seconds to the first content of a streamed answer."""
    call_id: str | None
    """LiteLLM's `x-litellm-call-id`. A client may have chosen it: it need not be unique."""
    message_id: str | None
    """`id` of the answer."""
    cost_usd: float | UnsetType = UNSET
    """What it cost, in US dollars; absent where no price is known."""
    miss_reason: str | UnsetType = UNSET
    """Why nothing was read from the cache, as in the label `reason` of the misses; absent where
    something was, where caching was not asked for, and with SIDECAR_MISS_REASONS=false."""


class Lines(Protocol):
    """What takes lines; nothing here may wait or raise."""

    losses: Losses

    def write(self, line: bytes) -> None:
        """Take a line, its line end included."""


class UsageLog:
    """Writes exchanges as lines.

    Args:
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        lines: Lines,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lines = lines
        self._clock = clock
        self._encoder = msgspec.json.Encoder()
        self._second = 0
        self._second_text = ""
        self._failures = {fault: metrics.log_failures.child("usage", fault) for fault in LogFault}
        self._failures_seen = 0
        self._logged_at: dict[LogFault, float] = {}
        self._lines_taken = 0
        self._failing_since: int | None = None
        """How many had failed when it began to fail; None while all is well."""
        self._at_last_look = (0, 0)

    def write(
        self,
        exchange: Exchange,
        observation: Observation,
        *,
        outcome: Outcome | None,
        provider: str,
        team_alias: str,
        hashed_key: str | None,
        cost_usd: float | None = None,
        miss_reason: MissReason | None = None,
    ) -> None:
        """Write the line of an exchange.

        Args:
            cost_usd: None where no price is known.
            miss_reason: None for an answer that is no miss.
        """
        response = first_values(exchange.response_headers)
        facts, usage = exchange.facts, observation.usage
        # By position, in the order of the fields: names to match would take twice as long.
        line = UsageLine(
            self._now(),
            exchange.route,
            exchange.status_code,
            observation.status,
            _cut(observation.fault),
            outcome,
            exchange.end,
            exchange.upstream_fault,
            _cut(facts.model),
            _cut(observation.response_model),
            _text(response.get(b"x-litellm-model-id")),
            provider,
            team_alias[:_MAX_CHARS],
            hashed_key and hashed_key[:_KEY_CHARS],
            _text(header(exchange.request_headers, b"user-agent")),
            facts.stream,
            usage.input_tokens,
            usage.cache_read_input_tokens,
            *_writes(usage),
            usage.output_tokens,
            int(exchange.duration_s * 1e6) / 1e6,
            _micros(exchange.first_byte_s),
            _micros(exchange.first_token_s),
            _text(response.get(b"x-litellm-call-id")),
            _cut(observation.message_id),
            UNSET if cost_usd is None else cost_usd,
            UNSET if miss_reason is None else miss_reason,
        )
        self._lines_taken += 1
        self._lines.write(self._encoded(line))
        if self._lines.losses.total != self._failures_seen:
            self.account_failures()

    def account_failures(self) -> None:
        """Count what has failed, and log each kind of it once in a while."""
        losses = self._lines.losses
        if losses.total == self._failures_seen:
            return
        if self._failing_since is None:
            self._failing_since = self._failures_seen
        self._failures_seen = losses.total
        now = self._clock()
        for fault, count in list(losses.by_fault.items()):
            counter = self._failures[fault]
            if count == counter.value:
                continue
            counter.value = count
            if now - self._logged_at.get(fault, -_QUIET_S) >= _QUIET_S:
                self._logged_at[fault] = now
                detail, remedy = losses.details[fault], _REMEDIES[fault]
                logger.error(
                    "usage_log_failed",
                    extra={"reason": fault, "detail": detail, "remedy": remedy},
                )

    def look_after(self) -> None:
        """Count what has failed, and say when lines are written again. For once a second."""
        self.account_failures()
        taken, failures = self._at_last_look
        self._at_last_look = self._lines_taken, self._failures_seen
        wrote = self._lines_taken > taken and self._failures_seen == failures
        if wrote and self._failing_since is not None:
            failed = self._failures_seen - self._failing_since
            self._failing_since = None
            logger.warning("usage_log_recovered", extra={"failures": failed})

    def _encoded(self, line: UsageLine) -> bytes:
        try:
            text = self._encoder.encode(line)
        except UnicodeEncodeError:
            # JSON can carry half an emoji, in a model's name for instance.
            for name in line.__struct_fields__:
                value = getattr(line, name)
                if isinstance(value, str):
                    setattr(line, name, value.encode("utf-8", "replace").decode())
            text = self._encoder.encode(line)
        if not text.isascii() or b"\x7f" in text:
            text = _CONTROLS.sub(_escaped, text)
        return text + b"\n"

    def _now(self) -> str:
        """Write the time; the part that stays the same for a second is kept."""
        now = self._clock()
        second = int(now)
        if second != self._second:
            self._second = second
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._second_text}.{int(now % 1 * 1000):03d}Z"


def _writes(usage: Usage) -> tuple[int | None, int | None, int | None]:
    """Split the written tokens like `Usage.input_classes`; None for what the answer left out."""
    said_5m, said_1h = usage.ephemeral_5m_input_tokens, usage.ephemeral_1h_input_tokens
    if said_5m is None and said_1h is None:
        return None, None, usage.cache_creation_input_tokens
    _, _, write_5m, write_1h, write_unknown = usage.input_classes()
    return (
        None if said_5m is None else write_5m,
        None if said_1h is None else write_1h,
        write_unknown,
    )


def _cut(text: str | None) -> str | None:
    return text[:_MAX_CHARS] if text else None


def _text(value: bytes | None) -> str | None:
    return value[:_MAX_CHARS].decode("utf-8", "replace") if value else None


def _escaped(found: re.Match[bytes]) -> bytes:
    return b"\\u%04x" % ord(found[0].decode())


def _micros(seconds: float | None) -> float | None:
    """Leave microseconds, and no digits that say nothing."""
    return None if seconds is None else int(seconds * 1e6) / 1e6
