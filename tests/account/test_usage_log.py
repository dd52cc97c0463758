"""What stands in a line of the usage log, and what becomes of lines that cannot be written."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

import pytest

from sidecar.account.metrics import Metrics
from sidecar.account.usage_log import UsageLog
from sidecar.exchange import (
    End,
    Exchange,
    LogFault,
    Observation,
    Outcome,
    RequestFacts,
    Route,
    Status,
    UpstreamFault,
    Usage,
)
from sidecar.lines import Losses

KEY = "sk-usage-log-1"
HASH = hashlib.sha256(KEY.encode()).hexdigest()
CLASSES = (
    "uncached_tokens",
    "read_tokens",
    "write_5m_tokens",
    "write_1h_tokens",
    "write_unknown_tokens",
    "output_tokens",
)


class Kept:
    """Takes lines, and fails when told to."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.losses = Losses()
        self.fault: LogFault | None = None

    def write(self, line: bytes) -> None:
        if self.fault is None:
            self.lines.append(line)
        else:
            self.losses.add(self.fault, "said the system")


class Log:
    """A usage log on a clock that stands still."""

    def __init__(self) -> None:
        self.kept = Kept()
        self.metrics = Metrics(("model",), compat=(), clock=lambda: 0.0)
        self.now = 1_790_000_000.9996
        self.log = UsageLog(self.kept, self.metrics, lambda: self.now)

    def write(self, **changes: Any) -> dict[str, Any]:
        """Write an exchange and return its line."""
        usage = changes.pop("usage", Usage(7, 16, 2101, 30, 20, None))
        observation = Observation(
            changes.pop("status", Status.COMPLETE),
            usage,
            changes.pop("response_model", "claude-sonnet-4-5-20250929"),
            changes.pop("message_id", "msg_01XFDUDYJgAACzvnptvVoYEL"),
            changes.pop("fault", ""),
        )
        resolved = {
            "outcome": changes.pop("outcome", Outcome.HIT),
            "provider": changes.pop("provider", "anthropic"),
            "team_alias": changes.pop("team_alias", "Team Red"),
            "hashed_key": changes.pop("hashed_key", HASH),
            "cost_usd": changes.pop("cost_usd", None),
        }
        given = Exchange(
            route=Route.MESSAGES,
            method="POST",
            status_code=200,
            observed=True,
            end=End.COMPLETE,
            facts=RequestFacts(changes.pop("model", "claude-sonnet-4-5"), True, True),
            observation=observation,
            request_headers=[
                (b"user-agent", b"claude-cli/2.0.1"),
                (b"x-api-key", KEY.encode()),
                (b"user-agent", b"a second one"),
            ],
            response_headers=[
                (b"x-litellm-call-id", b"call-1"),
                (b"x-litellm-model-id", b"deployment-1"),
            ],
            duration_s=0.1234567,
            first_byte_s=0.1,
            first_token_s=None,
            overhead_s=0.0002,
        )
        self.log.write(given._replace(**changes), observation, **resolved)
        line = self.kept.lines[-1]
        assert line.endswith(b"}\n")
        assert line.count(b"\n") == 1
        decoded: dict[str, Any] = json.loads(line)
        return decoded

    def failures(self, fault: LogFault) -> float:
        return self.metrics.log_failures.child("usage", fault).value


def test_a_line_says_who_asked_what_and_what_it_took() -> None:
    """Every field, in its order; the key only as the beginning of its hash."""
    log = Log()
    line = log.write()

    assert list(line.items()) == [
        ("event", "usage"),
        ("time", "2026-09-21T14:13:20.999Z"),
        ("route", "/v1/messages"),
        ("http_status", 200),
        ("status", "complete"),
        ("fault", None),
        ("outcome", "hit"),
        ("end", "complete"),
        ("upstream_failure", None),
        ("model", "claude-sonnet-4-5"),
        ("response_model", "claude-sonnet-4-5-20250929"),
        ("model_id", "deployment-1"),
        ("provider", "anthropic"),
        ("team_alias", "Team Red"),
        ("key_hash", HASH[:16]),
        ("user_agent", "claude-cli/2.0.1"),
        ("stream", True),
        ("uncached_tokens", 7),
        ("read_tokens", 2101),
        ("write_5m_tokens", 20),
        ("write_1h_tokens", None),
        ("write_unknown_tokens", 10),
        ("output_tokens", 16),
        ("duration_s", 0.123456),
        ("first_byte_s", 0.1),
        ("first_token_s", None),
        ("call_id", "call-1"),
        ("message_id", "msg_01XFDUDYJgAACzvnptvVoYEL"),
    ]
    assert KEY.encode() not in log.kept.lines[0]


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        pytest.param(Usage(), (None,) * 6, id="nothing said"),
        pytest.param(Usage(5, 1), (5, None, None, None, None, 1), id="nothing of the cache"),
        pytest.param(Usage(5, 1, 0, 0), (5, 0, None, None, 0, 1), id="zeros, and no split"),
        pytest.param(Usage(5, 1, 0, 0, 0, 0), (5, 0, 0, 0, 0, 1), id="zeros, split"),
        pytest.param(Usage(5, 1, 9, 30), (5, 9, None, None, 30, 1), id="a total alone"),
        pytest.param(Usage(5, 1, None, None, 20, 4), (5, None, 20, 4, 0, 1), id="a split alone"),
        pytest.param(Usage(5, 1, 0, 30, 20, 15), (5, 0, 20, 10, 0, 1), id="a split too large"),
    ],
)
def test_what_was_not_said_is_null(usage: Usage, counts: tuple[int | None, ...]) -> None:
    """Zero is an answer, absence is none; what is not null sums up to the whole prompt."""
    line = Log().write(usage=usage)

    assert tuple(line[name] for name in CLASSES) == counts
    assert sum(line[name] or 0 for name in CLASSES[:5]) == sum(usage.input_classes())


