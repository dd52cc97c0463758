"""Who is paying: from a request's key to a team's name.

A key is only ever held as its sha256, the way LiteLLM itself stores it (LiteLLM 1.83.10
`proxy/_types.py`, `hash_token`). The sources of a name, in order: the header that a LiteLLM
callback sets on the answer, then a file that maps key hashes to teams.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote

import yaml

from sidecar.errors import ConfigError
from sidecar.exchange import RawHeaders, header

__all__ = ["NO_TEAM", "UNKNOWN", "TeamFile", "key_hash", "named_in"]

NO_TEAM = "None"
"""The team of a key without one; LiteLLM's own spelling."""
UNKNOWN = "unknown"
"""A name that could not be resolved."""

_KEY_HEADERS = (
    # LiteLLM's order: 1.83.10 proxy/auth/user_api_key_auth.py, get_api_key.
    b"x-litellm-api-key",
    b"authorization",
    b"api-key",
    b"x-api-key",
    b"x-goog-api-key",
    b"ocp-apim-subscription-key",
)
_SCHEME = re.compile(rb"(?:bearer|basic)\s+", re.IGNORECASE)
_HASH = re.compile(r"[0-9a-f]{64}")


def key_hash(headers: RawHeaders) -> str | None:
    """Hash the key that LiteLLM would take from these headers; None if there is none."""
    for name in _KEY_HEADERS:
        value = header(headers, name)
        if value:
            key = _SCHEME.sub(b"", value.strip(), count=1)
            return hashlib.sha256(key).hexdigest()
    return None


def named_in(headers: RawHeaders, name: bytes) -> str | None:
    """Read a name from a header that the LiteLLM callback sets, percent-decoded as UTF-8."""
    value = header(headers, name)
    if not value:
        return None
    return unquote(value.decode("latin-1"), errors="replace").strip() or None


class TeamFile:
    """A JSON or YAML file that maps key hashes to team aliases.

    One mapping at its top: sha256 of the key in lower-case hex, to the alias; null for a key
    without a team.

    Raises:
        ConfigError: the file cannot be read, or is not such a map. What was read before stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._teams: Mapping[str, str] = {}
        self.load()

    def team_of(self, hashed: str) -> str | None:
        """Return the alias of a key; None if the file does not name it."""
        return self._teams.get(hashed)

    def changed(self) -> bool:
        """Whether the file is another one than at the last attempt to read it."""
        try:
            return self._stat() != self._stamp
        except OSError:
            return self._stamp is not None

    def load(self) -> int:
        """Read the file anew and return how many keys it names."""
        try:
            self._stamp = self._stat()
            text = self._path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            self._stamp = None
            raise ConfigError([f"{self._path}: cannot be read: {_reason(exc)}"]) from None
        try:
            # JSON is YAML, but for its tabs. This loader leaves every scalar a string: a hash
            # of digits, or a team called `no`, stays what it is.
            decoded = yaml.load(text.replace("\t", " "), Loader=yaml.BaseLoader)  # noqa: S506
        except yaml.YAMLError as exc:
            mark = getattr(exc, "problem_mark", None)
            where = f" line {mark.line + 1}" if mark is not None else ""
            raise ConfigError([f"{self._path}:{where} is neither JSON nor YAML"]) from None
        self._teams = _checked(decoded, self._path)
        return len(self._teams)

    def _stat(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _checked(decoded: object, path: Path) -> Mapping[str, str]:
    """Check the whole map and name every faulty entry, never its key in full."""
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
        elif not isinstance(team, str):
            faults.append(f"{path}: entry {number} ({hashed[:8]}…) has no string for its alias")
        else:
            teams[hashed] = NO_TEAM if team in ("", "~", "null") else team
    if faults:
        raise ConfigError(faults)
    return teams


def _reason(exc: Exception) -> str:
    return exc.strerror or str(exc) if isinstance(exc, OSError) else "it is not UTF-8"
