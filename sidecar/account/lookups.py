"""Looking up at LiteLLM to whom a key belongs, behind the path of the requests.

`resolve` answers from memory, or notes that somebody waits and returns. One question is asked
for a key, whoever waits for it; its answer holds for a while, also where it is that LiteLLM
does not know the key. Nothing here grows without a bound: not the keys that are remembered,
nor those that are asked for at once, nor those who wait. While LiteLLM fails it is asked more
and more rarely, and nobody waits: what it said last holds, for an hour at most.

Only hashes of keys come in here, and LiteLLM is asked by them. `/team/info` is never asked: it
answers with all keys of a team. The aliases of all teams come from one listing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from sidecar.account.identity import NO_TEAM, Owner
from sidecar.account.litellm import AskError, LiteLLM

__all__ = ["LOOKUP_RESULTS", "Lookups"]

logger = logging.getLogger("sidecar.account")

LOOKUP_RESULTS = {
    "key_info": (
        *("found", "not_found", "timeout", "refused", "failed"),
        *("backing_off", "queue_full"),
    ),
    "team_list": ("found", "timeout", "refused", "failed"),
}
"""What can become of a look-up, by the endpoint that is asked."""

_TIMEOUT_S = 5.0
"""How long an exchange waits for its owner, the time in the queue included."""
_CONCURRENCY = 4
"""Questions asked at once: LiteLLM has better things to do."""
_MAX_ASKED_KEYS = 1024
"""Keys that wait for their answer at once."""
_MAX_WAITING = 16_384
"""Exchanges that wait at once, about 1 KB each."""
_MAX_ANSWERS = 10_000
"""Keys that are remembered, about 0.5 KB each."""
_STALE_S = 3600.0
"""How long an answer may be used while LiteLLM gives no newer one."""
_FIRST_BACK_OFF_S = 1.0
_LAST_BACK_OFF_S = 60.0
_TEAM_LIST_AGE_S = 10.0
"""How old the listing has to be to be asked for anew because a team is not in it."""
_PAGE_TEAMS = 100
"""Teams a page; LiteLLM gives no more."""
_MAX_PAGES = 100
_MAX_KEY_BYTES = 1024 * 1024
_MAX_PAGE_BYTES = 8 * 1024 * 1024
"""Longest page: LiteLLM lists the members of each team. It is decoded in some 10 ms."""
_SLICE = 100
"""Exchanges that are told their owner between two chances for the loop to do other work."""

Settle = Callable[[Owner], None]


class _Key(msgspec.Struct):
    """What is read of `info` in the answer of `/key/info`."""

    team_id: str | None = None
    key_alias: str | None = None


class _KeyInfo(msgspec.Struct):
    info: _Key


class _Team(msgspec.Struct):
    """What is read of each of `teams` in the answer of `/v2/team/list`."""

    team_id: str
    team_alias: str | None = None


class _TeamPage(msgspec.Struct):
    teams: list[_Team]
    total_pages: int = 1


_KEY_DECODER = msgspec.json.Decoder(_KeyInfo)
_PAGE_DECODER = msgspec.json.Decoder(_TeamPage)


@dataclass(frozen=True, slots=True)
class _Answer:
    owner: Owner
    at: float


class Lookups:
    """Knows the owners of keys, as LiteLLM says them.

    Args:
        litellm: whom to ask.
        count: takes the source and the result of each look-up.
        contain: takes a fault that was kept from reaching anybody else.
        clock: monotonic seconds.
        ttl_s: how long an answer holds.
    """

    def __init__(
        self,
        litellm: LiteLLM,
        count: Callable[[str, str], None],
        contain: Callable[[Exception], None],
        clock: Callable[[], float],
        *,
        ttl_s: float,
    ) -> None:
        self._litellm = litellm
        self._count = count
        self._contain = contain
        self._clock = clock
        self._ttl_s = ttl_s
        self._answers: dict[str, _Answer] = {}
        self._waiting: dict[str, deque[Settle]] = {}
        self._waiting_count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._teams = _Teams(litellm, count, clock, ttl_s)
        self._retry_at = 0.0
        self._back_off_s = 0.0

    def resolve(self, hashed: str, settle: Settle) -> Owner | None:
        """Say to whom a key belongs; None if `settle` will be called with the answer, once.

        Args:
            settle: called in the loop, and must not raise.
        """
        now = self._clock()
        answer = self._answers.get(hashed)
        if answer is not None and now - answer.at < self._ttl_s:
            return answer.owner
        waiting = self._waiting.get(hashed)
        full = self._waiting_count >= _MAX_WAITING
        if waiting is None:
            if now < self._retry_at:
                self._count("key_info", "backing_off")
                return self.known(hashed)
            full = full or len(self._waiting) >= _MAX_ASKED_KEYS
        if full:
            self._count("key_info", "queue_full")
            return self.known(hashed)
        if waiting is None:
            waiting = self._waiting[hashed] = deque()
            task = asyncio.get_running_loop().create_task(self._look_up(hashed, waiting))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        waiting.append(settle)
        self._waiting_count += 1
        return None

    def known(self, hashed: str) -> Owner:
        """Say to whom a key belongs, as it was last said."""
        answer = self._answers.get(hashed)
        if answer is None or self._clock() - answer.at > self._ttl_s + _STALE_S:
            return Owner()
        return answer.owner

    async def flush(self, timeout_s: float) -> None:
        """Wait for the answers, and then tell those who still wait what is known without them."""
        if self._tasks:
            _, late = await asyncio.wait(list(self._tasks), timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _look_up(self, hashed: str, waiting: deque[Settle]) -> None:
        """Ask for a key, and tell all who wait for it, also where this is cancelled."""
        owner = self.known(hashed)
        try:
            owner = await self._answer(hashed) or owner
            # Whoever comes from now on finds the answer, or asks anew.
            del self._waiting[hashed]
            while len(waiting) > _SLICE:
                self._settle(waiting, owner, _SLICE)
                await asyncio.sleep(0)
        finally:
            self._waiting.pop(hashed, None)
            self._settle(waiting, owner, len(waiting))

    def _settle(self, waiting: deque[Settle], owner: Owner, number: int) -> None:
        for _ in range(number):
            self._waiting_count -= 1
            waiting.popleft()(owner)

    async def _answer(self, hashed: str) -> Owner | None:
        """Ask for a key, and remember the answer; None if there is none."""
        loop = asyncio.get_running_loop()
        deadline = asked_at = loop.time() + _TIMEOUT_S
        try:
            async with asyncio.timeout_at(deadline), self._slots:
                asked_at = loop.time()
                if self._clock() < self._retry_at:
                    self._count("key_info", "backing_off")
                    return None
                owner = await self._ask(hashed)
        except AskError as error:
            self._count("key_info", error.result)
            self._failed(error.reason)
            return None
        except TimeoutError:
            if deadline - asked_at < _TIMEOUT_S / 2:
                # Most of the time went by in the queue, and that says nothing of LiteLLM.
                self._count("key_info", "queue_full")
                return None
            self._count("key_info", "timeout")
            self._failed(f"no answer in {_TIMEOUT_S:g} s")
            return None
        except Exception as exc:
            # The boundary: whatever goes wrong in here costs a name, and nothing else.
            self._contain(exc)
            self._count("key_info", "failed")
            self._failed(type(exc).__name__)
            return None
        if self._back_off_s:
            self._back_off_s = self._retry_at = 0.0
            logger.info("identity_lookups_recovered")
        answers = self._answers
        answers.pop(hashed, None)  # to the end of the order, the oldest being first
        if len(answers) >= _MAX_ANSWERS:
            del answers[next(iter(answers))]
        answers[hashed] = _Answer(owner, self._clock())
        return owner

    async def _ask(self, hashed: str) -> Owner:
        key = await self._key(hashed)
        if key is None:
            self._count("key_info", "not_found")
            return Owner()
        team = await self._teams.alias(key.team_id) if key.team_id else NO_TEAM
        self._count("key_info", "found")
        return Owner(team, key.key_alias or NO_TEAM)

    async def _key(self, hashed: str) -> _Key | None:
        body = await self._litellm.get(
            "/key/info", {"key": hashed}, timeout_s=_TIMEOUT_S, max_bytes=_MAX_KEY_BYTES
        )
        if body is None:
            return None
        try:
            return _KEY_DECODER.decode(body).info
        except (msgspec.MsgspecError, RecursionError):
            raise AskError("failed", "/key/info: the answer is not LiteLLM's") from None

    def _failed(self, reason: str) -> None:
        """Ask more rarely. Those who were asked at once, and failed together, failed once."""
        now = self._clock()
        if now < self._retry_at:
            return
        if not self._back_off_s:
            logger.warning("identity_lookups_failed", extra={"reason": reason})
        self._back_off_s = min(max(2 * self._back_off_s, _FIRST_BACK_OFF_S), _LAST_BACK_OFF_S)
        self._retry_at = now + self._back_off_s


class _Teams:
    """The aliases of all teams, as listed by LiteLLM."""

    def __init__(
        self,
        litellm: LiteLLM,
        count: Callable[[str, str], None],
        clock: Callable[[], float],
        ttl_s: float,
    ) -> None:
        self._litellm = litellm
        self._count = count
        self._clock = clock
        self._ttl_s = ttl_s
        self._aliases: dict[str, str] = {}
        self._listed_at = float("-inf")
        self._lock = asyncio.Lock()

    async def alias(self, team_id: str) -> str | None:
        """Return the alias of a team; None if LiteLLM does not list it.

        Raises:
            AskError: there is no listing that is recent enough.
        """
        async with self._lock:
            age_s = self._clock() - self._listed_at
            new = team_id not in self._aliases and age_s >= _TEAM_LIST_AGE_S
            if new or age_s >= self._ttl_s:
                try:
                    self._aliases = await self._list()
                except AskError as error:
                    self._count("team_list", error.result)
                    raise
                self._listed_at = self._clock()
                self._count("team_list", "found")
        return self._aliases.get(team_id)

    async def _list(self) -> dict[str, str]:
        aliases: dict[str, str] = {}
        for number in range(1, _MAX_PAGES + 1):
            parameters = {"page": str(number), "page_size": str(_PAGE_TEAMS)}
            body = await self._litellm.get(
                "/v2/team/list", parameters, timeout_s=_TIMEOUT_S, max_bytes=_MAX_PAGE_BYTES
            )
            try:
                page = _PAGE_DECODER.decode(body or b"")
            except (msgspec.MsgspecError, RecursionError):
                raise AskError("failed", "/v2/team/list: the answer is not LiteLLM's") from None
            aliases |= {team.team_id: team.team_alias or NO_TEAM for team in page.teams}
            if number >= page.total_pages or not page.teams:
                break
        return aliases
