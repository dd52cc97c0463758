"""The metrics of the sidecar: every name, label and help text in one place.

Renaming or relabelling anything here breaks somebody's dashboards; a golden file in the tests
holds it still. Names follow prometheus.io/docs/practices/naming.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Sequence

from sidecar import __version__
from sidecar.account.compat import Compat
from sidecar.account.remarks import RemarkCounts
from sidecar.account.store import Amount, Family, Store

__all__ = ["Metrics"]

PREFIX = "litellm_sidecar_"

# Edges lie on values that people put into objectives; an answer may take ten minutes.
_DURATION_EDGES = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_FIRST_EDGES = (0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 10, 20, 30, 60, 120, 300, 600)
_OVERHEAD_EDGES = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)


class Metrics:
    """All families of one sidecar, on a store of their own.

    Args:
        labels: names of the labels that token series carry.
        compat: which of LiteLLM's own names are exported, as in SIDECAR_COMPAT.
        costs: whether money is counted.
        misses: whether it is told why caching missed.
        clock: Unix time in seconds.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        compat: Collection[str],
        costs: bool = False,
        misses: bool = False,
        clock: Callable[[], float],
    ) -> None:
        self.store = store = Store(clock)
        self.labels = labels = tuple(labels)
        self.input_tokens = store.counter(
            f"{PREFIX}input_tokens",
            "Prompt tokens by what the provider's prompt cache did with them, as the usage of "
            "2xx answers says; the classes are disjoint and their sum is the whole prompt.",
            (*labels, "cache"),
        )
        self.output_tokens = store.counter(
            f"{PREFIX}output_tokens",
            "Tokens generated, as the usage of 2xx answers says; of a broken stream what was "
            "said before it broke.",
            labels,
        )
        self.responses = store.counter(
            f"{PREFIX}responses",
            "2xx answers on observed routes by what the prompt cache did: hit, write, "
            "not_cached (asked for or automatic, nothing read or written), not_asked, unreported "
            "(no cache field in the answer), unknown (the request could not be read).",
            (*labels, "outcome"),
        )
        self.costs: Costs | None = Costs(store, labels) if costs else None
        """What answers cost; None where no source of prices is wanted."""
        self.misses: Misses | None = Misses(store, labels, costs=costs) if misses else None
        """Why caching missed; None where nobody wants to know."""
        self.observations = store.counter(
            f"{PREFIX}observations",
            "Exchanges on observed routes by what could be read of the answer: complete, "
            "partial, missing, invalid, oversized, encoded, error.",
            ("route", "model", "status"),
        )
        self.remarks = RemarkCounts(store, PREFIX)
        """What answers say beside their tokens."""
        self.http_requests = store.counter(
            f"{PREFIX}http_requests",
            "Requests relayed, by the status code sent; 499 where the client left first.",
            ("route", "method", "code"),
        )
        self.http_in_flight = store.gauge(
            f"{PREFIX}http_requests_in_flight", "Requests being relayed.", ("route",)
        )
        self.http_duration = store.histogram(
            f"{PREFIX}http_request_duration_seconds",
            "Time from a request's head to the end of its answer.",
            ("route",),
            _DURATION_EDGES,
        )
        self.first_byte = store.histogram(
            f"{PREFIX}time_to_first_byte_seconds",
            "Time from a request's head to the head of LiteLLM's answer.",
            ("route",),
            _FIRST_EDGES,
        )
        self.first_token = store.histogram(
            f"{PREFIX}time_to_first_token_seconds",
            "Time from a request's head to the first content of a streamed answer.",
            ("route",),
            _FIRST_EDGES,
        )
        self.overhead = store.histogram(
            f"{PREFIX}overhead_seconds",
            "Time that the sidecar itself added to an exchange: before the request went on, "
            "before the answer's head went on, to rewrite its usage where that is on, and at "
            "the end; waiting is left out.",
            ("route",),
            _OVERHEAD_EDGES,
        )
        self.upstream_failures = store.counter(
            f"{PREFIX}upstream_failures",
            "Exchanges in which LiteLLM gave no answer or broke off, by reason.",
            ("reason",),
        )
        self.client_disconnects = store.counter(
            f"{PREFIX}client_disconnects",
            "Exchanges that the client left before their end.",
            ("route",),
        )
        self.refusals = store.counter(
            f"{PREFIX}refusals",
            "Requests and connections that the sidecar itself turned away, by reason.",
            ("reason",),
        )
        self.drain_aborts = store.counter(
            f"{PREFIX}drain_aborts",
            "Exchanges, WebSockets among them, that were cut or turned away because the time to "
            "drain was over, or because a second signal came.",
        )
        self.drain_aborts.child()  # there at zero, so that the first is an increase
        self.label_overflows = store.counter(
            f"{PREFIX}label_overflows",
            "Exchanges counted under other because a label had reached its limit of values, "
            "or all labels together their limit of series (label=series).",
            ("label",),
        )
        self.internal_errors = store.counter(
            f"{PREFIX}internal_errors",
            "Faults of the sidecar that were kept from reaching a response, by where.",
            ("room",),
        )
        self.log_failures = store.counter(
            f"{PREFIX}log_failures",
            "Lines of the usage log (log=usage) and of the process's own log (log=process) that "
            "could not be written, and rotations that failed, by reason.",
            ("log", "reason"),
        )
        self.rewrites = store.counter(
            f"{PREFIX}rewrites",
            "Answers whose usage was to be rewritten (SIDECAR_REWRITE_USAGE), by what became of "
            "them: rewritten, or why they passed as they came.",
            ("result",),
        )
        self.team_file_reloads = store.counter(
            f"{PREFIX}team_file_reloads",
            "Readings of the key-to-team file by result; a failed one keeps the old map.",
            ("result",),
        )
        self.team_file_success = store.gauge(
            f"{PREFIX}team_file_last_success_timestamp_seconds",
            "When the key-to-team file was last read, in Unix time.",
        )
        self.identity_lookups = store.counter(
            f"{PREFIX}identity_lookups",
            "Look-ups of a key's owner by source (key_info and team_list at LiteLLM, file) and "
            "result; backing_off and queue_full are exchanges for which LiteLLM was not asked.",
            ("source", "result"),
        )
        build = store.gauge(
            f"{PREFIX}build_info",
            "Always 1; the version of the sidecar and of its interpreter.",
            ("version", "python"),
        )
        build.child(__version__, platform.python_version()).add(1)
        self.upstream_info = store.gauge(
            f"{PREFIX}upstream_info",
            "1 for the LiteLLM version that answered last, as its x-litellm-version says; 0 for "
            "those before it.",
            ("version",),
        )
        self.compat_conflict = store.gauge(
            f"{PREFIX}compat_conflict",
            "1 where that LiteLLM exports the names of this choice of SIDECAR_COMPAT itself, so "
            "that one of the two has to be dropped.",
            ("names",),
        )
        self.compat = Compat(store, compat)
        """LiteLLM's own names, as far as they are switched on."""


