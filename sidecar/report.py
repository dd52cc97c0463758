"""Summing the lines of usage logs into a table: `sidecar report`.

It reads whatever holds such lines: files, rotated and compressed ones too, or a pipe, with the
lines of other logs among them. Memory is bounded by the number of groups, whatever the number of
lines; a line that cannot be read is counted and left out.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from io import BufferedReader
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from sidecar.account.ledger import client_of
from sidecar.exchange import Outcome, Status
from sidecar.terminal import shown

__all__ = ["GROUPINGS", "Report", "lines_of", "print_report", "read_time"]

_BLOCK_BYTES = 1024 * 1024
_MAX_LINE_BYTES = 1024 * 1024
"""Longest line that is looked at. One of the sidecar's own has some 4 KiB at most."""
_GZIP = b"\x1f\x8b"
_MIN_WIDTH = 160


class _Line(msgspec.Struct, gc=False):
    """What is summed of a line; everything else in it is passed over."""

    event: str = ""
    time: str = ""
    route: str | None = None
    status: str = ""
    outcome: Outcome | None = None
    model: str | None = None
    response_model: str | None = None
    model_id: str | None = None
    provider: str | None = None
    team_alias: str | None = None
    key_hash: str | None = None
    user_agent: str | None = None
    uncached_tokens: int | None = None
    read_tokens: int | None = None
    write_5m_tokens: int | None = None
    write_1h_tokens: int | None = None
    write_unknown_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    miss_reason: str | None = None


_client_of = lru_cache(maxsize=1024)(client_of)

GROUPINGS: dict[str, Callable[[_Line], str | None]] = {
    "model": lambda line: line.model,
    "team_alias": lambda line: line.team_alias,
    "provider": lambda line: line.provider,
    "response_model": lambda line: line.response_model,
    "model_id": lambda line: line.model_id,
    "key_hash": lambda line: line.key_hash,
    "client": lambda line: _client_of(line.user_agent or ""),
    "route": lambda line: line.route,
    "day": lambda line: line.time[:10],
}
"""What lines can be grouped by."""


