"""File descriptors: how many the process may have, and who may have the last of them.

A request takes two, one to its client and one to LiteLLM. When none is left nothing can be
accepted: neither a client, who would be hung up on without a word, nor a scrape or a probe, for
want of which the process would be restarted. So clients are turned away while there still are
some to answer them with, and what is left after that is for LiteLLM, and at last for the admin
port alone.

A new descriptor has the lowest number that is free (POSIX), so its number tells whether it is
one of the last.
"""

from __future__ import annotations

import logging
import os
import resource
import sys

__all__ = ["Descriptors", "raise_limit"]

logger = logging.getLogger("sidecar")

_ADVICE = (
    "raise the limit of open files (ulimit -n; LimitNOFILE= of systemd; --ulimit nofile= of "
    "Docker; the container runtime's of Kubernetes)"
)


def raise_limit() -> None:
    """Raise the soft limit to the hard one, as far as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS and containers may have a lower one of their own
        logger.debug("file_descriptor_limit_not_raised", extra={"hard": hard})


class Descriptors:
    """The limit, and how it is shared out.

    Args:
        limit: how many there may be; that of the process if not given.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is None:
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.limit = sys.maxsize if limit == resource.RLIM_INFINITY else limit
        self.reserved = max(32, min(512, self.limit // 8))
        """How many no client gets; a quarter of them is for the admin port alone."""
        self._warned = False

    def admits(self, number: int) -> bool:
        """Whether a client may have the descriptor of this number."""
        return number < self.limit - self.reserved or self._short()

    def has_room(self, count: int = 1) -> bool:
        """Whether there is one for the last of so many connections to LiteLLM."""
        try:
            number = os.open(os.devnull, os.O_RDONLY)
        except OSError:
            return self._short()
        os.close(number)
        return number + count <= self.limit - self.reserved // 4 or self._short()

    def check(self, requests: int | None, connections: int | None) -> None:
        """Warn if the limit is too low for those of the settings; None is no limit."""
        if requests is None and connections is None:
            return
        if connections is None or requests is None:
            needed = 2 * (requests or connections or 0)
        else:
            needed = connections + min(requests, connections)
        needed += self.reserved
        if self.limit < needed:
            logger.warning(
                "file_descriptor_limit_is_low",
                extra={
                    "limit": self.limit,
                    "needed": needed,
                    "detail": f"{_ADVICE}, or lower SIDECAR_MAX_CONCURRENT_REQUESTS",
                },
            )

    def _short(self) -> bool:
        """Say once that there are none left; returns that there are none."""
        if not self._warned:
            self._warned = True
            logger.error(
                "file_descriptors_ran_out",
                extra={
                    "limit": self.limit,
                    "detail": "connections are refused until others end; "
                    f"{_ADVICE}, or set SIDECAR_MAX_CONNECTIONS and "
                    "SIDECAR_MAX_CONCURRENT_REQUESTS lower",
                },
            )
        return False
