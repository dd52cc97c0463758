"""Finding the few events of an event stream that matter.

What this module knows is the framing of WHATWG event streams
(https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6): LF, CR and
CRLF line ends, a leading byte order mark, comments, fields with and without a space after
the colon, `data` over several lines. What it must not know is what any event means.

The contract: bytes in by `feed`, events out; any split of the same bytes gives the same
events; the work is linear; at most `MAX_EVENT_BYTES` are held; nothing raises.

A stream of a language model is nearly all text deltas. Events are therefore not parsed one
by one: each chunk is searched for a needle, and only an event that holds it is cut out and
parsed. To search for a second one would take as long again; what matters only at the end of a
stream, such as how it ended, is looked for there alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

__all__ = ["MAX_EVENT_BYTES", "TAIL_BYTES", "Event", "EventFinder"]

MAX_EVENT_BYTES = 1024 * 1024
"""Longest event that is parsed, in bytes, its closing blank line aside; websockets takes the
same figure for a message. A longer one is skipped and noted, and reading goes on after it."""

TAIL_BYTES = 4 * 1024
"""How much of the end of a stream is searched for the needles of its end. After the event that
closes a message nothing comes but pings."""

_BOM = b"\xef\xbb\xbf"
_LF = 0x0A
_MAX_PENDING = MAX_EVENT_BYTES + len(_BOM) + len(b"\n\n")


class Event(NamedTuple):
    """One event of the stream that held a needle."""

    name: bytes
    """Value of the last `event` field; empty where there was none."""
    data: bytes
    """The `data` fields, joined by LF."""
    terminated: bool = True
    """False for what stood after the last blank line when the stream ended."""
    stray: bool = False
    """Whether it has a line that is no field of an event stream: a frame that was torn."""


class EventFinder:
    """Cuts out of an event stream the events that hold one of the needles.

    Args:
        needles: byte strings without line ends, one of which every event of interest holds.
        end_needles: others, whose events are of interest only in the last `TAIL_BYTES`; they
            come out of `finish`.
    """

    __slots__ = (
        "_after_cr",
        "_at_start",
        "_between",
        "_end_needles",
        "_needles",
        "_overlap",
        "_pending",
        "_skip_hit",
        "_skipping",
        "_tail",
        "_tail_bytes",
        "oversized",
    )

    def __init__(self, needles: Sequence[bytes], end_needles: Sequence[bytes] = ()) -> None:
        self._needles = tuple(needles)
        self._end_needles = tuple(end_needles)
        self._tail: list[bytes] = []
        self._tail_bytes = 0
        self._overlap = max(map(len, needles)) - 1
        self._pending = bytearray()
        self._after_cr = False
        self._at_start = True
        self._between = False
        """Whether the next byte begins an event, which is not the first."""
        self._skipping = False
        self._skip_hit = False
        self.oversized = False
        """Whether an event of interest was longer than the bound, and therefore skipped."""

    def feed(self, chunk: bytes) -> Sequence[Event]:
        """Return the events of interest that end in this chunk."""
        if self._between and chunk.endswith(b"\n\n") and b"\r" not in chunk:
            # Whole events, as most chunks are.
            for needle in self._needles:
                if needle in chunk:
                    break
            else:
                self._keep_tail(chunk)
                return ()
        if self._after_cr or b"\r" in chunk:
            chunk = self._with_line_feeds(chunk)
        if not chunk:
            return ()
        self._keep_tail(chunk)
        found = self._take(chunk)
        self._between = not (self._pending or self._at_start or self._after_cr)
        return found

    def _take(self, chunk: bytes) -> list[Event]:
        """Cut the events of interest out of what is pending and a chunk."""
        start = 0
        found: list[Event] = []
        if self._pending or self._at_start:
            start = self._end_of_pending(chunk)
            if start < 0:
                self._hold(chunk)
                return found
            self._take_pending(chunk[:start], found)
        end = chunk.rfind(b"\n\n", start)
        end = start if end < 0 else end + 2
        if end > start:
            for event in self._cut(chunk, start, end, self._needles):
                self._parse(event, found)
        if end < len(chunk):
            self._hold(chunk[end:] if end else chunk)
        return found

    def _keep_tail(self, chunk: bytes) -> None:
        if len(chunk) >= TAIL_BYTES:
            self._tail[:] = [chunk[-TAIL_BYTES:]]
            self._tail_bytes = TAIL_BYTES
            return
        self._tail.append(chunk)
        self._tail_bytes += len(chunk)
        if self._tail_bytes > 2 * TAIL_BYTES:
            self._tail[:] = [self._last_bytes()]
            self._tail_bytes = TAIL_BYTES

    def finish(self) -> Sequence[Event]:
        """Return the events of interest of the stream's end, and what stands after the last
        blank line, if it is of interest."""
        found: list[Event] = []
        tail = self._last_bytes()
        if len(tail) < TAIL_BYTES:
            first, tail = 0, tail.removeprefix(_BOM)
        else:
            # It begins with the rest of an event, or of the blank line before one.
            first = max(0, tail.find(b"\n\n"))
        last = tail.rfind(b"\n\n", first) + 2
        for event in self._cut(tail, first, last, self._end_needles):
            if not _holds(event, self._needles):
                self._parse(event, found)
        if self._skipping:
            self.oversized |= self._skip_hit
        else:
            event = bytes(self._pending).strip(b"\n")
            if _holds(event, self._needles) or _holds(event, self._end_needles):
                self._parse(event, found, terminated=False)
        self._pending.clear()
        return found

    def _last_bytes(self) -> bytes:
        return b"".join(self._tail)[-TAIL_BYTES:]

    def _with_line_feeds(self, chunk: bytes) -> bytes:
        """Make LF of every line end, also of a CRLF that two chunks share."""
        if self._after_cr and chunk.startswith(b"\n"):
            self._after_cr = False
            chunk = chunk[1:]
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _end_of_pending(self, chunk: bytes) -> int:
        """Return where in the chunk the pending event's blank line ends, or -1."""
        if chunk[0] == _LF and self._pending.endswith(b"\n"):
            return 1
        end = chunk.find(b"\n\n")
        return end if end < 0 else end + 2

    def _hold(self, rest: bytes) -> None:
        """Keep the beginning of an event; past the bound, only whether it is of interest."""
        pending = self._pending
        if not self._skipping:
            pending += rest
            if len(pending) <= _MAX_PENDING:
                return
            self._skipping = True
            rest = b""
        window = bytes(pending) + rest
        self._skip_hit = self._skip_hit or _holds(window, self._needles)
        # Enough to see a needle, or a blank line, that two chunks share.
        pending[:] = window[-self._overlap :]

    def _take_pending(self, head: bytes, found: list[Event]) -> None:
        """Close the pending event with the bytes up to its blank line."""
        self._hold(head)
        if self._skipping:
            self.oversized |= self._skip_hit
            self._skipping = self._skip_hit = False
        else:
            event = bytes(self._pending).strip(b"\n")
            if _holds(event, self._needles):
                self._parse(event, found)
        self._at_start = False
        self._pending.clear()

    def _cut(self, chunk: bytes, start: int, end: int, needles: Sequence[bytes]) -> Iterator[bytes]:
        """Yield those of the whole events of `chunk[start:end]` that hold a needle."""
        hits = [chunk.find(needle, start, end) for needle in needles]
        while (hit := min((hit for hit in hits if hit >= 0), default=-1)) >= 0:
            first = chunk.rfind(b"\n\n", start, hit)
            last = chunk.find(b"\n\n", hit)
            yield chunk[start if first < 0 else first : last].strip(b"\n")
            start = last + 2
            # A needle that lies ahead is not searched for again: the work stays linear.
            hits = [
                hit if hit < 0 or hit >= start else chunk.find(needle, start, end)
                for hit, needle in zip(hits, needles, strict=True)
            ]

    def _parse(self, event: bytes, found: list[Event], *, terminated: bool = True) -> None:
        if self._at_start:
            event = event.removeprefix(_BOM)
        if len(event) > MAX_EVENT_BYTES:
            self.oversized |= _holds(event, self._needles)
            return
        first, _, rest = event.partition(b"\n")
        if (
            first.startswith(b"event: ")
            and len(rest) > 6
            and rest.startswith(b"data: ")
            and b"\n" not in rest
        ):
            found.append(Event(first[7:], rest[6:], terminated))  # as nearly all are
            return
        name = b""
        data: list[bytes] = []
        stray = False
        lines = event.split(b"\n")
        if not terminated and b":" not in lines[-1]:
            lines.pop()  # the stream was cut within the name of a field
        for line in lines:
            field, _, value = line.partition(b":")
            if field == b"data":
                data.append(value.removeprefix(b" "))
            elif field == b"event":
                name = value.removeprefix(b" ")
            elif field not in (b"", b"id", b"retry"):  # the empty one is that of a comment
                stray = True
        joined = b"\n".join(data)
        if joined or stray:  # else nothing is said to anyone, and it held the needle in a comment
            found.append(Event(name, joined, terminated, stray))


def _holds(event: bytes, needles: Sequence[bytes]) -> bool:
    return any(needle in event for needle in needles)
