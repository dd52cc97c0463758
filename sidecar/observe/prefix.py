"""Where a prompt can be cached: digests of what stands before each of its breakpoints.

Providers keep a prompt in the order tools, system, messages, up to the marks that ask for it.
The marks themselves move from turn to turn, and are taken out before anything is digested. A
text is the same prompt as a string and as the first block of a list. The order of keys is kept,
because models see it; so are blanks between them, because a client writes all of its requests
in one way.

The digests are fast ones under a salt. They pass on with the facts of their request and are not
for keeping: whoever remembers them hashes them once more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Raw
from xxhash import xxh3_128, xxh3_128_digest

from sidecar.exchange import Breakpoint, Dialect, Prefix
from sidecar.observe.members import MemberReader, end_of_item

__all__ = ["PrefixReader", "Prompt"]

_TTL_S, _LONG_TTL_S = 300, 3600
_MAX_BREAKPOINTS = 4
_MAX_MARKS = 1024
_MAX_OBJECTS = 16 * 1024
"""Of a prompt with more marks or objects nothing is said: to read it would hold up the loop."""
_COUNTED_FROM_BYTES = 128 * 1024
"""Up to this size a body cannot hold so many that it takes more than a few milliseconds."""
_MAX_MESSAGES = 2048
_MAX_TEXT = 256 * 1024
_MAX_BRACKETS = 8192
_MAX_WALKED_BYTES = 1024 * 1024
"""In parts of no more in all the ends of blocks within are looked for: each bracket may cost a
step, and each megabyte 3 ms."""
_TAIL_BYTES = 96
"""Where a mark is nearly always found; for a whole one without blanks 65 are enough."""
_TELLING_BYTES = 100
"""A second message of so many bytes is not said in two conversations; `yes` is."""
_MAX_ENDS = 4096
_MAX_BLANKS = 256
"""Blanks that are gone through to find the comma before a mark."""

_NONE = Raw()
_ABSENT = (b"", b"null", b"[]")


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

    model: Any = None
    stream: Any = None
    cache_control: Raw = _NONE


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
    previous_response_id: Any = None
    conversation: Any = None

    @property
    def elsewhere(self) -> bool:
        """Whether the provider has a part of the prompt already."""
        return self.previous_response_id is not None or self.conversation is not None


_PROMPTS: dict[Dialect, MemberReader[Any]] = {
    Dialect.ANTHROPIC: MemberReader(_Messages),
    Dialect.BEDROCK_INVOKE: MemberReader(_Messages),
    Dialect.BEDROCK_CONVERSE: MemberReader(_Converse),
    Dialect.OPENAI_CHAT: MemberReader(_Chat),
    Dialect.OPENAI_RESPONSES: MemberReader(_Response),
}
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
_CLOSED = re.compile(rb"[\s\]}]*+")
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

    __slots__ = ("_before", "_hash", "breakpoints", "ends", "size")

    def __init__(self, salt: int, before: bytes, size: int) -> None:
        self.ends: list[bytes] = []
        """The digest up to the end of each part."""
        self.breakpoints: list[Breakpoint] = []
        self.size = size
        self._before = before
        self._hash = xxh3_128(seed=salt)

    @property
    def digest(self) -> bytes:
        """Of what precedes the parts, and of all of them."""
        return self._before + self._hash.digest()

    def add(self, head: Raw | bytes, plain: bytes) -> None:
        """Take a part.

        Args:
            head: what comes before its content, such as its role.
            plain: its content, without marks.
        """
        digest = self._hash
        digest.update(head)
        digest.update(plain)
        self.ends.append(digest.digest())
        self.size += len(plain)

    def add_marked(self, head: bytes, content: bytes, marks: Sequence[tuple[int, int]]) -> None:
        """Take a part that had marks.

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
            plain, within = _plain(content[:end] + b"]"), self._hash.copy()
            within.update(head)
            within.update(plain)
            self._note(self._before + within.digest(), ttl_s, self.size + len(plain))
        self.add(head, _plain(content))
        if last_ttl_s >= 0:
            self.end(last_ttl_s)

    def end(self, ttl_s: int) -> None:
        """Note a breakpoint at the end of what was taken."""
        self._note(self.digest, ttl_s, self.size)

    def _note(self, digest: bytes, ttl_s: int, size: int) -> None:
        self.breakpoints.append(Breakpoint(digest, ttl_s, size, len(self.ends)))


