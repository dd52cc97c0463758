"""What an exchange adds to which series."""

from __future__ import annotations

import hashlib
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from sidecar.account.identity import Owner
from sidecar.account.ledger import Ledger, provider_of
from sidecar.account.metrics import Metrics
from sidecar.account.pricing import Pricing
from sidecar.exchange import (
    LABEL_NAMES,
    NO_TERMS,
    End,
    Exchange,
    InputClass,
    Observation,
    Outcome,
    RequestFacts,
    Route,
    Status,
    UpstreamFault,
    Usage,
)
from sidecar.observe.tap import outcome_of

KEY = hashlib.sha256(b"sk-1").hexdigest()
LABELS = ("model", "team_alias", "provider")


class Books:
    """A ledger with its metrics, and a way to ask for a value."""

    def __init__(
        self,
        labels: tuple[str, ...] = LABELS,
        *,
        compat: Sequence[str] = ("v1.83",),
        costs: bool = False,
        misses: bool = False,
        **limits: Any,
    ):
        self.metrics = Metrics(labels, compat=compat, costs=costs, misses=misses, clock=lambda: 1.0)
        self.registry = CollectorRegistry()
        self.registry.register(self.metrics.store)
        self.ledger = Ledger(self.metrics, outcome_of, **limits)

    def submit(self, given: Exchange) -> None:
        self.ledger.begin(given.route)
        self.ledger.submit(given)

    def value(self, name: str, **labels: str) -> float | None:
        prefix = "" if name.startswith("litellm_") else "litellm_sidecar_"
        return self.registry.get_sample_value(prefix + name, labels)

    def series(self) -> int:
        return sum(len(family.children) for family in self.metrics.store.families)


def exchange(**changes: Any) -> Exchange:
    """Write an exchange in which 2101 tokens were read."""
    usage = changes.pop("usage", Usage(7, 16, 2101, 30, 20, None))
    observation = Observation(
        changes.pop("status", Status.COMPLETE),
        usage,
        changes.pop("response_model", "claude-sonnet-4-5-20250929"),
        changes.pop("message_id", "msg_01XFDUDYJgAACzvnptvVoYEL"),
        terms=changes.pop("terms", NO_TERMS),
    )
    asked, hour = changes.pop("asked", True), changes.pop("hour", True)
    facts = RequestFacts(changes.pop("model", "m"), None, asked, hour)
    given = Exchange(
        route=Route.MESSAGES,
        method="POST",
        status_code=200,
        observed=True,
        end=End.COMPLETE,
        facts=facts,
        observation=observation,
        request_headers=[(b"authorization", b"Bearer sk-1")],
        response_headers=[(b"x-litellm-team-alias", b"red")],
        duration_s=0.5,
        first_byte_s=0.2,
        first_token_s=None,
        overhead_s=0.0002,
    )
    return given._replace(**changes)


TEAM = {"model": "m", "team_alias": "red", "provider": "anthropic"}


def test_token_classes_add_up_to_the_prompt() -> None:
    """The five classes are disjoint and sum to the whole prompt."""
    books = Books()
    books.submit(exchange())
    books.submit(exchange())
    values = {kind: books.value("input_tokens_total", cache=kind, **TEAM) for kind in InputClass}
    assert values == {
        "uncached": 14,
        "read": 4202,
        "write_5m": 40,
        "write_1h": 0,
        "write_unknown": 20,
    }
    assert books.value("output_tokens_total", **TEAM) == 32


@pytest.mark.parametrize(
    ("usage", "asked", "outcome", "hits", "misses"),
    [
        (Usage(7, 1, 5, 9), True, Outcome.HIT, 1, 0),
        (Usage(7, 1, 0, 9), True, Outcome.WRITE, 0, 1),
        (Usage(7, 1, 0, 0), True, Outcome.NOT_CACHED, 0, 1),
        (Usage(7, 1, 0, 0), False, Outcome.NOT_ASKED, 0, 0),
        (Usage(7, 1), True, Outcome.UNREPORTED, 0, 0),
        (Usage(7, 1, 0, 0), None, Outcome.UNKNOWN, 0, 0),
    ],
)
def test_outcomes_and_the_names_of_litellm(
    usage: Usage, asked: bool | None, outcome: Outcome, hits: int, misses: int
) -> None:
    """Each outcome is counted once; hits and misses follow it; all children exist at zero."""
    books = Books()
    books.submit(exchange(usage=usage, asked=asked))
    for each in Outcome:
        assert books.value("responses_total", outcome=each, **TEAM) == (each is outcome)
    names = {"model": "m", "requested_model": "m", "team_alias": "red"}
    assert books.value("litellm_cache_hits_metric_total", **names) == hits
    assert books.value("litellm_cache_misses_metric_total", **names) == misses
    cached = usage.cache_read_input_tokens or 0
    assert books.value("litellm_cached_tokens_metric_total", **names) == cached


