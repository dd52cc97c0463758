"""Compares the books of both ends with the usage log, and the usage log with the metrics.

For each exchange the books name all that can truthfully be said of it. What the client received
the sidecar has read; what the stand-in's kernel did not take it cannot have read. Where the two
bounds know the same there is one truth, and the line has to say it. Where they differ, because
bytes were under way when a connection broke, the line has to say what a reader of some bytes
between the bounds knows. The metrics have no such freedom: they are the sum of the lines.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench.chaos.books import Attempt, Books
from bench.chaos.plans import NOTHING, Plan, Reading, tokens_of

__all__ = ["CLASSES", "OUTCOMES", "STATUSES", "Life", "Samples", "Verdict", "judge", "read_lines"]

CLASSES = ("uncached", "read", "write_5m", "write_1h", "write_unknown", "output")
STATUSES = ("complete", "partial", "missing", "invalid", "oversized", "encoded", "error")
OUTCOMES = ("hit", "write", "not_cached", "not_asked", "unreported", "unknown")

_P = "litellm_sidecar_"
_OWN_ERRORS = ("stale_connection", "connection_lost", "malformed_response")
"""What comes of connections that break before the head, and of what stands behind an answer."""

Line = dict[str, Any]
Samples = Collection[tuple[Mapping[str, str], float]]


class Life(NamedTuple):
    """What one process of the sidecar said."""

    lines: list[bytes]
    """Of its usage log."""
    samples: Samples
    """Its metrics as they were scraped last; the name is the label `__name__`."""


class Truth(NamedTuple):
    """What can be said of one exchange: all that a line says and the metrics count."""

    http_status: int
    reading: Reading
    outcome: str | None = None
    model: str | None = None
    team: str | None = None


@dataclass
class Verdict:
    """What came of the comparison."""

    exchanges: int = 0
    lines: int = 0
    by_bounds: int = 0
    """Exchanges whose line had a choice."""
    whole: int = 0
    """Well-formed answers that the client saw to their end."""
    table: list[tuple[str, int, int, int, int]] = field(default_factory=list)
    """Name; the books' sum where there is one truth, and where the line chose; log; metrics."""
    offences: list[str] = field(default_factory=list)

    @property
    def difference(self) -> int:
        """The sum of all differences."""
        return sum(
            abs(certain + chosen - log) + abs(log - metrics)
            for _, certain, chosen, log, metrics in self.table
        )


def read_lines(path: Path) -> list[bytes]:
    """Read a usage log, with the files that it was renamed to."""
    renamed = sorted(
        (file for file in path.parent.glob(path.name + ".*") if file.suffix[1:].isdigit()),
        key=lambda file: -int(file.suffix[1:]),
    )
    return [line for file in (*renamed, path) for line in file.read_bytes().splitlines(True)]


def judge(books: Books, lives: Sequence[Life]) -> Verdict:
    """Compare the books with what each life of the sidecar said."""
    verdict = Verdict(exchanges=len(books.attempts))
    verdict.offences += books.faults
    by_number: dict[int, list[Line]] = {}
    log, metrics = Counter[str](), Counter[str]()
    for number, (raw, samples) in enumerate(lives, 1):
        lines = _parse(raw, verdict)
        for line in lines:
            by_number.setdefault(_number_of(line), []).append(line)
        log += _sums(lines)
        metrics += _compare_metrics(f"life {number}", lines, samples, verdict)
        verdict.lines += len(lines)
    certain, chosen = Counter[str](), Counter[str]()
    for attempt in books.attempts:
        found = by_number.pop(attempt.number, [])
        _judge_one(books, attempt, found, verdict, certain, chosen)
    for number, found in by_number.items():
        verdict.offences.append(f"a line of no exchange ({number}): {found[0]}")
    for name in (*CLASSES, *STATUSES, *OUTCOMES):
        row = name, certain[name], chosen[name], log[name], metrics[name]
        verdict.table.append(row)
    return verdict


# One exchange


def _judge_one(
    books: Books,
    attempt: Attempt,
    lines: list[Line],
    verdict: Verdict,
    certain: Counter[str],
    chosen: Counter[str],
) -> None:
    plan = books.plan_of(attempt)
    truths, may_be_absent = _truths(plan, attempt)
    said = [_said(line) for line in lines]
    faults = _broken_promises(plan, attempt)
    if len(said) > 1:
        faults.append("more than one line")
    elif not said and not may_be_absent:
        faults.append("no line")
    elif said and said[0] not in truths:
        faults.append(f"none of {truths}" if truths else "a line, where none can be")
    verdict.offences += [_evidence(plan, attempt, lines, fault) for fault in faults]
    if attempt.complete and any(truth.reading.status == "complete" for truth in truths):
        verdict.whole += 1
    one = len(truths) + may_be_absent == 1
    if one and truths:
        _add(certain, next(iter(truths)))
    elif not one:
        verdict.by_bounds += 1
        if said and said[0] in truths:
            _add(chosen, said[0])


