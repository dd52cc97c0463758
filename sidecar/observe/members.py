"""Reading a few members of a JSON object, at a C decoder's speed and with Python's leniency.

msgspec skips what is not asked for, but refuses a whole document for a lone surrogate (text
that was cut inside an emoji), for invalid UTF-8 and for NaN. Providers and clients send these,
and the standard library's decoder takes them.
"""

from __future__ import annotations

import json
from typing import Generic, TypeVar

import msgspec

__all__ = ["MemberReader"]

StructT = TypeVar("StructT", bound=msgspec.Struct)


class MemberReader(Generic[StructT]):
    """Reads the members that a struct names; all of them must have defaults."""

    def __init__(self, struct: type[StructT]) -> None:
        self._struct = struct
        self._decode = msgspec.json.Decoder(struct).decode

    def strict(self, data: bytes) -> StructT | None:
        """Decode fast; None for anything that is not plain JSON with an object at its top."""
        try:
            return self._decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def lenient(self, data: bytes) -> StructT | None:
        """Decode, slowly if need be; None for what Python's own decoder refuses as well."""
        data = data.removeprefix(b"\xef\xbb\xbf")
        found = self.strict(data)
        if found is not None:
            return found
        try:
            decoded = json.loads(data.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None
        if not isinstance(decoded, dict):
            return None
        return self._struct(**{name: decoded.get(name) for name in self._struct.__struct_fields__})