@dataclass(slots=True)
class Sums:
    """What a group adds up to."""

    requests: int = 0
    partial: int = 0
    """Those of whose answer only a part could be read."""
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    misses: dict[str, int] = field(default_factory=dict)
    """Answers that read nothing though caching was asked for, by why."""
    uncached: int = 0
    read: int = 0
    write_5m: int = 0
    write_1h: int = 0
    write_unknown: int = 0
    output: int = 0
    cost_usd: float = 0.0
    priced: int = 0
    """2xx answers whose price is known."""

    def take(self, line: _Line) -> None:
        """Add a line."""
        self.requests += 1
        if line.status == Status.PARTIAL:
            self.partial += 1
        if line.outcome is not None:
            self.outcomes[line.outcome] += 1
        if line.miss_reason is not None:
            self.misses[line.miss_reason] = self.misses.get(line.miss_reason, 0) + 1
        self.uncached += line.uncached_tokens or 0
        self.read += line.read_tokens or 0
        self.write_5m += line.write_5m_tokens or 0
        self.write_1h += line.write_1h_tokens or 0
        self.write_unknown += line.write_unknown_tokens or 0
        self.output += line.output_tokens or 0
        if line.cost_usd is not None:
            self.priced += 1
            self.cost_usd += line.cost_usd

    def add(self, other: Sums) -> None:
        """Add another group."""
        for name in self.__slots__:
            if name not in ("outcomes", "misses"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
        for outcome, count in other.outcomes.items():
            self.outcomes[outcome] += count
        for reason, count in other.misses.items():
            self.misses[reason] = self.misses.get(reason, 0) + count

    @property
    def answers(self) -> int:
        """2xx answers."""
        return sum(self.outcomes.values())

    @property
    def prompt(self) -> int:
        """All prompt tokens."""
        return self.uncached + self.read + self.write_5m + self.write_1h + self.write_unknown

    @property
    def hit_ratio_requests(self) -> float | None:
        """Of the answers to requests that asked for caching, the part that read from the cache."""
        hits = self.outcomes[Outcome.HIT]
        misses = self.outcomes[Outcome.WRITE] + self.outcomes[Outcome.NOT_CACHED]
        return _part(hits, hits + misses)

    @property
    def hit_ratio_tokens(self) -> float | None:
        """Of all prompt tokens, the part that was read from the cache."""
        return _part(self.read, self.prompt)


def _part(some: int, whole: int) -> float | None:
    return some / whole if whole else None


class Report:
    """Sums lines.

    Args:
        by: names from `GROUPINGS`.
        since: lines from this moment on, written as the lines write it; empty for all.
        until: lines before this moment; empty for all.
    """

    def __init__(self, by: Sequence[str], since: str = "", until: str = "") -> None:
        self.by = tuple(by)
        self.groups: dict[tuple[str, ...], Sums] = {}
        self.malformed = 0
        """Usage lines that could not be read, and what is no JSON at all."""
        self._readers = [GROUPINGS[name] for name in by]
        self._since = since
        self._until = until or "~"  # after every digit
        self._decoder = msgspec.json.Decoder(_Line)

    def take(self, lines: Iterable[bytes]) -> None:
        """Add lines."""
        decode, readers, groups = self._decoder.decode, self._readers, self.groups
        since, until = self._since, self._until
        for raw in lines:
            try:
                line = decode(raw)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                self.malformed += _is_malformed(raw)
                continue
            if line.event != "usage" or not since <= line.time < until:
                continue
            group = tuple([read(line) or "-" for read in readers])
            sums = groups.get(group)
            if sums is None:
                sums = groups[group] = Sums()
            sums.take(line)

    def total(self) -> Sums:
        """Add all groups up."""
        total = Sums()
        for sums in self.groups.values():
            total.add(sums)
        return total

    def rows(self) -> list[tuple[tuple[str, ...], Sums]]:
        """Name the groups, those with most prompt tokens first."""
        return sorted(self.groups.items(), key=lambda row: (-row[1].prompt, row[0]))

    def as_json(self) -> dict[str, Any]:
        """Write it for machines."""
        return {
            "by": list(self.by),
            "groups": [
                dict(zip(self.by, group, strict=True)) | _as_json(sums)
                for group, sums in self.rows()
            ],
            "total": _as_json(self.total()),
            "malformed_lines": self.malformed,
        }


def _is_malformed(raw: bytes) -> bool:
    """Whether a line that is not as it should be is one of the sidecar's, or may have been."""
    try:
        line = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return bool(raw.strip())
    # Another log's members may have the same names and other types.
    return isinstance(line, dict) and line.get("event") == "usage"


def _as_json(sums: Sums) -> dict[str, Any]:
    return {
        "requests": sums.requests,
        "answers": sums.answers,
        "partial": sums.partial,
        "outcomes": sums.outcomes,
        "misses": sums.misses,
        "hit_ratio_requests": sums.hit_ratio_requests,
        "hit_ratio_tokens": sums.hit_ratio_tokens,
        "uncached_tokens": sums.uncached,
        "read_tokens": sums.read,
        "write_5m_tokens": sums.write_5m,
        "write_1h_tokens": sums.write_1h,
        "write_unknown_tokens": sums.write_unknown,
        "output_tokens": sums.output,
        "cost_usd": sums.cost_usd if sums.priced else None,
        "priced_answers": sums.priced,
    }


def lines_of(stream: BufferedReader) -> Iterator[bytes]:
    """Read a stream line by line, unpacked if it is packed with gzip.

    Raises:
        OSError: it cannot be read, or what is packed in it is damaged.
    """
    packed = stream.peek(len(_GZIP)).startswith(_GZIP)
    source = gzip.GzipFile(fileobj=stream) if packed else stream
    rest = b""
    try:
        while block := source.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
            if len(rest) > _MAX_LINE_BYTES:
                rest = b"\0"  # which makes what follows unreadable too, up to the line's end
    except (EOFError, zlib.error):
        raise OSError("what is packed in it is cut off or damaged") from None
    if rest:
        yield rest


def read_time(text: str) -> str:
    """Write a moment, ISO 8601 and UTC unless it says otherwise, as the lines do.

    Raises:
        ValueError: it is none.
    """
    moment = datetime.fromisoformat(text)
    moment = moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _reasons(sums: Sums) -> str:
    """Name the reasons of misses, the most frequent first; those of a later version too."""
    most = sorted(sums.misses.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{shown(reason)} {count:,}" for reason, count in most)


def print_report(report: Report) -> None:
    """Print the table: on a terminal to its width, else wide and without colours."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _MIN_WIDTH)
    if not report.groups:
        console.print("There are no usage lines.")
        return
    total = report.total()
    columns = [column for column in _COLUMNS if column.shown(total)]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in report.by:
        table.add_column(name, overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    for group, sums in report.rows():
        table.add_row(*map(shown, group), *[column.text(sums) for column in columns])
    if len(report.groups) > 1:
        table.add_section()
        names = ["all", *[""] * (len(report.by) - 1)]
        table.add_row(*names, *[column.text(total) for column in columns], style="bold")
    console.print(table)
    if total.misses:
        console.print("Why caching missed:")
        reasons = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for group, sums in report.rows():
            if sums.misses:
                reasons.add_row(*map(shown, group), _reasons(sums))
        if len(report.groups) > 1:
            reasons.add_row("all", *[""] * (len(report.by) - 1), _reasons(total), style="bold")
        console.print(reasons)
    unpriced = total.answers - total.priced
    if total.priced and unpriced:
        console.print(
            f"The cost is that of all answers but {unpriced:,}, whose price is not known."
        )


@dataclass(frozen=True, slots=True)
class _Column:
    title: str
    text: Callable[[Sums], str]
    shown: Callable[[Sums], object] = lambda total: True


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


_COLUMNS = (
    _Column("requests", lambda sums: f"{sums.requests:,}"),
    _Column("hits by\nrequest", lambda sums: _percent(sums.hit_ratio_requests)),
    _Column("hits by\ntoken", lambda sums: _percent(sums.hit_ratio_tokens)),
    _Column("uncached\ntokens", lambda sums: f"{sums.uncached:,}"),
    _Column("read", lambda sums: f"{sums.read:,}"),
    _Column("write\n5m", lambda sums: f"{sums.write_5m:,}"),
    _Column("write\n1h", lambda sums: f"{sums.write_1h:,}"),
    _Column(
        "write\nunknown",
        lambda sums: f"{sums.write_unknown:,}",
        lambda total: total.write_unknown,
    ),
    _Column("output", lambda sums: f"{sums.output:,}"),
    _Column(
        "cost\nUSD",
        lambda sums: f"{sums.cost_usd:,.4f}" if sums.priced else "-",
        lambda total: total.priced,
    ),
    _Column("partial", lambda sums: _percent(_part(sums.partial, sums.requests))),
)
