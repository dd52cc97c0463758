"""The records that pass between the rooms."""

from __future__ import annotations

from sidecar.exchange import End, Exchange, RequestFacts, Route


def test_an_exchange_is_shown_without_its_headers() -> None:
    """Headers hold keys; what is logged of an exchange, or of a failed test, must not."""
    exchange = Exchange(
        route=Route.MESSAGES,
        method="POST",
        status_code=200,
        observed=False,
        end=End.COMPLETE,
        facts=RequestFacts(),
        observation=None,
        request_headers=[(b"x-api-key", b"sk-secret")],
        response_headers=[(b"set-cookie", b"secret")],
        duration_s=1.0,
        first_byte_s=None,
        first_token_s=None,
        overhead_s=0.0,
    )
    assert repr(exchange) == "Exchange(/v1/messages, POST, 200, complete)"
    assert f"{exchange}" == repr(exchange)