class PrefixReader:
    """Reads request bodies of one dialect.

    Args:
        salt: of the digests, 64 bits.
    """

    def __init__(self, dialect: Dialect, salt: int) -> None:
        self._salt = salt
        self._decode = _PROMPTS[dialect].strict
        converse = dialect is Dialect.BEDROCK_CONVERSE
        self._key, self._mark = (
            (b'"cachePoint"', _POINT) if converse else (b'"cache_control"', _CONTROL)
        )
        self._simple = dialect not in (Dialect.OPENAI_CHAT, Dialect.OPENAI_RESPONSES)
        """Whether a message is a role and a content, and nothing else."""

    @property
    def automatic(self) -> bool:
        """Whether a prompt may be cached that does not ask for it: by OpenAI, or where LiteLLM
        asks on its own account."""
        return not self._simple

    def read(self, body: bytes) -> Prompt | None:
        """Decode a body; None for one that is not of the dialect, or holds too much."""
        if len(body) > _COUNTED_FROM_BYTES and body.count(b"{") > _MAX_OBJECTS:
            return None
        prompt: Prompt | None = self._decode(body)
        return prompt

    def prefix(self, prompt: Any, marks: int) -> Prefix | None:
        """Digest a prompt.

        Args:
            marks: how many places in the body look like one.

        Returns:
            None where it has no breakpoint, too much of anything, or is not whole in the request.
        """
        bound = _MAX_TEXT if isinstance(prompt.messages, str) else _MAX_MESSAGES
        if marks > _MAX_MARKS or len(prompt.messages) > bound:
            return None
        if isinstance(prompt, _Response) and prompt.elsewhere:
            return None
        reading = _Reading(self._salt, self._key, self._mark, thorough=False)
        found = self._digest(prompt, reading)
        if reading.marks < marks:
            reading = _Reading(self._salt, self._key, self._mark, thorough=True)
            found = self._digest(prompt, reading)
        return found

    def _digest(self, prompt: Any, reading: _Reading) -> Prefix | None:
        salt, messages = self._salt, prompt.messages
        tools = _Chain(salt, b"", 0)
        reading.add_section(tools, prompt.tools)
        system = _Chain(salt, tools.digest, tools.size)
        if isinstance(prompt, _Chat):
            first = 0
            while first < len(messages) and bytes(messages[first].role) in _SYSTEM_ROLES:
                first += 1
            reading.add_messages(system, messages[:first])
            messages = messages[first:]
        else:
            reading.add_section(system, prompt.system)
        if isinstance(messages, str):
            messages = [_Message(Raw(b'"user"'), Raw(msgspec.json.encode(messages)))]
        rest = _Chain(salt, system.digest, system.size)
        second = reading.add_messages(rest, messages)
        if prompt.cache_control:
            reading.marks += 1
            asked = _CONTROL.match(b'"cache_control":' + bytes(prompt.cache_control))
            if asked is not None and asked[1] and _ASKS.search(asked[1]):
                rest.end(_ttl_s(asked[1]))
        if not self._simple and not (tools.breakpoints or system.breakpoints or rest.breakpoints):
            if system.size:
                system.end(0)
            rest.end(0)
        found = [
            Breakpoint(digest, ttl_s, size, 0)
            for digest, ttl_s, size, _ in (*tools.breakpoints, *system.breakpoints)
        ]
        found += rest.breakpoints
        if not found or reading.lost:
            return None
        before = system.digest
        return Prefix(
            before[:16],
            before[16:],
            b"".join(rest.ends),
            second,
            tuple(found[-_MAX_BREAKPOINTS:]),
            rest.size,
        )