def test_litellms_names_can_be_switched_off() -> None:
    """Without compat none of LiteLLM's names exist."""
    books = Books(compat=())
    books.submit(exchange())
    assert not any(
        family.name.startswith("litellm_cache") for family in books.metrics.store.families
    )


def test_http_series() -> None:
    """Requests, durations, first bytes, first tokens and overhead are counted by route."""
    books = Books()
    books.ledger.begin(Route.MESSAGES)
    assert books.value("http_requests_in_flight", route="/v1/messages") == 1
    books.ledger.submit(exchange(first_token_s=0.3, method="BREW"))
    route = {"route": "/v1/messages"}
    assert books.value("http_requests_in_flight", **route) == 0
    assert books.value("http_requests_total", method="other", code="200", **route) == 1
    assert books.value("http_request_duration_seconds_sum", **route) == 0.5
    assert books.value("time_to_first_byte_seconds_bucket", le="0.25", **route) == 1
    assert books.value("time_to_first_token_seconds_bucket", le="0.25", **route) == 0
    assert books.value("overhead_seconds_bucket", le="0.00025", **route) == 1
    assert books.value("observations_total", model="m", status="complete", **route) == 1
    assert books.value("observations_total", model="m", status="partial", **route) == 0


def test_client_that_left() -> None:
    """A leaver is 499 and a disconnect, and its tokens count all the same."""
    books = Books()
    books.submit(exchange(end=End.CLIENT_LEFT, status=Status.PARTIAL))
    route = {"route": "/v1/messages"}
    assert books.value("http_requests_total", method="POST", code="499", **route) == 1
    assert books.value("client_disconnects_total", **route) == 1
    assert books.value("input_tokens_total", cache="read", **TEAM) == 2101


def test_client_that_closed_after_the_last_event_did_not_leave() -> None:
    """Some clients close a stream at message_stop, before its last byte."""
    books = Books()
    books.submit(exchange(end=End.CLIENT_LEFT))
    assert books.value("client_disconnects_total", route="/v1/messages") == 0
    route = {"route": "/v1/messages"}
    assert books.value("http_requests_total", method="POST", code="200", **route) == 1


def test_upstream_failures_exist_at_zero() -> None:
    """Every reason exists before it happens, so that its first increase is seen."""
    books = Books()
    for fault in UpstreamFault:
        assert books.value("upstream_failures_total", reason=fault) == 0
    books.submit(exchange(upstream_fault=UpstreamFault.BODY_CUT))
    assert books.value("upstream_failures_total", reason="body_cut") == 1


@pytest.mark.parametrize(
    ("request_headers", "response_headers", "team"),
    [
        pytest.param("sk-1", b"red", "red", id="header"),
        pytest.param("sk-1", b"None", "None", id="header, no team"),
        pytest.param("sk-1", b"R%C3%A9d%20%26%20co", "Réd & co", id="header, escaped"),
        pytest.param("sk-1", None, "file", id="file"),
        pytest.param("sk-2", None, "unknown", id="not in the file"),
        pytest.param(None, None, "unknown", id="no key"),
    ],
)
def test_team_from_header_then_file(
    request_headers: str | None, response_headers: bytes | None, team: str
) -> None:
    """The answer's header says the team, then the file, else it is unknown."""

    class File:
        def resolve(self, hashed: str, settle: Callable[[Owner], None]) -> Owner | None:
            return self.known(hashed)

        def known(self, hashed: str) -> Owner:
            return Owner({KEY: "file"}.get(hashed))

    books = Books(("model", "team_alias"), identities=File())
    asked = [(b"x-api-key", request_headers.encode())] if request_headers else []
    said = [(b"x-litellm-team-alias", response_headers)] if response_headers else []
    books.submit(exchange(request_headers=asked, response_headers=said))
    assert books.value("output_tokens_total", model="m", team_alias=team) == 16


class Asked:
    """Somebody who answers when told to, and knows one thing before."""

    def __init__(self, known: Owner | None = None) -> None:
        self._known = known or Owner()
        self.waiting: list[tuple[str, Callable[[Owner], None]]] = []

    def resolve(self, hashed: str, settle: Callable[[Owner], None]) -> Owner | None:
        self.waiting.append((hashed, settle))
        return None

    def known(self, hashed: str) -> Owner:
        return self._known


