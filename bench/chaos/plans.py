"""What happens in each exchange of a run, and what a reader of a part of its answer can know.

`plan(seed, number)` makes the same plan whenever it is asked: what the client sends and when it
leaves, what the stand-in answers, byte by byte, and when it breaks off. A plan also says what is
true: `Plan.readings` gives what those know who have read so many bytes of the answer and no more.

Nothing of the sidecar is used in here. What is true is said anew, from the way in which the
answers are built.
"""

from __future__ import annotations

import json
import random
import zlib
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["MODELS", "NOTHING", "TEAMS", "Leaving", "Plan", "Reading", "plan", "tokens_of"]

MODELS = ("claude-sonnet-4-5", "claude-opus-4-1", "claude-haiku-4-5", "team-chat")
TEAMS = ("Team Red", "Team Blue", "équipe", "None")
_TEAM_HEADERS = ("Team Red", "Team%20Blue", "%C3%A9quipe", "None")
_ERRORS = (400, 401, 403, 404, 429, 500, 503, 529)
_LONG_BYTES = 50_000
_OVERSIZED_EVENT_BYTES = 1_100_000
_OVERSIZED_BODY_BYTES = 4_300_000


class Reading(NamedTuple):
    """What is known of an answer after some of its bytes."""

    status: str
    uncached: int = 0
    read: int = 0
    write_5m: int = 0
    write_1h: int = 0
    write_unknown: int = 0
    output: int = 0
    cache_reported: bool = False


NOTHING = Reading("partial")


def tokens_of(reading: Reading) -> tuple[int, int, int, int, int, int]:
    """The five input classes and the output."""
    return reading[1:7]


class Leaving(NamedTuple):
    """When and how a client leaves."""

    when: str
    """`head`, `body`: after so many bytes of the request's head or body; `asked`: so many
    milliseconds after the request; `answered`: after so many bytes of the answer's body."""
    amount: int
    how: str
    """`fin`, `rst`, `half` (its sending side alone)."""


