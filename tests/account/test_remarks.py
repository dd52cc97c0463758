"""What answers say of themselves, counted in closed sets of words."""

from __future__ import annotations

from sidecar.account.remarks import RemarkCounts
from sidecar.account.store import Store, Value
from sidecar.exchange import Observation, Remarks, Status, Terms


def counted(*observations: Observation) -> dict[tuple[str, str], float]:
    """Count these answers; returns what is not zero, by name and word."""
    store = Store(lambda: 0.0)
    counts = RemarkCounts(store, "x_")
    for observation in observations:
        counts.add(observation)
    return {
        (family.name, values[0]): value.value
        for family in store.families
        for values, value in family.children.items()
        if isinstance(value, Value) and value.value
    }


def said(remarks: Remarks, **terms: str | int) -> Observation:
    """Make an answer that said this."""
    return Observation(Status.COMPLETE, terms=Terms(**terms), remarks=remarks)  # type: ignore[arg-type]


def test_each_word_has_its_series() -> None:
    """Reasons, tiers, tools and iterations are counted apart."""
    first = Remarks("end_turn", "tools_changed", 2, ("compaction", "message", "message"))
    assert counted(
        said(first, service_tier="priority", web_search_requests=3),
        said(Remarks("stop"), service_tier="default"),
    ) == {
        ("x_stop_reasons", "end_turn"): 1,
        ("x_stop_reasons", "stop"): 1,
        ("x_provider_cache_miss_reasons", "tools_changed"): 1,
        ("x_server_tool_uses", "web_fetch"): 2,
        ("x_server_tool_uses", "web_search"): 3,
        ("x_service_tiers", "priority"): 1,
        ("x_service_tiers", "default"): 1,
        ("x_iterations", "compaction"): 1,
        ("x_iterations", "message"): 2,
    }


def test_unknown_words_make_no_series() -> None:
    """A provider may say anything: it is counted as `other`."""
    odd = Remarks("a", "b", None, ("c",))
    assert counted(said(odd, service_tier="d")) == {
        (name, "other"): 1
        for name in (
            "x_stop_reasons",
            "x_provider_cache_miss_reasons",
            "x_service_tiers",
            "x_iterations",
        )
    }


def test_silence_counts_nothing() -> None:
    """An answer that says nothing of itself leaves all series at zero."""
    assert counted(Observation(Status.COMPLETE)) == {}
