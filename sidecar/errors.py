"""The exceptions of the sidecar.

SidecarError
├── ConfigError      settings that cannot be used; exit code 2
├── StartError       a socket that cannot be bound, and the like; exit code 1
└── UpstreamError    no answer could be had from the upstream; 502 or 504
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sidecar.exchange import UpstreamFault

__all__ = ["ConfigError", "SidecarError", "StartError", "UpstreamError"]


class SidecarError(Exception):
    """Base of all errors that the sidecar raises on purpose."""


class ConfigError(SidecarError):
    """Settings that cannot be used.

    Args:
        faults: one sentence a fault, each naming the setting, its value (secrets masked)
            and what is allowed.
    """

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class StartError(SidecarError):
    """The process cannot start, although its settings are sound."""


class UpstreamError(SidecarError):
    """The upstream gave no response head, or broke off in the middle of a body."""

    def __init__(self, fault: UpstreamFault, detail: str = "") -> None:
        super().__init__(detail or fault.value)
        self.fault = fault