class _Reading:
    """Goes through a prompt.

    A mark is nearly always the last member of the last block of its part. At first only there is
    looked for marks; if these are not all that the body has, everything is searched.
    """

    __slots__ = ("_brackets", "_bytes", "_key", "_mark", "_salt", "_tail", "lost", "marks")

    def __init__(self, salt: int, key: bytes, mark: re.Pattern[bytes], *, thorough: bool) -> None:
        self._salt = salt
        self._key = key
        self._mark = mark
        self._tail = slice(None if thorough else -_TAIL_BYTES, None)
        self.marks = 0
        """How many were found that look like one."""
        self._brackets = _MAX_BRACKETS
        self._bytes = _MAX_WALKED_BYTES
        self.lost = False
        """Whether there is a part of which nothing can be said."""

    def add_section(self, chain: _Chain, value: Raw) -> None:
        """Take tools or a system prompt for one part, if there is anything."""
        content = bytes(value)
        if content in _ABSENT:
            return
        if self._key in content[self._tail]:
            self._add_marked(chain, b"", content)
        else:
            chain.add(b"", _plain(content))

    def add_messages(self, chain: _Chain, messages: Sequence[_Message]) -> bytes:
        """Take messages; returns the digest of the second alone, if it tells."""
        key, tail, add = self._key, self._tail, chain.add
        second = b""
        for message in messages:
            content = bytes(message.content)
            head: Raw | bytes = message.role
            if type(message) is not _Message:
                others = [getattr(message, name) for name in message.__struct_fields__[2:]]
                head = b"".join((head, *others))
            if key in content[tail]:
                content = self._add_marked(chain, bytes(head), content)
                if self.lost:
                    break
            elif content.startswith(_COMPACT) and content.endswith(_TEXT_END):
                add(head, content[_COMPACT_BYTES:-2])
            else:
                add(head, _plain(content))
            if len(chain.ends) == 2 and len(content) >= _TELLING_BYTES:
                second = xxh3_128_digest(bytes(head) + _plain(content), self._salt)
        return second

    def _add_marked(self, chain: _Chain, head: bytes, content: bytes) -> bytes:
        """Take a part that has marks; returns it without them."""
        at = content.rfind(self._key)
        ttl_s = _LAST_MARKS.get(content[at:])
        if ttl_s is not None and content.find(self._key) == at:
            before = content[:at].rstrip()
            if before.endswith(b","):
                self.marks += 1
                content = before[:-1] + b"}]"
                chain.add(head, _plain(content))
                chain.end(ttl_s)
                return content
        content, marks = self._unmarked(content)
        if marks and not _closed(content, marks[0][0]):
            self._bytes -= len(content)
            if self._bytes >= 0:
                self._brackets -= content.count(b"[") + content.count(b"{")
            if self._bytes < 0 or self._brackets < 0:
                self.lost = True
                return content
        chain.add_marked(head, content, marks)
        return content

    def _unmarked(self, text: bytes) -> tuple[bytes, list[tuple[int, int]]]:
        """Take the marks out of a list of blocks, each with its comma.

        Returns:
            The rest; and where marks were in it that ask for caching, each with its TTL.
        """
        marks: list[tuple[int, int]] = []
        pieces: list[bytes] = []
        kept = size = at = 0
        while (at := text.find(self._key, at)) >= 0:
            self.marks += 1
            begin = text.rfind(b"{", kept, at) if self._mark is _POINT else at
            found = self._mark.match(text, begin) if begin >= 0 else None
            if found is None:
                at += len(self._key)
                continue
            before = begin - 1
            while before > begin - _MAX_BLANKS and text[before] in _BLANKS:
                before -= 1
            at = found.end()
            if text[before] == 0x2C:
                begin = before
            elif (comma := _COMMA.match(text, at)) is not None:
                at = comma.end()
            pieces.append(text[kept:begin])
            size += begin - kept
            kept = at
            if found[1] and _ASKS.search(found[1]):
                marks.append((size, _ttl_s(found[1])))
        pieces.append(text[kept:])
        return b"".join(pieces), marks


def _ttl_s(control: bytes) -> int:
    return _LONG_TTL_S if b'"1h"' in control else _TTL_S


def _closed(content: bytes, at: int) -> bool:
    """Whether nothing but ends follows. What follows from far is not looked at."""
    return len(content) - at <= _MAX_ENDS and _CLOSED.fullmatch(content, at) is not None


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


def _plain(content: bytes) -> bytes:
    """Write a list that begins with a text as if that stood alone, as a string."""
    if not content.startswith(b"["):
        return content
    if content.startswith(_COMPACT):
        begin = len(_COMPACT)
    elif content.startswith(_SPACED):
        begin = len(_SPACED)
    else:
        found = _TEXT_FIRST.match(content)
        if found is None:
            return content
        begin = found.end()
    if content.endswith(b"}]") and content[-3] not in _BLANKS:
        return content[begin:-2]
    end = len(content[:-1].rstrip()) - 1  # the brace of the last block
    return content[begin:end].rstrip()
