"""Keeps prices fresh: reads the operator's file when it changes, and asks LiteLLM on a schedule.

Nothing waits for it. What fails keeps the last good prices, is logged once until it works again,
and is tried again soon.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path

from sidecar.account.litellm import AskError, LiteLLM
from sidecar.account.metrics import Costs
from sidecar.account.price_file import PriceFile
from sidecar.account.price_litellm import CostMap, deployments_in
from sidecar.account.price_package import VERSION, load_package
from sidecar.account.pricing import Pricing
from sidecar.errors import ConfigError

__all__ = ["PriceKeeper"]

logger = logging.getLogger("sidecar.account")

_LOOK_S = 1.0
_FIRST_RETRY_S = 5.0
_LAST_RETRY_S = 300.0
_AT_START_S = 10.0
"""Longest wait for what has never been read: LiteLLM can start after the sidecar, and what is
answered until its prices are there has none."""
_SOON_S = 60.0
"""How soon a deployment that is not known yet may have LiteLLM asked again."""
_CALENDAR_S = 3600.0
_STALE_AFTER = 3
"""Refreshes that may fail before a source is called stale."""
_TIMEOUT_S = 30.0
"""Time for an answer. LiteLLM takes a second to write its cost map."""
_MAX_BYTES = 32 * 1024 * 1024
"""Longest answer that is taken. LiteLLM 1.100.5's cost map has 1.6 MB."""


