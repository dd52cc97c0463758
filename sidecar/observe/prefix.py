"""Where a prompt can be cached: digests of what stands before each of its breakpoints.

Providers keep a prompt in the order tools, system, messages, up to the marks that ask for it.
The marks themselves move from turn to turn, and are taken out before anything is digested. A
text is the same prompt as a string and as the first block of a list. The order of keys is kept,
because models see it; so are blanks between them, because a client writes all of its requests
in one way.

The digests are fast ones under a salt. They pass on with the facts of their request; whoever
remembers them hashes them once more, or keeps none of a short text (`recall`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw
from xxhash import xxh3_128_digest

from sidecar.exchange import Breakpoint, Dialect, Prefix
from sidecar.observe.asking import CACHE_POINT, Asking, mark_of
from sidecar.observe.members import MemberReader, end_of_item, find_in_windows
from sidecar.observe.recall import MIN_BYTES, Beginning, Recall, Stretch

__all__ = ["Plan", "PrefixReader", "Prompt"]

_TTL_S, _LONG_TTL_S = 300, 3600
_MAX_BREAKPOINTS = 4
_MAX_MARKS = 1024
_MAX_OBJECTS = 12 * 1024
"""Of a prompt with more marks or objects nothing is said: to read it would hold up the loop."""
_COUNTED_FROM_BYTES = 128 * 1024
"""Up to this size a body cannot hold so many that it takes more than a few milliseconds."""
_MAX_MESSAGES = 2048
_STEP_MESSAGES = 256
"""So many are digested between two chances for the loop to do other work."""
_MAX_TEXT_BYTES = 256 * 1024
"""Longest prompt that may be a string at its top: that one is decoded."""
_LONG_BYTES = 16 * 1024
"""From this size on, messages are not decoded with the rest: most may be known."""
_MAX_JOINED_BYTES = 64 * 1024
"""A longer part is not copied to be digested."""
_MAX_BRACKETS = 8192
_MAX_WALKED_BYTES = 512 * 1024
"""In parts of no more in all the ends of blocks within are looked for: each bracket may cost a
step, and each megabyte 3 ms."""
_TAIL_BYTES = 96
"""Where a mark is nearly always found; for a whole one without blanks 65 are enough."""
_TELLING_BYTES = 100
"""A second message of so many bytes is not said in two conversations; `yes` is."""
_MAX_ENDS = 512
"""What follows a mark from farther is not looked at."""
_MAX_MARK_BYTES = 512
"""Longest mark that is seen as one."""
_MAX_BLANKS = 256
"""Blanks that are gone through to find the comma before or behind a mark, or a first text."""

_NONE = Raw()
_NOWHERE = memoryview(b"")
_NOTHING = (b"", b"null")
_ABSENT = (*_NOTHING, b"[]")


class _Message(msgspec.Struct, gc=False):
    role: Raw = _NONE
    content: Raw = _NONE


class _ChatMessage(_Message, gc=False):
    name: Raw = _NONE
    tool_calls: Raw = _NONE
    tool_call_id: Raw = _NONE
    function_call: Raw = _NONE


class _Item(_Message, gc=False):
    type: Raw = _NONE
    name: Raw = _NONE
    arguments: Raw = _NONE
    output: Raw = _NONE
    call_id: Raw = _NONE
    encrypted_content: Raw = _NONE


class Prompt(msgspec.Struct):
    """What is read of a request, whatever its dialect."""

    model: Raw = _NONE
    stream: Raw = _NONE
    cache_control: Raw = _NONE

    @property
    def control(self) -> bytes:
        """The mark at the top, as one is written within a part."""
        return b'"cache_control":' + bytes(memoryview(self.cache_control)[:_MAX_MARK_BYTES])


class _Messages(Prompt):
    tools: Raw = _NONE
    system: Raw = _NONE
    messages: list[_Message] = []


class _Converse(Prompt):
    tools: Raw = msgspec.field(default=_NONE, name="toolConfig")
    system: Raw = _NONE
    messages: list[_Message] = []


class _Chat(Prompt):
    tools: Raw = _NONE
    messages: list[_ChatMessage] = []


class _Response(Prompt):
    tools: Raw = _NONE
    system: Raw = msgspec.field(default=_NONE, name="instructions")
    messages: str | list[_Item] = msgspec.field(default="", name="input")
    previous_response_id: Raw = _NONE
    conversation: Raw = _NONE

    @property
    def elsewhere(self) -> bool:
        """Whether the provider has a part of the prompt already."""
        elsewhere = (self.previous_response_id, self.conversation)
        return any(memoryview(each) not in _NOTHING for each in elsewhere)


class _LongMessages(_Messages):
    messages: Raw = _NONE  # type: ignore[assignment]


class _LongConverse(_Converse):
    messages: Raw = _NONE  # type: ignore[assignment]


class _LongChat(_Chat):
    messages: Raw = _NONE  # type: ignore[assignment]


class _LongResponse(_Response):
    messages: Raw = msgspec.field(default=_NONE, name="input")  # type: ignore[assignment]


class _Reader(NamedTuple):
    """How prompts of a dialect are decoded."""

    whole: MemberReader[Any]
    long: MemberReader[Any]
    messages: msgspec.json.Decoder[Any]


_ANTHROPIC = _Reader(
    MemberReader(_Messages), MemberReader(_LongMessages), msgspec.json.Decoder(list[_Message])
)
_READERS: dict[Dialect, _Reader] = {
    Dialect.ANTHROPIC: _ANTHROPIC,
    Dialect.BEDROCK_INVOKE: _ANTHROPIC,
    Dialect.BEDROCK_CONVERSE: _ANTHROPIC._replace(
        whole=MemberReader(_Converse), long=MemberReader(_LongConverse)
    ),
    Dialect.OPENAI_CHAT: _Reader(
        MemberReader(_Chat), MemberReader(_LongChat), msgspec.json.Decoder(list[_ChatMessage])
    ),
    Dialect.OPENAI_RESPONSES: _Reader(
        MemberReader(_Response), MemberReader(_LongResponse), msgspec.json.Decoder(list[_Item])
    ),
}
_string = msgspec.json.Decoder(str).decode
_SYSTEM_ROLES = (b'"system"', b'"developer"')

_BLANKS = b" \t\n\r"
_LAST_MARKS = {
    json.dumps({"cache_control": control}, separators=separators)[1:].encode() + b"]": ttl_s
    for control, ttl_s in (
        ({"type": "ephemeral"}, _TTL_S),
        ({"type": "ephemeral", "ttl": "5m"}, _TTL_S),
        ({"type": "ephemeral", "ttl": "1h"}, _LONG_TTL_S),
    )
    for separators in ((",", ":"), (", ", ": "))
}
"""How a list ends that has one mark as nearly all clients write it, with its TTL."""
_CONTROL = re.compile(rb'"cache_control"\s*+:\s*+(?:null|(\{[^{}]*+\}))')
_POINT = re.compile(rb'\{\s*+"cachePoint"\s*+:\s*+(\{[^{}]*+\})\s*+\}')
_ASKS = re.compile(rb'"type"\s*+:\s*+"(?:ephemeral|default)"')
_COMMA = re.compile(rb"\s*+,\s*+")
_CLOSING = b" \t\n\r]}"
_COMPACT = b'[{"type":"text","text":'
_COMPACT_BYTES = len(_COMPACT)
_TEXT_END = b'"}]'
_SPACED = b'[{"type": "text", "text": '
_TEXT_FIRST = re.compile(rb'\[\s*+\{\s*+"type"\s*+:\s*+"text"\s*+,\s*+"text"\s*+:\s*+')


class _Chain:
    """Digests the parts of a section one after the other.

    Args:
        salt: of the digests.
        before: the digest of what precedes them.
        size: of what precedes them, in bytes.
    """

    __slots__ = ("_before", "_end", "_salt", "breakpoints", "count", "ends", "size")

    def __init__(self, salt: int, before: bytes, size: int) -> None:
        self.ends: list[bytes] = []
        """The digests up to the end of each part."""
        self.count = 0
        """How many parts."""
        self.breakpoints: list[Breakpoint] = []
        self.size = size
        self._before = before
        self._salt = salt
        self._end = b""

    @property
    def digest(self) -> bytes:
        """Of what precedes the parts, and of all of them."""
        return self._before + (self._end or xxh3_128_digest(b"", self._salt))

    def resume(self, ends: bytes, count: int, size: int) -> None:
        """Begin behind parts that are known."""
        self.ends.append(ends)
        self.count = count
        self.size += size
        self._end = ends[-16:]

    def add(self, head: Raw | bytes, plain: bytes | memoryview) -> None:
        """Take a part.

        Args:
            head: what comes before its content, such as its role.
            plain: its content, without marks.
        """
        self._end = end = self._behind(head, plain)
        self.ends.append(end)
        self.count += 1
        self.size += len(plain)

    def _behind(self, head: Raw | bytes, plain: bytes | memoryview) -> bytes:
        """Digest what was taken and a part behind it."""
        salt = self._salt
        if len(plain) > _MAX_JOINED_BYTES:
            plain = xxh3_128_digest(plain, salt)
        return xxh3_128_digest(b"".join((self._end, head, plain)), salt)

    def add_marked(
        self, head: bytes, content: bytes, marks: Sequence[tuple[int, int]]
    ) -> bytes | memoryview:
        """Take a part that had marks; returns what was digested of its content.

        Args:
            marks: where they were, and the TTL that each asked for.
        """
        last_ttl_s, end = -1, 1
        # Those before the last four would be left out in the end. A part may hold them all, and
        # be most of the body: it must not be gone through once for each.
        for at, ttl_s in marks[-_MAX_BREAKPOINTS:]:
            end = _end_of_block(content, at, end)
            if end == len(content):
                last_ttl_s = ttl_s
                continue
            plain = _plain_until(content, end)
            digest = self._before + self._behind(head, plain)
            self._note(digest, ttl_s, self.size + len(plain))
        plain = _plain(content)
        self.add(head, plain)
        if last_ttl_s >= 0:
            self.end(last_ttl_s)
        return plain

    def end(self, ttl_s: int) -> None:
        """Note a breakpoint at the end of what was taken."""
        self._note(self.digest, ttl_s, self.size)

    def _note(self, digest: bytes, ttl_s: int, size: int) -> None:
        self.breakpoints.append(Breakpoint(digest, ttl_s, size, self.count))


class Plan:
    """What of a long prompt was digested before, and what is to be remembered of it.

    Args:
        text: the list of messages.
        rest: what of it is behind the stretch that is known.
        known_to: where that ends.
        keep_to: where one ends that is to be remembered; 0 for none.
        behind: how many messages are behind that one.
    """

    __slots__ = (
        "asked",
        "beginning",
        "behind",
        "hour",
        "keep_to",
        "keys",
        "known",
        "known_to",
        "name",
        "rest",
        "text",
    )

    def __init__(
        self,
        text: memoryview = _NOWHERE,
        rest: bytes = b"",
        known: Stretch | None = None,
        known_to: int = 0,
        keep_to: int = 0,
        behind: int = 0,
    ) -> None:
        self.text = text
        self.rest = rest
        self.known = known
        self.known_to = known_to
        self.keep_to = keep_to
        self.behind = behind
        self.name: int | None = None
        """Of tools and system prompt."""
        self.beginning: Beginning | None = None
        """What is known of these."""
        self.keys = 0
        """How many places in them look like a mark."""
        self.asked = self.hour = False

    @property
    def length(self) -> int:
        """How many messages are known."""
        return 0 if self.known is None else self.known.length + self.known.system_length


class PrefixReader:
    """Reads request bodies of one dialect.

    Args:
        salt: of the digests, 64 bits.
        recall: what was digested before, under the same salt; shared with readers of other
            dialects.
    """

    def __init__(self, dialect: Dialect, salt: int, recall: Recall | None = None) -> None:
        self._salt = salt
        self._dialect = dialect
        self._reader = _READERS[dialect]
        mark = mark_of(dialect)
        self._key = mark.key
        self._mark = _POINT if mark is CACHE_POINT else _CONTROL
        self._kind = dialect.value.encode()
        self._recall = recall or Recall(salt)
        self._simple = dialect not in (Dialect.OPENAI_CHAT, Dialect.OPENAI_RESPONSES)
        """Whether a message is a role and a content, and nothing else."""

    @property
    def automatic(self) -> bool:
        """Whether a prompt may be cached that does not ask for it: by OpenAI, or where LiteLLM
        asks on its own account."""
        return not self._simple

    def fits(self, body: bytes) -> bool:
        """Say whether a body does not hold too much to be read."""
        return len(body) <= _COUNTED_FROM_BYTES or body.count(b"{") <= _MAX_OBJECTS

    def read(self, body: bytes) -> Prompt | None:
        """Decode a body that fits; None for one that is not of the dialect."""
        reader = self._reader.whole if len(body) <= _LONG_BYTES else self._reader.long
        prompt: Prompt | None = reader.strict(body)
        return prompt

    def plan(self, prompt: Any) -> Plan | None:
        """Find out what of a long prompt is known, and what is to be; None for a short one."""
        if not isinstance(prompt.messages, Raw):
            return None
        text = memoryview(prompt.messages)
        known, known_to = self._recall.stretch(self._kind, text)
        rest = bytes(text[known_to:])
        mark = find_in_windows(rest, self._key, 0)
        keep_to = self._recall.place(text, known_to, len(text) if mark < 0 else known_to + mark)
        behind = self._decoded(rest[keep_to - known_to :], keep_to) if keep_to else None
        if behind is None:
            keep_to = 0  # it was within a message
        plan = Plan(text, rest, known, known_to, keep_to, len(behind or ()))
        self._find_beginning(prompt, plan, self._kind)
        return plan

    def _find_beginning(self, prompt: Any, plan: Plan, kind: bytes) -> None:
        if not isinstance(prompt, _Chat):
            plan.name = self._recall.name(kind, prompt.tools, prompt.system)
            plan.beginning = self._recall.beginning(plan.name)

    def search(self, prompt: Any, plan: Plan, asking: Asking) -> int:
        """Look for what asks for caching in a long prompt; returns how many places look like it.

        What is known is not gone through again.
        """
        known = plan.beginning
        if known is None:
            parts = (prompt.tools,) if plan.name is None else (prompt.tools, prompt.system)
            for part in parts:
                own = Asking(True, asking.mark)
                plan.keys += own.count(part)
                plan.asked = plan.asked or bool(own.found.asked)
                plan.hour = plan.hour or bool(own.found.hour)
            keys, asked, hour = plan.keys, plan.asked, plan.hour
        else:
            keys, asked, hour = known.keys, known.asked, known.hour
        asking.add(asked, hour, keys)
        if prompt.cache_control:
            keys += asking.count(prompt.control)
        return keys + asking.count(plan.rest)

    def prefix(
        self, prompt: Any, plan: Plan | None, marks: int, *, in_steps: bool
    ) -> Generator[None, None, Prefix | None]:
        """Digest a prompt.

        Args:
            plan: of a long one.
            marks: how many places look like a mark.
            in_steps: whether to yield where the loop may run.

        Returns:
            None where it has no breakpoint, too much of anything, or is not whole in the request.
        """
        if marks > _MAX_MARKS or (isinstance(prompt, _Response) and prompt.elsewhere):
            return None
        messages: Any = prompt.messages
        if plan is not None:
            messages = self._decoded(plan.rest, plan.known_to)
            if in_steps:
                yield
        elif isinstance(messages, str):
            messages = _said(messages)
        if plan is None:
            plan = Plan()
            # It is searched as a whole: what its beginning asks for is not known by itself.
            self._find_beginning(prompt, plan, b"short " + self._kind)
        if messages is None or len(messages) + plan.length > _MAX_MESSAGES:
            return None
        for thorough in (False, True):
            reading = _Reading(self._salt, self._key, self._mark, thorough=thorough)
            found = yield from self._digest(prompt, messages, plan, reading, in_steps=in_steps)
            if reading.marks >= marks:
                break
            if in_steps:
                yield
        return found

    def _decoded(self, text: bytes, begin: int) -> list[Any] | None:
        """Decode a list of messages, or those behind a comma; None for anything else.

        Args:
            begin: the place of that comma in the list; 0 for all of it.
        """
        said = False
        if self._dialect is Dialect.OPENAI_RESPONSES:
            said = text.startswith(b'"')
            if not text or (said and len(text) > _MAX_TEXT_BYTES):
                return None
        elif not text:
            return []
        try:
            if said:
                return _said(_string(text))
            items = b"[" + text[1:] if begin else text
            messages: list[Any] = self._reader.messages.decode(items)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return messages

    def _beginning(self, prompt: Any, plan: Plan, reading: _Reading) -> Beginning:
        """Digest tools and system prompt, or know them."""
        known = plan.beginning
        if known is not None and not reading.thorough:
            reading.marks += known.marks
            reading.walk(*known.walked)
            return known
        before = reading.marks
        tools = _Chain(self._salt, b"", 0)
        reading.add_section(tools, prompt.tools)
        system = _Chain(self._salt, tools.digest, tools.size)
        reading.add_section(system, prompt.system)
        made = _beginning_of(tools, system, reading.marks - before, plan, reading.walked)
        sizes = (tools.size, system.size - tools.size)
        whole = not (reading.thorough or reading.lost)
        if plan.name is not None and whole and _untold(*sizes):
            self._recall.keep_beginning(plan.name, made)
        return made

    def _digest(
        self, prompt: Any, messages: Any, plan: Plan, reading: _Reading, *, in_steps: bool
    ) -> Generator[None, None, Prefix | None]:
        salt, known = self._salt, plan.known
        if isinstance(prompt, _Chat):
            tools = _Chain(salt, b"", 0)
            reading.add_section(tools, prompt.tools)
            system = _Chain(salt, tools.digest, tools.size)
            first = 0
            if known is not None:
                if known.system:
                    system.resume(known.system, known.system_length, known.system_size)
            else:
                while first < len(messages) and bytes(messages[first].role) in _SYSTEM_ROLES:
                    first += 1
            if in_steps:
                yield from reading.add_in_steps(system, messages[:first])
            else:
                reading.add_messages(system, messages[:first])
            messages = messages[first:]
            beginning = _beginning_of(tools, system, 0, plan, (0, 0))
            system_end = system.digest[16:] if system.count else b""
            system_length, system_size = system.count, system.size - tools.size
        else:
            beginning = self._beginning(prompt, plan, reading)
            system_end, system_length, system_size = b"", 0, 0
        rest = _Chain(salt, beginning.digest, beginning.size)
        second = b""
        if known is not None:
            rest.resume(known.ends, known.length, known.size)
            second = known.second
        kept = len(messages) - plan.behind if plan.keep_to else 0
        if kept > 0 and not reading.thorough:
            first_size = len(_plain(bytes(messages[0].content))) if known is None else 0
            if in_steps:
                second = (yield from reading.add_in_steps(rest, messages[:kept])) or second
            else:
                second = reading.add_messages(rest, messages[:kept]) or second
            messages = messages[kept:]
            if not reading.lost and _untold(first_size, system_size):
                stretch = Stretch(
                    rest.count,
                    system_length,
                    b"".join(rest.ends),
                    rest.size - beginning.size,
                    second,
                    system_end,
                    system_size,
                )
                self._recall.keep_stretch(self._kind, plan.text, plan.keep_to, stretch)
        if in_steps:
            second = (yield from reading.add_in_steps(rest, messages)) or second
        else:
            second = reading.add_messages(rest, messages) or second
        if prompt.cache_control:
            reading.marks += 1
            asked = _CONTROL.match(prompt.control)
            if asked is not None and asked[1] and _ASKS.search(asked[1]):
                rest.end(_ttl_s(asked[1]))
        found = [*beginning.breakpoints, *rest.breakpoints]
        if not found and not self._simple:
            if beginning.size:
                found.append(Breakpoint(beginning.digest, 0, beginning.size, 0))
            rest.end(0)
            found += rest.breakpoints
        if not found or reading.lost:
            return None
        return Prefix(
            beginning.digest[:16],
            beginning.digest[16:],
            b"".join(rest.ends),
            second,
            tuple(found[-_MAX_BREAKPOINTS:]),
            rest.size,
        )


def _beginning_of(
    tools: _Chain, system: _Chain, marks: int, plan: Plan, walked: tuple[int, int]
) -> Beginning:
    found = [
        Breakpoint(digest, ttl_s, size, 0)
        for digest, ttl_s, size, _ in (*tools.breakpoints, *system.breakpoints)
    ]
    asked = (plan.keys, plan.asked, plan.hour)
    return Beginning(system.digest, system.size, tuple(found), marks, *asked, walked)


def _untold(*sizes: int) -> bool:
    """Whether digests of texts of these sizes tell nothing of them."""
    return all(size == 0 or size >= MIN_BYTES for size in sizes)


def _said(text: str) -> list[_Message]:
    """Write a prompt that is a string as the message that it stands for."""
    return [_Message(Raw(b'"user"'), Raw(msgspec.json.encode(text)))]


class _Reading:
    """Goes through a prompt.

    A mark is nearly always the last member of the last block of its part. At first only there is
    looked for marks; if these are not all that the body has, everything is searched.
    """

    __slots__ = (
        "_brackets",
        "_bytes",
        "_key",
        "_mark",
        "_salt",
        "_tail",
        "lost",
        "marks",
        "thorough",
    )

    def __init__(self, salt: int, key: bytes, mark: re.Pattern[bytes], *, thorough: bool) -> None:
        self._salt = salt
        self._key = key
        self._mark = mark
        self._tail = slice(None if thorough else -_TAIL_BYTES, None)
        self.thorough = thorough
        self.marks = 0
        """How many were found that look like one."""
        self._brackets = _MAX_BRACKETS
        self._bytes = _MAX_WALKED_BYTES
        self.lost = False
        """Whether there is a part of which nothing can be said."""

    @property
    def walked(self) -> tuple[int, int]:
        """How many bytes and brackets were gone through to find the ends of blocks."""
        return _MAX_WALKED_BYTES - self._bytes, _MAX_BRACKETS - self._brackets

    def walk(self, size: int, brackets: int) -> None:
        """Take notice that so much was gone through."""
        self._bytes -= size
        self._brackets -= brackets

    def add_section(self, chain: _Chain, value: Raw) -> None:
        """Take tools or a system prompt for one part, if there is anything."""
        content = bytes(value)
        if content in _ABSENT:
            return
        if self._key in content[self._tail]:
            self._add_marked(chain, b"", content)
        else:
            chain.add(b"", _plain(content))

    def add_in_steps(
        self, chain: _Chain, messages: Sequence[_Message]
    ) -> Generator[None, None, bytes]:
        """Take messages as `add_messages` does, and yield between so many."""
        second = b""
        for start in range(0, len(messages), _STEP_MESSAGES):
            if self.lost:
                break
            batch = messages[start : start + _STEP_MESSAGES]
            second = self.add_messages(chain, batch) or second
            yield
        return second

    def add_messages(self, chain: _Chain, messages: Sequence[_Message]) -> bytes:
        """Take messages; returns the digest of the second alone, if it tells."""
        key, tail, add, quick = self._key, self._tail, chain.add, not self.thorough
        others = messages[0].__struct_fields__[2:] if messages else ()
        second = b""
        for message in messages:
            content = bytes(message.content)
            head: Raw | bytes = message.role
            if others:
                head = b"".join((head, *[getattr(message, name) for name in others]))
            plain: bytes | memoryview
            if quick and content.endswith(_TEXT_END) and content.startswith(_COMPACT):
                # Behind a mark at the end there is a brace more.
                plain = content[_COMPACT_BYTES:-2]
                add(head, plain)
            elif key in content[tail]:
                plain = self._add_marked(chain, bytes(head), content)
                if self.lost:
                    break
            else:
                plain = _plain(content)
                add(head, plain)
            if chain.count == 2 and len(plain) >= _TELLING_BYTES:
                second = xxh3_128_digest(bytes(head) + plain, self._salt)
        return second

    def _add_marked(self, chain: _Chain, head: bytes, content: bytes) -> bytes | memoryview:
        """Take a part that may have marks; returns what was digested of its content."""
        at = content.rfind(self._key, max(0, len(content) - _TAIL_BYTES))
        ttl_s = _LAST_MARKS.get(content[at:])
        short = len(content) <= _COUNTED_FROM_BYTES
        find = bytes.find if short else find_in_windows
        if ttl_s is not None and find(content, self._key, 0) == at:
            end = at - 1
            if content[end] in _BLANKS:
                end = _end_before_blanks(content, at) - 1
            if content[end] == 0x2C:
                self.marks += 1
                begin = _begin_of_text(content)
                bare = short and content[end - 1] not in _BLANKS
                plain = content[begin:end] if bare else _cut(content, begin, end)
                chain.add(head, plain)
                chain.end(ttl_s)
                return plain
        content, marks = self._unmarked(content)
        if marks and not _closed(content, marks[0][0]):
            self._bytes -= len(content)
            if self._bytes >= 0:
                self._brackets -= content.count(b"[") + content.count(b"{")
            if self._bytes < 0 or self._brackets < 0:
                self.lost = True
                return b""
        return chain.add_marked(head, content, marks)

    def _unmarked(self, text: bytes) -> tuple[bytes, list[tuple[int, int]]]:
        """Take the marks out of a list of blocks, each with its comma.

        Returns:
            The rest; and where marks were in it that ask for caching, each with its TTL.
        """
        marks: list[tuple[int, int]] = []
        view = _view(text)
        pieces: list[bytes | memoryview] = []
        kept = size = at = 0
        while (at := text.find(self._key, at)) >= 0:
            self.marks += 1
            begin = at
            if self._mark is _POINT:
                begin = text.rfind(b"{", max(kept, at - _MAX_BLANKS), at)
            found = self._mark.match(text, begin, at + _MAX_MARK_BYTES) if begin >= 0 else None
            if found is None:
                at += len(self._key)
                continue
            at = found.end()
            before = begin
            if text[before - 1] in _BLANKS:
                before = _end_before_blanks(text, before)
            if text[before - 1] == 0x2C and before > kept:
                begin = before - 1
            elif (comma := _COMMA.match(text, at, at + _MAX_BLANKS)) is not None:
                at = comma.end()
            pieces.append(view[kept:begin])
            size += begin - kept
            kept = at
            if found[1] and _ASKS.search(found[1]):
                marks.append((size, _ttl_s(found[1])))
        pieces.append(view[kept:])
        return b"".join(pieces), marks


def _ttl_s(control: bytes) -> int:
    return _LONG_TTL_S if b'"1h"' in control else _TTL_S


def _closed(content: bytes, at: int) -> bool:
    """Whether nothing but ends follows. What follows from far is not looked at."""
    return len(content) - at <= _MAX_ENDS and not content[at:].translate(None, _CLOSING)


def _end_of_block(content: bytes, at: int, begin: int) -> int:
    """Return where the block ends that a place stands in: at the end of all if it is the last.

    Args:
        begin: where to look from; the place may be before that, in the block that ends there.
    """
    if at < begin:
        return begin
    if _closed(content, at) or not content.startswith(b"["):
        return len(content)
    end = end_of_item(content, at, begin)
    return len(content) if _closed(content, end) else end


# A content may have megabytes: to copy it takes half a millisecond for each, with the memory that
# this needs, and to search it as much. For short ones other ways are quicker.


def _view(content: bytes) -> bytes | memoryview:
    return memoryview(content) if len(content) > _COUNTED_FROM_BYTES else content


def _cut(content: bytes, begin: int, end: int) -> bytes | memoryview:
    """Cut out what may end with blanks, without these."""
    if content[end - 1] in _BLANKS:
        end = _end_before_blanks(content, end)
    return _view(content)[begin:end]


def _end_before_blanks(content: bytes, end: int) -> int:
    blanks = content[max(0, end - _MAX_BLANKS) : end]
    return end - len(blanks) + len(blanks.rstrip())


def _begin_of_text(content: bytes) -> int:
    """Return where the text begins that a list begins with; 0 for what is no such list."""
    if not content.startswith(b"["):
        return 0
    if content.startswith(_COMPACT):
        return _COMPACT_BYTES
    if content.startswith(_SPACED):
        return len(_SPACED)
    found = _TEXT_FIRST.match(content, 0, _MAX_BLANKS)
    return 0 if found is None else found.end()


def _plain(content: bytes) -> bytes | memoryview:
    """Write a list that begins with a text as if that stood alone, as a string.

    The last brace and bracket of a list are left out, whatever it begins with.
    """
    begin = _begin_of_text(content)
    if content.endswith(b"}]"):
        if len(content) <= _COUNTED_FROM_BYTES and content[-3] not in _BLANKS:
            return content[begin:-2]
        return _cut(content, begin, len(content) - 2)
    if not begin:
        return content
    end = _end_before_blanks(content, len(content) - 1) - 1  # the brace of the last block
    return _cut(content, begin, end)


def _plain_until(content: bytes, end: int) -> bytes | memoryview:
    """Write a list in the same way as if it ended behind one of its blocks."""
    begin = _begin_of_text(content)
    if content[end - 1] == 0x7D:
        return _cut(content, begin, end - 1)
    if not begin:
        return content[:end] + b"]"
    return _cut(content, begin, _end_before_blanks(content, end) - 1)
