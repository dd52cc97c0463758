"""Keys, their hashes, and the file that names their teams."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from sidecar.account.identity import Identities, KeyReader, Owner, TeamFile, named_in
from sidecar.errors import ConfigError
from sidecar.exchange import Route


def hashed(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([(b"authorization", b"Bearer sk-1")], b"sk-1"),
        ([(b"authorization", b"bearer  sk-1 ")], b"sk-1"),
        ([(b"authorization", b"sk-1")], b"sk-1"),
        ([(b"x-api-key", b"sk-2"), (b"authorization", b"Bearer sk-1")], b"sk-1"),
        ([(b"api-key", b"sk-3"), (b"x-api-key", b"sk-2")], b"sk-3"),
        ([(b"x-litellm-api-key", b"Bearer sk-4"), (b"authorization", b"Bearer sk-1")], b"sk-4"),
        ([(b"x-goog-api-key", b"sk-5")], b"sk-5"),
        ([(b"authorization", b"Basic sk-6")], b"sk-6"),
        (
            [
                (
                    b"authorization",
                    b"AWS4-HMAC-SHA256 Credential=Bearer sk-7/20261124/us, Signature=x",
                )
            ],
            b"sk-7",
        ),
        ([(b"authorization", b"AWS4-HMAC-SHA256 SignedHeaders=a, Credential=sk-8/d/r")], b"sk-8"),
    ],
)
def test_key_is_the_one_that_litellm_takes(headers: list[tuple[bytes, bytes]], key: bytes) -> None:
    """The headers are looked at in LiteLLM's order, and only the hash comes out."""
    assert KeyReader().hash_of(Route.MESSAGES, headers) == hashed(key)


def test_no_key() -> None:
    """Without a key there is no hash."""
    headers = [(b"x-other", b"1"), (b"authorization", b"")]
    assert KeyReader().hash_of(Route.MESSAGES, headers) is None


def test_every_header_has_its_place() -> None:
    """Each goes before all that come after it in LiteLLM's order, whatever the order of lines;
    the first of two lines is taken."""
    names = [
        *(b"x-litellm-api-key", b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key"),
        b"ocp-apim-subscription-key",
    ]
    reader = KeyReader()
    while names:
        headers = [(name, name) for name in reversed(names)] + [(names[0], b"second")]
        assert reader.hash_of(Route.MESSAGES, headers) == hashed(names[0])
        del names[0]


def test_custom_header_goes_before_all() -> None:
    """Where LiteLLM has a header of its own for keys, it looks at no other."""
    reader = KeyReader("X-Our-Key")
    others = [(b"authorization", b"Bearer sk-1"), (b"x-litellm-api-key", b"sk-2")]
    assert reader.hash_of(Route.MESSAGES, [*others, (b"x-our-key", b"Bearer sk-3")]) == hashed(
        b"sk-3"
    )
    assert reader.hash_of(Route.MESSAGES, others) is None


@pytest.mark.parametrize("reader", [KeyReader(), KeyReader("x-our-key")])
def test_pass_through_routes_have_a_header_of_their_own(reader: KeyReader) -> None:
    """On those LiteLLM takes `litellm_user_api_key` before all others, and nowhere else."""
    headers = [(b"x-litellm-api-key", b"sk-1"), (b"x-our-key", b"sk-1")]
    headers += [(b"litellm_user_api_key", b"sk-2")]
    assert reader.hash_of(Route.ANTHROPIC_MESSAGES, headers) == hashed(b"sk-2")
    assert reader.hash_of(Route.MESSAGES, headers) == hashed(b"sk-1")


def test_names_are_percent_decoded() -> None:
    """Names in headers are percent-encoded UTF-8, or the bare bytes of UTF-8 or latin-1."""
    assert named_in([(b"x", b"Team%20R%C3%A9d")], b"x") == "Team Réd"
    assert named_in([(b"x", b"100%")], b"x") == "100%"
    assert named_in([(b"x", "Réd".encode())], b"x") == "Réd"
    assert named_in([(b"x", "Réd".encode("latin-1"))], b"x") == "Réd"
    assert named_in([(b"x", b"R%E9d")], b"x") == "Réd"
    for nothing in (b"", b" ", b"%20"):
        assert named_in([(b"x", nothing)], b"x") is None
    assert named_in([], b"x") is None


A, B, C = hashed(b"a"), hashed(b"b"), "0" * 64


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(json.dumps({A: "red", B: None, C: "no"}, indent="\t"), id="JSON"),
        pytest.param(f"{A}: red\n{B}: null\n'{C}': no  # a comment\n", id="YAML"),
        pytest.param(f"{A}: red\n{B}:\n{C}: no\n", id="YAML, empty value, bare digits"),
        pytest.param(f"{A}: &team red\n{B}: ~\r\n{C}: no\n", id="YAML, anchor, CRLF"),
        pytest.param(f'\ufeff{{"{A}": " red\t", "{B}": "", "{C}": "no",}}', id="nearly JSON"),
    ],
)
def test_file_maps_hashes_to_teams(tmp_path: Path, text: str) -> None:
    """JSON and YAML say the same; null is a key without team."""
    path = tmp_path / "teams"
    path.write_text(text)
    teams = TeamFile(path)
    assert [teams.team_of(key) for key in (A, B, C, "x")] == ["red", "None", "no", None]


