"""The commands that say where prices come from: prices, check."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sidecar.account.price_package import VERSION
from tests.account.test_pricing import HOUR, MAP, SONNET, deployment
from tests.support.process import free_port
from tests.test_cli import run

KEY = "sk-viewer"
ANSWERS = {
    "/health/liveliness": {},
    "/public/litellm_model_cost_map": MAP,
    "/v1/model/info": {"data": [deployment("anthropic/claude-own-1-20250101", SONNET | HOUR)]},
}


class _LiteLLM(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        answer = ANSWERS.get(self.path, {})
        refused = self.path == "/v1/model/info" and (
            self.headers.get("authorization") != f"Bearer {KEY}"
        )
        body = json.dumps(answer).encode()
        self.send_response(401 if refused else 200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def litellm() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _LiteLLM) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_prices_names_the_source_of_each(tmp_path: Path) -> None:
    """What a deployment would cost, rate by rate, short and long prompts; and what has no price."""
    path = tmp_path / "prices.yaml"
    path.write_text("alias: {output: 14.5}\n")
    with litellm() as url:
        settings = {"SIDECAR_UPSTREAM": url, "SIDECAR_PRICE_FILE": str(path)}
        done = run("prices", "alias", "other", SIDECAR_LITELLM_KEY=KEY, **settings)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"file: 1 models in {path}",
        "cost_map: 7 models",
        "model_info: 1 models",
        f"package: genai-prices {VERSION}",
        "alias: deployment d1, anthropic/claude-own-1-20250101",
        "  input              3 USD            model_info: anthropic/claude-own-1-20250101",
        "  cache_read         0.3 USD          model_info: anthropic/claude-own-1-20250101",
        "  cache_write_5m     3.75 USD         model_info: anthropic/claude-own-1-20250101",
        "  cache_write_1h     6 USD            model_info: anthropic/claude-own-1-20250101",
        "  output             14.5 USD         file: alias",
        "  web_search_per_1k  10 USD           model_info: anthropic/claude-own-1-20250101",
        "  prompts of more than 200000 tokens:",
        "  input              6 USD",
        "  cache_read         0.6 USD",
        "  cache_write_5m     7.5 USD",
        "  cache_write_1h     not known",
        "  output             14.5 USD",
        "other: no deployment of this name is known",
        "  not priced: unknown_model",
    ]


def test_prices_without_litellm() -> None:
    """What cannot be asked is said; the other sources are used."""
    nobody = f"http://127.0.0.1:{free_port()}"
    done = run("prices", "--tier", "batch", "claude-sonnet-4-5", SIDECAR_UPSTREAM=nobody)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "cost_map: failed: /public/litellm_model_cost_map: ConnectError"
    assert "  cache_write_1h     3 USD            package: anthropic/claude-sonnet-4-5" in lines
    done = run("prices", "m", SIDECAR_PRICE_SOURCES="")
    assert (done.returncode, "SIDECAR_PRICE_SOURCES is empty" in done.stderr) == (1, True)
    assert run("prices").returncode == 2


def test_check_says_where_prices_come_from(tmp_path: Path) -> None:
    """Each source in use; and a broken price file with its line."""
    with litellm() as url:
        done = run("check", SIDECAR_UPSTREAM=url, SIDECAR_LITELLM_KEY="sk-wrong")
        assert done.returncode == 0
        assert [line for line in done.stdout.splitlines() if line.startswith("prices from ")] == [
            "prices from cost_map: 7 models",
            "prices from model_info: failed: /v1/model/info: LiteLLM refuses the key (401)",
            f"prices from package: genai-prices {VERSION}",
        ]
        assert (
            "prices from" not in run("check", SIDECAR_UPSTREAM=url, SIDECAR_PRICE_SOURCES="").stdout
        )
    path = tmp_path / "prices.yaml"
    path.write_text("m:\n  input: 3\n  output: dear\n")
    for command in ("check", "serve"):
        broken = run(command, SIDECAR_PRICE_FILE=str(path))
        assert broken.returncode == 2
        assert f"{path} line 3: 'dear' is not a price" in broken.stderr
