"""A small file that an operator edits while the sidecar runs."""

from __future__ import annotations

from pathlib import Path

from sidecar.errors import ConfigError

__all__ = ["WatchedFile"]

_MAX_BYTES = 16 * 1024 * 1024
"""Longest file that is read: some 150,000 keys, for one. A ConfigMap holds 1 MiB."""


class WatchedFile:
    """Reads a file, and tells when it has become another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None

    def changed(self) -> bool:
        """Whether the file is another one than at the last attempt to read it."""
        try:
            return self._stat() != self._stamp
        except OSError:
            return self._stamp is not None

    def read(self) -> str:
        """Read the file.

        Raises:
            ConfigError: it cannot be read, is not UTF-8, or too large.
        """
        try:
            self._stamp = self._stat()
            with self.path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
            text = raw.decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as exc:
            self._stamp = None
            reason = exc.strerror or str(exc) if isinstance(exc, OSError) else "it is not UTF-8"
            raise ConfigError([f"{self.path}: cannot be read: {reason}"]) from None
        if len(raw) > _MAX_BYTES:
            raise ConfigError([f"{self.path}: is larger than {_MAX_BYTES} bytes"])
        return text

    def _stat(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino
