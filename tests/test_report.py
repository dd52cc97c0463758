"""What `sidecar report` makes of usage logs."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import pytest

from sidecar.report import Report, lines_of, read_time
from tests.support.process import coverage_environment
from tests.support.running import ROOT


def run(*arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run the command as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "sidecar", "report", *arguments],
        check=False,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "COLUMNS": "200"} | coverage_environment(),
        input=given,
        capture_output=True,
        timeout=30,
    )


def line(**changes: Any) -> bytes:
    """Write a usage line; a call of `claude-1` by the red team that read 900 of 1,000 tokens."""
    fields: dict[str, Any] = {
        "event": "usage",
        "time": "2026-11-24T12:00:00.500Z",
        "route": "/v1/messages",
        "http_status": 200,
        "status": "complete",
        "outcome": "hit",
        "model": "claude-1",
        "team_alias": "red",
        "user_agent": "claude-cli/2.0.1 (external, cli)",
        "uncached_tokens": 60,
        "read_tokens": 900,
        "write_5m_tokens": 30,
        "write_1h_tokens": 10,
        "write_unknown_tokens": 0,
        "output_tokens": 5,
    }
    return json.dumps(fields | changes).encode() + b"\n"


WROTE = line(outcome="write", read_tokens=0, write_5m_tokens=1000, team_alias="blue")
FAILED: dict[str, Any] = {
    "http_status": 429,
    "status": "error",
    "outcome": None,
    "uncached_tokens": None,
    "read_tokens": None,
    "write_5m_tokens": None,
    "write_1h_tokens": None,
    "write_unknown_tokens": None,
    "output_tokens": None,
}


def summed(
    given: bytes, by: str = "model,team_alias", since: str = "", until: str = ""
) -> dict[str, Any]:
    """Sum lines in this process."""
    moments = [read_time(text) if text else "" for text in (since, until)]
    report = Report(by.split(","), *moments)
    report.take(lines_of(BufferedReader(BytesIO(given))))
    return report.as_json()


def test_sums_by_model_and_team() -> None:
    """Everything is added up in its group, and over all groups."""
    partial = line(status="partial", output_tokens=None, write_1h_tokens=None)
    given = line() + WROTE + partial + line(**FAILED)

    result = summed(given)

    red, blue = result["groups"]
    assert (red["model"], red["team_alias"]) == ("claude-1", "red")
    assert (
        red
        == {
            "model": "claude-1",
            "team_alias": "red",
            "requests": 3,
            "answers": 2,
            "partial": 1,
            "outcomes": {
                "hit": 2,
                "write": 0,
                "not_cached": 0,
                "not_asked": 0,
                "unreported": 0,
                "unknown": 0,
            },
            "misses": {},
            "hit_ratio_requests": 1.0,
            "hit_ratio_tokens": 1800 / 1990,
            "uncached_tokens": 120,
            "read_tokens": 1800,
            "write_5m_tokens": 60,
            "write_1h_tokens": 10,
            "write_unknown_tokens": 0,
            "output_tokens": 5,
            "cost_usd": None,
            "priced_answers": 0,
        }
        or blue == {}
    )
    assert result["total"]["requests"] == 4
    assert result["total"]["read_tokens"] == 1800
    assert result["total"]["hit_ratio_requests"] == 2 / 3
    assert result["malformed_lines"] == 0


def test_ratio_of_nothing_is_none() -> None:
    """Where nobody asked for caching, and nothing was prompted, there is no ratio."""
    (group,) = summed(line(**FAILED))["groups"]
    assert (group["hit_ratio_requests"], group["hit_ratio_tokens"]) == (None, None)
    (group,) = summed(line(outcome="not_asked"))["groups"]
    assert group["hit_ratio_requests"] is None


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("team_alias", [["blue"], ["red"]]),
        ("team_alias,model", [["blue", "claude-1"], ["red", "claude-1"]]),
        ("client", [["claude-cli/2"]]),
        ("day", [["2026-11-24"]]),
        ("key_hash,route", [["-", "/v1/messages"]]),
    ],
)
def test_groups(by: str, groups: list[list[str]]) -> None:
    """Any choice of columns, in its order; what a line does not say is a dash."""
    result = summed(line() + WROTE, by)
    assert result["by"] == by.split(",")
    assert [[group[name] for name in result["by"]] for group in result["groups"]] == groups


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"since": "2026-11-24T12:00:00.500Z"}, 2),
        ({"since": "2026-11-24T12:00:00.501Z"}, 1),
        ({"until": "2026-11-24T12:00:00.500"}, 0),
        ({"until": "2026-11-24T13:00:01+01:00"}, 1),
        ({"since": "2026-11-24", "until": "2026-11-25"}, 1),
        ({"since": "2026-11-24", "until": "2026-11-26"}, 2),
    ],
)
def test_period(options: dict[str, str], count: int) -> None:
    """From a moment on, it included, and to a moment, it excluded; UTC unless it says otherwise."""
    given = line() + line(time="2026-11-25T00:00:00.000Z")
    assert summed(given, **options)["total"]["requests"] == count


def test_files_of_all_kinds(tmp_path: Path) -> None:
    """Plain and packed, several and standard input, with and without a line end at the end."""
    (tmp_path / "usage.log").write_bytes(line() * 3)
    (tmp_path / "usage.log.1").write_bytes(line() * 5 + line().rstrip())
    (tmp_path / "usage.log.2.gz").write_bytes(gzip.compress(line() * 7) + gzip.compress(line()))
    (tmp_path / "empty.log").write_bytes(b"")
    files = [str(path) for path in sorted(tmp_path.iterdir())]

    period = ("--by", "day", "--since", "2026-11-24", "--until", "2026-11-25")
    done = run("--json", *period, *files, "-", given=gzip.compress(line() * 11))

    (group,) = json.loads(done.stdout)["groups"]
    assert (group["day"], group["requests"]) == ("2026-11-24", 3 + 6 + 8 + 11)
    assert (done.returncode, done.stderr) == (0, b"")


def test_other_lines_are_passed_over_and_torn_ones_counted() -> None:
    """A log of the process is no fault; a line that is cut off, or none of ours, is one."""
    noise = [
        b'{"time":"2026-11-24T12:00:00.500Z","level":"info","event":"serving"}\n',
        b"\n",
        b'{"other": [1, 2, {"event": "usage"}]}\n',
    ]
    torn = [
        line()[:200] + b"\n",
        b"Traceback (most recent call last):\n",
        line(uncached_tokens="7"),
        line(outcome="no such outcome"),
        b"\xff\xfe\n",
        b"[" * 100_000 + b"\n",
    ]

    done = run("--json", "-", given=line() + b"".join(noise + torn) + line())

    result = json.loads(done.stdout)
    assert (result["total"]["requests"], result["malformed_lines"]) == (2, len(torn))
    assert done.stderr.decode() == f"sidecar: {len(torn)} lines could not be read\n"
    assert done.returncode == 0


@pytest.mark.parametrize("event", [None, "request", 7, ["usage"]])
def test_lines_of_other_logs_are_skipped_whatever_they_hold(event: object) -> None:
    """Members of the same names may have other types there; in a usage line that is a fault."""
    names = json.loads(line()) | {"cost_usd": 1}
    values: list[object] = [200, "x", True, None, [], {}]
    for name in names:
        for value in values:
            foreign = names | {name: value} | {"event": event}
            if event is None:
                del foreign["event"]
            assert summed(json.dumps(foreign).encode() + b"\n")["malformed_lines"] == 0, foreign
    assert summed(b'[1]\n"usage"\nnull\n')["malformed_lines"] == 0
    assert summed(line(status=200) + line(read_tokens="x"))["malformed_lines"] == 2


CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)]


def test_name_cannot_command_the_terminal() -> None:
    """What a client calls a model is shown, not obeyed; for programs it is what it was."""
    escapes = "\x1b[2J\x1b]0;title\x07\x9b31mred"
    everything = "".join(CONTROLS)
    given = line(model=escapes) + line(model=everything, team_alias="a\nb")
    for by in ("model,team_alias", "model"):
        text = run("--by", by, "-", given=given).stdout.decode()
        assert not set(CONTROLS) - {"\n"} & set(text)
        flat = "".join(text.split())
        assert "\\x1b[2J\\x1b]0;title\\x07\\x9b31mred" in flat
        assert "\\x00\\x01" in flat
    assert "a\\x0ab" in run("-", given=given).stdout.decode()
    names = [
        group["model"] for group in json.loads(run("--json", "-", given=given).stdout)["groups"]
    ]
    assert sorted(names) == sorted([escapes, everything])


def test_cost_is_shown_where_it_is_known() -> None:
    """Lines without a price are none that cost nothing."""
    priced = line(cost_usd=0.25) + line(cost_usd=0)
    result = summed(priced + WROTE)["total"]
    assert (result["cost_usd"], result["priced_answers"], result["answers"]) == (0.25, 2, 3)
    text = run("-", given=priced + WROTE).stdout.decode()
    assert "0.2500" in text
    assert "all answers but 1," in text


def test_table() -> None:
    """A row a group, most tokens first, and a sum; nothing but text where it is no terminal."""
    done = run("-", given=line() * 2000 + line(model="claude-2", status="partial") + WROTE)
    rows = [row.split() for row in done.stdout.decode().splitlines()]
    assert b"\x1b" not in done.stdout
    numbers = ["2,000", "100.0%", "90.0%", "120,000", "1,800,000", "60,000", "20,000"]
    assert ["claude-1", "red", *numbers, "10,000", "0.0%"] in rows
    assert rows.index(next(row for row in rows if row[:2] == ["claude-1", "blue"])) < rows.index(
        next(row for row in rows if row[:2] == ["claude-2", "red"])
    )
    assert rows[-1][:2] == ["all", "2,002"]
    assert b"USD" not in done.stdout
    assert run("-").stdout == b"There are no usage lines.\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "Missing argument"),
        (["/no/such/file"], 2, "does not exist"),
        (["--by", "colour", "-"], 2, "colour is not among model, team_alias"),
        (["--by", ",", "-"], 2, "nothing is not among"),
        (["--since", "yesterday", "-"], 2, "yesterday is not a date or time"),
        (["-"], 1, "-: what is packed in it is cut off or damaged"),
    ],
)
def test_what_cannot_be_done(arguments: list[str], code: int, words: str) -> None:
    """Wrong usage ends with 2, and what cannot be read with 1, each in a line or two."""
    done = run(*arguments, given=gzip.compress(line() * 100)[:-20])
    assert done.returncode == code
    assert words in done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_memory_does_not_depend_on_the_lines() -> None:
    """Of a line of any length only a piece is kept, and it counts as one that cannot be read."""
    longest = 0

    class Endless(BytesIO):
        """What a file of 64 MiB without a line end reads as."""

        left = 64

        def readinto(self, buffer: Any) -> int:
            if not self.left:
                return 0
            self.left -= 1
            buffer[:] = b"x" * len(buffer)
            if not self.left:
                tail = b"\n" + line()
                buffer[-len(tail) :] = tail
            return len(buffer)

    def watched(stream: BufferedReader) -> Any:
        nonlocal longest
        for one in lines_of(stream):
            longest = max(longest, len(one))
            yield one

    report = Report(["model"])
    report.take(watched(BufferedReader(Endless(), 1024 * 1024)))

    assert (report.malformed, report.total().requests) == (1, 1)
    assert longest <= 2 * 1024 * 1024 + 1


def test_why_caching_missed() -> None:
    """By group and in all, the most frequent reason first; none where no line tells any."""
    wrote: dict[str, Any] = {"outcome": "write", "read_tokens": 0}
    given = line()
    given += line(**wrote, miss_reason="expired") + line(**wrote, miss_reason="changed_tools") * 2
    given += line(**wrote, team_alias="blue", miss_reason="expired") + line(**wrote)

    result = summed(given)
    groups = {group["team_alias"]: group["misses"] for group in result["groups"]}
    assert groups == {"red": {"expired": 1, "changed_tools": 2}, "blue": {"expired": 1}}
    assert result["total"]["misses"] == {"expired": 2, "changed_tools": 2}

    said = run("-", given=given).stdout.decode()
    rows = [each.split() for each in said.partition("Why caching missed:")[2].splitlines()]
    assert ["claude-1", "red", "changed_tools", "2,", "expired", "1"] in rows
    assert ["claude-1", "blue", "expired", "1"] in rows
    assert ["all", "changed_tools", "2,", "expired", "2"] in rows
    assert b"Why caching missed" not in run("-", given=line() + line(**wrote)).stdout
