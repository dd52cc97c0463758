"""Takes the pictures of the live page that the docs show: `make screenshots`.

The demo runs, and some more clients with it, for as long as the curves need to look like
curves; then a real Chromium opens the page. The pictures go to `docs/images`.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from playwright.sync_api import Page  # noqa: E402

from sidecar.demo.traffic import KEYS, MODELS  # noqa: E402
from tests.support.browser import chromium, opened  # noqa: E402
from tests.support.calls import body_for  # noqa: E402
from tests.support.process import said_until  # noqa: E402

IMAGES = ROOT / "docs" / "images"
SHOTS = {
    "page": ("light", 1280, (".top", ".charts")),
    "page-table": ("dark", 1280, (".by-name", ".pair")),
    "page-narrow": ("light", 400, (".top", "#chart-tokens")),
}
"""Of each picture the theme, the width, and the first and the last part that it shows."""
_MARGIN_PX = 13
_CLIENTS = 3
_MINUTES = 6.5
"""Longer than five, after which the first writes are lost: that is to be seen, too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, take the pictures, and end it; returns the exit code."""
    parser = argparse.ArgumentParser(description="Take the pictures of the live page.")
    parser.add_argument(
        "--minutes", type=float, default=_MINUTES, help="how long clients go on before"
    )
    minutes = parser.parse_args(arguments).minutes
    command = [sys.executable, "-u", "-m", "sidecar", "demo"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as demo:
        try:
            page_url, url = _addresses(demo)
            stop = threading.Event()
            for number in range(_CLIENTS):
                threading.Thread(target=_ask, args=(url, number, stop), daemon=True).start()
            time.sleep(minutes * 60)
            _take(page_url)
            stop.set()
        finally:
            demo.terminate()
            demo.communicate(timeout=10)
    return 0


def _addresses(demo: subprocess.Popen[str]) -> tuple[str, str]:
    """Read where the page is, and where clients connect."""
    said = said_until(demo, "Ctrl-C ends it.")
    page, data = re.search(r"page +(http\S+)", said), re.search(r"curl -s (http\S+)/v1/", said)
    assert page is not None, said
    assert data is not None, said
    return page[1], data[1]


def _ask(url: str, number: int, stop: threading.Event) -> None:
    """Make calls at a pace that changes, as people do."""
    chance = random.Random(number)  # noqa: S311 - no secret
    with httpx.Client(trust_env=False, timeout=20) as client:
        while not stop.wait(chance.expovariate(0.4 + 0.9 * (int(time.time() / 47 + number) % 3))):
            model, key = chance.choice(MODELS), chance.choice(KEYS)
            topic = f"{key.team} {chance.choices(range(40), [40 / (1 + at) for at in range(40)])}"
            ttl = "1h" if key is KEYS[1] else None if chance.random() < 0.1 else "5m"
            size = chance.randint(4500, 9000) if ttl == "5m" and chance.random() < 0.1 else 6000
            client.post(
                f"{url}/v1/messages",
                json=body_for(model, topic, tokens=size, ttl=ttl, stream=chance.random() < 0.5),
                headers={"x-api-key": key.secret, "anthropic-version": "2023-06-01"},
            )


def _take(url: str) -> None:
    with chromium() as browser:
        for name, (scheme, width, parts) in SHOTS.items():
            size = {"width": width, "height": 1100}
            with opened(browser, url, color_scheme=scheme, viewport=size) as tab:
                tab.page.locator("#chart-money canvas").wait_for()
                _settle(tab.page)
                first, last = (tab.page.locator(part).bounding_box() for part in parts)
                assert first is not None
                assert last is not None
                top = max(0, first["y"] - _MARGIN_PX)
                bottom = last["y"] + last["height"] + _MARGIN_PX
                clip: Any = {"x": 0, "y": top, "width": width, "height": bottom - top}
                tab.page.screenshot(path=IMAGES / f"{name}.png", full_page=True, clip=clip)


def _settle(page: Page) -> None:
    """Wait for the second round of figures: by then nothing moves any more."""
    with page.expect_response("**/api/v1/series*"):
        pass
    page.wait_for_timeout(600)


if __name__ == "__main__":
    sys.exit(main())