@dataclass(slots=True)
class Plan:
    """One exchange."""

    number: int
    name: str = "plain"
    """What is done to it, for a person."""
    method: str = "POST"
    target: str = "/v1/messages"
    observed: bool = True
    model: str | None = None
    """What was asked for; None where the request cannot be read."""
    team: str = ""
    asked: bool | None = None
    """Whether the request asks for caching; None where it cannot be read."""
    request: bytes = b""
    request_head: int = 0
    """Length of the request's head."""
    status_code: int = 200
    stream: bool = False
    head: bytes = b""
    body: bytes = b""
    """As it is coded; what is promised of it can be less."""
    wire: bytes = b""
    """Head and framed body."""
    framing: str = "length"
    """`length`, `chunked`, `close`."""
    declared: int = 0
    """The length in the head."""
    coding: str = ""
    chunks: list[tuple[int, int]] = field(default_factory=list)
    """Where the data of each chunk begin: in the wire, in the body."""
    # The text is the body without its coding.
    text_bytes: int = 0
    steps: list[tuple[int, Reading]] = field(default_factory=list)
    """From which length of the text on which counts are known; the status is left open."""
    error_span: tuple[int, int] | None = None
    """Where an error event stands in the text."""
    wrong_at: int | None = None
    """From where on it is known that a count is none."""
    oversized_span: tuple[int, int] | None = None
    # What the stand-in does.
    cuts: list[int] = field(default_factory=list)
    """Where the wire is cut into writes."""
    gap_s: float = 0.0
    """Between two writes."""
    stall: tuple[int, float] | None = None
    """Before which write to wait, and how long."""
    stop_at: int = 0
    """How much of the wire is sent."""
    then: str = "keep"
    """What follows: `keep` the connection, `fin`, `rst`, `hold` it until the other side closes."""
    settled: bool = False
    """Whether `then` waits until the client has what was sent."""
    linger_s: float = 0.0
    """Before `then`."""
    # What the client does.
    leaving: Leaving | None = None
    client_pause_s: float = 0.0

    @property
    def undisturbed(self) -> bool:
        """Whether nothing is done to it, and the answer comes at once."""
        return "," not in self.name and not self.gap_s

    @property
    def promised(self) -> int:
        """How many bytes of the body make a whole answer."""
        return min(self.declared, len(self.body)) if self.framing == "length" else len(self.body)

    def body_bytes(self, wire_bytes: int) -> int:
        """How much of the body is in the beginning of the wire."""
        if self.framing == "chunked":
            index = bisect_right(self.chunks, wire_bytes, key=lambda pair: pair[0]) - 1
            if index < 0:
                return 0
            start, at = self.chunks[index]
            end = self.chunks[index + 1][1] if index + 1 < len(self.chunks) else len(self.body)
            return min(at + wire_bytes - start, end)
        return max(0, min(wire_bytes - len(self.head), self.promised))

    def wire_bytes(self, body_bytes: int) -> int:
        """How much of the wire has so much of the body, and no more."""
        if self.framing == "chunked" and body_bytes:
            index = bisect_right(self.chunks, body_bytes - 1, key=lambda pair: pair[1]) - 1
            start, at = self.chunks[index]
            return start + body_bytes - at
        return len(self.head) + body_bytes

    def ended(self, wire_bytes: int) -> bool:
        """Whether the beginning of the wire can be a whole answer to its reader."""
        if self.framing == "length":
            return self.declared <= len(self.body) and self.body_bytes(wire_bytes) == self.promised
        return wire_bytes == len(self.wire) and (self.framing == "chunked" or self.then != "rst")

    def readings(self, least: int, most: int, *, may_end: bool, must_end: bool) -> set[Reading]:
        """What those can know who have read at least and at most so many bytes of the body.

        Args:
            may_end: whether they can have seen that the answer is whole.
            must_end: whether they have.
        """
        if not 200 <= self.status_code < 300:
            return {Reading("error")}
        if self.coding == "private":
            return {Reading("encoded")}
        if self.declared > _OVERSIZED_BODY_BYTES:
            return {Reading("oversized")}  # its head says so
        low, low_ended = self._decoded(least)
        high, high_ended = (low, low_ended) if most == least else self._decoded(most)
        points = {low, high, *self._turns(low, high)}
        found: set[Reading] = set()
        for at in points:
            if must_end or (may_end and at == high):
                found |= self._readings_at(at, ended=low_ended if must_end else high_ended)
            if not must_end:
                found |= self._readings_at(at, ended=False)
        return found

    def _decoded(self, count: int) -> tuple[int, bool]:
        if self.coding != "gzip":
            return count, True
        decoder = zlib.decompressobj(31)
        return len(decoder.decompress(self.body[:count])), decoder.eof

    def _turns(self, low: int, high: int) -> list[int]:
        """Where between two lengths of the text more is known than before."""
        turns = [at for at, _ in self.steps]
        for span in (self.error_span, self.oversized_span):
            turns += span or ()
        turns += [self.text_bytes, self.text_bytes - 1]
        if self.wrong_at is not None:
            turns.append(self.wrong_at)
        return [at for at in turns if low < at < high]

    def _readings_at(self, at: int, *, ended: bool) -> set[Reading]:
        known = Reading("")
        counts = 0
        for offset, step in self.steps:
            if at >= offset:
                known = step
                counts += 1
        whole = at == self.text_bytes
        if not self.stream:
            return {known._replace(status=self._json_status(at, counts, ended=ended))}
        statuses: set[str] = set()
        plain = "complete" if whole and counts else "missing" if whole or ended else "partial"
        if plain == "missing" and counts:
            plain = "partial"  # it ended early, under a length that says that it did not
        if self.wrong_at is not None and at >= self.wrong_at:
            statuses.add("invalid")
        elif self.oversized_span is not None and at > self.oversized_span[0]:
            statuses.add("oversized")
            if at < self.oversized_span[1]:
                statuses.add(plain)  # it can be known only from its bound on
        elif self.error_span is not None and at > self.error_span[0]:
            statuses.add("partial" if counts else "error")
            if at < self.error_span[1]:
                statuses.add(plain)
        else:
            statuses.add(plain)
        return {known._replace(status=status) for status in statuses}

    def _json_status(self, at: int, counts: int, *, ended: bool) -> str:
        if at < self.text_bytes:
            return ("invalid" if at else "missing") if ended else "partial"
        if self.wrong_at is not None:
            return "invalid"
        return "complete" if counts else "missing"


def plan(seed: int, number: int) -> Plan:
    """Make the plan of an exchange."""
    chance = random.Random(seed * 1_000_003 + number)  # noqa: S311
    made = Plan(number)
    _make_request(made, chance)
    if not made.observed:
        _make_unobserved(made)
    else:
        kind = _pick(chance, _KINDS)
        made.name = kind
        if kind == "refused":
            _make_refusal(made, chance)
        elif made.stream:
            _make_stream(made, chance, kind)
        else:
            _make_message(made, chance, kind)
    _frame(made, chance)
    _disturb(made, chance)
    return made


