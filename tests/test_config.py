"""Settings, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar.config import PREFIX, load_settings, unknown_settings
from sidecar.errors import ConfigError


def faults(monkeypatch: pytest.MonkeyPatch, **settings: str) -> list[str]:
    for name, value in settings.items():
        monkeypatch.setenv(PREFIX + name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings()
    return caught.value.faults


def test_defaults_are_enough() -> None:
    """Without any setting the sidecar runs beside a LiteLLM on its own port, on loopback."""
    settings = load_settings()
    assert settings.upstream == "http://127.0.0.1:4000"
    assert (settings.host, settings.port, settings.admin_port) == ("127.0.0.1", 4001, 4002)
    assert settings.labels == ("model", "team_alias", "provider")


def test_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are comma-separated, the order of labels does not matter, * trusts all."""
    monkeypatch.setenv("SIDECAR_LABELS", "team_alias, model")
    monkeypatch.setenv("SIDECAR_TRUSTED_PROXIES", "*")
    monkeypatch.setenv("SIDECAR_UPSTREAM", "https://llm.test:8443/")
    monkeypatch.setenv("SIDECAR_LOG_LEVEL", "DEBUG")
    settings = load_settings()
    assert settings.labels == ("model", "team_alias")
    assert [str(network) for network in settings.trusted_proxies] == ["0.0.0.0/0", "::/0"]
    assert (settings.upstream, settings.log_level) == ("https://llm.test:8443", "debug")


def test_all_faults_are_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each fault has the setting's name, its value, and what is allowed."""
    found = faults(
        monkeypatch,
        UPSTREAM="llm:4000/v1",
        PORT="70000",
        LABELS="model,customer",
        TRUSTED_PROXIES="10.0.0.0/99",
        DRAIN_TIMEOUT_S="soon",
        COMPAT="v2",
        TEAM_FILE=str(tmp_path / "absent"),
    )
    assert len(found) == 7
    text = "\n".join(found)
    assert "SIDECAR_PORT='70000' must be 0 to 65535" in text
    assert "unknown: customer" in text
    assert "SIDECAR_DRAIN_TIMEOUT_S='soon' must be seconds" in text
    assert "SIDECAR_COMPAT='v2' must be v1.83 or off" in text


def test_rewriting_is_off_and_can_be_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The switch is off; its limits are rules of two kinds, in their order."""
    assert (load_settings().rewrite_usage, load_settings().rewrite_only) == ("off", ())
    monkeypatch.setenv("SIDECAR_REWRITE_USAGE", "openai-full")
    monkeypatch.setenv("SIDECAR_REWRITE_ONLY", "model:claude-[45]*, user-agent:OpenAI/*,")
    settings = load_settings()
    assert settings.rewrite_usage == "openai-full"
    assert settings.rewrite_only == ("model:claude-[45]*", "user-agent:OpenAI/*")


@pytest.mark.parametrize("rule", ["claude-*", "team:red", "model:", "model:x,user-agent"])
def test_faulty_rule_is_named(monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    """A limit that would never hold is a fault, with the rule and what is allowed."""
    both = faults(monkeypatch, REWRITE_USAGE="on", REWRITE_ONLY=rule)
    assert len(both) == 2
    assert "must be off, openai or openai-full" in both[0]
    assert "model:PATTERN and user-agent:PATTERN" in both[1]
    assert f"(not a rule: {rule.split(',')[-1]})" in both[1]


def test_secrets_in_a_fault_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A password in a URL, or a key in the wrong place, does not reach the log."""
    text = "".join(faults(monkeypatch, UPSTREAM="http://me:hunter2@h/x", HOST="", PORT="sk-abc123"))
    assert "hunter2" not in text
    assert "abc123" not in text


@pytest.mark.parametrize(
    "value", ["ftp://h", "http://", "http://h?x=1", "http://h:x", "http://u@h"]
)
def test_upstream_must_be_an_address(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An upstream is a scheme, a host and a port, and nothing else."""
    (fault,) = faults(monkeypatch, UPSTREAM=value)
    assert "http://HOST:PORT" in fault


def test_service_links_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kubernetes overwrites SIDECAR_PORT for a Service named sidecar: say so."""
    (fault,) = faults(monkeypatch, PORT="tcp://10.0.0.1:4001")
    assert "enableServiceLinks: false" in fault


def test_unknown_names_are_warned_about() -> None:
    """A misspelt setting is named, with a guess; what Kubernetes sets is let be."""
    environ = {
        "SIDECAR_PROT": "1",
        "SIDECAR_SERVICE_HOST": "x",
        "SIDECAR_PORT_4001_TCP": "x",
        "X": "",
    }
    assert unknown_settings(environ) == [
        "SIDECAR_PROT is not a setting; did you mean SIDECAR_PORT?"
    ]