def test_json_is_read_as_json(tmp_path: Path) -> None:
    """An emoji that was escaped as JSON does is one: YAML knows no pairs of surrogates."""
    path = tmp_path / "teams.json"
    path.write_text(json.dumps({A: "Team \U0001f98a"}))
    assert TeamFile(path).team_of(A) == "Team \U0001f98a"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[1, 2]", "must be one mapping", id="list"),
        pytest.param("", "must be one mapping", id="empty"),
        pytest.param("a: [", "line 1", id="not YAML"),
        pytest.param("\n\na: b: c", "line 3", id="not YAML either"),
        pytest.param("sk-secret-1: red", "entry 1 is not named by a sha256", id="a key itself"),
        pytest.param(f"{A}: [x]", "entry 1", id="a list for an alias"),
        pytest.param("\x00", "neither JSON nor YAML", id="binary"),
        pytest.param(f'\n{A}: "\\UFFFFFFFF"', " line 2: ", id="beyond the integers of C"),
        pytest.param(f'\n{A}: "\\U00110000"', " line 2: ", id="beyond the characters"),
        pytest.param("%YAML 1." + "1" * 5000 + "\n--- a", " line 1: ", id="endless version"),
        pytest.param("[" * 100_000, "neither JSON nor YAML", id="deep"),
        pytest.param(f'{{"{A}": 5}}', "has no string for its alias", id="a number in JSON"),
        pytest.param(" " * (16 * 1024 * 1024 + 1), "is larger than", id="huge"),
    ],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """The fault names the file and the place, and never a key."""
    path = tmp_path / "teams.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        TeamFile(path)
    (fault,) = caught.value.faults
    assert said in fault
    assert str(path) in fault
    assert "secret" not in fault


def test_all_faults_are_named(tmp_path: Path) -> None:
    """Every faulty entry is named in one go."""
    path = tmp_path / "teams.json"
    path.write_text(json.dumps({"x": "1", A: "red", "y": "2", B: {}}))
    with pytest.raises(ConfigError) as caught:
        TeamFile(path)
    assert [fault.split(": ")[1][:7] for fault in caught.value.faults] == [
        "entry 1",
        "entry 3",
        "entry 4",
    ]


def test_faults_have_an_end(tmp_path: Path) -> None:
    """A long file of the wrong kind is told in some lines, not in thousands."""
    path = tmp_path / "teams.json"
    path.write_text(json.dumps({f"sk-{n}": "red" for n in range(5000)}))
    with pytest.raises(ConfigError) as caught:
        TeamFile(path)
    assert len(caught.value.faults) == 21
    assert caught.value.faults[-1].endswith("4980 more entries are faulty")


