"""Plays cases against a sidecar in a process of its own, and says what differs from the claim.

What every case is held to, whatever its row says: nothing of the process's own failed, nothing
is in flight afterwards, its memory stayed below `MEMORY_BYTES` above where it began, the next
request is answered, on the same connection where that is still open, and every script of the
upstream came to its end.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import uvloop

from tests.faults.answers import SSE_BODY
from tests.faults.cases import GOOD, SETTINGS
from tests.faults.ends import Answer, Connecting, Play, Upstream
from tests.faults.model import (
    MEMORY_BYTES,
    Case,
    Counts,
    Cut,
    Gets,
    Listening,
    Reaches,
    Refused,
    Same,
    Scripts,
    Series,
    Whole,
)
from tests.support.calls import request, samples, send
from tests.support.running import SidecarProcess, sidecar_process, until

__all__ = ["Lab", "State"]

_PREFIX = "litellm_sidecar_"
_FAMILIES = {
    "observations": "status",
    "input_tokens": "cache",
    "output_tokens": "",
    "upstream_failures": "reason",
    "http_requests": "code",
    "client_disconnects": "",
    "refusals": "reason",
    "internal_errors": "room",
}
"""The counters that are compared, and by which label; the others of their labels are summed."""

_AT_ONCE = 16
_SETTLE_S = 10.0
_POLL_S = 0.005


class State(NamedTuple):
    """What the process holds while nothing is asked of it."""

    files: int
    tasks: int
    connections: int
    """To the upstream."""


class Lab:
    """An upstream, a sidecar before it, and a client."""

    def __init__(self, runner: asyncio.Runner, upstream: Upstream, sidecar: SidecarProcess) -> None:
        self._runner = runner
        self._upstream = upstream
        self._sidecar = sidecar
        self._number = 0
        self._counted: Series = Counter()
        self.resident_bytes = 0
        # The first of its kind may take memory, and make series, for good.
        for _ in range(20):
            self.differences(GOOD)
        self.resident_bytes = sidecar.resident_bytes()
        self.at_rest = self.rest()

    @classmethod
    @contextmanager
    def open(cls, directory: Path, settings: str) -> Iterator[Lab]:
        """Start one, with the settings of that name."""
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            upstream = Upstream()
            runner.run(_listen(upstream))
            environment = {"SIDECAR_UPSTREAM": f"http://127.0.0.1:{upstream.port}"}
            environment |= SETTINGS[settings]
            try:
                with sidecar_process(directory, environment, module="bench.inspected") as sidecar:
                    yield cls(runner, upstream, sidecar)
            finally:
                runner.run(upstream.deafen())

    def differences(self, case: Case, *, thorough: bool = False) -> list[str]:
        """Play a case and say what was not as its row says."""
        plays = list(case.plays())
        if thorough and case.more is not None:
            plays += case.more()
        return self._runner.run(self._differences(case, plays))

    def rest(self) -> State:
        """Wait until the pool has let go of its connections, and say what is left."""
        return self._runner.run(self._rest())

    # A case

    async def _differences(self, case: Case, plays: Sequence[Scripts]) -> list[str]:
        process = Path(f"/proc/{self._sidecar.process.pid}")
        (process / "clear_refs").write_text("5")  # proc(5): the peak begins anew
        before = self._counted
        found = await self._play_all(case, plays)
        expected = _times(case.counts, len(plays))
        expected.update(GOOD.counts.series())
        found += _compare_counts(expected, await self._settle(before, expected))
        peak = _kilobytes(process / "status", "VmHWM") * 1024
        if self.resident_bytes and peak - self.resident_bytes > MEMORY_BYTES:
            found.append(f"memory grew by {(peak - self.resident_bytes) / 2**20:.0f} MB")
        return found

    async def _play_all(self, case: Case, plays: Sequence[Scripts]) -> list[str]:
        await self._set_up(case.listening)
        found: list[str] = []
        last: Connecting | None = None
        # A sweep is played some at a time; what is not one may be about who comes first.
        at_once = _AT_ONCE if len(plays) > _AT_ONCE else 1
        for at in range(0, len(plays), at_once):
            batch = plays[at : at + at_once]
            results = await asyncio.gather(*(self._play(case, scripts) for scripts in batch))
            for number, (faults, client) in enumerate(results, at):
                found += [f"play {number}: {fault}" for fault in faults]
                if client is not None and number < len(plays) - 1:
                    client.close()
                last = client
        if case.listening is not Listening.YES:
            await self._set_up(Listening.YES)
        return found[:10] + await self._good(last)

    async def _set_up(self, listening: Listening) -> None:
        upstream = self._upstream
        if listening is Listening.YES and upstream.listening:
            return
        await upstream.deafen()
        if listening is Listening.YES:
            upstream.listen()
        elif listening is Listening.FULL:
            await upstream.fill()

    async def _play(self, case: Case, scripts: Scripts) -> tuple[list[str], Connecting | None]:
        """Play through the sidecar, and without it where the answers are to be the same."""
        if not isinstance(case.gets, Same):
            answer, play, client = await self._perform(self._sidecar.port, scripts)
            return [*_compare(case.gets, answer, None), *_upstream_faults(case, play)], client
        (answer, play, client), (direct, _, _) = await asyncio.gather(
            self._perform(self._sidecar.port, scripts),
            self._perform(self._upstream.port, scripts, keep=False),
        )
        return [*_compare(case.gets, answer, direct), *_upstream_faults(case, play)], client

    async def _perform(
        self, port: int, scripts: Scripts, *, keep: bool = True
    ) -> tuple[Answer, Play, Connecting | None]:
        """Play once; the client's connection comes back if it may still be open, and is kept."""
        self._number += 1
        name = b"%06d" % self._number
        play = self._upstream.plays[name] = Play(scripts.upstream)
        client = await Connecting.to(("127.0.0.1", port))
        try:
            answer = await client.perform(scripts.client, name, play)
            keep = keep and answer.complete and client.connection.fileno() >= 0
            if not keep:
                client.close()
            await until(lambda: play.over >= play.began, _SETTLE_S)
        except TimeoutError:
            play.fault = TimeoutError("it did not come to its end")
        except BaseException:
            client.close()
            raise
        finally:
            del self._upstream.plays[name]
        return answer, play, client if keep else None

    async def _good(self, client: Connecting | None) -> list[str]:
        """Ask what has a good answer, on the connection of before if that is open."""
        (scripts,) = GOOD.plays()
        if client is not None:
            self._number += 1
            name = b"%06d" % self._number
            play = self._upstream.plays[name] = Play(scripts.upstream)
            answer = await client.perform(scripts.client, name, play)
            client.close()
            if answer.status or play.began or answer.rest:
                return [f"afterwards, {fault}" for fault in _compare_good(answer)]
        answer, _, client = await self._perform(self._sidecar.port, scripts)
        if client is not None:
            client.close()
        return [f"afterwards, {fault}" for fault in _compare_good(answer)]

    # What is counted

    async def _settle(self, before: Series, expected: Series) -> Series:
        """Wait until what is expected was counted; return what was."""
        deadline = asyncio.get_running_loop().time() + _SETTLE_S
        while True:
            self._counted, in_flight = await self._scrape()
            added: Series = Counter(
                {key: value - before[key] for key, value in self._counted.items()}
            )
            added = +added
            late = asyncio.get_running_loop().time() > deadline
            if (added == expected and not in_flight) or late:
                if in_flight:
                    added["requests_in_flight", ""] = in_flight
                return added
            await asyncio.sleep(_POLL_S)

    async def _scrape(self) -> tuple[Series, int]:
        answer = await send(self._sidecar.admin_url, request("GET", "/metrics"))
        counted: Series = Counter()
        in_flight = 0
        for name, labels, value in samples(answer.body.decode()):
            family = name.removeprefix(_PREFIX).removesuffix("_total")
            if family == "http_requests_in_flight":
                in_flight += int(value)
            elif name.startswith(_PREFIX) and family in _FAMILIES:
                counted[family, labels.get(_FAMILIES[family], "")] += int(value)
        return counted, in_flight

    # What is left

    async def _rest(self) -> State:
        await until(lambda: not self._upstream.open, _SETTLE_S)
        process = self._sidecar.process
        said = len(_said(process.log))
        process.send(signal.SIGUSR1)
        await until(lambda: len(_said(process.log)) > said, _SETTLE_S)
        tasks, connections = _said(process.log)[-1]
        return State(len(os.listdir(f"/proc/{process.pid}/fd")), int(tasks), int(connections))


