"""Why caching missed, and what was written for nothing: conversations that are played.

A request is read by the reader of request bodies and answered by the stand-in's prompt cache, one
for each deployment, on a clock that the test sets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from sidecar.account.miss_series import TTLS
from sidecar.account.misses import MissTracker
from sidecar.account.pricing import Pricing
from sidecar.demo.provider import PromptCache
from sidecar.exchange import Dialect, Exchange, MissReason, RequestFacts, Usage
from sidecar.observe.prefix import PrefixReader
from sidecar.observe.recall import Recall
from tests.account.test_ledger import TEAM, Books, exchange
from tests.account.test_pricing import HOUR, NOW, SONNET, cost_map
from tests.support.requests import facts_of as request_facts

Body = dict[str, Any]
MODEL = "claude-sonnet-4-5"
LABELS = TEAM | {"model": MODEL}
RECALL = Recall(7)
PREFIXES = {dialect: PrefixReader(dialect, 7, RECALL) for dialect in Dialect}
SHORT, LONG = {"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}


def words(topic: str, tokens: int = 2000) -> str:
    """Write a text of so many tokens of the stand-in's."""
    return (f"{topic} " * (4 * tokens))[: 4 * tokens]


def block(text: str, control: Mapping[str, str] | None = None) -> Body:
    made: Body = {"type": "text", "text": text}
    return made | ({"cache_control": dict(control)} if control else {})


def turns(*texts: str, control: Mapping[str, str] | None = SHORT) -> list[Body]:
    """Write messages in turn, and mark the last."""
    made: list[Body] = [
        {"role": "user" if at % 2 == 0 else "assistant", "content": text}
        for at, text in enumerate(texts)
    ]
    made[-1]["content"] = [block(texts[-1], control)]
    return made


def facts_of(body: Body, dialect: Dialect = Dialect.ANTHROPIC, **style: Any) -> RequestFacts:
    raw = json.dumps(body, **style).encode()
    return request_facts(raw, dialect, PREFIXES[dialect])


class Play:
    """A ledger that sees what a provider answers."""

    def __init__(self, *, max_conversations: int = 1000) -> None:
        self.now = 1000.0
        pricing = Pricing(file=None, package=False, clock=lambda: NOW)
        pricing.cost_map = cost_map({MODEL: SONNET | HOUR})
        self.books = Books(costs=True, misses=True, pricing=pricing)
        families = self.books.metrics.misses
        assert families is not None
        self.tracker = MissTracker(
            lambda: self.now, families.evicted.child(), max_conversations=max_conversations
        )
        self.books.ledger._misses = self.tracker
        self.caches: dict[str, PromptCache] = {}

    def ask(
        self, body: Body, deployment: str = "d1", *, key: str = "sk-1", seconds: float = 1.0
    ) -> MissReason | None:
        """Play a request that begins now and takes so long; returns why it missed."""
        cache = self.caches.setdefault(deployment, PromptCache(lambda: self.now))
        use = cache.look_up(MODEL, body)
        cache.commit(use)
        self.now += seconds
        usage = Usage(
            use.input_tokens,
            5,
            use.cache_read_input_tokens,
            use.cache_creation_input_tokens,
            use.ephemeral_5m_input_tokens,
            use.ephemeral_1h_input_tokens,
        )
        return self.submit(facts_of(body), usage, deployment, key=key, seconds=seconds)

    def submit(
        self,
        facts: RequestFacts,
        usage: Usage,
        deployment: str = "d1",
        *,
        key: str = "sk-1",
        seconds: float = 1.0,
        **changes: Any,
    ) -> MissReason | None:
        before = self.reasons()
        given: Exchange = exchange(usage=usage, **changes)
        self.books.submit(
            given._replace(
                facts=facts._replace(model=facts.model or MODEL),
                request_headers=[(b"x-api-key", key.encode())],
                response_headers=[
                    *given.response_headers,
                    (b"x-litellm-model-id", deployment.encode()),
                ],
                duration_s=seconds,
                first_byte_s=seconds / 2,
            )
        )
        after = self.reasons()
        new = [reason for reason in after if after[reason] > before.get(reason, 0)]
        assert len(new) <= 1
        return new[0] if new else None

    def reasons(self) -> dict[MissReason, float]:
        return {
            reason: self.books.value("cache_misses_total", reason=reason, **LABELS) or 0
            for reason in MissReason
        }

    def later(self, seconds: float) -> None:
        self.now += seconds
        self.tracker.sweep()

    def lost(self) -> dict[str, float | None]:
        """Tokens that were never read, by TTL."""
        return {
            ttl: self.books.value("cache_write_tokens_never_read_total", ttl=ttl, **LABELS)
            for ttl in TTLS
        }