def test_file_behind_a_link_is_read_again(tmp_path: Path) -> None:
    """Kubernetes changes a ConfigMap by turning a link to a directory."""
    for name, team in {"one": "red", "two": "blue"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "teams.json").write_text(json.dumps({A: team}))
    (tmp_path / "data").symlink_to("one")
    (tmp_path / "teams.json").symlink_to("data/teams.json")
    teams = TeamFile(tmp_path / "teams.json")
    assert not teams.changed()
    (tmp_path / "data.new").symlink_to("two")
    (tmp_path / "data.new").replace(tmp_path / "data")
    assert teams.changed()
    teams.load()
    assert teams.team_of(A) == "blue"


def test_broken_file_keeps_the_old_map(tmp_path: Path) -> None:
    """A reload that fails changes nothing, and the next good file is read."""
    path = tmp_path / "teams.json"
    path.write_text(json.dumps({A: "red"}))
    teams = TeamFile(path)
    assert not teams.changed()
    path.write_text("{")
    assert teams.changed()
    with pytest.raises(ConfigError):
        teams.load()
    assert teams.team_of(A) == "red"
    assert not teams.changed(), "one failure is one report"
    path.unlink()
    assert teams.changed()
    with pytest.raises(ConfigError):
        teams.load()
    assert not teams.changed()
    path.write_bytes(b"\xff\xfe")
    assert teams.changed()
    with pytest.raises(ConfigError, match="not UTF-8"):
        teams.load()
    assert not teams.changed()
    path.write_text(json.dumps({A: "blue"}))
    os.utime(path, ns=(1, 1))
    assert teams.changed()
    assert teams.load() == 1
    assert teams.team_of(A) == "blue"


def never(*said: object) -> None:
    """Stand where nothing is to be called."""
    raise AssertionError(said)


class Said:
    """What LiteLLM says of keys, at once."""

    def __init__(self, owners: dict[str, Owner]) -> None:
        self.owners = owners

    def resolve(self, hashed: str, settle: Callable[[Owner], None]) -> Owner | None:
        return self.known(hashed)

    def known(self, hashed: str) -> Owner:
        return self.owners.get(hashed, Owner())


class SaidLater(Said):
    """The same, some time later."""

    def resolve(self, hashed: str, settle: Callable[[Owner], None]) -> Owner | None:
        asyncio.get_running_loop().call_soon(settle, self.owners.get(hashed, Owner()))
        return None


@pytest.mark.anyio
@pytest.mark.parametrize("source", [Said, SaidLater])
async def test_file_stands_behind_litellm(tmp_path: Path, source: type[Said]) -> None:
    """What LiteLLM says goes before the file, also that a key has no team; the file speaks
    where LiteLLM knows nothing."""
    path = tmp_path / "teams.json"
    path.write_text(json.dumps(dict.fromkeys((A, B, C), "old")))
    owners = {A: Owner("new", "alias"), B: Owner("None", "None"), C: Owner(None, "alias")}
    looks: list[tuple[str, str]] = []
    identities = Identities(
        source(owners), TeamFile(path), lambda source, result: looks.append((source, result))
    )
    found: dict[str, Owner] = {}
    for key in (A, B, C, "x"):
        owner = identities.resolve(key, partial(found.__setitem__, key))
        if owner is not None:
            found[key] = owner
    await asyncio.sleep(0.01)
    assert found == owners | {C: Owner("old", "alias"), "x": Owner()}
    assert {key: identities.known(key) for key in found} == found
    assert looks == [("file", "found"), ("file", "not_found")]


def test_file_alone(tmp_path: Path) -> None:
    """Without a key for LiteLLM the file alone is asked; without a file, nobody."""
    path = tmp_path / "teams.json"
    path.write_text(json.dumps({A: "red"}))
    looks: list[tuple[str, str]] = []
    identities = Identities(None, TeamFile(path), lambda *look: looks.append(look))
    assert identities.resolve(A, never) == Owner("red")
    assert identities.resolve(B, never) == Owner()
    assert identities.known(A) == Owner("red")
    assert looks == [("file", "found"), ("file", "not_found")]
    identities = Identities(Said({A: Owner("blue")}), None, never)
    assert identities.resolve(A, never) == Owner("blue")
    assert identities.resolve(B, never) == Owner()
