"""What a scraper is told of the format, over real sockets."""

from __future__ import annotations

from email.message import Message

import pytest

from tests.support.running import running
from tests.support.wire import ask

pytestmark = pytest.mark.anyio

NOWHERE = "http://127.0.0.1:9"
OPENMETRICS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
TEXT = "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=0.0.4;q=0.4"


@pytest.mark.parametrize(
    ("accept", "kind", "version"),
    [
        ("", "text/plain", "0.0.4"),
        (TEXT, "text/plain", "0.0.4"),
        (OPENMETRICS, "application/openmetrics-text", "1.0.0"),
    ],
    ids=["nothing", "text", "openmetrics"],
)
async def test_format_is_named(accept: str, kind: str, version: str) -> None:
    """Prometheus 3 fails a scrape that does not name its format, and reads the rest as it says."""
    async with running(NOWHERE) as sidecar:
        head = f"GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\n\r\n"
        answer = await ask(("127.0.0.1", sidecar.lifecycle.admin_port), head.encode())

    told = Message()
    told["content-type"] = (answer.header(b"content-type") or b"").decode()
    assert (told.get_content_type(), told.get_param("version")) == (kind, version)
    assert told.get_param("charset") == "utf-8"
    assert answer.body.endswith(b"# EOF\n") is (kind != "text/plain")