def test_what_did_not_end_well_says_so() -> None:
    """A line stands for an exchange without an answer, too."""
    line = Log().write(
        status_code=502,
        status=Status.ERROR,
        outcome=None,
        fault="status 502",
        end=End.UPSTREAM_CUT,
        upstream_fault=UpstreamFault.CONNECT_FAILED,
        usage=Usage(),
        response_headers=(),
        request_headers=(),
        hashed_key=None,
        model=None,
        response_model=None,
        message_id=None,
    )

    assert (line["http_status"], line["status"], line["fault"]) == (502, "error", "status 502")
    assert (line["end"], line["upstream_failure"]) == ("upstream_cut", "connect_failed")
    absent = ("outcome", "model", "response_model", "model_id", "call_id", "message_id")
    assert {line[name] for name in (*absent, "key_hash", "user_agent")} == {None}


def test_cost_is_absent_where_no_price_is_known() -> None:
    """Zero is a price."""
    log = Log()

    assert "cost_usd" not in log.write()
    assert log.write(cost_usd=0.0)["cost_usd"] == 0
    assert log.write(cost_usd=0.0125)["cost_usd"] == 0.0125


def test_what_clients_say_is_bounded_and_stays_one_line() -> None:
    """Texts of any length, line ends, halves of emoji and bytes that are no text do no harm."""
    log = Log()
    line = log.write(
        model="a\n\ud83d" + "x" * 10_000_000,
        response_model="é\u2028" * 10_000,
        team_alias="\udc00" + "t" * 1000,
        message_id='"},{"' * 1000,
        request_headers=[(b"user-agent", b"\xff\xc3\xa9\n" + b"u" * 1000)],
        response_headers=[(b"x-litellm-call-id", b"c" * 100_000)],
    )

    assert line["model"] == "a\n?" + "x" * 197
    assert line["team_alias"] == "?" + "t" * 199
    assert line["user_agent"].startswith("\ufffdé\nu")
    assert len(log.kept.lines[0]) < 3000


def test_failures_are_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """All are counted; each kind is logged once with what to do, again only after a minute, and
    so is the end of it."""
    caplog.set_level(logging.INFO)
    log = Log()
    log.write()
    log.kept.fault = LogFault.NO_SPACE
    for _ in range(3):
        log.write()
    log.kept.fault = LogFault.UNAVAILABLE
    log.write()
    log.log.look_after()

    assert log.failures(LogFault.NO_SPACE) == 3
    assert log.failures(LogFault.UNAVAILABLE) == 1
    assert [(record.message, record.reason) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("usage_log_failed", "no_space"),
        ("usage_log_failed", "unavailable"),
    ]
    assert "make room" in caplog.records[0].remedy  # type: ignore[attr-defined]
    assert caplog.records[0].detail == "said the system"  # type: ignore[attr-defined]

    caplog.clear()
    log.log.look_after()
    assert caplog.records == []  # nobody has tried
    log.kept.fault = None
    log.write()
    log.log.look_after()
    log.log.look_after()
    assert [(record.message, record.failures) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("usage_log_recovered", 4)
    ]

    caplog.clear()
    log.kept.fault = LogFault.NO_SPACE
    log.write()
    log.now += 60
    log.write()
    assert [record.message for record in caplog.records] == ["usage_log_failed"]
    assert log.failures(LogFault.NO_SPACE) == 5
