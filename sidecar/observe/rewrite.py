"""Adding OpenAI's names to the usage of Anthropic's answers, as they pass.

Readers that only know `usage.prompt_tokens_details.cached_tokens` find it there when the switch
is on. What this module knows is which answers are rewritten, what is added, and where; how a
usage is read and how a stream's usages merge is `anthropic`'s, and the values are those that
are known when the usage passes. It must not know the relay, nor do any I/O.

The contract: members are put in before the closing brace of a usage, and every other byte stays
what it was and where it was; any split of the same bytes gives the same bytes in all; the work
is linear; at most `MAX_EVENT_BYTES` of a stream, or `MAX_JSON_BYTES` of a body, are kept; the
public methods do not raise for any input.

When bytes go out: at once, up to the first closing brace that stands behind `"usage"` in the
same line, or JSON body; nothing can be put in before it. What stands behind it is held until
the line's end has come, not until the event's, for only then is it known whether the line is a
JSON text, and of which kind. In a string a quote is escaped: text that talks of "usage" holds
nothing up.

What passes untouched: a usage that has `prompt_tokens_details`; one that says nothing which
could be added (where no cache field was sent, none is made up); one in a member of content or
tool input; an event whose JSON spans several `data` lines; a line that ends further than
`MAX_EVENT_BYTES` from the beginning of its event, and a body over `MAX_JSON_BYTES`, which are
the bounds of what is counted; whatever is not one JSON object. `result` tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import translate

from sidecar.exchange import Dialect, RawHeaders, RequestFacts, Rewrite, Transformer, Usage, header
from sidecar.observe.anthropic import USAGE_NEEDLE, StreamReading
from sidecar.observe.decoding import codings_of
from sidecar.observe.members import find_member, members_of
from sidecar.observe.sse import MAX_EVENT_BYTES, Event
from sidecar.observe.tap import MAX_JSON_BYTES, STREAM_TYPE, is_json, media_type

__all__ = ["Rewriter", "transformer_for"]

_BOM = b"\xef\xbb\xbf"
_OVERLAP = len(USAGE_NEEDLE) - 1
_LINE_END = re.compile(rb"\r\n|\n|\r")
# Atomic groups, so that a CRLF is never taken for two line ends.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LONGEST_BLANK_LINE = len(b"\r\n\r\n")
_LINE_ENDS = re.compile(rb"[\r\n]*+")
_RESULTS = tuple(Rewrite)
# A part of a representation (206) has no place to put anything; 204 and 205 have no content.
_WITHOUT_WHOLE_CONTENT = (204, 205, 206)


class Rewriter:
    """Decides which answers are rewritten.

    Args:
        full: whether `prompt_tokens` and `completion_tokens` are added as well.
        only: `model:PATTERN` and `user-agent:PATTERN`, with shell-style wildcards; an answer
            is rewritten if one of them fits its request. Empty for all answers.
    """

    def __init__(self, *, full: bool, only: Sequence[str] = ()) -> None:
        self._full = full
        self._all = not only
        self._models = _patterns(only, "model")
        # Clients vary the case of their own names between versions.
        self._agents = _patterns([rule.lower() for rule in only], "user-agent")

    def wanted(self, dialect: Dialect, headers: RawHeaders) -> bool:
        """Whether the answer to a request with these headers may have to be rewritten."""
        if dialect is not Dialect.ANTHROPIC or _no_transform(headers):
            return False
        return self._all or bool(self._models) or self._fits_agent(headers)

    def transformer(
        self,
        dialect: Dialect,
        request_headers: RawHeaders,
        facts: RequestFacts,
        status_code: int,
        headers: RawHeaders,
    ) -> Transformer | Rewrite | None:
        """Make the transformer of a response body. See `sidecar.exchange.Rewriting`."""
        if dialect is not Dialect.ANTHROPIC:
            return None
        if not 200 <= status_code < 300 or status_code in _WITHOUT_WHOLE_CONTENT:
            return None
        if not self._all and not self._fits_agent(request_headers):
            if not self._models:
                return None
            if facts.model is None:
                return Rewrite.UNKNOWN_MODEL
            if not any(pattern.match(facts.model) for pattern in self._models):
                return None
        if _no_transform(request_headers) or _no_transform(headers):
            return Rewrite.NO_TRANSFORM
        return transformer_for(headers, full=self._full)

    def _fits_agent(self, headers: RawHeaders) -> bool:
        if not self._agents:
            return False
        agent = (header(headers, b"user-agent") or b"").decode("latin-1").lower()
        return any(pattern.match(agent) for pattern in self._agents)


def _patterns(rules: Sequence[str], kind: str) -> list[re.Pattern[str]]:
    found = [rule.partition(":")[2] for rule in rules if rule.partition(":")[0] == kind]
    return [re.compile(translate(pattern)) for pattern in found]


def _no_transform(headers: RawHeaders) -> bool:
    return any(
        name == b"cache-control"
        and b"no-transform" in [part.strip().lower() for part in value.split(b",")]
        for name, value in headers
    )


def transformer_for(headers: RawHeaders, *, full: bool) -> Transformer | Rewrite:
    """Make what rewrites one response body, by the response's own type and coding.

    Args:
        headers: the response's headers.
        full: whether `prompt_tokens` and `completion_tokens` are added as well.
    """
    content_type = media_type(headers)
    if content_type != STREAM_TYPE and not is_json(content_type):
        return Rewrite.MISSING
    if codings_of(headers):
        return Rewrite.ENCODED
    if content_type == STREAM_TYPE:
        return _StreamRewriter(_Editor(full=full))
    length = header(headers, b"content-length") or b""
    if length.isdigit() and int(length) > MAX_JSON_BYTES:
        return Rewrite.OVERSIZED
    return _JsonRewriter(_Editor(full=full))


class _Editor:
    """Says what is to be put into the usages of one answer, and where."""

    def __init__(self, *, full: bool) -> None:
        self._full = full
        self._reading = StreamReading()
        self._results: set[Rewrite] = set()

    @property
    def result(self) -> Rewrite:
        """The first of what has happened, in the order of `Rewrite`."""
        return next((result for result in _RESULTS if result in self._results), Rewrite.MISSING)

    def note(self, result: Rewrite) -> None:
        """Note why a text that holds the needle passes untouched."""
        self._results.add(result)

    def edit(self, name: bytes, text: bytes) -> tuple[int, bytes] | None:
        """Read a JSON text that holds the needle; say at which place to put in which bytes.

        Args:
            name: the event's, where the text itself has no `type`.
        """
        path = self._reading.take_event(Event(name, text))
        if not path:
            if path is None:
                self.note(Rewrite.UNREADABLE)
            return None
        place = find_member(text, path)
        if place is None or text[place[0] : place[1]] == b"null":
            return None
        begin, end = place
        if text[begin : begin + 1] != b"{" or end <= _Hold(0).look(text):
            # No object, or one whose key is written with escapes and may have gone out already.
            self.note(Rewrite.UNREADABLE)
            return None
        present = {key for key, _, _ in members_of(text, begin, end)}
        if "prompt_tokens_details" in present:
            self.note(Rewrite.PRESENT)
            return None
        added = b",".join(self._members(self._reading.usage, present))
        if not added:
            self.note(Rewrite.UNREPORTED)
            return None
        self.note(Rewrite.REWRITTEN)
        return end - 1, b"," + added if present else added

    def _members(self, usage: Usage, present: set[str]) -> Iterator[bytes]:
        if usage.cache_reported:
            written = usage.write_tokens
            yield b'"prompt_tokens_details":{"cached_tokens":%d%b}' % (
                usage.read_tokens,
                b',"cache_creation_tokens":%d' % written if written else b"",
            )
        if not self._full:
            return
        if usage.input_tokens is not None and "prompt_tokens" not in present:
            yield b'"prompt_tokens":%d' % sum(usage.input_classes())
        if usage.output_tokens is not None and "completion_tokens" not in present:
            yield b'"completion_tokens":%d' % usage.output_tokens


class _Hold:
    """Finds from where on a text is held that grows and may hold a usage."""

    __slots__ = ("_brace", "_found", "_searched")

    def __init__(self, begin: int) -> None:
        self._searched = begin
        self._found = False
        self._brace = -1

    def look(self, text: bytes | bytearray) -> int:
        """Return up to where the text can go out: all of it, or the brace behind the needle.

        Args:
            text: what it was at the last call, and more.
        """
        if not self._found:
            needle = text.find(USAGE_NEEDLE, self._searched)
            if needle < 0:
                self._searched = max(self._searched, len(text) - _OVERLAP)
                return len(text)
            self._found = True
            self._searched = needle
        if self._brace < 0:
            self._brace = text.find(b"}", self._searched)
            self._searched = len(text)
        return len(text) if self._brace < 0 else self._brace

    def shift(self, count: int) -> None:
        """Take note that so many bytes were taken from the text's beginning."""
        self._searched -= count
        self._brace = max(-1, self._brace - count)


