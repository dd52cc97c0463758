"""Reading request bodies, as the relay has it done."""

from __future__ import annotations

from sidecar.exchange import Dialect, RequestFacts
from sidecar.observe.prefix import PrefixReader
from sidecar.observe.request import BodyReader

__all__ = ["facts_of"]


def facts_of(
    raw: bytes,
    dialect: Dialect = Dialect.ANTHROPIC,
    prefixes: PrefixReader | None = None,
    *,
    ttls: bool = False,
    piece_bytes: int = 0,
) -> RequestFacts:
    """Read a body whose length its head says.

    Args:
        piece_bytes: of how many bytes each piece is; 0 for all in one.
    """
    length = [(b"content-length", b"%d" % len(raw))]
    reader = BodyReader(length, 1 << 25, ttls=ttls, dialect=dialect, prefixes=prefixes)
    step = piece_bytes or len(raw) or 1
    for at in range(0, len(raw), step):
        reader.feed(raw[at : at + step])
    for _ in reader.finish():
        pass
    return reader.facts()
