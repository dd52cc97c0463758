"""Who is paying: from a request's key to a team's name.

A key is only ever held as its sha256, the way LiteLLM itself stores it (LiteLLM 1.83.10
`proxy/_types.py`, `hash_token`). The sources of a name, in order: the header that a LiteLLM
callback sets on the answer, then a file that maps key hashes to teams.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote_to_bytes

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
# Bedrock clients sign with the key as their access key; LangChain writes `Bearer` before it.
_AWS_SIGNATURE = re.compile(rb"AWS4-HMAC-SHA256\b.*?Credential=(?:Bearer\s+)?([^/\s,]+)")
_HASH = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 16 * 1024 * 1024
"""Longest file that is read: some 150,000 keys. A ConfigMap holds 1 MiB."""
_MAX_FAULTS = 20
"""Faulty entries that are named."""


def key_hash(headers: RawHeaders) -> str | None:
    """Hash the key that LiteLLM would take from these headers; None if there is none."""
    for name in _KEY_HEADERS:
        value = header(headers, name)
        if value:
            signed = _AWS_SIGNATURE.match(value)
            key = signed[1] if signed else _SCHEME.sub(b"", value.strip(), count=1)
            return hashlib.sha256(key).hexdigest()
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
            with self._path.open("rb") as file:
                raw = file.read(_MAX_FILE_BYTES + 1)
            text = raw.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as exc:
            self._stamp = None
            raise ConfigError([f"{self._path}: cannot be read: {_reason(exc)}"]) from None
        if len(raw) > _MAX_FILE_BYTES:
            raise ConfigError([f"{self._path}: is larger than {_MAX_FILE_BYTES} bytes"])
        self._teams = _checked(_decoded(text, self._path), self._path)
        return len(self._teams)

    def _stat(self) -> tuple[int, int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _decoded(text: str, path: Path) -> object:
    try:
        # For itself and not as YAML, which nearly holds it: not its escaped emoji, nor its tabs.
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        # This loader leaves every scalar a string: a hash of digits, or a team called `no`,
        # stays what it is.
        return yaml.load(text, Loader=yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError) as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise ConfigError([f"{path}:{where} is neither JSON nor YAML"]) from None


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


def _reason(exc: Exception) -> str:
    return exc.strerror or str(exc) if isinstance(exc, OSError) else "it is not UTF-8"