def test_answer_waits_for_its_owner() -> None:
    """What goes by team is counted when the owner is known, all else at once; what waits holds
    no key."""
    asked = Asked()
    labels = ("model", "team_alias", "api_key_alias", "hashed_api_key", "client")
    books = Books(labels, identities=asked)
    agent = [(b"x-api-key", b"sk-1"), (b"user-agent", b"curl/8.1")]
    books.submit(exchange(request_headers=agent, response_headers=[]))
    names = {"model": "m", "team_alias": "red", "api_key_alias": "ci", "hashed_api_key": KEY}
    names |= {"client": "curl/8"}
    route = {"route": "/v1/messages"}
    assert books.value("http_requests_total", method="POST", code="200", **route) == 1
    assert books.value("observations_total", model="m", status="complete", **route) is None
    assert (books.value("output_tokens_total", **names), books.ledger.submitted) == (None, 1)
    ((hashed, settle),) = asked.waiting
    assert hashed == KEY
    assert isinstance(settle, partial)
    assert "sk-1" not in repr(settle.args)
    settle(Owner("red", "ci"))
    assert books.value("observations_total", model="m", status="complete", **route) == 1
    assert books.value("output_tokens_total", **names) == 16
    assert books.value("responses_total", outcome="hit", **names) == 1
    assert books.ledger.submitted == 2, "a scrape in between has not seen all"


@pytest.mark.parametrize(
    ("said", "labels", "asks"),
    [
        ([], ("model", "team_alias"), True),
        ([(b"x-litellm-team-alias", b"red")], ("model", "team_alias"), False),
        ([(b"x-litellm-team-alias", b"red")], ("model", "team_alias", "api_key_alias"), True),
        ([(b"x-litellm-key-alias", b"ci")], ("model", "team_alias", "api_key_alias"), True),
    ],
)
def test_only_what_is_not_said_is_asked_for(
    said: list[tuple[bytes, bytes]], labels: tuple[str, ...], asks: bool
) -> None:
    """A name in the answer's headers goes before all; a look-up is made for a name that is
    wanted and not there."""
    asked = Asked()
    books = Books(labels, identities=asked)
    books.submit(exchange(response_headers=said))
    for _, settle in asked.waiting:
        settle(Owner("other" if said else "red", "other"))
    team = "other" if said == [(b"x-litellm-key-alias", b"ci")] else "red"
    alias = "ci" if team == "other" else "other"
    names = {"model": "m", "team_alias": team, "api_key_alias": alias}
    found = books.value("output_tokens_total", **{label: names[label] for label in labels})
    assert (len(asked.waiting), found) == (asks, 16)


class Lines:
    """Takes what would be written to a usage log."""

    def __init__(self) -> None:
        self.written: list[dict[str, Any]] = []

    def write(self, exchange: Exchange, observation: Observation, **resolved: Any) -> None:
        self.written.append(resolved)


@pytest.mark.parametrize(
    ("said", "team"), [([], "before"), ([(b"x-litellm-team-alias", b"red")], "red")]
)
def test_line_does_not_wait(said: list[tuple[bytes, bytes]], team: str) -> None:
    """The line of an answer that waits for its owner is written at once, under the name that is
    known by then; a refused request's too, and nobody is asked for it."""
    lines, asked = Lines(), Asked(Owner("before"))
    books = Books(identities=asked, usage_log=lines)
    books.submit(exchange(response_headers=said))
    (line,) = lines.written
    assert (line["team_alias"], line["hashed_key"], line["outcome"]) == (team, KEY, Outcome.HIT)
    waiting = len(asked.waiting)
    books.submit(exchange(status_code=401, response_headers=[]))
    books.submit(exchange(status_code=401, response_headers=[], request_headers=[]))
    assert [line["team_alias"] for line in lines.written[1:]] == ["before", "unknown"]
    assert [line["hashed_key"] for line in lines.written[1:]] == [KEY, None]
    assert len(asked.waiting) == waiting


def test_refused_request_is_not_looked_up() -> None:
    """Who was refused has no name, so junk makes no look-ups; nor has a request without key."""
    asked = Asked()
    books = Books(identities=asked)
    books.submit(exchange(status_code=401, response_headers=[], status=Status.ERROR))
    books.submit(exchange(request_headers=[], response_headers=[]))
    assert asked.waiting == []


