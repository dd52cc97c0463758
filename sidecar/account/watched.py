"""A small file that an operator edits while the sidecar runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from sidecar.errors import ConfigError

__all__ = ["WatchedFile", "parsed"]

_Parsed = TypeVar("_Parsed")

_MAX_BYTES = 16 * 1024 * 1024
"""Longest file that is read: some 150,000 keys, for one. A ConfigMap holds 1 MiB."""


class WatchedFile:
    """Reads a file, and tells when it has become another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._unreadable = False
        """Whether the last attempt found a file, and could not read it."""

    def changed(self) -> bool:
        """Whether the file is another one than at the last attempt to read it, or can be read
        where it could not."""
        try:
            stamp = self._stat()
        except OSError:
            return self._stamp is not None
        if stamp != self._stamp:
            return True
        return self._unreadable and self._opens()

    def read(self) -> str:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, is not UTF-8, or too large.
        """
        self._stamp, self._unreadable = None, False
        try:
            self._stamp = self._stat()
            with self.path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ConfigError([f"{self.path}: cannot be read: it is not UTF-8"]) from None
        except OSError as exc:
            self._unreadable = self._stamp is not None
            reason = exc.strerror or str(exc)
            raise ConfigError([f"{self.path}: cannot be read: {reason}"]) from None
        if len(raw) > _MAX_BYTES:
            raise ConfigError([f"{self.path}: is larger than {_MAX_BYTES} bytes"])
        return text

    def _opens(self) -> bool:
        try:
            with self.path.open("rb") as file:
                file.read(1)
        except OSError:
            return False
        return True

    def _stat(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino


def parsed(text: str, path: Path, take: Callable[[yaml.BaseLoader], _Parsed]) -> _Parsed:
    """Parse YAML, every scalar of which stays a string: a hash of digits, or a team called `no`.

    Args:
        take: what is wanted of it, its nodes or its data.

    Raises:
        ConfigError: it is no YAML; with the line where that is known.
    """
    line = None
    try:
        loader = yaml.BaseLoader(text)
        try:
            return take(loader)
        except (ValueError, OverflowError):
            # So ends an escape that is no character, such as `\\UFFFFFFFF`.
            line = loader.line + 1
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        line = exc.problem_mark.line + 1 if exc.problem_mark is not None else None
    except (yaml.YAMLError, RecursionError):
        pass
    where = f" line {line}" if line is not None else ""
    raise ConfigError([f"{path}{where}: is neither JSON nor YAML"])
