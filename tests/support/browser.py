"""A real Chromium, driven by Playwright, that notes what goes wrong in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, sync_playwright

from tests.support.requirements import require

__all__ = ["Tab", "chromium", "opened"]

_TIMEOUT_MS = 10_000


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser; skips, or fails under REQUIRE_ALL=1, where there is none."""
    path = require(shutil.which("chromium") or shutil.which("chromium-browser"), "Chromium")
    with sync_playwright() as playwright:
        # Without its sandbox, which it refuses to set up for root.
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@dataclass(frozen=True, slots=True)
class Tab:
    """A page, and what was seen of it."""

    page: Page
    errors: list[str] = field(default_factory=list)
    """Errors and warnings of the console, and exceptions."""
    urls: list[str] = field(default_factory=list)
    """All that it asked for."""

    def violations(self, *rules: str) -> list[str]:
        """What axe finds that is serious or worse, with the places; by all rules, or by some."""
        options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
        found = Axe().run(self.page, options=options).response["violations"]
        return [
            f"{one['id']}: {node['html'][:200]} {node['failureSummary']}"
            for one in found
            if one["impact"] in ("serious", "critical")
            for node in one["nodes"]
        ]

    def overflow_px(self) -> int:
        """By how much the page is wider than the window."""
        script = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        return int(self.page.evaluate(script))


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Tab]:
    """Open a page in a profile of its own."""
    context = browser.new_context(**options)
    context.set_default_timeout(_TIMEOUT_MS)
    tab = Tab(context.new_page())
    tab.page.on(
        "console",
        lambda said: tab.errors.append(said.text) if said.type in ("error", "warning") else None,
    )
    tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
    context.on("request", lambda request: tab.urls.append(request.url))
    try:
        tab.page.goto(url)
        yield tab
    finally:
        context.close()
