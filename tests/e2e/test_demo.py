"""The demo as a user runs it: piped, to its end or to a signal, and with a sidecar that lies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sidecar.demo.comparison import Difference, Played, counted, differences, truth
from sidecar.demo.provider import BookEntry
from sidecar.demo.traffic import LONER, SEARCH, Ask, Ending
from tests.support.process import said_until

ROOT = Path(__file__).resolve().parents[2]
CLI = [sys.executable, "-W", "always::ResourceWarning", "-m", "sidecar", "demo"]

TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
POLL_S = 0.05


def environment(temporary: Path) -> dict[str, str]:
    """An environment in which nothing is right: the demo must not care."""
    return {
        "PATH": os.environ["PATH"],
        "TMPDIR": str(temporary),
        "SIDECAR_PORT": "not a port",
        "SIDECAR_COMPAT": "off",
        "SIDECAR_LABELS": "model",
        "HTTP_PROXY": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }


def run(command: list[str], temporary: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environment(temporary),
        capture_output=True,
        encoding="utf-8",
        timeout=TIMEOUT_S,
        check=False,
    )


def cells(line: str) -> list[str]:
    return line.replace(",", "").split()


def test_one_round_counts_what_is_true(tmp_path: Path) -> None:
    """Every count is the provider's, the exit code is 0, and nothing is left behind."""
    done = run([*CLI, "--once"], tmp_path)

    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    assert list(tmp_path.iterdir()) == []
    lines = done.stdout.splitlines()
    assert "Every count equals the truth." in lines
    assert "\x1b" not in done.stdout
    assert "✗" not in done.stdout
    rows = [cells(line) for line in lines if line.startswith("✓ ")]
    truths = [cells(line) for line in lines if line.startswith("  is true ")]
    # Two models with three teams each, two models' endings, one route.
    assert len(rows) == len(truths) == 9
    for row, true in zip(rows, truths, strict=True):
        assert row[-len(true[2:]) :] == true[2:]

    search = cells(next(line for line in reversed(lines) if line.startswith("✓ search")))
    # What the provider's minimum of 1,024 tokens makes of the prompts: known in advance.
    prompt_1, prompt_2, plain, short = 1200 + 17, 1200 + 34, 1200 + 51, 3
    questions = 5 * 3 + 4 + 1
    assert search[2] == "7"
    assert search[3] == str(plain + short + questions)
    assert search[4:7] == [str(prompt_1 + 2 * prompt_2), str(prompt_1 + prompt_2), "0"]
    assert search[-3:] == ["3", "3", "1"]


def test_litellms_own_names_are_shown(tmp_path: Path) -> None:
    """Each of the three series is printed on one line for every model and team."""
    done = run([*CLI, "--once"], tmp_path)

    series = re.findall(
        r'^litellm_(\w+)_total\{model="(\S+)",requested_model="\2",team_alias="([^"]+)"\} \d+\.0$',
        done.stdout,
        re.MULTILINE,
    )
    assert len(series) == len(set(series)) == 18
    assert {name for name, _, _ in series} == {
        "cached_tokens_metric",
        "cache_hits_metric",
        "cache_misses_metric",
    }
    assert {team for _, _, team in series} == {"search", "data science", "None"}


@pytest.mark.parametrize(
    ("sabotage", "told"),
    [
        pytest.param(
            "from sidecar.exchange import Usage as U; honest = U.input_classes\n"
            "def generous(self):\n"
            "    uncached, read, *writes = honest(self)\n"
            "    return (uncached, read + 1, *writes)\n"
            "U.input_classes = generous",
            "claude-sonnet-4-5, search: read counted 3692, true 3685",
            id="a-token-too-many",
        ),
        pytest.param(
            "from sidecar.exchange import Usage as U; honest = U.input_classes\n"
            "def swapped(self):\n"
            "    uncached, read, write_5m, write_1h, unknown = honest(self)\n"
            "    return uncached, read, write_1h, write_5m, unknown\n"
            "U.input_classes = swapped",
            "claude-haiku-4-5, data science: write_1h counted 4385, true 4368",
            id="times-to-live-swapped",
        ),
        pytest.param(
            "from sidecar.account.ledger import Ledger; honest = Ledger._count\n"
            "Ledger._count = lambda self, reading, _, key: honest(self, reading, 'search', key)",
            "claude-sonnet-4-5, None: answers counted 0, true 4",
            id="another-team",
        ),
        pytest.param(
            "from sidecar.account.ledger import Ledger; honest = Ledger._count\n"
            "def forgetful(self, reading, *owner):\n"
            "    if reading.observation.status != 'partial':\n"
            "        honest(self, reading, *owner)\n"
            "Ledger._count = forgetful",
            "claude-sonnet-4-5: partial counted 0, true 4",
            id="broken-streams-forgotten",
        ),
    ],
)
def test_a_sidecar_that_counts_wrong_is_found_out(tmp_path: Path, sabotage: str, told: str) -> None:
    """A wrong count ends the demo with 1, and it says which count is wrong."""
    start = "import sys; from sidecar.cli import main; sys.argv[1:] = ['demo', '--once']; main()"
    done = run([sys.executable, "-c", f"{sabotage}\n{start}"], tmp_path)

    assert (done.stderr, done.returncode) == ("", 1)
    assert "THE COUNTS DIFFER FROM THE TRUTH:" in done.stdout
    assert "✗" in done.stdout
    assert f"  {told}\n" in done.stdout
    assert "Every count equals the truth." not in done.stdout