def request(**members: Any) -> Body:
    return {"model": MODEL, "max_tokens": 5, "messages": turns("hi", control=None)} | members


SYSTEM = [block(words("rules"), SHORT)]
TOOLS = [{"name": "a", "input_schema": {"type": "object"}}]


def test_a_new_prefix_then_a_hit() -> None:
    """The first of its kind was not seen here; the next one is no miss."""
    play = Play()
    assert play.ask(request(system=SYSTEM)) is MissReason.NOT_SEEN_HERE
    assert play.ask(request(system=SYSTEM)) is None
    assert sum(play.reasons().values()) == 1


@pytest.mark.parametrize(("control", "ttl_s"), [(SHORT, 300), (LONG, 3600)])
def test_expired(control: Mapping[str, str], ttl_s: float) -> None:
    """It was seen longer ago than it is kept; each use keeps it for as long again."""
    play = Play()
    body = request(system=[block(words("rules"), control)])
    play.ask(body)
    for _ in range(2):
        play.later(ttl_s - 10)
        assert play.ask(body) is None
    play.later(ttl_s)
    assert play.ask(body) is MissReason.EXPIRED
    play.later(ttl_s - 10)
    assert play.ask(body) is None


def test_changed_system() -> None:
    """A system prompt that names the time of day."""
    play = Play()
    play.ask(request(system=SYSTEM, tools=TOOLS))
    changed = request(
        system=[block(words("12:01 rules"), SHORT)],
        tools=TOOLS,
        messages=turns("another question", control=None),
    )
    assert play.ask(changed) is MissReason.CHANGED_SYSTEM


def test_changed_tools() -> None:
    """A tool more, in the same conversation or another one; that the system prompt differs as
    well comes second."""
    play = Play()
    play.ask(request(system=SYSTEM, tools=TOOLS))
    more = [*TOOLS, {"name": "b", "input_schema": {}}]
    assert play.ask(request(system=SYSTEM, tools=more)) is MissReason.CHANGED_TOOLS
    both = request(
        system=[block(words("other"), SHORT)],
        tools=[*more, *TOOLS],
        messages=turns("another", control=None),
    )
    assert play.ask(both) is MissReason.CHANGED_TOOLS


def test_changed_messages() -> None:
    """An earlier message was edited: the second by its first, the first by its second."""
    play = Play()
    first = [words("a"), words("b"), words("c")]
    play.ask(request(messages=turns(*first)))
    edited = [first[0], words("B"), first[2], "d", "e"]
    assert play.ask(request(messages=turns(*edited))) is MissReason.CHANGED_MESSAGES
    stamped = [words("12:01 a"), *edited[1:], "f", "g"]
    assert play.ask(request(messages=turns(*stamped))) is MissReason.CHANGED_MESSAGES


def test_a_new_conversation_under_the_same_system_was_not_seen() -> None:
    """Its first message is new: nothing of it has changed."""
    play = Play()
    play.ask(request(messages=turns(words("a"))))
    assert play.ask(request(messages=turns(words("b")))) is MissReason.NOT_SEEN_HERE
    assert play.ask(request(messages=turns(words("a"), "x", "y"))) is None


def test_keys_and_models_are_compared_apart() -> None:
    """What another key asked for is no earlier version of this prompt."""
    play = Play()
    play.ask(request(system=SYSTEM))
    changed = request(system=[block(words("12:01 rules"), SHORT)])
    assert play.ask(changed, key="sk-2") is MissReason.NOT_SEEN_HERE
    # But a cache belongs to a workspace, whatever the key.
    assert play.ask(request(system=SYSTEM), key="sk-2") is None


def test_other_deployment() -> None:
    """The router hopped: what was written at one deployment is written at another one, and both
    have it then."""
    play = Play()
    body = request(system=SYSTEM)
    play.ask(body, "d1")
    assert play.ask(body, "d2") is MissReason.OTHER_DEPLOYMENT
    assert play.ask(body, "d1") is None
    assert play.ask(body, "d2") is None
    play.later(301)
    assert play.ask(body, "d1") is MissReason.EXPIRED
    play.later(200)
    play.ask(body, "d1")
    play.later(200)
    assert play.ask(body, "d2") is MissReason.OTHER_DEPLOYMENT