def _broken_promises(plan: Plan, attempt: Attempt) -> list[str]:
    """Say what went wrong between client and stand-in, whatever was counted."""
    faults = [attempt.fault] if attempt.fault else []
    if attempt.seen > 1 and plan.method == "POST":
        faults.append("the request was sent twice")
    whole = plan.ended(attempt.sent) and attempt.received == plan.promised
    if attempt.own_error:
        if attempt.own_error not in _OWN_ERRORS and not attempt.disturbed:
            faults.append("the sidecar refused, and nothing called for it")
    elif attempt.complete and not whole:
        faults.append("the client saw an end that the stand-in did not send")
    elif (
        plan.leaving is None
        and plan.then in ("keep", "fin")
        and plan.stop_at == len(plan.wire)
        and plan.ended(plan.stop_at)
        and not (attempt.complete or attempt.disturbed)
    ):
        faults.append("the answer was whole, and did not arrive")
    return faults


def _truths(plan: Plan, attempt: Attempt) -> tuple[set[Truth], bool]:
    """Name what can truthfully be said of an exchange, and whether nothing can."""
    if not plan.observed or not attempt.head_written:
        return set(), True
    if attempt.own_error:
        return {Truth(attempt.status_code, Reading("error"))}, False
    least, most = attempt.received, plan.body_bytes(attempt.sent)
    may_end = attempt.sent > 0 and plan.ended(attempt.sent)
    must_end = attempt.complete
    if must_end:
        most = least
    truths: set[Truth] = set()
    if attempt.status_code or (attempt.sent >= len(plan.head) and plan.status_code):
        readings = plan.readings(least, most, may_end=may_end, must_end=must_end)
        truths |= {_relayed(plan, reading) for reading in readings}
    if not attempt.status_code:
        truths.add(Truth(499, NOTHING))
        if attempt.disturbed:
            truths.add(Truth(503, Reading("error")))  # the sidecar was stopped
        if attempt.ending not in ("keep", "hold"):
            truths.add(Truth(502, Reading("error")))
    return truths, not attempt.seen and not attempt.status_code


def _relayed(plan: Plan, reading: Reading) -> Truth:
    """What is said of an answer whose head was relayed."""
    if not 200 <= plan.status_code < 300:
        return Truth(plan.status_code, reading)
    written = reading.write_5m + reading.write_1h + reading.write_unknown
    outcome = (
        "hit"
        if reading.read
        else "write"
        if written
        else "unreported"
        if not reading.cache_reported
        else "unknown"
        if plan.asked is None
        else "not_cached"
        if plan.asked
        else "not_asked"
    )
    model = plan.model or "unknown"
    return Truth(
        plan.status_code, reading._replace(cache_reported=False), outcome, model, plan.team
    )


def _add(sums: Counter[str], truth: Truth) -> None:
    sums[truth.reading.status] += 1
    for name, count in zip(CLASSES, tokens_of(truth.reading), strict=True):
        sums[name] += count
    if truth.outcome is not None:
        sums[truth.outcome] += 1


def _evidence(plan: Plan, attempt: Attempt, lines: list[Line], fault: str) -> str:
    return (
        f"exchange {attempt.number} ({plan.name}): {fault}\n"
        f"  plan: {plan.target}, {plan.status_code}, {plan.framing} {plan.coding}, head "
        f"{len(plan.head)}, body {len(plan.body)}, promised {plan.promised}, stop at "
        f"{plan.stop_at} of {len(plan.wire)}, then {plan.then}, leaving {plan.leaving}\n"
        f"  stand-in: seen {attempt.seen}, sent {attempt.sent} (body "
        f"{plan.body_bytes(attempt.sent)}), {attempt.ending or 'no end'}\n"
        f"  client: {attempt.status_code} {attempt.own_error}, received {attempt.received}, "
        f"complete {attempt.complete}, left {attempt.left}\n"
        f"  lines: {json.dumps(lines)}"
    )


# The usage log


def _parse(raw: list[bytes], verdict: Verdict) -> list[Line]:
    lines = []
    for text in raw:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        if line is None or line.get("event") != "usage":
            verdict.offences.append(f"not a line of a usage log: {text[:200]!r}")
        else:
            lines.append(line)
            number, call_id = _number_of(line), line["call_id"]
            if call_id not in (None, str(number)):
                verdict.offences.append(f"exchange {number} has the call id {call_id}")
    return lines


def _number_of(line: Line) -> int:
    return int(line["user_agent"].rpartition(" ")[2])


def _tokens(line: Line) -> tuple[int, int, int, int, int, int]:
    uncached, read, write_5m, write_1h, unknown, output = (
        int(line[f"{name}_tokens"] or 0) for name in CLASSES
    )
    return uncached, read, write_5m, write_1h, unknown, output