@contextmanager
def running(temporary: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The demo without `--once`, from when it says that it goes on; with what it said."""
    with subprocess.Popen(
        CLI,
        cwd=ROOT,
        env=environment(temporary),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    ) as child:
        try:
            yield child, said_until(child, "Ctrl-C ends it.")
        finally:
            if child.poll() is None:
                child.kill()


def fetch(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=STOP_TIMEOUT_S) as response:
        return str(response.read().decode())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C or SIGTERM ends the running form within seconds, with 0 and nothing left behind."""
    with running(tmp_path) as (child, said):
        assert "Every count equals the truth." in said
        child.send_signal(number)
        rest, _ = child.communicate(timeout=STOP_TIMEOUT_S)

    assert child.returncode == 0
    assert re.fullmatch(r"Ended after \d+ more calls\.\n", rest)
    assert list(tmp_path.iterdir()) == []


def test_traffic_goes_on_where_it_says(tmp_path: Path) -> None:
    """The printed addresses answer, and the trickle is counted there."""
    with running(tmp_path) as (child, said):
        urls = dict(re.findall(r"^  (metrics|page|readiness) +(http://\S+)$", said, re.MULTILINE))
        assert fetch(urls["readiness"]) == "ready\n"
        assert said.startswith(f"The live page, while this runs:\n  {urls['page']}\n")
        assert "Prompt cache" in fetch(urls["page"])
        told = json.loads(fetch(f"{urls['page']}api/v1/summary?window=start"))
        assert told["requests"]["finished"] >= _requests(fetch(urls["metrics"])) - 1 > 0
        deadline = time.monotonic() + TIMEOUT_S
        before = _requests(fetch(urls["metrics"]))
        while _requests(fetch(urls["metrics"])) < before + 2:
            assert time.monotonic() < deadline, "the trickle does not come"
            time.sleep(POLL_S)
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=STOP_TIMEOUT_S)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_printed_call_works(tmp_path: Path) -> None:
    """The call, pasted into a shell twice, writes to the cache and then reads from it."""
    with running(tmp_path) as (child, said):
        call = said[said.index("curl -s") : said.index("\n\nOne call a second")]
        first, second = (
            subprocess.run(
                ["sh", "-c", call],
                env={"PATH": os.environ["PATH"]},
                capture_output=True,
                encoding="utf-8",
                timeout=TIMEOUT_S,
                check=True,
            ).stdout
            for _ in range(2)
        )
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=STOP_TIMEOUT_S)

    assert '"cache_read_input_tokens":0' in first
    assert '"cache_read_input_tokens":0' not in second
    assert "litellm_cache_hits_metric_total{" in first


