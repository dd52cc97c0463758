"""Anthropic's own Python SDK, pointed at the sidecar: what it returns and what it raises."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest

from tests.support.calls import body_for, request, samples, send
from tests.support.clouds import Clouds
from tests.support.litellm import BLUE, LiteLLM
from tests.support.running import SidecarProcess, sidecar_process

pytestmark = pytest.mark.anyio

# The SDK warns of real models that are to be retired; the stand-in answers for any name.
MODEL = "claude-sdk"
TEXT = "The prompt was read block by block, and what was known was cheap. "


@pytest.fixture(scope="module")
def sidecar(clouds: Clouds, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    """Run a sidecar directly in front of the provider."""
    settings = {"SIDECAR_UPSTREAM": clouds.url}
    with sidecar_process(tmp_path_factory.mktemp("sidecar"), settings) as running:
        yield running


def client(url: str, key: str = "sk-sdk-1") -> anthropic.Anthropic:
    # Without its own repetitions, so that an error is shown and not mended.
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=20)


def call(topic: str, question: str = "What is new?", **members: Any) -> dict[str, Any]:
    body = body_for(MODEL, topic, question=question) | members
    del body["stream"]
    return body


def true_usage(clouds: Clouds) -> dict[str, int]:
    entry = clouds.books.entries[-1]
    return {
        "input_tokens": entry.input_tokens,
        "output_tokens": entry.output_tokens,
        "cache_read_input_tokens": entry.cache_read_input_tokens,
        "cache_creation_input_tokens": entry.cache_creation_input_tokens,
    }


def usage_of(message: Any) -> dict[str, int]:
    names = (
        "input_tokens",
        "output_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
    )
    return {name: getattr(message.usage, name) for name in names}


def test_create_and_stream(clouds: Clouds, sidecar: SidecarProcess) -> None:
    """Whole answers and streams come out as the provider sent them, usage included."""
    with client(sidecar.url) as sdk:
        first = sdk.messages.create(**call("the SDK"))
        assert (first.content[0].text, usage_of(first)) == (TEXT, true_usage(clouds))
        assert first.usage.cache_creation is not None
        assert first.usage.cache_creation.ephemeral_5m_input_tokens == 1500

        with sdk.messages.stream(**call("the SDK")) as stream:
            assert "".join(stream.text_stream) == TEXT
            second = stream.get_final_message()
        assert usage_of(second) == true_usage(clouds)
        assert second.usage.cache_read_input_tokens == 1500

        counted = sdk.messages.count_tokens(
            model=MODEL, messages=[{"role": "user", "content": "12345678"}]
        )
        assert counted.input_tokens == 2
        assert next(model.id for model in sdk.models.list()) == "claude-opus-4-5-20251101"


async def test_asynchronous_client(clouds: Clouds, sidecar: SidecarProcess) -> None:
    """The asynchronous client gets the same."""
    sdk = anthropic.AsyncAnthropic(base_url=sidecar.url, api_key="sk-sdk-1", max_retries=0)
    async with sdk:
        message = await sdk.messages.create(**call("async"))
        assert usage_of(message) == true_usage(clouds)
        async with sdk.messages.stream(**call("async", "[[many-events 500]]")) as stream:
            events = [event.type async for event in stream]
            final = await stream.get_final_message()
    assert events.count("text") == 500
    assert usage_of(final) == true_usage(clouds)
    assert final.usage.cache_read_input_tokens == 1500
    metrics = await send(sidecar.admin_url, request("GET", "/metrics"))
    rows = samples(metrics.body.decode())
    assert sum(v for name, _, v in rows if name == "litellm_cached_tokens_metric_total") >= 1500


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, anthropic.BadRequestError),
        (401, anthropic.AuthenticationError),
        (403, anthropic.PermissionDeniedError),
        (404, anthropic.NotFoundError),
        (413, anthropic.APIStatusError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (529, anthropic.InternalServerError),
    ],
)
def test_errors_of_the_provider(
    sidecar: SidecarProcess, status: int, error: type[anthropic.APIStatusError]
) -> None:
    """The SDK raises what it raises without the sidecar, with the provider's words."""
    with client(sidecar.url) as sdk:
        question = f"[[status-{status}]]"
        with pytest.raises(error, match=str(status)) as raised:
            sdk.messages.create(**call("errors", question))
        with (
            pytest.raises(error, match=str(status)),
            sdk.messages.stream(**call("errors", question)) as stream,
        ):
            stream.get_final_message()
    assert raised.value.status_code == status
    assert raised.value.request_id is not None


def test_error_in_the_stream(sidecar: SidecarProcess) -> None:
    """An error event is raised as the error that it is."""
    with (
        client(sidecar.url) as sdk,
        pytest.raises(anthropic.APIStatusError, match="overloaded_error"),
        sdk.messages.stream(**call("errors", "[[error-mid-stream]]")) as stream,
    ):
        stream.get_final_message()


def test_stream_that_broke(sidecar: SidecarProcess) -> None:
    """A stream that the provider broke off is an error, never a message."""
    with (
        client(sidecar.url) as sdk,
        pytest.raises((anthropic.APIConnectionError, httpx2.RemoteProtocolError)),
        sdk.messages.stream(**call("errors", "[[cut-mid-stream]]")) as stream,
    ):
        stream.get_final_message()


def test_no_upstream(tmp_path: Path) -> None:
    """The sidecar's own error is one that the SDK understands, message and all."""
    settings = {"SIDECAR_UPSTREAM": "http://127.0.0.1:9"}
    with sidecar_process(tmp_path, settings) as sidecar, client(sidecar.url) as sdk:
        with pytest.raises(anthropic.InternalServerError) as raised:
            sdk.messages.create(**call("nobody"))
        assert raised.value.status_code == 502
        assert raised.value.response.headers["x-sidecar-error"] == "connect_failed"
        assert raised.value.body == {
            "type": "error",
            "error": {"type": "api_error", "message": "LiteLLM could not be reached."},
        }
        assert "LiteLLM could not be reached." in str(raised.value)


@pytest.mark.parametrize("model", ["claude-direct", "claude-vertex", "claude-bedrock"])
def test_through_litellm(
    clouds: Clouds, litellm: LiteLLM, front: SidecarProcess, model: str
) -> None:
    """The same through a real LiteLLM and all providers; a key in `Authorization`."""
    with anthropic.Anthropic(base_url=front.url, auth_token=BLUE.key, max_retries=0) as sdk:
        asked = call(f"SDK {litellm.version}", model=model)
        message = sdk.messages.create(**asked)
        assert usage_of(message) == true_usage(clouds)
        assert usage_of(message)["cache_creation_input_tokens"] == 1500
        with sdk.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == TEXT
            final = stream.get_final_message()
        assert usage_of(final) == true_usage(clouds)
        assert usage_of(final)["cache_read_input_tokens"] == 1500


def test_errors_of_litellm(litellm: LiteLLM, front: SidecarProcess) -> None:
    """A key that LiteLLM does not know, and a model that it does not have."""
    with (
        client(front.url, "sk-nobody") as sdk,
        pytest.raises(anthropic.AuthenticationError, match="unknown key"),
    ):
        sdk.messages.create(**call("errors"))
    with client(front.url, BLUE.key) as sdk:
        with pytest.raises(anthropic.BadRequestError, match="no-such-model"):
            sdk.messages.create(**call("errors", model="no-such-model"))
        with pytest.raises(anthropic.NotFoundError):
            sdk.get("/no/such/path", cast_to=object)
