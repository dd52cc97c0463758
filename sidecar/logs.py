"""Logs: one JSON object a line on standard output, constant event names, data as fields."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from traceback import format_tb
from typing import Any

from sidecar.lines import LineWriter

__all__ = ["set_up_logging"]

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# What JSON lets stand as it is, and a terminal may obey: DEL, C1 controls, line separators.
_CONTROLS = re.compile("[\x7f-\x9f\u2028\u2029]")
# uvicorn's word for what is our way of cutting a response whose upstream died.
_CUT = "ASGI callable returned without completing response."


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        line |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        text = json.dumps(line, default=str, ensure_ascii=False)
        return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the library's name
        """Give the frames and the names of the exceptions; what these say could quote a key or a
        body."""
        chain: list[BaseException] = []
        exc: BaseException | None = ei[1]
        while exc is not None and exc not in chain:
            chain.append(exc)
            exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
        parts = ["".join(format_tb(exc.__traceback__)) + type(exc).__name__ for exc in chain]
        return "\n\n".join(reversed(parts))


class _Handler(logging.Handler):
    """Hands each line to the thread that writes to standard output."""

    _FLUSH_S = 2.0

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.process.write(self.format(record).encode("utf-8", "replace") + b"\n")
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        # `logging` calls it at the end of the process.
        self._writer.flush(self._FLUSH_S)


def _is_news(record: logging.LogRecord) -> bool:
    return _CUT not in record.getMessage()


def set_up_logging(level: str) -> LineWriter:
    """Send all logs of the process to standard output.

    Returns:
        What writes there; other lines for standard output have to go through it too.
    """
    # Without standard output, its number may be that of a connection by now.
    descriptor = sys.stdout.fileno() if sys.stdout else os.open(os.devnull, os.O_WRONLY)
    writer = LineWriter(descriptor)
    handler = _Handler(writer)
    handler.setFormatter(_JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # httpx logs whole URLs, uvicorn its own start and stop, which we log ourselves.
    for name in ("httpx", "httpcore", "uvicorn", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    return writer