class _JsonRewriter:
    """Rewrites a JSON body."""

    streamed = False

    def __init__(self, editor: _Editor) -> None:
        self._editor = editor
        self._body = bytearray()
        self._sent = 0
        self._hold = _Hold(0)
        self._gave_up = False

    @property
    def held(self) -> bytes:
        return bytes(self._body[self._sent :])

    @property
    def result(self) -> Rewrite:
        return self._editor.result

    def feed(self, chunk: bytes) -> bytes:
        if self._gave_up:
            return chunk
        body = self._body
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            self._editor.note(Rewrite.OVERSIZED)
            rest = self.held
            self._gave_up = True
            self._body, self._sent = bytearray(), 0
            return rest
        end = self._hold.look(body)
        out = chunk if end - self._sent == len(chunk) else bytes(body[self._sent : end])
        self._sent = end
        return out

    def finish(self) -> bytes:
        rest = self.held
        if rest:
            body = bytes(self._body)
            # LiteLLM's guardrails send a whole message as an event: to read, the two are one.
            edit = self._editor.edit(b"message", body)
            if edit is not None:
                place, added = edit
                rest = body[self._sent : place] + added + body[place:]
            self._body, self._sent = bytearray(), 0
        return rest


class _StreamRewriter:
    """Rewrites an event stream.

    `_buffer` begins with the current event, as it came, and `_sent` bytes of it have gone out.
    Lines are looked at only in an event that holds the needle; those before `_line` have been.
    While an event over the bound is skipped, the buffer has only what tells where it ends.
    """

    streamed = True

    def __init__(self, editor: _Editor) -> None:
        self._editor = editor
        self._buffer = bytearray()
        self._sent = 0
        self._at_start = True
        self._skipping = False
        self._of_interest = False
        self._name = b""
        self._has_data = False
        self._line = 0
        self._hold = _Hold(0)

    @property
    def held(self) -> bytes:
        return bytes(self._buffer[self._sent :])

    @property
    def result(self) -> Rewrite:
        return self._editor.result

    def feed(self, chunk: bytes) -> bytes:
        buffer = self._buffer
        if not buffer and USAGE_NEEDLE not in chunk and chunk.endswith(b"\n\n"):
            # Whole events without a usage, which is nearly all of a stream.
            self._at_start = False
            return chunk
        searched = len(buffer)
        buffer += chunk
        edits: list[tuple[int, bytes]] = []
        begin, end = self._advance(searched, edits)
        untouched = self._sent == searched and end == len(buffer) and not edits
        out = chunk if untouched else self._out(edits, end)
        del buffer[:begin]
        self._sent = end - begin
        self._line -= begin
        self._hold.shift(begin)
        return out

    def finish(self) -> bytes:
        end = len(self._buffer)
        edits: list[tuple[int, bytes]] = []
        if self._of_interest and not self._skipping:
            # The end of the body is the end of its last line.
            self._take_line(self._line, end, edits)
        rest = self._out(edits, end)
        self._buffer, self._sent = bytearray(), 0
        return rest

    def _out(self, edits: Sequence[tuple[int, bytes]], end: int) -> bytes:
        """Cut what goes out from the buffer, with what is put into it."""
        at = self._sent
        pieces: list[bytes | bytearray] = []
        for place, added in edits:
            pieces += self._buffer[at:place], added
            at = place
        return b"".join([*pieces, self._buffer[at:end]])

    def _advance(self, searched: int, edits: list[tuple[int, bytes]]) -> tuple[int, int]:
        """Go through what is new; return where the buffer is to begin, and what can go out.

        Args:
            searched: how much of the buffer is not new.
            edits: takes what is to be put in, and where.
        """
        buffer = self._buffer
        # From here on a blank line may begin that ends in what is new.
        back = max(0, searched - _LONGEST_BLANK_LINE + 1)
        begin = 0 if searched else self._skip_line_ends(0)
        if self._skipping:
            stop = _next_blank_line(buffer, 0)
            if buffer.find(USAGE_NEEDLE, 0, len(buffer) if stop < 0 else stop) >= 0:
                self._editor.note(Rewrite.OVERSIZED)
            if stop < 0:
                return max(0, len(buffer) - _OVERLAP), len(buffer)
            begin = self._next_event(stop)
        while True:
            known = searched
            if not self._of_interest:
                hit = buffer.find(USAGE_NEEDLE, max(begin, searched - _OVERLAP))
                last = _last_blank_line(buffer, max(begin, back), len(buffer) if hit < 0 else hit)
                if last >= 0:
                    begin = self._next_event(last)
                if hit < 0:
                    break
                self._of_interest = True
                known = begin
            stop = _next_blank_line(buffer, max(begin, back))
            self._take_lines(begin, known, len(buffer) if stop < 0 else stop, edits)
            if stop < 0:
                break
            begin = self._next_event(stop)
        if len(buffer) - begin > MAX_EVENT_BYTES:
            if buffer.find(USAGE_NEEDLE, self._line) >= 0:
                self._editor.note(Rewrite.OVERSIZED)
            self._skipping = True
            # The end of the line before may be the beginning of a blank line.
            return max(self._line - len(b"\r\n"), len(buffer) - _OVERLAP), len(buffer)
        return begin, self._hold.look(buffer) if self._of_interest else len(buffer)

    def _next_event(self, at: int) -> int:
        """Begin a new event behind a blank line, and return where it begins."""
        self._at_start = self._skipping = self._of_interest = self._has_data = False
        self._name = b""
        return self._skip_line_ends(at)

    def _skip_line_ends(self, at: int) -> int:
        """Pass over more blank lines, and over the second half of a CRLF."""
        match = _LINE_ENDS.match(self._buffer, at)
        assert match is not None  # the pattern takes the empty string
        self._line = match.end()
        self._hold = _Hold(self._line)
        return self._line

    def _take_lines(
        self, begin: int, known: int, stop: int, edits: list[tuple[int, bytes]]
    ) -> None:
        """Look at the lines that end before `stop`.

        Args:
            begin: where their event begins.
            known: up to where no line ends but those that were taken.
        """
        buffer = self._buffer
        taken = False
        for match in _LINE_END.finditer(buffer, max(self._line, known), stop):
            taken = True
            line, end = self._line, match.start()
            self._line = match.end()
            if end - begin <= MAX_EVENT_BYTES:
                self._take_line(line, end, edits)
            elif buffer.find(USAGE_NEEDLE, line, end) >= 0:
                self._editor.note(Rewrite.OVERSIZED)
        if taken:
            self._hold = _Hold(self._line)

    def _take_line(self, begin: int, end: int, edits: list[tuple[int, bytes]]) -> None:
        """Look at a line, and note what is to be put into it."""
        line = bytes(self._buffer[begin:end])
        if self._at_start:
            line = line.removeprefix(_BOM)
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            self._name = value
        if field != b"data" or not value.strip():
            return
        continued, self._has_data = self._has_data, True
        if USAGE_NEEDLE not in value:
            return
        if continued:
            self._editor.note(Rewrite.UNREADABLE)
            return
        edit = self._editor.edit(self._name, value)
        if edit is not None:
            place, added = edit
            edits.append((end - len(value) + place, added))


def _next_blank_line(text: bytearray, begin: int) -> int:
    """Return where the first blank line ends that begins at `begin` or later; -1 for none."""
    found = text.find(b"\n\n", begin)
    if text.find(b"\r", begin, len(text) if found < 0 else found) < 0:
        return found if found < 0 else found + 2
    match = _BLANK_LINE.search(text, begin)
    return -1 if match is None else match.end()


def _last_blank_line(text: bytearray, begin: int, end: int) -> int:
    """Return where the last blank line between two places ends; -1 for none."""
    if text.find(b"\r", begin, end) < 0:
        found = text.rfind(b"\n\n", begin, end)
        return found if found < 0 else found + 2
    last = -1
    for match in _BLANK_LINE.finditer(text, begin, end):
        last = match.end()
    return last