async def _listen(upstream: Upstream) -> None:
    upstream.listen()


def _said(log: Path) -> list[tuple[str, str]]:
    """Return what the process has said of its tasks and connections so far."""
    return re.findall(r"tasks=(\d+) connections=(\d+)\n", log.read_text())


def _kilobytes(path: Path, name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", path.read_text())
    assert match is not None
    return int(match[1])


def _times(counts: Counts, times: int) -> Series:
    return Counter({key: value * times for key, value in counts.series().items()})


def _compare_counts(expected: Series, added: Series) -> list[str]:
    return [
        f"{family}{{{label}}} rose by {added[family, label]}, not by {expected[family, label]}"
        for family, label in sorted(expected.keys() | added.keys())
        if added[family, label] != expected[family, label]
    ]


def _compare(gets: Gets, answer: Answer, direct: Answer | None) -> list[str]:
    """Say how an answer differs from the claim."""
    pairs: list[tuple[str, object, object]] = []
    if isinstance(gets, Same):
        assert direct is not None
        pairs = [
            ("status", answer.status, direct.status),
            ("headers", answer.end_to_end(), direct.end_to_end()),
            ("body", answer.body, direct.body),
            ("complete", answer.complete, direct.complete),
            ("complete", answer.complete, gets.complete),
        ]
    elif isinstance(gets, Refused):
        pairs = [
            ("status", answer.status, gets.status),
            ("reason", answer.header(b"x-sidecar-error"), gets.reason.encode()),
            ("complete", answer.complete, True),
        ]
    elif isinstance(gets, Cut | Whole):
        pairs = [
            ("status", answer.status, 200),
            ("body", answer.body, gets.body),
            ("complete", answer.complete, isinstance(gets, Whole)),
        ]
    # Whatever the upstream sent: nobody is to find a second answer in it.
    pairs.append(("what follows its end", answer.rest, b""))
    return [
        f"{what} is {_short(is_)}, not {_short(claimed)}"
        for what, is_, claimed in pairs
        if is_ != claimed
    ]


def _compare_good(answer: Answer) -> list[str]:
    good = Answer(200, answer.headers, SSE_BODY, complete=True)
    return _compare(GOOD.gets, answer, good)


def _upstream_faults(case: Case, play: Play) -> list[str]:
    """Say what went wrong at the upstream, or was not seen by it."""
    found = [] if play.fault is None else [f"the upstream's script failed: {play.fault!r}"]
    if case.reaches is not None:
        seen = Reaches.NOTHING
        if play.began:
            seen = Reaches.WHOLE if play.upstream.whole else Reaches.PART
        if seen is not case.reaches:
            found.append(f"{seen.value} of the request reached the upstream")
    return found


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:120]}…{shown[-60:]}"