def test_too_short() -> None:
    """Nothing is written where the prefix is below the model's minimum, however long the rest;
    when it has grown past it, that is its first time."""
    play = Play()
    short = words("a", 900)
    assert play.ask(request(messages=turns(short))) is MissReason.TOO_SHORT
    question = turns(words("question", 3000), control=None)
    brief = request(system=[block(short, SHORT)], messages=question)
    assert play.ask(brief) is MissReason.TOO_SHORT
    grown = turns(short, "answer", words("b", 900))
    assert play.ask(request(messages=grown)) is MissReason.NOT_SEEN_HERE


def test_unknown() -> None:
    """What should have been read, and what could not be looked at."""
    play = Play()
    body = request(system=SYSTEM)
    play.ask(body)
    play.caches["d1"].clear()
    assert play.ask(body) is MissReason.UNKNOWN
    wrote = Usage(7, 5, 0, 2000, 2000, 0)
    assert play.submit(RequestFacts(MODEL, None, True), wrote) is MissReason.UNKNOWN
    kept_nothing = Usage(4000, 5, 0, 0)
    assert play.submit(facts_of(request(system=[block("new", SHORT)] * 2)), kept_nothing) in (
        MissReason.UNKNOWN,
        MissReason.TOO_SHORT,
    )
    assert play.submit(facts_of(request(messages=turns("new"))), kept_nothing) is MissReason.UNKNOWN


def test_what_was_not_asked_or_not_said_is_no_miss() -> None:
    """Without marks, without cache fields, or where something was read."""
    play = Play()
    assert play.ask(request()) is None
    assert play.submit(facts_of(request(system=SYSTEM)), Usage(4000, 5)) is None
    assert play.submit(facts_of(request(system=SYSTEM)), Usage(4, 5, 2000, 0)) is None
    assert sum(play.reasons().values()) == 0


def test_requests_at_once_were_not_seen() -> None:
    """One that began before the first had answered could not read what that wrote."""
    play = Play()
    facts, wrote = facts_of(request(system=SYSTEM)), Usage(7, 5, 0, 2000, 2000, 0)
    play.now += 1
    assert play.submit(facts, wrote) is MissReason.NOT_SEEN_HERE
    assert play.submit(facts, wrote) is MissReason.NOT_SEEN_HERE
    play.now += 2
    assert play.submit(facts, wrote) is MissReason.UNKNOWN


def test_openai_caches_without_being_asked() -> None:
    """It reports reads alone; what is long enough was written."""
    play = Play()
    body = {
        "model": "gpt-5",
        "messages": [
            {"role": "system", "content": words("rules")},
            {"role": "user", "content": "hi"},
        ],
    }
    facts = facts_of(body, Dialect.OPENAI_CHAT)

    reasons = []
    for wait, prompt in ((0, 500), (10, 2000), (10, 2000), (400, 2000)):
        play.later(wait)
        before = _gpt(play)
        play.submit(facts, Usage(prompt, 5, 0), model="gpt-5", response_model="gpt-5")
        reasons += [reason for reason, count in _gpt(play).items() if count > before[reason]]
    assert reasons == ["too_short", "not_seen_here", "unknown", "expired"]


def _gpt(play: Play) -> dict[str, float]:
    labels = {"model": "gpt-5", "team_alias": "red", "provider": "openai"}
    return {
        reason: play.books.value("cache_misses_total", reason=reason, **labels) or 0
        for reason in MissReason
    }


# What was written for nothing.


@pytest.mark.parametrize(("control", "ttl", "ttl_s"), [(SHORT, "5m", 300), (LONG, "1h", 3600)])
def test_never_read(control: Mapping[str, str], ttl: str, ttl_s: float) -> None:
    """What nobody reads in its time is lost, and what it had cost more."""
    play = Play()
    play.ask(request(system=[block(words("rules"), control)]))
    play.later(ttl_s - 5)
    assert play.lost() == {"5m": 0, "1h": 0}
    play.later(5)
    assert play.lost() == {"5m": 0, "1h": 0} | {ttl: 2000}
    premium = play.books.value("cache_write_premium_never_read_usd_total", ttl=ttl, **LABELS)
    assert premium == pytest.approx(2000 * (0.75e-6 if ttl == "5m" else 3e-6))
    play.later(10 * ttl_s)
    assert play.lost()[ttl] == 2000


def test_what_was_read_is_not_lost() -> None:
    """A conversation reads what each turn wrote; the last turn's own words are lost."""
    play = Play()
    said = [words("a")]
    for number in range(4):
        play.ask(request(messages=turns(*said)))
        said += [words(f"b{number}", 100), words(f"c{number}", 100)]
        play.later(60)
    play.later(4000)
    assert play.lost() == {"5m": 200, "1h": 0}


