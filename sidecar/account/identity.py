"""Who is paying: from a request's key to a team's name.

A key is only ever held as its sha256, the way LiteLLM itself stores it (LiteLLM 1.83.10
`proxy/_types.py`, `hash_token`). The sources of a name, in order: the header that a LiteLLM
callback sets on the answer, LiteLLM's own word where it can be asked, a file that maps key
hashes to teams. `lookups` does the asking.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote_to_bytes

from sidecar.account.watched import WatchedFile, parsed
from sidecar.errors import ConfigError
from sidecar.exchange import RawHeaders, Route, first_values, header

__all__ = [
    "NO_TEAM",
    "UNKNOWN",
    "Identities",
    "KeyReader",
    "Owner",
    "Resolver",
    "TeamFile",
    "named_in",
]

NO_TEAM = "None"
"""The team of a key without one; LiteLLM's own spelling."""
UNKNOWN = "unknown"
"""A name that could not be resolved."""

_KEY_HEADERS: tuple[bytes, ...] = (
    # LiteLLM's order: 1.83.10 and 1.100.5 proxy/auth/user_api_key_auth.py, get_api_key.
    b"x-litellm-api-key",
    b"authorization",
    b"api-key",
    b"x-api-key",
    b"x-goog-api-key",
    b"ocp-apim-subscription-key",
)
_PASS_THROUGH_HEADER = b"litellm_user_api_key"
"""Goes before all others on the pass-through routes: there, in
check_api_key_for_custom_headers_or_pass_through_endpoints."""
_PASS_THROUGH_ROUTES = frozenset(
    {
        Route.ANTHROPIC_MESSAGES,
        Route.DEPLOYMENTS_CHAT,
        Route.DEPLOYMENTS_COMPLETIONS,
        Route.OPENAI_ENDPOINT,
        Route.AZURE_ENDPOINT,
        Route.AZURE_AI_ENDPOINT,
        Route.BEDROCK_ENDPOINT,
        Route.VERTEX_ENDPOINT,
    }
)
_SCHEME = re.compile(rb"(?:bearer|basic)\s+", re.IGNORECASE)
# Bedrock clients sign with the key as their access key; LangChain writes `Bearer` before it.
_AWS_SIGNATURE = re.compile(rb"AWS4-HMAC-SHA256\b.*?Credential=(?:Bearer\s+)?([^/\s,]+)")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_FAULTS = 20
"""Faulty entries that are named."""


class Owner(NamedTuple):
    """To whom a key belongs; None where that is not known."""

    team: str | None = None
    """Alias of the team; `NO_TEAM` for a key without one."""
    key_alias: str | None = None
    """Alias of the key; `NO_TEAM` for a key without one."""


class KeyReader:
    """Finds the key that LiteLLM takes from a request, and gives out nothing but hashes of it.

    Args:
        custom_header: LiteLLM's `litellm_key_header_name`, if that is set: it alone is looked at.
    """

    def __init__(self, custom_header: str | None = None) -> None:
        self._names = _KEY_HEADERS
        if custom_header is not None:
            self._names = (custom_header.lower().encode(),)
        self._pass_through_names = (_PASS_THROUGH_HEADER, *self._names)

    def hash_of(self, route: Route, headers: RawHeaders) -> str | None:
        """Hash the key that LiteLLM would take from these headers; None if there is none."""
        key = self._key_of(route, headers)
        return None if key is None else hashlib.sha256(key).hexdigest()

    def number_of(self, route: Route, headers: RawHeaders) -> int:
        """Give the key a number that is good within this process, which takes less time."""
        return hash(self._key_of(route, headers))

    def _key_of(self, route: Route, headers: RawHeaders) -> bytes | None:
        names = self._pass_through_names if route in _PASS_THROUGH_ROUTES else self._names
        values = first_values(headers)
        for name in names:
            value = values.get(name)
            if value:
                key = value.strip()
                if b" " in key:  # a key has none: a scheme stands before it, or a signature about
                    signed = _AWS_SIGNATURE.match(key)
                    key = signed[1] if signed else _SCHEME.sub(b"", key, count=1)
                return key
        return None


def named_in(headers: RawHeaders, name: bytes) -> str | None:
    """Read a name from a header that the LiteLLM callback sets: UTF-8, percent-encoded or not."""
    raw = header(headers, name)
    return _unescaped(raw) if raw else None


