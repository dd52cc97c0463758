"""The records that pass between the rooms of the sidecar.

Everything here is a frozen value or a closed enum whose values become label values. The values
are tuples, because some are made on every request: a frozen dataclass takes twice as long.
Data moves one way: `proxy` makes an `Exchange`, `observe` fills its `Observation`,
`account` turns it into names and numbers. Nothing here knows any of the three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

__all__ = [
    "LABEL_NAMES",
    "NO_REMARKS",
    "NO_TERMS",
    "NO_USAGE",
    "PRICE_SOURCES",
    "Accounts",
    "Breakpoint",
    "Dialect",
    "End",
    "Exchange",
    "InputClass",
    "LogFault",
    "MissReason",
    "Observation",
    "Observer",
    "Outcome",
    "Prefix",
    "RawHeaders",
    "RefusalReason",
    "Remarks",
    "RequestFacts",
    "RequestReader",
    "Rewrite",
    "Rewriting",
    "Route",
    "Status",
    "Tap",
    "Terms",
    "Transformer",
    "UpstreamFault",
    "Usage",
    "first_values",
    "header",
]

RawHeaders = Sequence[tuple[bytes, bytes]]
"""Header pairs in wire order, repeats kept, names in lower case (as ASGI gives them)."""


LABEL_NAMES = (
    "model",
    "team_alias",
    "provider",
    "response_model",
    "model_id",
    "api_key_alias",
    "hashed_api_key",
    "client",
)
"""All labels that token series can carry, in their order."""

PRICE_SOURCES = ("file", "model_info", "cost_map", "package")
"""Where prices come from, in their order: the operator's file, LiteLLM's `/v1/model/info` and
its cost map, the `genai-prices` package. They are values of the `source` label."""


class _LabelValue(StrEnum):
    """A closed set of label values. They are keys of dictionaries on every request's path, and
    `Enum` hashes its members in Python."""

    __hash__ = str.__hash__


class Route(_LabelValue):
    """The `route` label: LiteLLM's own paths, so that its series and ours can be joined."""

    MESSAGES = "/v1/messages"
    COUNT_TOKENS = "/v1/messages/count_tokens"
    ANTHROPIC_MESSAGES = "/anthropic/v1/messages"
    CHAT_COMPLETIONS = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    RESPONSES = "/v1/responses"
    REALTIME = "/v1/realtime"
    EMBEDDINGS = "/v1/embeddings"
    MODELS = "/v1/models"
    ENGINES_CHAT = "/engines/{model}/chat/completions"
    ENGINES_COMPLETIONS = "/engines/{model}/completions"
    DEPLOYMENTS_CHAT = "/openai/deployments/{model}/chat/completions"
    DEPLOYMENTS_COMPLETIONS = "/openai/deployments/{model}/completions"
    OPENAI_ENDPOINT = "/openai/{endpoint}"
    AZURE_ENDPOINT = "/azure/{endpoint}"
    AZURE_AI_ENDPOINT = "/azure_ai/{endpoint}"
    BEDROCK_ENDPOINT = "/bedrock/{endpoint}"
    VERTEX_ENDPOINT = "/vertex_ai/{endpoint}"
    OTHER = "other"


class Dialect(_LabelValue):
    """How a provider's answers spell `usage`."""

    ANTHROPIC = "anthropic"
    OPENAI_CHAT = "openai_chat"
    OPENAI_RESPONSES = "openai_responses"
    BEDROCK_INVOKE = "bedrock_invoke"
    BEDROCK_CONVERSE = "bedrock_converse"


class End(_LabelValue):
    """How the response body ended, seen from the relay."""

    COMPLETE = "complete"
    UPSTREAM_CUT = "upstream_cut"
    CLIENT_LEFT = "client_left"


class Status(_LabelValue):
    """What could be read of one answer on an observed route."""

    COMPLETE = "complete"
    """Read to its end."""
    PARTIAL = "partial"
    """The stream was cut, the client left, or an error event came after the start."""
    MISSING = "missing"
    """A 2xx answer that says nothing about usage."""
    INVALID = "invalid"
    """A usage, or the events around it, that contradict the protocol."""
    OVERSIZED = "oversized"
    """A part that had to be read was larger than a bound."""
    ENCODED = "encoded"
    """A content coding that the sidecar does not decode."""
    ERROR = "error"
    """A non-2xx answer, or an error event before any usage."""


class Outcome(_LabelValue):
    """What the provider's prompt cache did for one 2xx answer, by precedence."""

    HIT = "hit"
    WRITE = "write"
    NOT_CACHED = "not_cached"
    NOT_ASKED = "not_asked"
    UNREPORTED = "unreported"
    UNKNOWN = "unknown"


