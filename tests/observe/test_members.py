"""Where the members of a JSON object stand in its text."""

from __future__ import annotations

import json
import random
import re

import pytest

from sidecar.observe.members import SHALLOW, find_member, members_of


@pytest.mark.parametrize(
    ("text", "members"),
    [
        pytest.param(b"{}", [], id="empty"),
        pytest.param(b'{"a":1}', [("a", b"1")], id="one"),
        pytest.param(
            b'{ "a" : -1.5e3 ,\n"b":[1,[2,[3,[{}]]]],"c" :{"d":"}"}, "e":null }',
            [("a", b"-1.5e3"), ("b", b"[1,[2,[3,[{}]]]]"), ("c", b'{"d":"}"}'), ("e", b"null")],
            id="all kinds",
        ),
        pytest.param(
            b'{"a":12,"a":"x","a":[1],"a":1}',
            [("a", b"12"), ("a", b'"x"'), ("a", b"[1]"), ("a", b"1")],
            id="repeats",
        ),
        pytest.param(
            b'{"\\u0061\\n":"\\"","b":"\\\\"}', [("a\n", b'"\\""'), ("b", b'"\\\\"')], id="escapes"
        ),
        pytest.param(
            b'{"a":"\\ud83d","b":NaN,"c":[NaN]}',
            [("a", b'"\\ud83d"'), ("b", b"NaN"), ("c", b"[NaN]")],
            id="what only Python takes",
        ),
    ],
)
def test_members_and_the_places_of_their_values(
    text: bytes, members: list[tuple[str, bytes]]
) -> None:
    """Names in their order, repeats too, with the very bytes of their values."""
    text = b"\xef\xbb\xbf  " + text + b"\r\n"
    found = [(key, text[begin:end]) for key, begin, end in members_of(text, 5, len(text))]
    assert found == members
    for name, _ in members:
        place = find_member(text, [name])
        assert place is not None
        assert text[slice(*place)] == [value for key, value in members if key == name][-1]


def test_paths_lead_through_objects() -> None:
    """A path leads to the last member of each name, and nowhere through anything else."""
    text = json.dumps({"a": {"b": {"c": [1]}}, "d": [{"b": 1}]}).encode()
    assert find_member(text, ["a", "b", "c"]) == (text.index(b"[1]"), text.index(b"[1]") + 3)
    for path in (["d", "b"], ["b"], ["a", "c"], ["a", "b", "c", "x"]):
        assert find_member(text, path) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"a"',
        b'{"a":',
        b'{"a":{',
        b'{"a":["',
        b'{"a":[}',
        b'{"a" 1}',
        b'{"\\x":1}',
        b"7",
    ],
    ids=repr,
)
def test_what_is_no_json_raises_nothing(text: bytes) -> None:
    """Of a text that no decoder takes nothing useful is said, and nothing is raised."""
    for name in ("a", "b"):
        place = find_member(text, [name])
        assert place is None or place[1] <= len(text)


def test_what_does_not_end_is_left() -> None:
    """Python before 3.11.5 took it in with possessive groups; without them all is the same."""
    assert SHALLOW.match(b':"a","inst')[0] == b':"a",'  # type: ignore[index]
    greedy = re.compile(SHALLOW.pattern.replace(b")*+", b")*"), re.DOTALL)
    dice = random.Random(7)
    for _ in range(20_000):
        text = bytes(dice.choices(b'"\\{}[]:,a', k=dice.randrange(40)))
        match, other = SHALLOW.match(text), greedy.match(text)
        assert match is not None
        assert other is not None
        assert match.end() == other.end(), text
