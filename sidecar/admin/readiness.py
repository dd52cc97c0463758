"""Whether the process should be sent requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

__all__ = ["Readiness"]


class Readiness:
    """Started, not draining, and LiteLLM within reach.

    Args:
        probe: asks LiteLLM; returns None if it answers, else why not, in words.
        clock: monotonic seconds.
    """

    CACHE_S = 2.0
    """How long an answer of the probe is believed, so that kubelets and load balancers that
    ask often do not all ask LiteLLM."""

    def __init__(
        self, probe: Callable[[], Awaitable[str | None]], clock: Callable[[], float]
    ) -> None:
        self._probe = probe
        self._clock = clock
        self._asked_at: float | None = None
        self._answer: str | None = None
        self._lock = asyncio.Lock()
        self.started = False
        self.draining = False

    async def reason(self) -> str | None:
        """Say why not; None if ready."""
        if not self.started:
            return "starting"
        if self.draining:
            return "draining"
        async with self._lock:
            now = self._clock()
            if self._asked_at is None or now - self._asked_at >= self.CACHE_S:
                self._answer = await self._probe()
                self._asked_at = self._clock()
        return self._answer
