"""The ledger: takes each exchange at its end and counts it.

`submit` resolves the names of a label set once and keeps the series that go with it, so that
counting an exchange whose labels are known costs a few additions. It runs in the event loop,
never waits, and may raise: the relay contains that, and `contain` counts it. Where the owner of
a key has first to be looked up, what an answer said is counted under its name when that is known.

Labels come from what a client or an upstream says, and both can say anything. Names are taken
only from a 2xx answer, so that refused requests make no series; each label keeps its first N
values, all of them together M series, and what comes later is counted under `other`.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from sidecar.account.compat import CompatSeries, UpstreamVersion
from sidecar.account.identity import NO_TEAM, UNKNOWN, KeyReader, Owner, Resolver, named_in
from sidecar.account.metrics import Metrics
from sidecar.account.minimums import minimum_of
from sidecar.account.miss_series import MissSeries
from sidecar.account.misses import NOTHING, MissTracker, Verdict
from sidecar.account.money import Money
from sidecar.account.pricing import Asked, Pricing, asked_of
from sidecar.account.rates import ATTO, Cost, Unpriced
from sidecar.account.store import Value
from sidecar.account.usage_log import UsageLog
from sidecar.exchange import (
    LABEL_NAMES,
    End,
    Exchange,
    InputClass,
    Observation,
    Outcome,
    RefusalReason,
    RequestFacts,
    Rewrite,
    Route,
    Status,
    UpstreamFault,
    first_values,
    header,
)

__all__ = ["Ledger", "client_of", "provider_of"]

logger = logging.getLogger("sidecar.account")

OTHER = "other"
_DEPLOYMENT = b"x-litellm-model-id"
_MAX_VALUE_CHARS = 200
_MAX_ALIKE = 4096
"""Ways to be named, and owners of each, that are remembered; then all are found out anew."""
_MAX_NAMES_CHARS = 4096
"""Longest names of an answer, together, that are remembered: a client can make up any."""
_METHODS = frozenset(
    {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"}
)
_ID_PREFIXES = {"msg_bdrk_": "bedrock", "msg_vrtx_": "vertex_ai"}
_ROUTE_PROVIDERS = {
    Route.ANTHROPIC_MESSAGES: "anthropic",
    Route.OPENAI_ENDPOINT: "openai",
    Route.AZURE_ENDPOINT: "azure",
    Route.AZURE_AI_ENDPOINT: "azure_ai",
    Route.BEDROCK_ENDPOINT: "bedrock",
    Route.VERTEX_ENDPOINT: "vertex_ai",
}
"""Where LiteLLM passes through, the path says to whom."""
_LITELLM_PROVIDERS = frozenset(
    {
        *("anthropic", "azure", "azure_ai", "bedrock", "cohere", "databricks", "deepseek"),
        *("fireworks_ai", "gemini", "groq", "mistral", "openai", "openrouter", "perplexity"),
        *("text-completion-openai", "together_ai", "vertex_ai", "xai"),
    }
)
"""LiteLLM's names for those that are told by `x-litellm-model-name`."""
_API_DOMAINS = {
    b".anthropic.com": "anthropic",
    b".openai.azure.com": "azure",
    b".openai.com": "openai",
    b".googleapis.com": "vertex_ai",
    b".amazonaws.com": "bedrock",
}
"""Where `x-litellm-model-api-base` points, which LiteLLM 1.83 sends in place of the name."""
_OPENAI_MODEL = re.compile(r"(?:gpt-|chatgpt-|o\d)")
_ANTHROPIC_ID = re.compile(r"msg_0\w{20,}$")
_CLIENT = re.compile(r"([A-Za-z][A-Za-z0-9_.-]{0,39})/v?(\d{1,6})")


