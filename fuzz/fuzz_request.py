"""What a request asks for is the same whole and split; marks that move change no prefix."""

from __future__ import annotations

import atheris

from fuzz.harness import controlled, pieces, start

with atheris.instrument_imports(include=["sidecar"]):
    from sidecar.exchange import Dialect, RequestFacts
    from sidecar.observe import asking, prefix, recall, request

# So low that an input of a few kilobytes goes past them.
prefix._MAX_MARKS, prefix._MAX_MESSAGES, prefix._MAX_TEXT_BYTES = 16, 32, 1024
prefix._MAX_BRACKETS, prefix._MAX_WALKED_BYTES, prefix._MAX_ENDS = 64, 2048, 16
prefix._STEP_MESSAGES, prefix._MAX_MARK_BYTES = 2, 128
prefix._LONG_BYTES, prefix._MAX_JOINED_BYTES = 512, 256
recall._PLACES[:] = [64 * 5**step // 4**step for step in range(16)]
asking._MAX_KEYS, request._DENSE_STEP_BYTES, request._STEP_BYTES = 16, 64, 1024
request._PATIENCE, request._MAX_TOP_VALUES, request._MAX_TOP_QUOTES = 2, 32, 256
DIALECTS = tuple(Dialect)
READERS = {dialect: prefix.PrefixReader(dialect, 7) for dialect in Dialect}
MARK = b',"cache_control":{"type":"ephemeral"}'
PLAIN = b'{"type":"text","text":"a"'


def read(
    dialect: Dialect,
    body: bytes,
    chunks: list[bytes],
    *,
    sized: bool,
    prefixes: prefix.PrefixReader | None = None,
) -> RequestFacts:
    reader = request.BodyReader(
        [(b"content-length", b"%d" % len(body))] if sized else [],
        1 << 20,
        ttls=True,
        dialect=dialect,
        prefixes=prefixes or prefix.PrefixReader(dialect, 7),
    )
    for chunk in chunks:
        reader.feed(chunk)
    for _ in reader.finish():
        pass
    return reader.facts()


def one_input(data: bytes) -> None:
    body, control = controlled(data)
    dialect, seed = DIALECTS[control % len(DIALECTS)], control >> 4
    for sized in (True, False):
        whole = read(dialect, body, [body], sized=sized)
        assert whole == read(dialect, body, pieces(body, seed), sized=sized), whole
        known = read(dialect, body, [body], sized=sized, prefixes=READERS[dialect])
        assert whole == known, (whole, known)
    if dialect is Dialect.ANTHROPIC and (found := read(dialect, body, [body], sized=True).prefix):
        moved = body.replace(PLAIN + b"}", PLAIN + MARK + b"}")
        again = read(dialect, moved, [moved], sized=True).prefix
        if again is not None:
            assert (found.tools, found.system) == (again.tools, again.system)
            assert found.messages == again.messages


if __name__ == "__main__":
    start(one_input)
