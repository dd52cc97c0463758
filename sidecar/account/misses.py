"""Why caching missed, and what was written for nothing, from what passed through this sidecar.

It remembers which prefixes were written and read, through which deployment and when, and what the
last prompt of each conversation began with. What it holds are hashes, times and counts, in tables
whose least recently used entries leave. A hash is the interpreter's own of 64 bits, which has a key
of its process (SipHash), over a salted digest of 128: nothing of a prompt can be found out from it.

Nothing here reads a clock but through the one that it is given, waits, or does more for one
answer than a few dozen look-ups. What was read needs no reason at once: hits are put by and gone
through some at a time, before the next miss at the latest, which costs half of what it does to
take each when it comes, with other work's code and data in the processor's caches.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from sidecar.account.miss_series import MissSeries
from sidecar.account.rates import Cost
from sidecar.account.store import Value
from sidecar.exchange import (
    Exchange,
    MissReason,
    Observation,
    Outcome,
    Prefix,
    Usage,
)

__all__ = ["NOTHING", "MissTracker", "Verdict", "Written"]

_LOOK_BACK_MESSAGES = 20
"""Providers look back so many blocks from a breakpoint, and a message has at least one."""
_TTL_S = 300
"""How long a prefix is kept where nobody says so: OpenAI names 5 to 10 minutes."""
_PREFIXES = 4
"""How many prefixes, as a mean, are held for each conversation."""
_MAX_DEPLOYMENTS = 4
"""How many deployments are remembered of one prefix."""
_MAX_BEGINNINGS = 4
"""How many pairs of tools and system prompt are remembered of one key and model."""
_MAX_SWEPT = 2000
_MAX_HITS = 32
"""So many are put by: 0.3 ms of work."""
_BYTES_PER_TOKEN = 4
"""Of text, about."""
_TTLS = ((3600, "1h"), (300, "5m"))


class Written:
    """What an answer wrote. Whoever counts the answer tells it the series."""

    __slots__ = ("series",)

    def __init__(self) -> None:
        self.series: MissSeries | None = None
        """Where it is counted if nobody reads it; None until the owner is known."""


class _Unread:
    """Tokens that were written and not yet read: those after `low`, up to `high`."""

    __slots__ = ("expires", "high", "low", "premium", "ttl", "written")

    def __init__(
        self, written: Written, low: int, high: int, ttl: str, expires: float, premium: int
    ) -> None:
        self.written = written
        self.low = low
        self.high = high
        self.ttl = ttl
        self.expires = expires
        self.premium = premium
        """Attodollars for one token."""


class Verdict(NamedTuple):
    """What was made of an answer."""

    reason: MissReason | None = None
    """Why nothing was read; None for an answer that is no miss."""
    written: Written | None = None
    """What it wrote; None if that is nothing."""


NOTHING = Verdict()


class _Use:
    """A prefix at one deployment."""

    __slots__ = ("deployment", "exact", "next", "since", "tokens", "ttl_s", "unread", "used")

    def __init__(self, deployment: str, since: float, used: float, ttl_s: int) -> None:
        self.deployment = deployment
        self.since = since
        """When it could be read for the first time."""
        self.used = used
        """When the last request began that wrote or read it."""
        self.ttl_s = ttl_s
        self.tokens = 0
        self.exact = False
        """Whether the tokens were said, or reckoned by their share of bytes."""
        self.unread: tuple[_Unread, ...] = ()
        self.next: _Use | None = None
        """The same prefix at another deployment."""

    def alive(self, at: float) -> bool:
        return self.used + self.ttl_s > at


class _Told(NamedTuple):
    """What the last prompt of a conversation had in its prefix."""

    tools: int
    system: int
    whole: int
    """How many messages."""
    messages: int
    since: float


class _Answer(NamedTuple):
    """What is remembered of an answer until it is looked at."""

    prefix: Prefix
    model: str | None
    """The model that was asked for."""
    key: int
    deployment: str
    began: float
    since: float
    """When what it wrote could be read."""
    outcome: Outcome
    usage: Usage
    minimum: int
    cost: Cost | None
    written: Written | None


class _Look(NamedTuple):
    """What is needed of an answer, for as long as it is looked at."""

    prefix: Prefix
    keys: tuple[int, ...]
    """Hashes of what its breakpoints end."""
    scope: bytes
    """The model that was asked for."""
    deployment: str
    began: float
    since: float


EntryT = TypeVar("EntryT")


class _Recent(OrderedDict[int, EntryT]):
    """A table whose least recently used entries leave."""

    __slots__ = ("_bound",)

    def __init__(self, bound: int) -> None:
        super().__init__()
        self._bound = bound

    def put(self, key: int, entry: EntryT) -> EntryT | None:
        """Take an entry, or take notice of its use; returns what had to leave."""
        self[key] = entry
        self.move_to_end(key)
        return self.popitem(last=False)[1] if len(self) > self._bound else None


class MissTracker:
    """Follows prefixes from answer to answer.

    Args:
        clock: monotonic seconds.
        evicted: counts prefixes that had to leave before their time.
        max_conversations: bounds what is held.
    """

    def __init__(
        self, clock: Callable[[], float], evicted: Value, *, max_conversations: int
    ) -> None:
        self._clock = clock
        self._evicted = evicted
        self._hits: deque[_Answer] = deque()
        self._prefixes: _Recent[_Use] = _Recent(_PREFIXES * max_conversations)
        self._told: _Recent[_Told] = _Recent(2 * max_conversations)
        self._beginnings: _Recent[list[_Told]] = _Recent(max_conversations)
        self._max_unread = 2 * max_conversations
        # In the order of their writing, so that what is first expires first.
        self._unread: dict[str, OrderedDict[_Unread, None]] = {
            ttl: OrderedDict() for _, ttl in _TTLS
        }

    def judge(
        self,
        exchange: Exchange,
        observation: Observation,
        outcome: Outcome,
        key: int,
        deployment: str,
        minimum: int,
        cost: Cost | None,
    ) -> Verdict:
        """Say why an answer read nothing, if it did not, and remember what it wrote and read.

        Args:
            key: the number of the request's key.
            deployment: LiteLLM's name of what answered; the same object for the same one.
            minimum: how many tokens a prefix must have for the model to keep it.
            cost: None where no price is known.
        """
        hit = outcome is Outcome.HIT
        if not hit and outcome is not Outcome.WRITE and outcome is not Outcome.NOT_CACHED:
            return NOTHING
        usage, facts = observation.usage, exchange.facts
        if facts.prefix is None:
            if hit:
                return NOTHING
            short = outcome is Outcome.NOT_CACHED and sum(usage.input_classes()) < minimum
            return Verdict(MissReason.TOO_SHORT if short else MissReason.UNKNOWN)
        began = self._clock() - exchange.duration_s
        first_byte_s = exchange.first_byte_s
        written = Written() if usage.write_tokens else None
        answer = _Answer(
            facts.prefix,
            facts.model,
            key,
            deployment,
            began,
            began + (exchange.duration_s if first_byte_s is None else first_byte_s),
            outcome,
            usage,
            minimum,
            cost,
            written,
        )
        if not hit:
            self._catch_up()
            return Verdict(self._take(answer), written)
        self._hits.append(answer)
        if len(self._hits) >= _MAX_HITS:
            self._catch_up()
        return NOTHING if written is None else Verdict(None, written)

    def _catch_up(self) -> None:
        """Go through the hits that were put by."""
        hits = self._hits
        while hits:
            self._take(hits.popleft())

    def _take(self, answer: _Answer) -> MissReason | None:
        """Say why an answer read nothing, if it did not, and remember what it wrote and read."""
        prefix, usage, minimum = answer.prefix, answer.usage, answer.minimum
        prompt = sum(usage.input_classes())
        kept = usage.read_tokens + usage.write_tokens
        if kept and usage.writes_reported:
            prefix = _as_far_as_kept(prefix, prompt, kept)
        last = prefix.breakpoints[-1]
        if not usage.writes_reported or not kept:
            kept = prompt * last.size // (prefix.size or 1)
        not_cached = answer.outcome is Outcome.NOT_CACHED
        if not_cached and kept < minimum:
            return MissReason.TOO_SHORT
        scope = b"p" + (answer.model or "").encode("utf-8", "replace") + b"\0"
        look = _Look(
            prefix,
            tuple([hash(scope + each.digest) for each in prefix.breakpoints]),
            scope,
            answer.deployment,
            answer.began,
            answer.since,
        )
        # Where writes are not reported, they are not known to have failed either.
        if not_cached and usage.writes_reported:
            return self._seen(look) or MissReason.UNKNOWN
        scope = b"c" + answer.key.to_bytes(8, "little", signed=True) + scope
        reason = None
        if answer.outcome is Outcome.HIT:
            self._read(look, usage.read_tokens)
        else:
            reason = self._seen(look) or self._compared(look, scope)
        unread = self._written(answer, last.ttl_s) if answer.written is not None else ()
        self._note(look, kept, minimum, unread, exact=usage.writes_reported)
        self._tell(look, scope)
        return reason

    def sweep(self) -> None:
        """Count what has expired unread. For once a second."""
        self._catch_up()
        now = self._clock()
        for ttl, unread in self._unread.items():
            for _ in range(min(_MAX_SWEPT, len(unread))):
                first = next(iter(unread))
                if first.expires > now:
                    break
                del unread[first]
                series = first.written.series
                if series is not None:
                    series.lose(ttl, first.high - first.low, first.premium)

    def _places(self, look: _Look) -> Iterator[int]:
        """Name the prefixes that the provider looks for, the longest first."""
        prefix, scope = look.prefix, look.scope
        last = prefix.breakpoints[-1]
        yield look.keys[-1]
        before = prefix.tools + prefix.system
        ends = prefix.messages
        # Where the last breakpoint is at a message's end, that one was named already.
        whole = last.messages
        if last.digest == before + ends[16 * (whole - 1) : 16 * whole]:
            whole -= 1
        for count in range(whole, max(0, whole - _LOOK_BACK_MESSAGES), -1):
            yield hash(scope + before + ends[16 * (count - 1) : 16 * count])
        yield from reversed(look.keys[:-1])
        if last.digest != before:
            yield hash(scope + before)
        yield hash(scope + prefix.tools)

    def _uses(self, place: int, look: _Look) -> list[_Use]:
        """Find a prefix where it could be read when a request began; its own deployment first."""
        use = self._prefixes.get(place)
        if use is None or use.next is None:
            return [use] if use is not None and use.since <= look.began else []
        found = []
        while use is not None:
            if use.since <= look.began:
                found.append(use)
            use = use.next
        found.sort(key=lambda use: use.deployment != look.deployment)
        return found

    def _seen(self, look: _Look) -> MissReason | None:
        """Say what the longest prefix that was seen here tells; None if none was."""
        for place in self._places(look):
            uses = self._uses(place, look)
            if not uses:
                continue
            alive = next((use for use in uses if use.alive(look.began)), None)
            if alive is None:
                return MissReason.EXPIRED
            here = alive.deployment == look.deployment
            return MissReason.UNKNOWN if here else MissReason.OTHER_DEPLOYMENT
        return None

    def _compared(self, look: _Look, scope: bytes) -> MissReason:
        """Compare with the last prompt of the same conversation, or of the same key and model."""
        prefix = look.prefix
        tools, system = self._sections(prefix)
        for told in self._conversation(prefix, scope):
            if told.since > look.began:
                continue
            if told.tools != tools:
                return MissReason.CHANGED_TOOLS
            if told.system != system:
                return MissReason.CHANGED_SYSTEM
            if told.messages != self._messages(prefix, told.whole):
                return MissReason.CHANGED_MESSAGES
            return MissReason.UNKNOWN
        beginnings = self._beginnings.get(hash(scope)) or []
        earlier = [told for told in beginnings if told.since <= look.began]
        if not earlier or any(told.tools == tools and told.system == system for told in earlier):
            return MissReason.NOT_SEEN_HERE
        if any(told.tools == tools for told in earlier):
            return MissReason.CHANGED_SYSTEM
        return MissReason.CHANGED_TOOLS

    def _sections(self, prefix: Prefix) -> tuple[int, int]:
        return hash(b"t" + prefix.tools), hash(b"s" + prefix.system)

    def _messages(self, prefix: Prefix, count: int) -> int:
        """Hash so many messages from the first on; nothing if there are not as many."""
        end = 16 * count
        return hash(b"m" + prefix.messages[end - 16 : end]) if count else 0

    def _conversation(self, prefix: Prefix, scope: bytes) -> Iterator[_Told]:
        for name in self._names(prefix, scope):
            told = self._told.get(name)
            if told is not None:
                yield told

    def _names(self, prefix: Prefix, scope: bytes) -> Iterator[int]:
        """Name a conversation: by its first message, and by its second, if the first changes."""
        if prefix.messages:
            yield hash(scope + b"1" + prefix.messages[:16])
        if prefix.second:
            yield hash(scope + b"2" + prefix.second)

    def _tell(self, look: _Look, scope: bytes) -> None:
        """Remember what a prompt began with."""
        prefix = look.prefix
        tools, system = self._sections(prefix)
        count = prefix.breakpoints[-1].messages
        told = _Told(tools, system, count, self._messages(prefix, count), look.since)
        for name in self._names(prefix, scope):
            self._told.put(name, told)
        group = hash(scope)
        beginnings = self._beginnings.get(group) or []
        at = 0
        for each in beginnings:
            if each.tools == tools and each.system == system:
                told = each  # it was there from the first time on
                break
            at += 1
        if at or not beginnings:
            beginnings = [told, *beginnings[:at], *beginnings[at + 1 :]][:_MAX_BEGINNINGS]
        self._beginnings.put(group, beginnings)

    def _read(self, look: _Look, read: int) -> None:
        """Take notice that so many tokens were read."""
        found: _Use | None = None
        elsewhere: _Use | None = None
        for place in self._places(look):
            uses = [use for use in self._uses(place, look) if use.alive(look.began)]
            if uses and uses[0].deployment == look.deployment:
                found = uses[0]
                break
            if uses and elsewhere is None:
                elsewhere = uses[0]
        found = found or elsewhere
        if found is None:
            return
        if not found.exact:
            found.tokens, found.exact = read, True
        found.used = max(found.used, look.began)
        self._cover(found, read)
        for key in look.keys:
            use = self._prefixes.get(key)
            while use is not None:
                here = use.deployment == found.deployment
                if use.unread and here and use.since <= look.began < use.used + use.ttl_s:
                    self._cover(use, read)
                use = use.next

    def _cover(self, use: _Use, read: int) -> None:
        """Take what was read of a prefix from what was written and not read."""
        reached = min(read, use.tokens)
        for part in use.unread:
            if part.low < reached:
                part.low = min(reached, part.high)
                if part.low == part.high:
                    self._unread[part.ttl].pop(part, None)

    def _written(self, answer: _Answer, asked_s: int) -> tuple[_Unread, ...]:
        """Note what was written, by how long it is kept.

        Args:
            asked_s: the TTL that the request asked for; 0 where it did not ask.
        """
        usage, cost, written = answer.usage, answer.cost, answer.written
        assert written is not None
        _, read, write_5m, write_1h, rest = usage.input_classes()
        premium_5m, premium_1h, premium_rest = cost.write_premiums if cost else (0, 0, 0)
        if rest:
            # Not said: what the request asked for, if it asked.
            if asked_s == 3600:
                write_1h, premium_1h = write_1h + rest, premium_1h + premium_rest
            elif asked_s:
                write_5m, premium_5m = write_5m + rest, premium_5m + premium_rest
        made: list[_Unread] = []
        low = read
        # An hour stands before five minutes in a prompt.
        for (ttl_s, ttl), tokens, premium in zip(
            _TTLS, (write_1h, write_5m), (premium_1h, premium_5m), strict=True
        ):
            if tokens:
                part = _Unread(
                    written, low, low + tokens, ttl, answer.began + ttl_s, premium // tokens
                )
                low += tokens
                made.append(part)
                unread = self._unread[ttl]
                unread[part] = None
                if len(unread) > self._max_unread:
                    unread.popitem(last=False)
                    self._evicted.value += 1
        return tuple(made)

    def _note(
        self, look: _Look, kept: int, minimum: int, unread: tuple[_Unread, ...], *, exact: bool
    ) -> None:
        """Remember a request's prefixes: they were written or read just now.

        Args:
            kept: tokens up to the last breakpoint.
            exact: whether these were said.
        """
        last = look.prefix.breakpoints[-1]
        for key, each in zip(look.keys, look.prefix.breakpoints, strict=True):
            # What comes later may have images, which are many bytes and few tokens.
            share = kept * each.size // (last.size or 1)
            tokens = max(share, min(kept, each.size // _BYTES_PER_TOKEN))
            if each is last:
                tokens = kept
            if tokens < minimum and each is not last:
                continue
            first = self._prefixes.get(key)
            use = first
            while use is not None and use.deployment != look.deployment:
                use = use.next
            if use is None or not use.alive(look.began):
                use = _Use(look.deployment, look.since, look.began, each.ttl_s or _TTL_S)
                use.tokens, use.exact, use.unread = tokens, exact and each is last, unread
                first = _chained(use, first)
            else:
                use.used = max(use.used, look.began)
                if each is last and unread:
                    use.tokens, use.exact, use.unread = tokens, exact, unread
            assert first is not None  # it is `use`, or came before
            evicted = self._prefixes.put(key, first)
            if evicted is not None:
                self._evict(evicted)

    def _evict(self, first: _Use) -> None:
        """Let go of a prefix. What was written with it can no longer be said to be unread."""
        now = self._clock()
        use: _Use | None = first
        while use is not None:
            if use.alive(now):
                self._evicted.value += 1
            for part in use.unread:
                self._unread[part.ttl].pop(part, None)
            use = use.next


def _chained(use: _Use, others: _Use | None) -> _Use:
    """Put a use before those at other deployments, of which the oldest leaves if need be."""
    kept = [use]
    while others is not None and len(kept) < _MAX_DEPLOYMENTS:
        if others.deployment != use.deployment:
            kept.append(others)
        others = others.next
    for before, after in zip(kept, [*kept[1:], None], strict=True):
        before.next = after
    return use


def _as_far_as_kept(prefix: Prefix, prompt: int, kept: int) -> Prefix:
    """Leave a last breakpoint out that the request did not ask for, if most before it was not kept.

    LiteLLM may have asked for caching at an earlier place.
    """
    *before, last = prefix.breakpoints
    if not before or last.ttl_s:
        return prefix
    behind = prompt * (last.size - before[-1].size) // (prefix.size or 1)
    if 2 * (prompt - kept) < behind:
        return prefix
    return prefix._replace(breakpoints=tuple(before))