_KINDS = (
    ("plain", 895),
    ("long", 5),
    ("refused", 35),
    ("no usage", 15),
    ("wrong count", 15),
    ("private coding", 8),
    ("error first", 8),
    ("error amid", 18),
    ("oversized", 0.4),
)
_FAULTS = (
    ("none", 620),
    ("stall", 30),
    ("long stall", 2),
    ("single bytes", 6),
    ("torn writes", 60),
    ("closed early", 30),
    ("cut: rst before head", 15),
    ("cut: fin before head", 15),
    ("cut: rst", 60),
    ("cut: fin", 60),
    ("garbage head", 10),
    ("length too long", 15),
    ("length too short", 15),
    ("until close", 15),
    ("slow client", 10),
    ("leaves in head", 10),
    ("leaves in body", 10),
    ("leaves unanswered", 30),
    ("leaves amid", 60),
)


def _pick(chance: random.Random, weighted: tuple[tuple[str, float], ...]) -> str:
    return chance.choices([name for name, _ in weighted], [weight for _, weight in weighted])[0]


# The request


def _make_request(made: Plan, chance: random.Random) -> None:
    kind = chance.random()
    made.stream = chance.random() < 0.5
    index = chance.randrange(len(TEAMS))
    made.team = TEAMS[index]
    if kind < 0.02:
        made.method, made.target, made.observed = "GET", "/v1/models", False
    elif kind < 0.04:
        made.target, made.observed = "/v1/messages/count_tokens", False
    elif kind < 0.14:
        made.target = "/anthropic/v1/messages"
    model = chance.choice(MODELS)
    text = "What does the cache hold? " * chance.randrange(1, 40)
    part: dict[str, Any] = {"type": "text", "text": text}
    asked = chance.random() < 0.8
    if asked:
        part["cache_control"] = {"type": "ephemeral"}
    asking = {
        "model": model,
        "max_tokens": 1024,
        "stream": made.stream,
        "messages": [{"role": "user", "content": [part]}],
    }
    body = json.dumps(asking).encode()
    made.model, made.asked = model, asked
    if made.observed and chance.random() < 0.01:
        body = b"[" + body  # nothing can be read of it
        made.model = made.asked = None
    if made.method == "GET":
        body = b""
    lines = [
        f"{made.method} {made.target} HTTP/1.1",
        "host: chaos.local",
        "content-type: application/json",
        "authorization: Bearer sk-chaos-0123456789abcdef",
        f"user-agent: chaos/1 {made.number}",
    ]
    if made.method == "POST":
        lines.append(f"content-length: {len(body)}")
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    made.request, made.request_head = head + body, len(head)


# The answer's text


def _usage(chance: random.Random) -> tuple[dict[str, int], dict[str, int] | None]:
    """Draw a usage: its counts, and the split of what was written."""
    counts = {"input_tokens": chance.randrange(1, 4000)}
    kind = chance.random()
    if kind < 0.05:
        return counts, None  # nothing is said of a cache
    write_5m = write_1h = unknown = read = 0
    if kind < 0.60:
        read = chance.randrange(1, 100_000)
    if kind < 0.30 or 0.60 <= kind < 0.75:
        write_5m = chance.randrange(1, 20_000)
    if 0.20 <= kind < 0.40 or 0.70 <= kind < 0.85:
        write_1h = chance.randrange(1, 20_000)
    if 0.83 <= kind < 0.90:
        unknown = chance.randrange(1, 20_000)
    counts["cache_creation_input_tokens"] = write_5m + write_1h + unknown
    counts["cache_read_input_tokens"] = read
    split = {"ephemeral_5m_input_tokens": write_5m, "ephemeral_1h_input_tokens": write_1h}
    return counts, split


def _known(counts: dict[str, int], split: dict[str, int] | None, output: int) -> Reading:
    written = counts.get("cache_creation_input_tokens", 0)
    write_5m = split["ephemeral_5m_input_tokens"] if split else 0
    write_1h = split["ephemeral_1h_input_tokens"] if split else 0
    return Reading(
        "",
        counts["input_tokens"],
        counts.get("cache_read_input_tokens", 0),
        write_5m,
        write_1h,
        written - write_5m - write_1h,
        output,
        "cache_read_input_tokens" in counts,
    )