class Costs:
    """The families of money, and of where prices come from."""

    def __init__(self, store: Store, labels: tuple[str, ...]) -> None:
        self.cost: Family[Amount] = store.amount(
            f"{PREFIX}cost_usd",
            "Cost of 2xx answers in USD: the tokens of their usage, and web searches "
            "(server_tool), at the prices of the first source that knows each rate.",
            (*labels, "kind"),
        )
        self.savings = store.amount(
            f"{PREFIX}cache_read_savings_usd",
            "What tokens read from the prompt cache would have cost more as ordinary input, "
            "in USD.",
            labels,
        )
        self.premium = store.amount(
            f"{PREFIX}cache_write_premium_usd",
            "What tokens written to the prompt cache cost more than ordinary input, in USD, by "
            "how long they are kept.",
            (*labels, "ttl"),
        )
        self.unpriced = store.counter(
            f"{PREFIX}unpriced_responses",
            "2xx answers with usage that have no cost, because no source of prices knows the "
            "model or a rate that is needed, by reason.",
            ("model", "reason"),
        )
        self.refreshes = store.counter(
            f"{PREFIX}price_refreshes",
            "Readings of a source of prices by result; a failed one keeps the old prices.",
            ("source", "result"),
        )
        self.refreshed_at = store.gauge(
            f"{PREFIX}price_source_last_success_timestamp_seconds",
            "When a source of prices was last read, or the sidecar started if it never was, in "
            "Unix time.",
            ("source",),
        )


class Misses:
    """The families of what caching missed, and lost."""

    def __init__(self, store: Store, labels: tuple[str, ...], *, costs: bool) -> None:
        self.reasons = store.counter(
            f"{PREFIX}cache_misses",
            "2xx answers to requests that asked for caching and read nothing, by why, as far as "
            "this sidecar saw it: not_seen_here (another replica may have seen it), expired, "
            "changed_system, changed_tools, changed_messages (against the last one of the same "
            "key and model), other_deployment, too_short, unknown.",
            (*labels, "reason"),
        )
        self.never_read = store.counter(
            f"{PREFIX}cache_write_tokens_never_read",
            "Tokens written to the prompt cache whose time ran out without a read seen here, by "
            "how long they were kept.",
            (*labels, "ttl"),
        )
        self.never_read_premium = (
            store.amount(
                f"{PREFIX}cache_write_premium_never_read_usd",
                "What those tokens had cost more than ordinary input, in USD.",
                (*labels, "ttl"),
            )
            if costs
            else None
        )
        """None where money is not counted."""
        self.evicted = store.counter(
            f"{PREFIX}cache_prefixes_evicted",
            "Prefixes forgotten before their time because SIDECAR_MAX_CONVERSATIONS was reached: "
            "where it rises, misses are called not_seen_here or unknown that have another reason, "
            "and reads of what was written are overlooked.",
        )
