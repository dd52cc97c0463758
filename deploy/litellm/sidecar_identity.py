"""LiteLLM callback that names the team and the key of a call in its response headers.

Put this file beside LiteLLM's configuration and add it to the callbacks:

    litellm_settings:
      callbacks: ["sidecar_identity.identity_headers"]

It knows what LiteLLM's authentication found out about a key. It must not know anything else: no
prompt, no answer, no key. The headers reach the client as well.

Contract: `x-litellm-team-alias` and `x-litellm-key-alias` on every answer for which LiteLLM asks
this callback, percent-encoded UTF-8, and the string `None`, LiteLLM's own spelling, where there is
no team or no alias. LiteLLM ignores what goes wrong in here, and then the headers are absent.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from litellm.integrations.custom_logger import CustomLogger

__all__ = ["IdentityHeaders", "identity_headers"]


def header_value(alias: str | None) -> str:
    """A name as a header value: names may hold any character, headers may not."""
    return quote(alias, safe="") if alias else "None"


class IdentityHeaders(CustomLogger):
    """Adds the two headers; holds no state."""

    async def async_post_call_response_headers_hook(
        self,
        data: dict[str, Any],
        user_api_key_dict: Any,
        response: Any,
        request_headers: dict[str, str] | None = None,
        litellm_call_info: dict[str, Any] | None = None,
    ) -> dict[str, str] | None:
        """Say whose call this was, from what LiteLLM's authentication looked up."""
        return {
            "x-litellm-team-alias": header_value(user_api_key_dict.team_alias),
            "x-litellm-key-alias": header_value(user_api_key_dict.key_alias),
        }


identity_headers = IdentityHeaders()