class PriceKeeper:
    """The sources of prices, and the pricing that uses them.

    Args:
        costs: where readings are counted.
        sources: which are wanted, from `PRICE_SOURCES`.
        file: the operator's prices; None without.
        litellm: asks LiteLLM.
        has_key: whether it does so with a key.
        refresh_s: time between two askings.
        clock: Unix time in seconds.

    Raises:
        ConfigError: the file cannot be used.
    """

    def __init__(
        self,
        costs: Costs,
        sources: Sequence[str],
        *,
        file: Path | None,
        litellm: LiteLLM,
        has_key: bool,
        refresh_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._costs = costs
        self._litellm = litellm
        self._refresh_s = refresh_s
        self._clock = clock
        self._failing: set[str] = set()
        self._package = "package" in sources
        if self._package:
            load_package()
        self._file = PriceFile(file) if file is not None and "file" in sources else None
        self.pricing = Pricing(file=self._file, package=self._package, clock=clock)
        self._feeds = [
            _Feed(name, each, clock())
            for name, each in (("cost_map", self._ask_cost_map), ("model_info", self._ask_info))
            if name in sources and (name != "model_info" or has_key)
        ]
        for source in (*(["file"] if self._file else ()), *(feed.source for feed in self._feeds)):
            for result in ("success", "failure"):
                costs.refreshes.child(source, result)
        for feed in self._feeds:
            # Of what is never read, an alert on old prices has to hear, too.
            costs.refreshed_at.child(feed.source).value = feed.read_at
        if self._file is not None:
            self._succeeded("file")

    async def keep(self, contain: Callable[[Exception], None]) -> None:
        """Keep prices fresh, until cancelled.

        Args:
            contain: takes the faults that must not end it.
        """
        async with asyncio.TaskGroup() as tasks:
            if self._file is not None:
                tasks.create_task(self._watch(self._file, contain))
            for feed in self._feeds:
                tasks.create_task(self._ask(feed))
            if self._package:
                tasks.create_task(self._follow_the_calendar())

    async def refresh(self) -> None:
        """Ask LiteLLM once, now; for the command line."""
        for feed in self._feeds:
            await self._try(feed)

    def describe(self) -> Iterator[str]:
        """Say of each source in use what it gave."""
        if self._file is not None:
            yield f"file: {len(self._file.cards)} models in {self._file.path}"
        for feed in self._feeds:
            yield f"{feed.source}: {feed.state}"
        if self._package:
            yield f"package: genai-prices {VERSION}"

    async def _watch(self, file: PriceFile, contain: Callable[[Exception], None]) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if await asyncio.to_thread(file.changed):
                    models = await asyncio.to_thread(file.load)
                    self._succeeded("file")
                    logger.info("price_file_read", extra={"models": models})
            except ConfigError as error:
                self._costs.refreshes.child("file", "failure").value += 1
                logger.error(
                    "price_file_failed",
                    extra={"faults": error.faults, "kept": "the old prices"},
                )
            except Exception as exc:
                self._costs.refreshes.child("file", "failure").value += 1
                contain(exc)

    async def _follow_the_calendar(self) -> None:
        """Have the package asked anew: some of its prices hold from a day on."""
        while True:
            await asyncio.sleep(min(self._refresh_s, _CALENDAR_S))
            self.pricing.changed()

    async def _ask(self, feed: _Feed) -> None:
        """Ask LiteLLM for ever: on the schedule, and soon where it failed."""
        retry_s = _FIRST_RETRY_S
        while True:
            if await self._try(feed):
                retry_s = _FIRST_RETRY_S
                await self._pause(feed)
            else:
                await asyncio.sleep(min(retry_s, self._refresh_s))
                longest = _LAST_RETRY_S if feed.told or feed.refused else _AT_START_S
                retry_s = min(2 * retry_s, longest)

    async def _pause(self, feed: _Feed) -> None:
        """Wait for the next time; not as long where a deployment answers that is not known."""
        waited = 0.0
        while waited < self._refresh_s:
            step = min(_SOON_S, self._refresh_s - waited)
            await asyncio.sleep(step)
            waited += step
            if feed.source == "model_info" and self.pricing.missed_deployment:
                return

    async def _try(self, feed: _Feed) -> bool:
        try:
            found = await feed.ask()
        except (AskError, ValueError) as error:
            feed.refused = isinstance(error, AskError) and error.result == "refused"
            self._failed(feed, str(error))
            return False
        except Exception as exc:
            # The boundary: whatever goes wrong in here costs a refresh, and nothing else.
            self._failed(feed, type(exc).__name__)
            return False
        feed.read_at, feed.stale = self._clock(), False
        feed.state = f"{found} models"
        self._succeeded(feed.source)
        if feed.source in self._failing or not feed.told:
            self._failing.discard(feed.source)
            feed.told = True
            logger.info("prices_read", extra={"source": feed.source, "models": found})
        return True

    async def _ask_cost_map(self) -> int:
        body = await self._get("/public/litellm_model_cost_map")
        self.pricing.cost_map = cost_map = CostMap(body)
        return len(cost_map)

    async def _ask_info(self) -> int:
        found = deployments_in(await self._get("/v1/model/info"))
        self.pricing.take_deployments(found)
        return len(found)

    async def _get(self, path: str) -> bytes:
        body = await self._litellm.get(path, {}, timeout_s=_TIMEOUT_S, max_bytes=_MAX_BYTES)
        if body is None:
            raise ValueError(f"{path}: LiteLLM answers 404")
        return body

    def _succeeded(self, source: str) -> None:
        self.pricing.changed()
        self._costs.refreshes.child(source, "success").value += 1
        self._costs.refreshed_at.child(source).value = self._clock()

    def _failed(self, feed: _Feed, reason: str) -> None:
        self._costs.refreshes.child(feed.source, "failure").value += 1
        feed.state = f"failed: {reason}"
        if feed.source not in self._failing:
            self._failing.add(feed.source)
            logger.warning(
                "prices_failed",
                extra={"source": feed.source, "reason": reason, "kept": "the old prices"},
            )
        age = self._clock() - feed.read_at
        if age > _STALE_AFTER * self._refresh_s and not feed.stale:
            feed.stale = True
            logger.warning("prices_stale", extra={"source": feed.source, "age_s": round(age)})


class _Feed:
    """One thing that LiteLLM is asked for."""

    def __init__(
        self, source: str, ask: Callable[[], Coroutine[None, None, int]], began: float
    ) -> None:
        self.source = source
        self.ask = ask
        self.read_at = began
        """When it last answered, or the sidecar began, in Unix time."""
        self.stale = False
        self.told = False
        """Whether it was ever read, and the log says so."""
        self.refused = False
        """Whether LiteLLM did not take the key, the last time."""
        self.state = "not asked yet"