class MissReason(_LabelValue):
    """Why a request that asked for caching read nothing, from what this sidecar saw itself."""

    NOT_SEEN_HERE = "not_seen_here"
    """Nothing like it was seen here; through another replica it may have been."""
    EXPIRED = "expired"
    """The prefix was used here before, longer ago than it is kept."""
    CHANGED_SYSTEM = "changed_system"
    """Against the last one of the same key and model, the system prompt is the first to differ."""
    CHANGED_TOOLS = "changed_tools"
    CHANGED_MESSAGES = "changed_messages"
    OTHER_DEPLOYMENT = "other_deployment"
    """The prefix is alive, but was written through another deployment of LiteLLM's."""
    TOO_SHORT = "too_short"
    """The prefix has fewer tokens than the model keeps."""
    UNKNOWN = "unknown"


class Rewrite(_LabelValue):
    """What became of one answer whose usage was to be rewritten; the first that holds."""

    UNKNOWN_MODEL = "unknown_model"
    """Named models alone are rewritten, and which one was asked for is not known."""
    NO_TRANSFORM = "no_transform"
    """Request or answer forbid that content be changed (RFC 9111 sections 5.2.1.6, 5.2.2.6)."""
    ENCODED = "encoded"
    """It has a content coding, though identity was asked for."""
    OVERSIZED = "oversized"
    """A usage stands, or may stand, in a part that is larger than a bound."""
    UNREADABLE = "unreadable"
    """A usage stands in what is not one JSON text, or is no object."""
    REWRITTEN = "rewritten"
    """Members were added."""
    PRESENT = "present"
    """The usage had the member already."""
    UNREPORTED = "unreported"
    """The usage says nothing that could be added."""
    MISSING = "missing"
    """There is no usage, or none has come."""


class InputClass(_LabelValue):
    """The `cache` label: disjoint parts of the prompt, whose sum is the whole prompt."""

    UNCACHED = "uncached"
    READ = "read"
    WRITE_5M = "write_5m"
    WRITE_1H = "write_1h"
    WRITE_UNKNOWN = "write_unknown"


class UpstreamFault(_LabelValue):
    """Why the upstream gave no response, or not all of it."""

    NO_FILE_DESCRIPTORS = "no_file_descriptors"
    CONNECT_FAILED = "connect_failed"
    CONNECT_TIMEOUT = "connect_timeout"
    STALE_CONNECTION = "stale_connection"
    CONNECTION_LOST = "connection_lost"
    SEND_TIMEOUT = "send_timeout"
    MALFORMED_REQUEST = "malformed_request"
    MALFORMED_RESPONSE = "malformed_response"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    IDLE_TIMEOUT = "idle_timeout"
    BODY_CUT = "body_cut"


class RefusalReason(_LabelValue):
    """Why the sidecar itself turned a client away, before anything reached the upstream."""

    BAD_REQUEST = "bad_request"
    BAD_HOST = "bad_host"
    BAD_TARGET = "bad_target"
    BAD_BODY = "bad_body"
    BAD_TRANSFER_ENCODING = "bad_transfer_encoding"
    UNKNOWN_TRANSFER_ENCODING = "unknown_transfer_encoding"
    CONNECT = "connect"
    HTTP_VERSION = "http_version"
    HEAD_TOO_LARGE = "head_too_large"
    REQUEST_TOO_LARGE = "request_too_large"
    SLOW_HEAD = "slow_head"
    SLOW_BODY = "slow_body"
    SLOW_READER = "slow_reader"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    TOO_MANY_REQUESTS = "too_many_requests"
    DRAINING = "draining"
    """It was under way, without an answer, when the time to drain was over."""


class LogFault(_LabelValue):
    """Why a line of a log was lost, or what else failed in keeping it."""

    NO_SPACE = "no_space"
    """The disk, the quota or the largest size of a file is used up."""
    UNAVAILABLE = "unavailable"
    """The file cannot be opened: its directory is gone, or may not be written to."""
    CLOSED = "closed"
    """Nobody reads standard output any more."""
    BUFFER_FULL = "buffer_full"
    """Standard output is read too slowly, or no longer."""
    IO_ERROR = "io_error"
    """The system refused to write, for another reason."""
    ROTATION = "rotation"
    """A file that is full could not be renamed; nothing is lost, it grows on."""