def _names(made: Plan) -> dict[str, object]:
    return {
        "id": f"msg_01Chaos{made.number:016d}",
        "type": "message",
        "role": "assistant",
        "model": made.model or "claude-sonnet-4-5",
        "stop_sequence": None,
    }


def _text(chance: random.Random, kind: str) -> str:
    # It talks of what is looked for, as answers may.
    times = chance.randrange(1, 20) * (100 if kind == "long" else 1)
    return 'a breakpoint, "usage" and \\"usage\\"; ' * times


def _make_unobserved(made: Plan) -> None:
    made.name, made.stream = "not observed", False
    answer: dict[str, object] = {"input_tokens": 999_999}
    if made.method == "GET":
        answer = {"data": [], "usage": {"input_tokens": 999_999, "output_tokens": 999_999}}
    made.body = json.dumps(answer).encode()


def _make_refusal(made: Plan, chance: random.Random) -> None:
    made.status_code, made.stream = chance.choice(_ERRORS), False
    error = {"message": "no", "type": "None", "param": "None", "code": str(made.status_code)}
    made.body = json.dumps({"error": error, "usage": {"input_tokens": 999_999}}).encode()


def _make_message(made: Plan, chance: random.Random, kind: str) -> None:
    counts, split = _usage(chance)
    output = chance.randrange(1, 4000)
    usage: dict[str, object] = {**counts, "output_tokens": output}
    if split is not None:
        usage["cache_creation"] = split
    known = _known(counts, split, output)
    content = _text(chance, kind)
    answer = {**_names(made), "content": [{"type": "text", "text": content}], "usage": usage}
    if kind in ("error first", "error amid"):
        made.name = kind = "plain"  # of streams alone
    if kind == "no usage":
        del answer["usage"]
    elif kind == "wrong count":
        usage["output_tokens"] = -output
        known = known._replace(output=0)
    elif kind == "oversized":
        answer["content"] = "x" * _OVERSIZED_BODY_BYTES
    elif kind == "private coding":
        made.coding = "private"
    made.body = json.dumps(answer).encode()
    made.text_bytes = len(made.body)
    if kind != "no usage":
        made.steps = [(made.text_bytes, known)]
    if kind == "wrong count":
        made.wrong_at = made.text_bytes