def provider_of(exchange: Exchange, observation: Observation) -> str:
    """Tell which provider answered: from the answer's id, the route, LiteLLM's model name, the
    answer's model."""
    message_id = observation.message_id or ""
    if message_id[:9] in _ID_PREFIXES:
        return _ID_PREFIXES[message_id[:9]]
    passed_to = _ROUTE_PROVIDERS.get(exchange.route)
    if passed_to is not None:
        return passed_to
    name = (header(exchange.response_headers, b"x-litellm-model-name") or b"").decode("latin-1")
    prefix = name.partition("/")[0]
    if prefix in _LITELLM_PROVIDERS:
        return prefix
    model = observation.response_model or name
    # The ways of Bedrock (`us.anthropic.…-v1:0`, ARNs) and Vertex AI (`…@20250929`) to spell.
    if "anthropic." in model or model.startswith("arn:aws"):
        return "bedrock"
    if "@" in model:
        return "vertex_ai"
    base = header(exchange.response_headers, b"x-litellm-model-api-base") or b""
    host = base.partition(b"://")[2].partition(b"/")[0]
    for domain, provider in _API_DOMAINS.items():
        if host.endswith(domain):
            return provider
    if _OPENAI_MODEL.match(model):
        return "openai"
    # LiteLLM makes up ids of its own for models that it translates: `msg_` and a UUID.
    return "anthropic" if _ANTHROPIC_ID.match(message_id) else UNKNOWN


def client_of(user_agent: str) -> str:
    """Name the client and its major version, from its User-Agent."""
    match = _CLIENT.match(user_agent)
    return f"{match[1].lower()}/{match[2]}" if match else UNKNOWN


def _client_label(exchange: Exchange, _: Observation) -> str:
    return client_of((header(exchange.request_headers, b"user-agent") or b"").decode("latin-1"))


def _header_label(name: bytes) -> Callable[[Exchange, Observation], str]:
    return lambda exchange, _: named_in(exchange.response_headers, name) or UNKNOWN


def _said_later(exchange: Exchange, observation: Observation) -> str:
    """Stand for a label that comes with the owner."""
    return UNKNOWN


_LABELS: dict[str, Callable[[Exchange, Observation], str]] = {
    "provider": provider_of,
    "response_model": lambda _, observation: observation.response_model or UNKNOWN,
    "model_id": _header_label(b"x-litellm-model-id"),
    "client": _client_label,
}


@dataclass(frozen=True, slots=True)
class _Series:
    """The series of one label set; all of them exist from its first sight on."""

    inputs: tuple[Value, ...]
    output: Value
    responses: dict[Outcome, Value]
    compat: CompatSeries | None
    """LiteLLM's own names; None where they are off."""
    money: Money | None
    """None where money is not counted."""
    misses: MissSeries | None
    """None where it is not told why caching missed."""


class _Place(NamedTuple):
    """Where answers are counted that are named alike and belong to the same owner."""

    model: str
    series: _Series
    overflows: tuple[str, ...]
    """The labels of which a limit was reached."""


class _Alike:
    """What is found out once for all answers that are named alike."""

    __slots__ = (
        "alias",
        "asked",
        "deployment",
        "minimum",
        "places",
        "provider",
        "team",
        "values",
    )

    def __init__(self, provider: str, deployment: str, asked: Asked, values: list[str]) -> None:
        self.provider = provider
        self.deployment = deployment
        """LiteLLM's name of it."""
        self.asked = asked
        self.minimum = minimum_of(asked.model_name, asked.response_model, asked.requested)
        """Tokens that a prefix must have to be cached."""
        self.values = values
        """Those of the labels, in which the owner's names have still to be put."""
        self.team: str | None = None
        """As the answers themselves say it; None if they do not."""
        self.alias: str | None = None
        self.places: dict[tuple[str | None, str | None], _Place] = {}
        """By the names of the owner."""


class _Reading(NamedTuple):
    """What is counted of a 2xx answer. It waits while its owner is looked up, and holds no key."""

    route: Route
    observation: Observation
    outcome: Outcome
    cost: Cost | Unpriced | None
    """None where no usage is reported, or money is not counted."""
    verdict: Verdict
    """Why it read nothing, and what it wrote that has still to be read."""
    alike: _Alike


