"""Plain readers of the same grammars, written for what the standards say and not for speed.

None of them shares a line with what it is compared with. `None` stands for what is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import h11

__all__ = [
    "Body",
    "Head",
    "events",
    "h11_requests",
    "read_body",
    "read_final_head",
    "read_head",
    "read_response_body",
]


class Head(NamedTuple):
    """The head of a message."""

    line: list[bytes]
    """The three parts of the first line."""
    headers: list[tuple[bytes, bytes]]
    """Names in lower case, values without blanks around them."""
    rest: bytes
    """What follows it."""

    def values(self, name: bytes) -> list[bytes]:
        """All values of a header."""
        return [value for key, value in self.headers if key == name]


class Body(NamedTuple):
    """The body of a message, as far as it came."""

    content: bytes
    complete: bool
    rest: bytes
    """What follows it."""


_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")  # RFC 9110 section 5
# The reason may be anything: it is not passed on.
_STATUS = re.compile(rb"(HTTP/1\.[01]) ([1-5][0-9]{2})((?: [^\r\n]*)?)")
_SIZE = re.compile(rb"([0-9A-Fa-f]+)[ \t]*(?:;[\t -~\x80-\xff]*)?")  # RFC 9112 section 7.1


def read_head(data: bytes, first_line: re.Pattern[bytes]) -> Head | None:
    """Read a head (RFC 9112 sections 2 to 5), as strictly as it is written there.

    Args:
        first_line: has a group for each part of it.
    """
    lines, end, rest = data.partition(b"\r\n\r\n")
    first, *fields = lines.split(b"\r\n")
    match = first_line.fullmatch(first)
    found = [_FIELD.fullmatch(field) for field in fields]
    if match is None or not end or not all(found):
        return None
    headers = [(field[1].lower(), field[2].strip(b" \t")) for field in found if field]
    return Head(list(match.groups()), headers, rest)


def read_body(head: Head, *, bodiless: bool = False) -> Body | None:
    """Read a body (RFC 9112 sections 6 and 7); None where its framing is not to be believed.

    Args:
        bodiless: whether the message has none, whatever its headers say.
    """
    codings = head.values(b"transfer-encoding")
    lengths = head.values(b"content-length")
    if bodiless:
        return Body(b"", True, head.rest)
    if codings:
        if lengths or [coding.lower() for coding in codings] != [b"chunked"]:
            return None
        return _read_chunks(head.rest)
    if lengths:
        if len(lengths) != 1 or not re.fullmatch(rb"[0-9]+", lengths[0]):
            return None
        length = int(lengths[0])
        content = head.rest[:length]
        return Body(content, len(content) == length, head.rest[length:])
    return Body(b"", True, head.rest)


def read_final_head(data: bytes) -> Head | None:
    """Read the head of a response, behind the interim ones; empty lines before them are skipped."""
    head = read_head(data.lstrip(b"\r\n"), _STATUS)
    while head is not None and head.line[1].startswith(b"1") and head.line[1] != b"101":
        head = read_head(head.rest.lstrip(b"\r\n"), _STATUS)
    return head


def read_response_body(head: Head, *, head_only: bool, eof: bool) -> Body | None:
    """Read the body of a response.

    Args:
        head_only: whether the request was a HEAD.
        eof: whether the connection ended behind it.
    """
    bodiless = head_only or head.line[1] in (b"204", b"304")
    if bodiless or head.values(b"content-length") or head.values(b"transfer-encoding"):
        return read_body(head, bodiless=bodiless)
    return Body(head.rest, eof, b"")


def _read_chunks(data: bytes) -> Body | None:
    content = b""
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end:
            return Body(content, False, b"")
        size = _SIZE.fullmatch(line)
        if size is None:
            return None
        length = int(size[1], 16)
        if not length:
            break
        content += data[:length]
        if len(data) < length + 2:
            return Body(content, False, b"")
        if data[length : length + 2] != b"\r\n":
            return None
        data = data[length + 2 :]
    while True:
        line, end, data = data.partition(b"\r\n")
        if not end:
            return Body(content, False, b"")
        if not line:
            return Body(content, True, data)
        if not _FIELD.fullmatch(line):
            return None


def events(
    stream: bytes,
    needles: Sequence[bytes],
    end_needles: Sequence[bytes],
    max_bytes: int,
    tail_bytes: int,
) -> tuple[list[tuple[bytes, bytes, bool, bool]], bool]:
    """Read all events of a stream, and give those of interest.

    Args:
        needles: one of which an event of interest holds.
        end_needles: others, of interest in the last `tail_bytes`.
        max_bytes: longest event.

    Returns:
        Of each the name, the data, whether a blank line ended it, and whether a line was no
        field; then whether one of interest was too long.
    """
    text = re.sub(rb"\r\n?", b"\n", stream)
    begin = 3 if text.startswith(b"\xef\xbb\xbf") else 0
    tail = text.find(b"\n\n", len(text) - tail_bytes) if len(text) >= tail_bytes else 0
    found: list[tuple[bytes, bytes, bool, bool]] = []
    late: list[tuple[bytes, bytes, bool, bool]] = []
    skipped = False
    last = text.rfind(b"\n\n")
    for match in re.finditer(rb"[^\n]+(?:\n[^\n]+)*", text[begin:]):
        block = match[0]
        terminated = begin + match.end() <= last
        wanted = any(needle in block for needle in needles)
        # What closes a stream stands in its tail, or was not closed itself.
        closing = any(needle in block for needle in end_needles) and (
            not terminated or (0 <= tail <= begin + match.start())
        )
        if not wanted and not closing:
            continue
        if len(block) > max_bytes:
            skipped = skipped or wanted
            continue
        name, data, stray = _read_event(block, terminated)
        if not data and not stray:
            continue  # it is not dispatched
        (found if wanted and terminated else late).append((name, data, terminated, stray))
    return found + late, skipped


def _read_event(block: bytes, terminated: bool) -> tuple[bytes, bytes, bool]:
    name, stray = b"", False
    data: list[bytes] = []
    lines = block.split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.startswith(b":"):
            continue
        if not terminated and number == len(lines) and b":" not in line:
            continue  # the stream was cut, and that is the beginning of a field's name
        match = re.fullmatch(rb"([^:]*)(?:: ?(.*))?", line, re.DOTALL)
        assert match is not None
        field, value = match[1], match[2] or b""
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif field not in (b"id", b"retry"):
            stray = True
    return name, b"\n".join(data), stray


def h11_requests(
    method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]], content: bytes
) -> list[tuple[bytes, bytes, bytes]]:
    """Write a request as it goes out, and give method, target and body of all that h11 reads."""
    head = b"%b %b HTTP/1.1\r\n" % (method, target)
    head += b"".join(b"%b: %b\r\n" % pair for pair in headers) + b"\r\n"
    if b"transfer-encoding" in dict(headers):
        content = b"%x\r\n%b\r\n" % (len(content), content) if content else b""
        content += b"0\r\n\r\n"
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(head + content)
    read: list[tuple[bytes, bytes, bytes]] = []
    while (event := connection.next_event()) is not h11.NEED_DATA:
        if event is h11.PAUSED:
            if not connection.trailing_data[0]:
                break
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is not h11.DONE:
                break
            connection.start_next_cycle()
        elif isinstance(event, h11.Request):
            read.append((event.method, event.target, b""))
        elif isinstance(event, h11.Data):
            read[-1] = (*read[-1][:2], read[-1][2] + bytes(event.data))
    return read
