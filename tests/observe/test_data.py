"""The cases of `tests/data`: bodies as they stand on the wire, and what is counted of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sidecar.exchange import Dialect, End, Observation, RequestFacts, Status
from sidecar.observe.tap import outcome_of
from tests.support.bodies import JSON, MESSAGES, SSE, cuts, observe

DATA = Path(__file__).parents[1] / "data"
_HEADERS = {".json": JSON, ".sse": SSE, ".eventstream": MESSAGES}
CASES = sorted(
    path for path in DATA.glob("*/*") if path.suffix in _HEADERS and ".expected" not in path.name
)


def read(path: Path, chunks: bytes | list[bytes], end: End = End.COMPLETE) -> Observation:
    """Read a case's body, in the dialect that its folder names."""
    return observe(chunks, _HEADERS[path.suffix], end=end, dialect=Dialect(path.parent.name))


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_case(path: Path) -> None:
    """The body gives what is expected: whole, cut in two at each place, and cut at random."""
    body = path.read_bytes()
    expected = json.loads(path.with_name(f"{path.stem}.expected.json").read_text())
    seen = read(path, body)
    error = seen.status is Status.ERROR
    assert expected == {
        "status": seen.status,
        "outcome": None if error else outcome_of(seen, RequestFacts()),
        "usage": seen.usage._asdict(),
        "terms": {name: said for name, said in seen.terms._asdict().items() if said is not None},
    }
    for at in range(len(body)):
        assert read(path, [body[:at], body[at:]]) == seen
    for chunks in cuts(body, seed=len(body)):
        assert read(path, chunks) == seen


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_beginning_of_a_case(path: Path) -> None:
    """Wherever a sound body is cut off, what is left of it is `partial`, if it is not all."""
    body = path.read_bytes()
    seen = read(path, body)
    if seen.status is Status.COMPLETE:
        for at in range(len(body)):
            cut = read(path, body[:at], End.UPSTREAM_CUT)
            assert cut.status is Status.PARTIAL or cut == seen, body[:at][-40:]


def test_every_expectation_has_its_body() -> None:
    """No case is left out because of how its file is named."""
    expectations = {path.name for path in DATA.glob("*/*.expected.json")}
    assert expectations == {f"{path.stem}.expected.json" for path in CASES}
    assert {path.parent.name for path in CASES} == set(Dialect)