class Usage(NamedTuple):
    """Token counts as the wire said them; `None` where it said nothing, or null.

    The fields carry Anthropic's names. `input_tokens` is the part that was neither read from
    nor written to the cache.
    """

    input_tokens: int | None = None
    """`usage.input_tokens`, tokens."""
    output_tokens: int | None = None
    """`usage.output_tokens`, tokens; cumulative in a stream."""
    cache_read_input_tokens: int | None = None
    """`usage.cache_read_input_tokens`, tokens."""
    cache_creation_input_tokens: int | None = None
    """`usage.cache_creation_input_tokens`, tokens of both TTLs."""
    ephemeral_5m_input_tokens: int | None = None
    """`usage.cache_creation.ephemeral_5m_input_tokens`, tokens."""
    ephemeral_1h_input_tokens: int | None = None
    """`usage.cache_creation.ephemeral_1h_input_tokens`, tokens."""

    @property
    def cache_reported(self) -> bool:
        """Whether any cache field was said: zero is an answer, absence is none."""
        return self.cache_read_input_tokens is not None or self.writes_reported

    @property
    def writes_reported(self) -> bool:
        """Whether anything was said of what was written."""
        return not (
            self.cache_creation_input_tokens is None
            and self.ephemeral_5m_input_tokens is None
            and self.ephemeral_1h_input_tokens is None
        )

    @property
    def read_tokens(self) -> int:
        """Tokens read from the cache."""
        return self.cache_read_input_tokens or 0

    @property
    def write_tokens(self) -> int:
        """Tokens written to the cache: the total where it was said, else the sum of its split."""
        if self.cache_creation_input_tokens is not None:
            return self.cache_creation_input_tokens
        return (self.ephemeral_5m_input_tokens or 0) + (self.ephemeral_1h_input_tokens or 0)

    def input_classes(self) -> tuple[int, int, int, int, int]:
        """Split the prompt into the five classes, in the order of `InputClass`.

        The total of written tokens wins over its split: what the split does not cover is
        `write_unknown`, and a split that exceeds the total is clamped to it.
        """
        total = self.write_tokens
        if not total:
            return (self.input_tokens or 0, self.cache_read_input_tokens or 0, 0, 0, 0)
        write_5m = min(self.ephemeral_5m_input_tokens or 0, total)
        write_1h = min(self.ephemeral_1h_input_tokens or 0, total - write_5m)
        return (
            self.input_tokens or 0,
            self.read_tokens,
            write_5m,
            write_1h,
            total - write_5m - write_1h,
        )


NO_USAGE = Usage()
"""Nothing was said."""


class Terms(NamedTuple):
    """What decides an answer's price besides its tokens; `None` where the wire said nothing."""

    service_tier: str | None = None
    """`usage.service_tier`: `standard`, `priority`, `batch`."""
    speed: str | None = None
    """`usage.speed`: `standard`, `fast`."""
    inference_geo: str | None = None
    """`usage.inference_geo`, such as `us`; `global` or `not_available`."""
    web_search_requests: int | None = None
    """`usage.server_tool_use.web_search_requests`, uses; cumulative in a stream."""


NO_TERMS = Terms()
"""Nothing was said."""


class Remarks(NamedTuple):
    """What an answer said of itself that is neither tokens nor price; as the wire spells it."""

    stop_reason: str | None = None
    """`stop_reason`, `finish_reason` or `stopReason`."""
    cache_miss_reason: str | None = None
    """`diagnostics.cache_miss_reason`: why nothing was read from the cache, if that was asked."""
    web_fetch_requests: int | None = None
    """`usage.server_tool_use.web_fetch_requests`, uses; cumulative in a stream."""
    iterations: tuple[str, ...] = ()
    """Types of `usage.iterations`, in their order."""


NO_REMARKS = Remarks()
"""Nothing was said."""


class Breakpoint(NamedTuple):
    """A place in a prompt up to which it is to be cached."""

    digest: bytes
    """Of the prefix that ends here: 16 bytes each for tools, system and messages, as far as it
    reaches."""
    ttl_s: int
    """How long it is to be kept, in seconds; 0 where the request does not ask for it."""
    size: int
    """Bytes of the prefix."""
    messages: int
    """How many whole messages are in it."""


class Prefix(NamedTuple):
    """What can be cached of a prompt: salted digests, and nothing that could be read."""

    tools: bytes
    """Digest of the tools, 16 bytes."""
    system: bytes
    messages: bytes
    """Digest of the messages up to each one's end, 16 bytes each, in their order."""
    second: bytes
    """Digest of the second message alone, which tells a conversation whose first message has
    changed; empty without one, or where it is so short that it may be said in any."""
    breakpoints: tuple[Breakpoint, ...]
    """In their order, at least one and at most four."""
    size: int
    """Bytes of the whole prompt."""


