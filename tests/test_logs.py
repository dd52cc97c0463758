"""What a line of the log holds, and what it does not."""

from __future__ import annotations

import json
import logging
import sys

from sidecar.logs import _JsonFormatter


def test_exceptions_are_logged_without_what_they_say() -> None:
    """An exception's text may quote a key or a body: its name and its frames do not."""

    secrets = "-".join(("sk", "1")), "-".join(("sk", "2"))  # the frames show this line

    def read(text: str) -> int:
        return int(text)

    try:
        try:
            read(secrets[0])
        except ValueError as exc:
            raise RuntimeError(secrets[1]) from exc
    except RuntimeError:
        record = logging.LogRecord(
            "uvicorn.error", logging.ERROR, __file__, 1, "Exception in %s", ("it",), sys.exc_info()
        )
    text = _JsonFormatter().format(record)
    assert "sk-" not in text
    line = json.loads(text)
    assert line["event"] == "Exception in it"
    assert line["exception"].splitlines()[-1] == "RuntimeError"
    assert "ValueError" in line["exception"]
    assert ", in read" in line["exception"]