def test_a_shorter_breakpoint_alone_is_read() -> None:
    """Two conversations share a system prompt: what each wrote beyond it is lost, to the token,
    also when the second reads further in its own."""
    play = Play()
    system = [block(words("rules"), SHORT)]
    play.ask(request(system=system, messages=turns(words("a", 777))))
    play.ask(request(system=system, messages=turns(words("b", 555))))
    play.ask(request(system=system, messages=turns(words("b", 555), "x", words("y", 1000))))
    play.later(4000)
    assert play.lost() == {"5m": 777 + 1001, "1h": 0}


def test_an_hour_and_five_minutes_in_one_request() -> None:
    """Each part has its own time, and its own loss."""
    play = Play()
    body = request(system=[block(words("rules"), LONG)], messages=turns(words("a", 500)))
    play.ask(body)
    play.later(301)
    assert play.lost() == {"5m": 500, "1h": 0}
    play.ask(body | {"messages": turns(words("b", 400))})
    play.later(4000)
    assert play.lost() == {"5m": 900, "1h": 0}
    play.ask(body)
    play.later(4000)
    assert play.lost() == {"5m": 1400, "1h": 2000}


def test_reading_elsewhere_saves_nothing_here() -> None:
    """The hop wrote it twice, and only one of them was read."""
    play = Play()
    body = request(system=SYSTEM)
    for deployment in ("d1", "d2", "d2"):
        play.ask(body, deployment)
    play.later(301)
    assert play.lost() == {"5m": 2000, "1h": 0}


def test_deployments_that_share_a_cache() -> None:
    """Who reads through another deployment what only this one wrote has read it."""
    play = Play()
    body = request(system=SYSTEM)
    play.ask(body, "d1")
    play.caches["d2"] = play.caches["d1"]
    assert play.ask(body, "d2") is None
    play.later(301)
    assert play.lost() == {"5m": 0, "1h": 0}


def test_eviction_is_counted_and_loses_no_truth() -> None:
    """What has to leave before its time is told of, and is not called unread."""
    play = Play(max_conversations=1)
    for number in range(9):
        play.ask(request(system=[block(words(f"rules {number}"), SHORT)]))
    assert play.books.value("cache_prefixes_evicted_total")
    play.later(301)
    lost = play.lost()["5m"]
    assert lost is not None
    assert 0 < lost <= 4 * 2000


def test_a_fault_in_judging_loses_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it missed is not known then; tokens and answers are counted as ever."""
    play = Play()

    def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(play.tracker, "judge", broken)
    assert play.ask(request(system=SYSTEM, messages=turns("hello"))) is None
    totals = {
        sample.name: sample.value
        for metric in play.books.registry.collect()
        for sample in metric.samples
        if sample.labels.get("room") == "account" or sample.labels.get("outcome") == "write"
    }
    assert totals["litellm_sidecar_internal_errors_total"] == 1
    assert totals["litellm_sidecar_responses_total"] == 1


# Where bytes or breakpoints tell little of tokens.


def test_images_hide_no_breakpoint_before_them() -> None:
    """An image has many bytes and few tokens: the system prompt before it is known all the same."""
    play = Play()
    reasons = []
    for wait, picture in ((0, "a"), (10, "b"), (400, "c")):
        play.later(wait)
        source = {"type": "base64", "media_type": "image/png", "data": picture * 300_000}
        content: list[Body] = [{"type": "image", "source": source}, block("what is it?", SHORT)]
        body = request(system=SYSTEM, messages=[{"role": "user", "content": content}])
        reasons.append(play.ask(body))
    assert reasons == [MissReason.NOT_SEEN_HERE, None, MissReason.EXPIRED]
    lost = play.lost()["5m"]
    assert lost is not None
    assert lost < 2 * 2000, "the system prompt was read"


@pytest.mark.parametrize("mark", [{}, {"cache_control": SHORT}], ids=["injected", "of a message"])
def test_a_breakpoint_that_litellm_places(mark: Body) -> None:
    """What it asks for is not the whole prompt: how much was written tells how far it went."""
    play = Play()
    system = {"role": "system", "content": words("rules")} | mark
    wrote, read = Usage(6000, 5, 0, 2000, 2000, 0), Usage(6000, 5, 2000, 0, 0, 0)
    reasons = []
    for wait, said, usage in ((0, "a", wrote), (10, "b", read), (400, "c", wrote)):
        play.later(wait)
        user = {"role": "user", "content": words(said, 6000)}
        body = {"model": MODEL, "messages": [system, user]}
        reasons.append(play.submit(facts_of(body, Dialect.OPENAI_CHAT), usage))
    assert reasons == [MissReason.NOT_SEEN_HERE, None, MissReason.EXPIRED]
    assert play.lost() == {"5m": 0, "1h": 0}