class _RouteSeries:
    """The series of one route, found once."""

    __slots__ = (
        "_metrics",
        "_requests",
        "_route",
        "client_disconnects",
        "duration",
        "first_byte",
        "first_token",
        "in_flight",
        "overhead",
    )

    def __init__(self, metrics: Metrics, route: Route) -> None:
        self._metrics = metrics
        self._route = route
        self._requests: dict[tuple[str, int], Value] = {}
        self.in_flight = metrics.http_in_flight.child(route)
        self.duration = metrics.http_duration.child(route)
        self.overhead = metrics.overhead.child(route)
        self.first_byte = metrics.first_byte.child(route)
        self.first_token = metrics.first_token.child(route)
        self.client_disconnects = metrics.client_disconnects.child(route)

    def requests(self, method: str, code: int) -> Value:
        """Return the count of requests with this method and status code."""
        found = self._requests.get((method, code))
        if found is None:
            label = method if method in _METHODS else OTHER
            found = self._metrics.http_requests.child(self._route, label, str(code))
            if label == method:
                self._requests[method, code] = found
        return found


class Ledger:
    """Counts exchanges.

    Args:
        metrics: what is counted; it says which labels token series carry, from `LABEL_NAMES`.
        outcome_of: says what the prompt cache did for an answer.
        identities: knows to whom keys belong; None where only the answers' headers say it.
        keys: finds the key of a request.
        pricing: prices answers; None where money is not counted.
        misses: tells why caching missed; None where nobody wants to know.
        usage_log: takes a line for each exchange on an observed route; None where it is off.
        upstream: is shown an answer's headers when it is due; None where nobody wants to know.
        max_label_values: how many values each label keeps.
        max_series: how many series the label sets may make in all.
    """

    def __init__(
        self,
        metrics: Metrics,
        outcome_of: Callable[[Observation, RequestFacts], Outcome],
        *,
        identities: Resolver | None = None,
        keys: KeyReader | None = None,
        pricing: Pricing | None = None,
        misses: MissTracker | None = None,
        usage_log: UsageLog | None = None,
        upstream: UpstreamVersion | None = None,
        max_label_values: int = 200,
        max_series: int = 50_000,
    ) -> None:
        self._metrics = metrics
        self._outcome_of = outcome_of
        self._identities = identities
        self._keys = keys or KeyReader()
        self._pricing = pricing
        self._misses = misses
        self._usage_log = usage_log
        self._upstream = upstream
        self._max_label_values = max_label_values
        self._max_series = max_series
        # The compatible names need model and team, whichever labels are switched on.
        self._names_kept = tuple(
            label
            for label in LABEL_NAMES
            if label in ("model", "team_alias") or label in metrics.labels
        )
        readers = _LABELS | {"hashed_api_key": lambda given, _: self._hash_of(given) or UNKNOWN}
        self._others = [readers.get(label, _said_later) for label in self._names_kept[2:]]
        # Of the others, the answer itself decides.
        self._of_requests = [
            readers[label] for label in ("client", "hashed_api_key") if label in self._names_kept
        ]
        self._alias_at = (*self._names_kept, "api_key_alias").index("api_key_alias")
        self._alias_wanted = self._alias_at < len(self._names_kept)
        self._values: dict[str, set[str]] = {label: {UNKNOWN} for label in LABEL_NAMES}
        self._values["team_alias"].add(NO_TEAM)
        self._alike: dict[tuple[object, ...], _Alike] = {}
        self._series: dict[tuple[str, ...], _Series] = {}
        self._series_each = len(InputClass) + len(Outcome) + 1 + len(metrics.compat.families)
        if metrics.costs is not None:
            self._series_each += Money.SERIES
        if metrics.misses is not None:
            self._series_each += MissSeries.count(metrics.misses)
        self._series_made = 0
        self._overflowed: set[str] = set()
        self._seen_faults: set[tuple[str, str]] = set()
        self.submitted = 0
        """How many exchanges were taken, and how many of them counted later."""
        self._observations: dict[tuple[Route, str], dict[Status, Value]] = {}
        self._routes: dict[Route, _RouteSeries] = {}
        # What is known beforehand exists at zero from the start.
        self._observed(Route.MESSAGES, UNKNOWN)
        self._on(Route.MESSAGES)
        for fault in UpstreamFault:
            metrics.upstream_failures.child(fault)
        for reason in RefusalReason:
            metrics.refusals.child(reason)
        for room in ("proxy", "observe", "account"):
            metrics.internal_errors.child(room)
        for label in (*self._names_kept, "series"):
            metrics.label_overflows.child(label)

    def begin(self, route: Route) -> None:
        """Note that a request has come."""
        self._on(route).in_flight.value += 1

    def submit(self, exchange: Exchange) -> None:
        """Count an exchange at its end."""
        route = self._on(exchange.route)
        self.submitted += 1
        route.in_flight.value -= 1
        observation = exchange.observation
        left = exchange.end is End.CLIENT_LEFT and (
            # Some clients close a stream at its last event, before its last byte.
            observation is None or observation.status is not Status.COMPLETE
        )
        route.requests(exchange.method, 499 if left else exchange.status_code).value += 1
        if left:
            route.client_disconnects.value += 1
        route.duration.observe(exchange.duration_s)
        route.overhead.observe(exchange.overhead_s)
        if exchange.first_byte_s is not None:
            route.first_byte.observe(exchange.first_byte_s)
        if exchange.first_token_s is not None:
            route.first_token.observe(exchange.first_token_s)
        if exchange.upstream_fault is not None:
            self._metrics.upstream_failures.child(exchange.upstream_fault).value += 1
        if self._upstream is not None and self._upstream.due:
            self._upstream.note(exchange.response_headers)
        if observation is not None:
            if 200 <= exchange.status_code < 300:
                self._take_answer(exchange, observation)
            else:
                self._take_refusal(exchange, observation)

    def refuse(self, reason: RefusalReason) -> None:
        """Count a client that was turned away."""
        self._metrics.refusals.child(reason).value += 1

    def record_rewrite(self, result: Rewrite) -> None:
        """Count an answer whose usage was to be rewritten."""
        self._metrics.rewrites.child(result).value += 1

    def contain(self, room: str, exc: Exception) -> None:
        """Count a fault that was kept from reaching a response; log the first of each kind."""
        self._metrics.internal_errors.child(room).value += 1
        kind = (room, type(exc).__name__)
        if kind not in self._seen_faults and len(self._seen_faults) < 100:
            self._seen_faults.add(kind)
            # The traceback names code; the message could quote a body.
            logger.error(
                "internal_error",
                extra={"room": room, "exception": kind[1], "where": _where(exc)},
            )

    def _on(self, route: Route) -> _RouteSeries:
        found = self._routes.get(route)
        if found is None:
            found = self._routes[route] = _RouteSeries(self._metrics, route)
        return found

    def _take_answer(self, exchange: Exchange, observation: Observation) -> None:
        """Count what a 2xx answer said, now or when its owner is known, and write its line."""
        self._metrics.remarks.add(observation)
        alike = self._alike_of(exchange, observation)
        facts, pricing = exchange.facts, self._pricing
        outcome = self._outcome_of(observation, facts)
        cost = pricing.price_as(alike.asked, facts, observation) if pricing is not None else None
        verdict = NOTHING
        if self._misses is not None:
            key = 0
            if facts.prefix is not None:
                key = self._keys.number_of(exchange.route, exchange.request_headers)
            priced = cost if isinstance(cost, Cost) else None
            try:
                verdict = self._misses.judge(
                    exchange, observation, outcome, key, alike.deployment, alike.minimum, priced
                )
            except Exception as exc:
                # Tokens and money are counted all the same.
                self.contain("account", exc)
        reading = _Reading(exchange.route, observation, outcome, cost, verdict, alike)
        team, alias = alike.team, alike.alias
        identities = self._identities
        if identities is not None and team is not None and (alias or not self._alias_wanted):
            identities = None  # there is nothing to ask
        hashed = None
        if identities is not None or self._usage_log is not None:
            hashed = self._hash_of(exchange)
        waits = False
        if identities is not None and hashed is not None:
            late = partial(self._record_late, reading, team, alias)
            owner = identities.resolve(hashed, late)
            if owner is None:
                waits = True
                owner = identities.known(hashed)
            team = team or owner.team
            if self._alias_wanted:
                alias = alias or owner.key_alias
        if self._usage_log is not None:
            self._usage_log.write(
                exchange,
                observation,
                outcome=outcome,
                provider=alike.provider,
                team_alias=team or UNKNOWN,
                hashed_key=hashed,
                cost_usd=cost.total / ATTO if isinstance(cost, Cost) else None,
                miss_reason=verdict.reason,
            )
        if not waits:
            self._count(reading, team, alias)

    def _take_refusal(self, exchange: Exchange, observation: Observation) -> None:
        """Count an answer that is no 2xx one, and write its line.

        A refused request may name any model, and carry any key: only a name that is known is
        taken, and nobody is asked for the key.
        """
        model = exchange.facts.model
        known = model if model is not None and model in self._values["model"] else UNKNOWN
        self._observed(exchange.route, known)[observation.status].value += 1
        if self._usage_log is None:
            return
        hashed = self._hash_of(exchange)
        team = named_in(exchange.response_headers, b"x-litellm-team-alias")
        if team is None and hashed is not None and self._identities is not None:
            team = self._identities.known(hashed).team
        self._usage_log.write(
            exchange,
            observation,
            outcome=None,
            provider=provider_of(exchange, observation),
            team_alias=team or UNKNOWN,
            hashed_key=hashed,
        )

    def _record_late(
        self, reading: _Reading, team: str | None, alias: str | None, owner: Owner
    ) -> None:
        """Count what an answer said, whose owner had to be looked up."""
        self.submitted += 1
        try:
            if self._alias_wanted:
                alias = alias or owner.key_alias
            self._count(reading, team or owner.team, alias)
        except Exception as exc:
            # The relay has long ended the exchange: nobody else contains this.
            self.contain("account", exc)

    def _count(self, reading: _Reading, team: str | None, alias: str | None) -> None:
        """Count what an answer said, under the names of its owner."""
        route, observation, outcome, cost, verdict, alike = reading
        place = alike.places.get((team, alias))
        if place is None:
            if len(alike.places) >= _MAX_ALIKE:
                alike.places.clear()
            place = alike.places[team, alias] = self._place(alike, team, alias)
        model, series, overflows = place
        for label in overflows:
            self._overflow(label)
        self._observed(route, model)[observation.status].value += 1
        usage = observation.usage
        for child, tokens in zip(series.inputs, usage.input_classes(), strict=True):
            if tokens:
                child.value += tokens
        series.output.value += usage.output_tokens or 0
        if isinstance(cost, Cost) and series.money is not None:
            series.money.add(cost)
        elif isinstance(cost, Unpriced) and self._metrics.costs is not None:
            self._metrics.costs.unpriced.child(model, cost).value += 1
        series.responses[outcome].value += 1
        if verdict is not NOTHING and series.misses is not None:
            if verdict.reason is not None:
                series.misses.reasons[verdict.reason].value += 1
            if verdict.written is not None:
                verdict.written.series = series.misses
        if series.compat is not None:
            series.compat.add(usage, outcome)

    def _observed(self, route: Route, model: str) -> dict[Status, Value]:
        """Return the series of what could be read, by status."""
        found = self._observations.get((route, model))
        if found is None:
            family = self._metrics.observations
            found = {status: family.child(route, model, status) for status in Status}
            self._observations[route, model] = found
        return found

    def _hash_of(self, exchange: Exchange) -> str | None:
        return self._keys.hash_of(exchange.route, exchange.request_headers)

    def _alike_of(self, exchange: Exchange, observation: Observation) -> _Alike:
        """Find what goes for all answers that are named as this one is."""
        headers = first_values(exchange.response_headers)
        message_id = observation.message_id or ""
        key = (
            exchange.route,
            exchange.facts.model,
            observation.response_model,
            _ID_PREFIXES.get(message_id[:9]) or _ANTHROPIC_ID.match(message_id) is None,
            headers.get(_DEPLOYMENT),
            headers.get(b"x-litellm-model-name"),
            headers.get(b"x-litellm-model-api-base"),
            headers.get(b"x-litellm-team-alias"),
            headers.get(b"x-litellm-key-alias"),
            observation.terms,
            *[read(exchange, observation) for read in self._of_requests],
        )
        found = self._alike.get(key)
        if found is None:
            found = self._resolved(exchange, observation)
            if sum(len(part) for part in key if isinstance(part, str | bytes)) > _MAX_NAMES_CHARS:
                # Whatever it is called, no source of prices knows it, and it is counted as other.
                found.asked = Asked._make(part[:_MAX_VALUE_CHARS] for part in found.asked)
                return found
            if len(self._alike) >= _MAX_ALIKE:
                self._alike.clear()
            self._alike[key] = found
        return found

    def _resolved(self, exchange: Exchange, observation: Observation) -> _Alike:
        alike = _Alike(
            provider_of(exchange, observation),
            sys.intern((header(exchange.response_headers, _DEPLOYMENT) or b"").decode("latin-1")),
            asked_of(exchange, observation),
            [
                exchange.facts.model or UNKNOWN,
                UNKNOWN,
                *[read(exchange, observation) for read in self._others],
            ],
        )
        alike.team = named_in(exchange.response_headers, b"x-litellm-team-alias")
        if self._alias_wanted:
            alike.alias = named_in(exchange.response_headers, b"x-litellm-key-alias")
        return alike

    def _place(self, alike: _Alike, team: str | None, alias: str | None) -> _Place:
        """Find the series of a label set, made at its first sight, as far as limits allow."""
        values = list(alike.values)
        values[1] = team or UNKNOWN
        if self._alias_wanted:
            values[self._alias_at] = alias or UNKNOWN
        overflows: list[str] = []
        kept = tuple(
            self._kept(label, value, overflows)
            for label, value in zip(self._names_kept, values, strict=True)
        )
        names = kept
        # The last place is for the set that stands for all others.
        if names not in self._series and (
            self._series_made + 2 * self._series_each > self._max_series
        ):
            overflows.append("series")
            names = (OTHER,) * len(names)
        series = self._series.get(names) or self._admit(names)
        return _Place(kept[0], series, tuple(overflows))

    def _kept(self, label: str, value: str, overflows: list[str]) -> str:
        """Keep a value of a label, or take `other` for it and note that."""
        values = self._values[label]
        if value in values:
            return value
        value = value.encode("utf-8", "replace").decode()  # JSON can carry half an emoji
        if len(values) < self._max_label_values and len(value) <= _MAX_VALUE_CHARS:
            values.add(value)
            return value
        overflows.append(label)
        return OTHER

    def _admit(self, names: tuple[str, ...]) -> _Series:
        """Make the series of a label set."""
        metrics = self._metrics
        named = dict(zip(self._names_kept, names, strict=True))
        values = [named[label] for label in metrics.labels]
        model, team = names[:2]
        series = self._series[names] = _Series(
            inputs=tuple(metrics.input_tokens.child(*values, kind) for kind in InputClass),
            output=metrics.output_tokens.child(*values),
            responses={kind: metrics.responses.child(*values, kind) for kind in Outcome},
            compat=metrics.compat.series(model, team),
            money=Money(metrics.costs, values) if metrics.costs is not None else None,
            misses=MissSeries(metrics.misses, values) if metrics.misses is not None else None,
        )
        self._series_made += self._series_each
        return series

    def _overflow(self, label: str) -> None:
        self._metrics.label_overflows.child(label).value += 1
        if label not in self._overflowed:
            self._overflowed.add(label)
            logger.warning("label_overflow", extra={"label": label})


def _where(exc: Exception) -> str:
    """Name the place that raised, as `file:line`."""
    traceback = exc.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"