def _said(line: Line) -> Truth:
    """What a line says, in the form of what can be said."""
    reading = Reading(line["status"], *_tokens(line))
    if line["outcome"] is None:
        return Truth(line["http_status"], reading)
    model = line["model"] or "unknown"
    return Truth(line["http_status"], reading, line["outcome"], model, line["team_alias"])


def _sums(lines: list[Line]) -> Counter[str]:
    sums = Counter[str]()
    for line in lines:
        _add(sums, _said(line))
    return sums


# The metrics


def _expected(lines: list[Line]) -> Counter[tuple[str, ...]]:
    """Sum lines up by the series that count them."""
    sums = Counter[tuple[str, ...]]()
    for line in lines:
        said, route = _said(line), line["route"]
        left = line["end"] == "client_left" and line["status"] != "complete"
        code = 499 if left else line["http_status"]
        sums[f"{_P}observations_total", route, line["status"]] += 1
        sums[f"{_P}http_requests_total", route, str(code)] += 1
        sums[f"{_P}client_disconnects_total", route] += left
        if said.outcome is None:
            continue
        assert said.model is not None
        assert said.team is not None
        names = said.model, said.team
        for kind, tokens in zip(CLASSES[:5], tokens_of(said.reading), strict=False):
            sums[f"{_P}input_tokens_total", *names, kind] += tokens
        sums[f"{_P}output_tokens_total", *names] += said.reading.output
        sums[f"{_P}responses_total", *names, said.outcome] += 1
        sums["litellm_cached_tokens_metric_total", *names] += said.reading.read
        sums["litellm_cache_hits_metric_total", *names] += said.outcome == "hit"
        missed = said.outcome in ("write", "not_cached")
        sums["litellm_cache_misses_metric_total", *names] += missed
    return sums


_KEYS = {
    f"{_P}observations_total": ("route", "status"),
    f"{_P}http_requests_total": ("route", "code"),
    f"{_P}client_disconnects_total": ("route",),
    f"{_P}input_tokens_total": ("model", "team_alias", "cache"),
    f"{_P}output_tokens_total": ("model", "team_alias"),
    f"{_P}responses_total": ("model", "team_alias", "outcome"),
    "litellm_cached_tokens_metric_total": ("model", "team_alias"),
    "litellm_cache_hits_metric_total": ("model", "team_alias"),
    "litellm_cache_misses_metric_total": ("model", "team_alias"),
}
_ZERO = (
    f"{_P}http_requests_in_flight",
    f"{_P}internal_errors_total",
    f"{_P}label_overflows_total",
    f"{_P}log_failures_total",
)
_OBSERVED = ("/v1/messages", "/anthropic/v1/messages")


def _compare_metrics(
    life: str, lines: list[Line], samples: Samples, verdict: Verdict
) -> Counter[str]:
    """Compare each series with the lines; return the sums by class, status and outcome."""
    expected = _expected(lines)
    counted, sums = Counter[tuple[str, ...]](), Counter[str]()
    for labels, value in samples:
        name = labels["__name__"]
        if name in _ZERO and value:
            verdict.offences.append(f"{life}: {dict(labels)} is {value:.0f}")
        if name not in _KEYS or labels.get("route", _OBSERVED[0]) not in _OBSERVED:
            continue
        counted[name, *(labels[key] for key in _KEYS[name])] += int(value)
        if name == f"{_P}input_tokens_total":
            sums[labels["cache"]] += int(value)
        elif name == f"{_P}output_tokens_total":
            sums["output"] += int(value)
        elif name == f"{_P}observations_total":
            sums[labels["status"]] += int(value)
        elif name == f"{_P}responses_total":
            sums[labels["outcome"]] += int(value)
    verdict.offences += _compare_costs(life, lines, samples)
    verdict.offences += [
        f"{life}: {' '.join(key)} is {counted[key]} in Prometheus and {expected[key]} by the log"
        for key in sorted({*expected, *counted})
        if counted[key] != expected[key]
    ]
    return sums


def _compare_costs(life: str, lines: list[Line], samples: Samples) -> list[str]:
    """Compare what answers cost, by model and team; both sides are sums of binary fractions."""
    logged: defaultdict[tuple[str, str], float] = defaultdict(float)
    counted: defaultdict[tuple[str, str], float] = defaultdict(float)
    for line in lines:
        if "cost_usd" in line:
            logged[line["model"] or "unknown", line["team_alias"]] += line["cost_usd"]
    for labels, value in samples:
        if labels["__name__"] == f"{_P}cost_usd_total" and value:
            counted[labels["model"], labels["team_alias"]] += value
    return [
        f"{life}: {' '.join(key)} costs {counted[key]} by Prometheus and {logged[key]} by the log"
        for key in sorted({*logged, *counted})
        if not math.isclose(logged[key], counted[key], rel_tol=1e-9)
    ]