def test_fault_in_late_counting_is_contained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there any more to contain it: it is counted."""
    asked = Asked()
    books = Books(identities=asked)
    books.submit(exchange(response_headers=[]))
    monkeypatch.setattr(books.ledger, "_admit", lambda names: 1 / 0)
    asked.waiting[0][1](Owner("red"))
    assert books.value("internal_errors_total", room="account") == 1


@pytest.mark.parametrize(
    ("changes", "provider"),
    [
        ({"message_id": "msg_bdrk_01abc"}, "bedrock"),
        ({"message_id": "msg_vrtx_01abc"}, "vertex_ai"),
        ({"message_id": "msg_01XFDUDYJgAACzvnptvVoYEL"}, "anthropic"),
        ({"message_id": "msg_6f1c0d2e-8f6b-4c1a-9a53-6f0f5a7c0001"}, "unknown"),
        ({"message_id": "chatcmpl-1"}, "unknown"),
        ({"message_id": None}, "unknown"),
        (
            {
                "message_id": "msg_1f1c",
                "response_headers": [(b"x-litellm-model-name", b"azure_ai/claude-sonnet-4-5")],
            },
            "azure_ai",
        ),
        ({"message_id": "x", "response_model": "us.anthropic.claude-v1:0"}, "bedrock"),
        (
            {
                "message_id": "x",
                "response_model": "arn:aws:bedrock:us-east-1:1:inference-profile/y",
            },
            "bedrock",
        ),
        ({"message_id": "x", "response_model": "claude-sonnet-4-5@20250929"}, "vertex_ai"),
        ({"message_id": "resp_1", "response_model": "gpt-4o-2024-08-06"}, "openai"),
        (
            {"message_id": "x", "response_headers": [(b"x-litellm-model-name", b"groq/llama")]},
            "groq",
        ),
        ({"message_id": "x", "response_headers": [(b"x-litellm-model-name", b"x/y")]}, "unknown"),
        (
            {
                "message_id": "chatcmpl-1",
                "response_model": "gpt-4o",
                "response_headers": [
                    (b"x-litellm-model-api-base", b"https://our.openai.azure.com/openai")
                ],
            },
            "azure",
        ),
        (
            {
                "message_id": "chatcmpl-1",
                "response_headers": [
                    (b"x-litellm-model-api-base", b"https://api.anthropic.com/v1/messages")
                ],
            },
            "anthropic",
        ),
        ({"message_id": None, "route": Route.BEDROCK_ENDPOINT}, "bedrock"),
        ({"message_id": "chatcmpl-1", "route": Route.AZURE_ENDPOINT}, "azure"),
        ({"message_id": "msg_vrtx_01abc", "route": Route.VERTEX_ENDPOINT}, "vertex_ai"),
    ],
)
def test_provider(changes: dict[str, Any], provider: str) -> None:
    """The answer's id tells the provider, then its model, then LiteLLM's name for it."""
    given = exchange(**changes)
    assert given.observation is not None
    assert provider_of(given, given.observation) == provider


def test_all_labels_together() -> None:
    """Every label that can be switched on has its value."""
    books = Books(LABEL_NAMES)
    books.submit(
        exchange(
            request_headers=[(b"x-api-key", b"sk-1"), (b"user-agent", b"claude-cli/2.1.3 (x)")],
            response_headers=[
                (b"x-litellm-team-alias", b"red"),
                (b"x-litellm-key-alias", b"ci"),
                (b"x-litellm-model-id", b"abc"),
            ],
        )
    )
    labels = TEAM | {
        "response_model": "claude-sonnet-4-5-20250929",
        "model_id": "abc",
        "api_key_alias": "ci",
        "hashed_api_key": KEY,
        "client": "claude-cli/2",
    }
    assert books.value("output_tokens_total", **labels) == 16


def test_labels_without_team() -> None:
    """LiteLLM's names keep model and team, whichever labels our own series carry."""
    books = Books(("provider",))
    books.submit(exchange())
    assert books.value("output_tokens_total", provider="anthropic") == 16
    names = {"model": "m", "requested_model": "m", "team_alias": "red"}
    assert books.value("litellm_cache_hits_metric_total", **names) == 1


def test_refused_requests_create_no_series() -> None:
    """10,000 invented models and keys that get 401 leave no trace but a count."""
    books = Books()
    books.submit(exchange(status_code=401, status=Status.ERROR, model="first"))
    before = books.series()
    for number in range(10_000):
        books.submit(
            exchange(
                status_code=401,
                status=Status.ERROR,
                model=f"invented-{number}",
                request_headers=[(b"x-api-key", b"sk-%d" % number)],
                response_headers=[],
            )
        )
    assert books.series() == before
    assert (
        books.value("observations_total", route="/v1/messages", model="unknown", status="error")
        == 10_001
    )


