"""Asking LiteLLM what it knows, with the operator's key.

It knows how LiteLLM is reached, and that an answer can be late, long or an error. It must not
know what is asked for, and is not to be called from the path of a request: whoever asks, waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx

__all__ = ["AskError", "LiteLLM"]


class AskError(Exception):
    """LiteLLM gave no answer that can be used.

    Args:
        result: what went wrong, as a label value: `timeout`, `refused` or `failed`.
        reason: in words, without anything that the answer said.
    """

    def __init__(self, result: str, reason: str) -> None:
        super().__init__(reason)
        self.result = result
        self.reason = reason


class LiteLLM:
    """LiteLLM's own endpoints.

    Args:
        transport: the way to it. Neither proxies nor anything else is taken from the environment.
        origin: `http://HOST:PORT` or `https://HOST:PORT`, what a URL begins with.
        key: sent with every question; None to ask without one.
        key_header: where LiteLLM looks for keys.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        origin: str,
        key: str | None,
        key_header: str = "authorization",
    ) -> None:
        headers = {"accept": "application/json", "accept-encoding": "identity"}
        if key is not None:
            headers[key_header] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            transport=transport, base_url=origin, headers=headers, trust_env=False
        )

    async def get(
        self, path: str, parameters: Mapping[str, str], *, timeout_s: float, max_bytes: int
    ) -> bytes | None:
        """Ask, and return the body of a 200; None for a 404.

        Raises:
            AskError: LiteLLM could not be asked, or gave any other answer.
        """
        try:
            async with asyncio.timeout(timeout_s):
                return await self._get(path, parameters, max_bytes)
        except TimeoutError:
            raise AskError("timeout", f"{path}: no answer in {timeout_s:g} s") from None
        except httpx.HTTPError as exc:
            raise AskError("failed", f"{path}: {type(exc).__name__}") from None

    async def _get(self, path: str, parameters: Mapping[str, str], max_bytes: int) -> bytes | None:
        async with self._client.stream("GET", path, params=parameters) as response:
            status_code = response.status_code
            if status_code == 404:
                return None
            if status_code in (401, 403):
                raise AskError("refused", f"{path}: LiteLLM refuses the key ({status_code})")
            if status_code != 200:
                raise AskError("failed", f"{path}: LiteLLM answers {status_code}")
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > max_bytes:
                    raise AskError("failed", f"{path}: the answer is longer than {max_bytes} bytes")
            return bytes(body)

    async def aclose(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()