def test_the_printed_report_works(tmp_path: Path) -> None:
    """The command, pasted into a shell, sums up what the demo has counted."""
    with running(tmp_path) as (_, said):
        command = next(line for line in said.splitlines() if " -m sidecar report " in line)
        done = subprocess.run(
            ["sh", "-c", command],
            cwd=ROOT,
            env=environment(tmp_path) | {"COLUMNS": "200"},
            capture_output=True,
            encoding="utf-8",
            timeout=TIMEOUT_S,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    counts, misses = done.stdout.split("Why caching missed:")
    rows = [cells(line) for line in counts.splitlines() if line.startswith("claude-")]
    assert [row[1] for row in rows].count("search") == 2
    assert "changed_" in misses or "not_seen_here" in misses
    total = next(cells(line) for line in counts.splitlines() if line.startswith("all "))
    # The calls of the round, and those that went on.
    played = re.search(r"^(\d+) calls were made", said, re.MULTILINE)
    assert played is not None
    assert int(total[1]) == sum(int(next(filter(str.isdigit, row))) for row in rows)
    assert int(total[1]) >= int(played[1])


def test_it_ends_by_itself_after_its_time(tmp_path: Path) -> None:
    """A demo that nobody ends does not run for ever."""
    program = (
        "import sys; import sidecar.demo.run as run; run._TRICKLE_FOR_S = 0.0\n"
        "from sidecar.cli import main; sys.argv[1:] = ['demo']; main()"
    )
    done = run([sys.executable, "-c", program], tmp_path)

    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.endswith(" more calls.\n")


# The comparison.


def _requests(exposition: str) -> int:
    return sum(sums["requests"] for sums in counted(exposition).by_route.values())


def _entry(sequence: int, **counts: int) -> BookEntry:
    names = (
        "input_tokens",
        "output_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "ephemeral_5m_input_tokens",
        "ephemeral_1h_input_tokens",
    )
    return BookEntry(
        sequence=sequence,
        model="m",
        key=SEARCH.hashed,
        streamed=False,
        completed=True,
        **{name: counts.get(name, 0) for name in names},
    )


def _played(sequence: int, *, ttl: str | None) -> Played:
    return Played(Ask("", SEARCH, "m", "", "", ttl=ttl), Ending.COMPLETE, sequence)


EXPOSITION = """\
# TYPE litellm_sidecar_input_tokens_total counter
litellm_sidecar_input_tokens_total{cache="uncached",model="m",provider="p",team_alias="search"} 7
litellm_sidecar_input_tokens_total{cache="read",model="m",provider="p",team_alias="search"} 100
litellm_sidecar_input_tokens_total{cache="read",model="m",provider="q",team_alias="search"} 20
# TYPE litellm_sidecar_responses_total counter
litellm_sidecar_responses_total{model="m",outcome="hit",provider="p",team_alias="search"} 1
litellm_sidecar_responses_total{model="m",outcome="write",provider="p",team_alias="search"} 2
litellm_sidecar_responses_total{model="m",outcome="not_cached",provider="p",team_alias="search"} 4
# TYPE litellm_cache_hits_metric_total counter
litellm_cache_hits_metric_total{model="m",requested_model="m",team_alias="search"} 1
# TYPE process_open_fds gauge
process_open_fds 12
"""


def test_counts_are_summed_by_model_and_team() -> None:
    """Series that differ in other labels are added; what is not compared is left out."""
    tally = counted(EXPOSITION)

    assert dict(tally.by_team) == {
        ("m", "search"): {
            "uncached": 7,
            "read": 120,
            "answers": 7,
            "hits": 1,
            "misses": 6,
            "litellm_hits": 1,
        }
    }
    assert dict(tally.by_model) == {}


def test_a_fraction_of_a_token_is_refused() -> None:
    """A count that is no whole number is not rounded away."""
    with pytest.raises(ValueError, match="not a whole number"):
        counted(EXPOSITION.replace("} 100", "} 100.5"))


def test_the_truth_tells_a_miss_from_what_was_not_asked_for() -> None:
    """Nothing read and nothing written is a miss only where caching was asked for."""
    entries = [
        _entry(1, cache_read_input_tokens=5),
        _entry(2, cache_creation_input_tokens=6, ephemeral_5m_input_tokens=4),
        _entry(3, input_tokens=7),
        _entry(4, input_tokens=8),
    ]
    played = [_played(at, ttl=None if at == 4 else "5m") for at in range(1, 5)]

    sums = truth(entries, played, [SEARCH, LONER]).by_team["m", "search"]

    assert (sums["hits"], sums["misses"], sums["not_asked"]) == (1, 2, 1)
    assert (sums["write_5m"], sums["write_1h"], sums["write_unknown"]) == (4, 0, 2)


def test_a_key_nobody_knows_has_no_known_team() -> None:
    """Its tokens are expected under `unknown`, as the sidecar counts them."""
    tally = truth([_entry(1)], [_played(1, ttl=None)], [LONER])

    assert list(tally.by_team) == [("m", "unknown")]


def test_every_wrong_number_is_a_difference() -> None:
    """One token too few, a row that should not be, a row that is missing: all are told."""
    true = truth([_entry(1, input_tokens=8)], [_played(1, ttl=None)], [SEARCH])
    same = truth([_entry(1, input_tokens=8)], [_played(1, ttl=None)], [SEARCH])
    assert differences(same, true) == []

    same.by_team["m", "search"]["uncached"] -= 1
    same.by_team["m", "stranger"]["output"] += 3
    del same.by_model[("m",)]

    found = differences(same, true)
    assert found == [
        Difference(("m", "search"), "uncached", 7, 8),
        Difference(("m", "stranger"), "output", 3, 0),
        Difference(("m",), "complete", 0, 1),
    ]
    assert str(found[0]) == "m, search: uncached counted 7, true 8"