@lru_cache(maxsize=1024)
def _unescaped(escaped: bytes) -> str | None:
    raw = unquote_to_bytes(escaped)
    try:
        value = raw.decode()
    except UnicodeDecodeError:
        value = raw.decode("latin-1")
    return value.strip() or None


class Resolver(Protocol):
    """Knows to whom keys belong, or finds it out."""

    def resolve(self, hashed: str, settle: Callable[[Owner], None]) -> Owner | None:
        """Say to whom a key belongs; None if `settle` will be called with the answer, once."""

    def known(self, hashed: str) -> Owner:
        """Say to whom a key belongs, as far as that is known without asking anybody."""


class Identities:
    """To whom keys belong: what LiteLLM says where it can be asked, else what the file says.

    A file that has grown old does not go before LiteLLM: it is looked into for keys that LiteLLM
    does not know, or cannot be asked for.

    Args:
        lookups: asks LiteLLM; None where there is no key to ask it with.
        file: None where there is none.
        count: takes the source and the result of each look into the file.
    """

    def __init__(
        self,
        lookups: Resolver | None,
        file: TeamFile | None,
        count: Callable[[str, str], None],
    ) -> None:
        self._lookups = lookups
        self._file = file
        self._count = count

    def resolve(self, hashed: str, settle: Callable[[Owner], None]) -> Owner | None:
        """Say to whom a key belongs; None if `settle` will be called with the answer, once."""
        if self._lookups is None:
            return self._completed(hashed, Owner())
        if self._file is None:
            return self._lookups.resolve(hashed, settle)
        owner = self._lookups.resolve(hashed, lambda owner: settle(self._completed(hashed, owner)))
        return None if owner is None else self._completed(hashed, owner)

    def known(self, hashed: str) -> Owner:
        """Say to whom a key belongs, as far as that is known without asking anybody."""
        owner = Owner() if self._lookups is None else self._lookups.known(hashed)
        if owner.team is None and self._file is not None:
            return Owner(self._file.team_of(hashed), owner.key_alias)
        return owner

    def _completed(self, hashed: str, owner: Owner) -> Owner:
        if owner.team is not None or self._file is None:
            return owner
        team = self._file.team_of(hashed)
        self._count("file", "not_found" if team is None else "found")
        return Owner(team, owner.key_alias)


class TeamFile(WatchedFile):
    """A JSON or YAML file that maps key hashes to team aliases.

    One mapping at its top: sha256 of the key in lower-case hex, to the alias; null for a key
    without a team.

    Raises:
        ConfigError: the file cannot be read, or is not such a map. What was read before stays.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._teams: Mapping[str, str] = {}
        self.load()

    def team_of(self, hashed: str) -> str | None:
        """Return the alias of a key; None if the file does not name it."""
        return self._teams.get(hashed)

    def load(self) -> int:
        """Read the file anew and return how many keys it names."""
        self._teams = _checked(_decoded(self.read(), self.path), self.path)
        return len(self._teams)


def _decoded(text: str, path: Path) -> object:
    try:
        # For itself and not as YAML, which nearly holds it: not its escaped emoji, nor its tabs.
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    return parsed(text, path, lambda loader: loader.get_single_data())


def _checked(decoded: object, path: Path) -> Mapping[str, str]:
    """Check the whole map and name the faulty entries, never a key in full."""
    if not isinstance(decoded, dict):
        raise ConfigError([f"{path}: must be one mapping from key hashes to team aliases"])
    faults: list[str] = []
    teams: dict[str, str] = {}
    for number, (hashed, team) in enumerate(decoded.items(), start=1):
        if not isinstance(hashed, str) or not _HASH.fullmatch(hashed):
            faults.append(
                f"{path}: entry {number} is not named by a sha256 in lower-case hex "
                '(write `printf %s "$KEY" | sha256sum`, never the key itself)'
            )
        elif team is not None and not isinstance(team, str):
            faults.append(f"{path}: entry {number} ({hashed[:8]}…) has no string for its alias")
        else:
            alias = (team or "").strip()
            teams[hashed] = NO_TEAM if alias in ("", "~", "null") else alias
    if faults:
        more = len(faults) - _MAX_FAULTS
        if more > 0:
            faults[_MAX_FAULTS:] = [f"{path}: {more} more entries are faulty"]
        raise ConfigError(faults)
    return teams