class RequestFacts(NamedTuple):
    """What the request body asked for; `None` where it could not be read."""

    model: str | None = None
    """Top-level `model`."""
    stream: bool | None = None
    """Top-level `stream`."""
    caching_asked: bool | None = None
    """Whether a `cache_control` stands anywhere in the request."""
    hour_asked: bool | None = None
    """Whether one of them asks for the TTL of one hour; `None` where nobody wanted to know."""
    prefix: Prefix | None = None
    """What can be cached; `None` where nobody wanted to know, or nothing was asked for."""


class Observation(NamedTuple):
    """What one response said, read by `observe`."""

    status: Status
    usage: Usage = NO_USAGE
    response_model: str | None = None
    """`model` of the answer, as the provider spells it."""
    message_id: str | None = None
    """`id` of the answer; its prefix tells the provider."""
    fault: str = ""
    """Why the status is not `complete`, in words for a person; empty otherwise."""
    terms: Terms = NO_TERMS
    remarks: Remarks = NO_REMARKS


class Exchange(NamedTuple):
    """One request and its answer, at its end. All durations are seconds."""

    route: Route
    method: str
    status_code: int
    """As sent to the client; 499 where the client left before a head (nginx's code)."""
    observed: bool
    end: End
    facts: RequestFacts
    observation: Observation | None
    request_headers: RawHeaders
    response_headers: RawHeaders
    duration_s: float
    first_byte_s: float | None
    first_token_s: float | None
    overhead_s: float
    """Time that the sidecar itself added; waiting for either side is left out."""
    upstream_fault: UpstreamFault | None = None

    def __repr__(self) -> str:
        """Leave the headers out: they hold keys."""
        return f"Exchange({self.route}, {self.method}, {self.status_code}, {self.end})"


class Tap(Protocol):
    """Reads one response as its bytes pass."""

    @property
    def first_token_seen(self) -> bool:
        """True from the first streamed piece of content on."""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""

    def finish(self, end: End) -> Observation:
        """Say what was seen. Call once, after the last `feed`."""


class RequestReader(Protocol):
    """Reads one request as its bytes pass."""

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""

    def finish(self) -> Iterator[None]:
        """Work off what is left in steps of a few milliseconds, one at each `next()`."""

    def facts(self) -> RequestFacts:
        """Say what was learned so far."""


class Accounts(Protocol):
    """Takes what the relay has to say; `app` hands one to the relay. Nothing here may block."""

    def begin(self, route: Route) -> None:
        """Note that a request has come."""

    def submit(self, exchange: Exchange) -> None:
        """Take an exchange at its end, once for each `begin`."""

    def refuse(self, reason: RefusalReason) -> None:
        """Note that a client was turned away."""

    def record_rewrite(self, result: Rewrite) -> None:
        """Note what became of an answer that was to be rewritten."""

    def contain(self, room: str, exc: Exception) -> None:
        """Note a fault that was kept from reaching a response."""


class Observer(Protocol):
    """Makes the readers of one exchange; `app` hands one to the relay."""

    def read_request(self, route: Route, dialect: Dialect, headers: RawHeaders) -> RequestReader:
        """Make the reader of a request body."""

    def tap(self, dialect: Dialect, status_code: int, headers: RawHeaders) -> Tap:
        """Make the reader of a response body."""


class Transformer(Protocol):
    """Puts something into the body of one response as its bytes pass, and takes nothing out."""

    @property
    def streamed(self) -> bool:
        """Whether what `feed` gives is to go out at once, under no announced length."""

    @property
    def held(self) -> bytes:
        """What was fed and not given back, as it came; also after a `feed` that raised."""

    @property
    def result(self) -> Rewrite:
        """What has become of the body so far."""

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes of the body and give what can go out."""

    def finish(self) -> bytes:
        """Give the rest of a body that is whole. Call once, after the last `feed`."""


class Rewriting(Protocol):
    """Makes the transformers; `app` hands one to the relay where the setting is on."""

    def wanted(self, dialect: Dialect, headers: RawHeaders) -> bool:
        """Whether the answer to a request with these headers may have to be transformed."""

    def transformer(
        self,
        dialect: Dialect,
        request_headers: RawHeaders,
        facts: RequestFacts,
        status_code: int,
        headers: RawHeaders,
    ) -> Transformer | Rewrite | None:
        """Make the transformer of a response body.

        Args:
            headers: the response's headers.

        Returns:
            A `Rewrite` where the body has to pass as it is, and that is worth counting; None
            where it is not to be rewritten.
        """


def header(headers: RawHeaders, name: bytes) -> bytes | None:
    """Find the first value of a header.

    Args:
        name: in lower case.
    """
    for key, value in headers:
        if key == name:
            return value
    return None


def first_values(headers: RawHeaders) -> dict[bytes, bytes]:
    """Map each name to its first value; takes as long as one `header` does."""
    return dict(reversed(headers))
