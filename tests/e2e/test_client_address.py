"""Who LiteLLM believes its client is: scheme, host, and address for its IP allow-list.

LiteLLM's uvicorn believes `X-Forwarded-*` from 127.0.0.1, which the sidecar is. The sidecar
trusts 127.0.0.1 alone here, as LiteLLM does; 127.0.0.2 is a client that nobody trusts. What
holds without the sidecar holds with it, with one deliberate exception: where LiteLLM itself reads
these headers from anybody, what an untrusted client forged does not get through, and LiteLLM
sees the client that forged nothing.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.support.calls import request, send
from tests.support.litellm import RED, LiteLLM
from tests.support.running import SidecarProcess
from tests.support.wire import Answer

pytestmark = pytest.mark.anyio

TRUSTED, UNTRUSTED = "127.0.0.1", "127.0.0.2"
SOURCES = pytest.mark.parametrize("source", [TRUSTED, UNTRUSTED], ids=["trusted", "untrusted"])
ELSEWHERE = "203.0.113.7"
KEY = {"authorization": f"Bearer {RED.key}"}
FORWARDED = {
    "X-Forwarded-For": ELSEWHERE,
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "other.test",
    "X-Forwarded-Port": "8443",
}
SENT = pytest.mark.parametrize("sent", [{}, FORWARDED], ids=["nothing sent", "forwarded"])
CLIENT_IP = "/v1/mcp/network/client-ip"
ISSUER = "/.well-known/oauth-authorization-server"


async def both(
    litellm: LiteLLM, front: SidecarProcess, target: str, sent: dict[str, str], source: str
) -> tuple[Answer, Answer]:
    """The direct answer, and that through the sidecar."""
    raw = request("GET", target, KEY | sent)
    return await send(litellm.url, raw, source=source), await send(front.url, raw, source=source)


@SOURCES
@SENT
async def test_redirect_keeps_its_scheme(
    litellm: LiteLLM, front: SidecarProcess, sent: dict[str, str], source: str
) -> None:
    """The redirect to the UI goes to https where a trusted proxy says so, and only there."""
    direct, through = await both(litellm, front, "/ui", sent, source)
    scheme = b"https" if sent and source == TRUSTED else b"http"
    assert through.header(b"location") == scheme + b"://llm.test/ui/"
    assert through.header(b"location") == direct.header(b"location")
    assert through.status == direct.status == 307


@SOURCES
@SENT
async def test_single_sign_on_comes_back_to_its_scheme(
    litellm: LiteLLM, front: SidecarProcess, sent: dict[str, str], source: str
) -> None:
    """The address that the login page is told to come back to is the one without the sidecar."""
    with litellm.applied({}, free_sso=True):
        answers = await both(litellm, front, "/sso/key/generate", sent, source)
    # LiteLLM makes a new state for each login.
    direct, through = (
        re.sub(rb"(?<=state=)\w+", b"*", answer.header(b"location") or b"") for answer in answers
    )
    scheme = b"https" if sent and source == TRUSTED else b"http"
    assert b"redirect_uri=%s%%3A%%2F%%2Fllm.test%%2Fsso%%2Fcallback&" % scheme in through
    assert through == direct
    assert answers[1].status == answers[0].status == 303


@SOURCES
@SENT
async def test_issuer_of_mcp(
    litellm: LiteLLM, front: SidecarProcess, sent: dict[str, str], source: str
) -> None:
    """LiteLLM names itself as without the sidecar. The exception: 1.83.10 believes the headers
    of any client here, and directly names the host that was forged; through the sidecar it
    names the one it was asked for."""
    direct, through = (json.loads(a.body) for a in await both(litellm, front, ISSUER, sent, source))
    if litellm.version == "1.83.10" and sent and source == UNTRUSTED:
        assert direct["issuer"] == "https://other.test:8443"
        honest, _ = await both(litellm, front, ISSUER, {}, source)
        direct = json.loads(honest.body)
    assert through == direct
    if source == UNTRUSTED:
        assert through["issuer"] == "http://llm.test"


@SOURCES
@SENT
async def test_client_address(
    litellm: LiteLLM, front: SidecarProcess, sent: dict[str, str], source: str
) -> None:
    """LiteLLM sees the address that it would see directly."""
    direct, through = await both(litellm, front, CLIENT_IP, sent, source)
    expected = ELSEWHERE if sent and source == TRUSTED else source
    assert json.loads(through.body) == json.loads(direct.body) == {"ip": expected}


@SOURCES
@SENT
@pytest.mark.parametrize("allowed", [TRUSTED, UNTRUSTED, ELSEWHERE])
async def test_allow_list(
    litellm: LiteLLM, front: SidecarProcess, sent: dict[str, str], source: str, allowed: str
) -> None:
    """The list of allowed addresses lets in whom it lets in directly, and nobody else."""
    with litellm.applied({"allowed_ips": [allowed]}):
        for target in ("/v1/models", CLIENT_IP):
            direct, through = await both(litellm, front, target, sent, source)
            expected = ELSEWHERE if sent and source == TRUSTED else source
            assert through.status == direct.status == (200 if expected == allowed else 403)
            assert through.body == direct.body


@SOURCES
@SENT
@pytest.mark.parametrize("allowed", [TRUSTED, UNTRUSTED, ELSEWHERE])
async def test_allow_list_by_header(
    litellm: LiteLLM, front: SidecarProcess, sent: dict[str, str], source: str, allowed: str
) -> None:
    """The same with `use_x_forwarded_for`. The exception: LiteLLM believes that header of any
    client, so that directly an untrusted one gets in by forging it; through the sidecar it is
    known by its own address."""
    with litellm.applied({"allowed_ips": [allowed], "use_x_forwarded_for": True}):
        direct, through = await both(litellm, front, "/v1/models", sent, source)
        if sent and source == UNTRUSTED:
            assert direct.status == (200 if allowed == ELSEWHERE else 403)
            direct, _ = await both(litellm, front, "/v1/models", {}, source)
        expected = ELSEWHERE if sent and source == TRUSTED else source
        assert through.status == direct.status == (200 if expected == allowed else 403)
        assert through.body == direct.body


@SOURCES
@SENT
@pytest.mark.parametrize("ranges", [["127.0.0.1/32"], []], ids=["ranges", "no ranges"])
async def test_client_address_by_header(
    litellm: LiteLLM,
    front: SidecarProcess,
    sent: dict[str, str],
    source: str,
    ranges: list[str],
) -> None:
    """The address that access to MCP servers goes by, with `use_x_forwarded_for`. Two
    exceptions. 1.83.10 without `mcp_trusted_proxy_ranges` believes a forged header; through the
    sidecar it does not. 1.100.5 without them wants no such header at all and sees nobody
    where there is one, as there always is behind a proxy."""
    settings = {"use_x_forwarded_for": True, "mcp_trusted_proxy_ranges": ranges}
    with litellm.applied(settings):
        direct, through = [
            json.loads(answer.body)["ip"]
            for answer in await both(litellm, front, CLIENT_IP, sent, source)
        ]
    if not ranges and litellm.version == "1.100.5":
        assert (direct, through) == ("" if sent else source, "")
    elif not ranges and sent and source == UNTRUSTED:
        assert (direct, through) == (ELSEWHERE, UNTRUSTED)
    else:
        assert through == direct