class _Stream:
    """Puts the text of a stream together, and notes what stands where."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.bytes = 0

    def add(self, name: str, **members: object) -> tuple[int, int]:
        """Add an event; return where it begins, and where its data end."""
        data = json.dumps({"type": name} | members)
        began = self.bytes
        self.events.append(f"event: {name}\ndata: {data}\n\n".encode())
        self.bytes += len(self.events[-1])
        return began, self.bytes - 2


def _make_stream(made: Plan, chance: random.Random, kind: str) -> None:
    stream = _Stream()
    counts, split = _usage(chance)
    output, first_output = chance.randrange(10, 4000), chance.randrange(1, 9)
    if kind != "error first":
        usage: dict[str, object] = {**counts, "output_tokens": first_output}
        if split is not None:
            usage["cache_creation"] = split
        message = {**_names(made), "content": [], "stop_reason": None, "usage": usage}
        if kind == "no usage":
            del message["usage"]
        _, known_at = stream.add("message_start", message=message)
        if kind != "no usage":
            made.steps.append((known_at, _known(counts, split, first_output)))
        block: dict[str, object] = {"type": "text", "text": ""}
        stream.add("content_block_start", index=0, content_block=block)
        for _ in range(chance.randrange(0, 8)):
            delta = {"type": "text_delta", "text": _text(chance, kind)}
            stream.add("content_block_delta", index=0, delta=delta)
            if chance.random() < 0.1:
                stream.add("ping")
    if kind in ("error first", "error amid"):
        error = {"type": "overloaded_error", "message": "Overloaded"}
        made.error_span = stream.add("error", error=error)
    else:
        stream.add("content_block_stop", index=0)
        _close_stream(made, chance, kind, stream, counts, split, output)
    text = b"".join(stream.events)
    made.text_bytes = len(text)
    if kind == "private coding":
        made.coding = "private"
    made.body = text
    made.chunks = []
    at = 0
    for event in stream.events:
        made.chunks.append((0, at))
        at += len(event)


def _close_stream(
    made: Plan,
    chance: random.Random,
    kind: str,
    stream: _Stream,
    counts: dict[str, int],
    split: dict[str, int] | None,
    output: int,
) -> None:
    """Add the events that close a stream."""
    delta: dict[str, object] = {"stop_reason": "end_turn", "stop_sequence": None}
    usage: dict[str, object] = {"output_tokens": output}
    closing = chance.random()
    if closing < 0.4:
        usage |= counts
    elif closing < 0.5:
        usage |= dict.fromkeys(counts, 0)  # some back ends do; it does not undo the start
    elif closing < 0.6 and split is not None:
        # What the start said is not the last word.
        counts = counts | {"cache_read_input_tokens": counts["cache_read_input_tokens"] + 7}
        usage |= counts
    known = _known(counts, split, output)
    members: dict[str, object] = {"usage": usage}
    if kind == "no usage":
        members = {}
    elif kind == "wrong count":
        usage["output_tokens"] = -output
        known = known._replace(output=made.steps[-1][1].output)
    elif kind == "oversized":
        delta["padding"] = "x" * _OVERSIZED_EVENT_BYTES
        known = made.steps[-1][1]
    began, known_at = stream.add("message_delta", delta=delta, **members)
    if kind == "wrong count":
        made.wrong_at = known_at
    if kind == "oversized":
        made.oversized_span = began, known_at + 2
    elif kind != "no usage":
        made.steps.append((known_at, known))
    stream.add("message_stop")


# The answer on the wire


def _frame(made: Plan, chance: random.Random) -> None:
    """Code the body and put it on the wire."""
    content_type = "text/event-stream; charset=utf-8" if made.stream else "application/json"
    team = _TEAM_HEADERS[TEAMS.index(made.team)]
    lines = [
        f"HTTP/1.1 {made.status_code} Whatever",
        "server: uvicorn",
        f"x-litellm-call-id: {made.number}",
        f"x-litellm-team-alias: {team}",
        f"content-type: {content_type}",
    ]
    starts = [at for _, at in made.chunks] or [0]
    oversized = len(made.body) > 1_000_000
    if made.coding == "private":
        lines.append("content-encoding: x-private")
    elif made.observed and made.status_code == 200 and chance.random() < 0.12 and not oversized:
        made.coding = "gzip"
        lines.append("content-encoding: gzip")
        coder = zlib.compressobj(1, wbits=31)
        pieces = []
        for start, end in zip(starts, [*starts[1:], len(made.body)], strict=True):
            pieces.append(coder.compress(made.body[start:end]) + coder.flush(zlib.Z_SYNC_FLUSH))
        pieces[-1] += coder.flush()
        made.body = b"".join(pieces)
        starts = [sum(map(len, pieces[:index])) for index in range(len(pieces))]
    if made.stream or (chance.random() < 0.1 and not oversized):
        made.framing = "chunked"
        lines.append("transfer-encoding: chunked")
    else:
        made.declared = len(made.body)
        lines.append("content-length: {length}")
    made.head = ("\r\n".join(lines) + "\r\n\r\n").encode()
    _put_on_wire(made, starts)


def _put_on_wire(made: Plan, starts: list[int]) -> None:
    made.chunks = []
    if made.framing != "chunked":
        made.head = made.head.replace(b"{length}", b"%d" % made.declared)
        made.wire = made.head + made.body
        made.cuts = [len(made.head) + at for at in starts[1:]]
    else:
        wire = bytearray(made.head)
        for start, end in zip(starts, [*starts[1:], len(made.body)], strict=True):
            if start:
                made.cuts.append(len(wire))
            wire += b"%x\r\n" % (end - start)
            made.chunks.append((len(wire), start))
            wire += made.body[start:end] + b"\r\n"
        made.wire = bytes(wire + b"0\r\n\r\n")
    made.stop_at = len(made.wire)


# What is done to it


def _disturb(made: Plan, chance: random.Random) -> None:
    fault = _pick(chance, _FAULTS)
    if made.stream and chance.random() < 0.3:
        made.gap_s = chance.random() * 0.004  # as a model writes
    elif chance.random() < 0.7:
        made.cuts = []  # all at once
    if fault == "none" or len(made.wire) > _OVERSIZED_EVENT_BYTES:
        return
    if fault == "single bytes" and len(made.wire) > _LONG_BYTES:
        return
    if made.method == "GET" and fault == "leaves in body":
        return
    made.name += ", " + fault
    settled = chance.random() < 0.5
    if fault in _DISTURB:
        _DISTURB[fault](made, chance)
    elif fault.startswith("cut: "):
        before = fault.endswith("before head")
        made.then = fault.split()[1]
        made.stop_at = 0 if before else chance.randrange(1, len(made.wire))
        if chance.random() < 0.2 and made.stop_at:  # all but the very end
            made.stop_at = len(made.wire) - chance.randrange(1, 12)
        made.settled = settled and not before
    elif fault.startswith("length"):
        _lie(made, chance, short=fault.endswith("short"))
    else:
        _leave(made, chance, fault, settled=settled)


def _stall(made: Plan, chance: random.Random) -> None:
    made.cuts = sorted({*made.cuts, chance.randrange(1, len(made.wire))})
    made.stall = chance.randrange(0, len(made.cuts) + 1), chance.random() * 0.3


def _long_stall(made: Plan, chance: random.Random) -> None:
    """Longer than a sidecar that drains waits for it."""
    _stall(made, chance)
    made.stall = len(made.cuts), 1.5 + chance.random()


def _single_bytes(made: Plan, chance: random.Random) -> None:
    made.cuts = list(range(1, len(made.wire)))
    made.gap_s = 0.0


def _torn_writes(made: Plan, chance: random.Random) -> None:
    count = min(len(made.wire) - 1, chance.randrange(1, 12))
    made.cuts = sorted(chance.sample(range(1, len(made.wire)), count))


def _closed_early(made: Plan, chance: random.Random) -> None:
    made.then = chance.choice(("fin", "rst"))
    made.settled = True
    made.linger_s = chance.random() * 0.003


def _garbage(made: Plan, chance: random.Random) -> None:
    made.head = chance.choice((b"HTTP/1.1 two hundred\r\n\r\n", b"SSH-2.0-chaos\r\n", b"\x00" * 9))
    made.framing, made.body, made.wire, made.cuts = "length", b"", made.head, []
    made.declared, made.chunks, made.steps, made.status_code = 1, [], [], 0
    made.stop_at, made.then = len(made.wire), "fin"


def _until_close(made: Plan, chance: random.Random) -> None:
    starts = [at for _, at in made.chunks] or [0]
    made.framing, made.then = "close", "fin"
    lines = made.head.split(b"\r\n")
    kept = [line for line in lines if not line.startswith((b"content-length", b"transfer-enc"))]
    made.head = b"\r\n".join(kept)
    _put_on_wire(made, starts)


def _slow_client(made: Plan, chance: random.Random) -> None:
    made.client_pause_s = chance.random() * 0.2


_DISTURB = {
    "stall": _stall,
    "long stall": _long_stall,
    "single bytes": _single_bytes,
    "torn writes": _torn_writes,
    "closed early": _closed_early,
    "garbage head": _garbage,
    "until close": _until_close,
    "slow client": _slow_client,
}


def _lie(made: Plan, chance: random.Random, *, short: bool) -> None:
    """Announce another length than that of the body."""
    starts = [at for _, at in made.chunks] or [0]
    if made.framing == "chunked":
        made.head = made.head.replace(b"transfer-encoding: chunked", b"content-length: {length}")
        made.framing = "length"
    else:
        made.head = made.head.replace(
            b"content-length: %d" % made.declared, b"content-length: {length}"
        )
    body_bytes = len(made.body)
    if short:
        made.declared = chance.randrange(0, body_bytes)
    else:
        made.declared = body_bytes + chance.randrange(1, 500)
    _put_on_wire(made, starts)
    # What is behind a length that is too short must not become the answer to a later request.
    made.then = "fin"
    made.cuts = []


def _leave(made: Plan, chance: random.Random, fault: str, *, settled: bool) -> None:
    """Let the client leave; half of the time the stand-in waits for that."""
    how = chance.choice(("fin", "rst", "half"))
    if fault == "leaves in head":
        made.leaving = Leaving("head", chance.randrange(1, made.request_head), how)
    elif fault == "leaves in body":
        length = len(made.request) - made.request_head
        made.leaving = Leaving("body", chance.randrange(0, length), how)
    elif fault == "leaves unanswered":
        made.leaving = Leaving("asked", chance.randrange(0, 20), how)
        if settled:
            made.stop_at, made.then = 0, "hold"
    else:
        amount = chance.randrange(0, made.promised)
        made.leaving = Leaving("answered", amount, how)
        if settled:
            made.stop_at, made.then = made.wire_bytes(amount), "hold"
