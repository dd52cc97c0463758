"""The cases of `tests/data`: bodies as they stand on the wire, and what is counted of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidecar.exchange import End, RequestFacts, Status
from sidecar.observe.tap import outcome_of
from tests.support.bodies import JSON, SSE, cuts, observe

DATA = Path(__file__).parents[1] / "data"
CASES = sorted(
    path
    for path in DATA.glob("*/*")
    if path.suffix in (".json", ".sse") and ".expected" not in path.name
)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_case(path: Path) -> None:
    """The body gives what is expected: whole, cut in two at each place, and cut at random."""
    body, headers = path.read_bytes(), SSE if path.suffix == ".sse" else JSON
    expected = json.loads(path.with_name(f"{path.stem}.expected.json").read_text())
    seen = observe(body, headers)
    error = seen.status is Status.ERROR
    assert expected == {
        "status": seen.status,
        "outcome": None if error else outcome_of(seen, RequestFacts()),
        "usage": seen.usage._asdict(),
        "terms": {name: said for name, said in seen.terms._asdict().items() if said is not None},
    }
    for at in range(len(body)):
        assert observe([body[:at], body[at:]], headers) == seen
    for chunks in cuts(body, seed=len(body)):
        assert observe(chunks, headers) == seen


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_beginning_of_a_case(path: Path) -> None:
    """Wherever a sound body is cut off, what is left of it is `partial`, if it is not all."""
    body, headers = path.read_bytes(), SSE if path.suffix == ".sse" else JSON
    seen = observe(body, headers)
    if seen.status is Status.COMPLETE:
        for at in range(len(body)):
            cut = observe(body[:at], headers, end=End.UPSTREAM_CUT)
            assert cut.status is Status.PARTIAL or cut == seen, body[:at][-40:]


def test_every_expectation_has_its_body() -> None:
    """No case is left out because of how its file is named."""
    expectations = {path.name for path in DATA.glob("*/*.expected.json")}
    assert expectations == {f"{path.stem}.expected.json" for path in CASES}
    assert len(CASES) > 10
