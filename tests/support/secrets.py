"""A watch on all that is logged and printed: no key of any test may be in it.

The keys of the tests begin with `sk-`, as LiteLLM's do. Where a test starts a sidecar, or runs a
command of it, what that wrote goes through `assert_no_keys`; in this process a handler on the
product's loggers, and pytest's capture, do the same for every test (`conftest.py`).
"""

from __future__ import annotations

import logging
import re

__all__ = ["LogWatch", "assert_no_keys", "keys_in"]

_KEY = re.compile(r"\bsk-\w[\w.-]*")  # and not `Task-3`, a name of asyncio's
_WATCHED = ("sidecar", "uvicorn", "asyncio", "httpx", "httpcore")


def keys_in(text: str | bytes) -> list[str]:
    """Find what is a key, or the beginning of one; a masked one is none."""
    return _KEY.findall(text if isinstance(text, str) else text.decode(errors="replace"))


def assert_no_keys(text: str | bytes, where: str) -> None:
    """Fail if there is a key.

    Args:
        where: what is being looked at, in words.
    """
    found = keys_in(text)
    assert not found, f"{where} has the keys {found[:3]}"


class LogWatch(logging.Handler):
    """Looks into every record of the product's loggers, at every level.

    It is stricter than the log: it also sees what a record only refers to, and has not said.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[str] = []
        """Keys since the last `take`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        parts = [f"{name}={value!r}" for name, value in vars(record).items() if name != "exc_info"]
        self.found += keys_in("\n".join([record.getMessage(), *parts]))

    def take(self) -> list[str]:
        """Give what was found, once."""
        found, self.found = self.found, []
        return found

    def install(self) -> None:
        """Begin to watch."""
        for name in _WATCHED:
            logging.getLogger(name).addHandler(self)
        # Its other users decide on their levels themselves.
        logging.getLogger("sidecar").setLevel(logging.DEBUG)