def test_errors_of_a_known_model_keep_its_name() -> None:
    """A model that has answered before is named when it fails."""
    books = Books()
    books.submit(exchange())
    books.submit(exchange(status_code=529, status=Status.ERROR))
    assert books.value("observations_total", route="/v1/messages", model="m", status="error") == 1


def test_label_values_are_limited() -> None:
    """The first N values are kept, later ones are `other`, and that is counted."""
    books = Books(max_label_values=3)  # one of them is `unknown`
    for name in ("a", "b", "c", "d", "a", "x" * 500):
        books.submit(exchange(model=name))
    labels = {"team_alias": "red", "provider": "anthropic"}
    assert books.value("output_tokens_total", model="a", **labels) == 32
    assert books.value("output_tokens_total", model="b", **labels) == 16
    assert books.value("output_tokens_total", model="other", **labels) == 48
    assert books.value("output_tokens_total", model="c", **labels) is None
    assert books.value("label_overflows_total", label="model") == 3


def test_series_are_limited_in_all() -> None:
    """Past the limit of series, all label sets count under one, which is within the limit."""
    books = Books(max_series=45)  # two label sets of 15 series, and the one for all others
    for number in range(10):
        books.submit(exchange(model=f"m{number}"))
    other = {"model": "other", "team_alias": "other", "provider": "other"}
    assert books.value("label_overflows_total", label="series") == 8
    assert books.value("output_tokens_total", **other) == 16 * 8
    assert books.value("output_tokens_total", **TEAM | {"model": "m1"}) == 16
    kept = {"input_tokens": 15, "output_tokens": 3, "responses": 18}
    kept |= {family.name: 3 for family in books.metrics.compat.families}
    families = {
        family.name.removeprefix("litellm_sidecar_"): len(family.children)
        for family in books.metrics.store.families
    }
    assert {name: families[name] for name in kept} == kept
    assert sum(kept.values()) == 45


def test_half_an_emoji_in_a_label_does_no_harm() -> None:
    """A label value that is no valid text is made one: a scrape must not fail for it."""
    books = Books(("model", "response_model"))
    books.submit(exchange(response_model="m\ud83d"))
    assert books.value("output_tokens_total", model="m", response_model="m?") == 16


def test_exchange_without_observation() -> None:
    """What is relayed and not observed has HTTP series alone."""
    books = Books()
    books.submit(exchange(observation=None, observed=False, route=Route.OTHER, method="GET"))
    assert books.value("http_requests_total", route="other", method="GET", code="200") == 1
    grown = {
        family.name.removeprefix("litellm_sidecar_")
        for family in books.metrics.store.families
        if "route" in family.labels and any("other" in values for values in family.children)
    }
    assert grown == {
        "http_requests",
        "http_requests_in_flight",
        "http_request_duration_seconds",
        "time_to_first_byte_seconds",
        "time_to_first_token_seconds",
        "overhead_seconds",
        "client_disconnects",
    }


def test_long_names_are_not_remembered() -> None:
    """A client that makes up names of a megabyte takes no memory with them."""
    books = Books(costs=True, pricing=Pricing(file=None, package=True, clock=time.time))
    books.submit(exchange(model="m"))  # imports what takes half a minute to import while traced
    tracemalloc.start()
    for number in range(100):
        books.submit(exchange(model=f"{number}{'m' * 1_000_000}", response_model="x" * 1_000_000))
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert books.value("output_tokens_total", **TEAM | {"model": "other"}) == 1600
    assert held < 5_000_000


def test_owners_take_no_place_by_names_that_are_no_labels() -> None:
    """Without the label for it, the aliases of a team's keys are all the same."""

    class Known:
        def resolve(self, hashed: str, settle: Callable[[Owner], None]) -> Owner | None:
            return self.known(hashed)

        def known(self, hashed: str) -> Owner:
            return Owner("red", hashed)

    books = Books(identities=Known())
    for number in range(50):
        key = [(b"x-api-key", b"sk-%d" % number)]
        books.submit(exchange(request_headers=key, response_headers=[]))
    assert books.value("output_tokens_total", **TEAM) == 800
    (alike,) = books.ledger._alike.values()
    assert len(alike.places) == 1
