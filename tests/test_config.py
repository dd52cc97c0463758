"""Settings, and what is said of wrong ones."""

from __future__ import annotations

import os
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
    assert (
        "SIDECAR_COMPAT='v2' must be a comma-separated choice of v1.83 and v1.100, or off" in text
    )


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("off", ()),
        ("", ()),
        ("v1.83", ("v1.83",)),
        ("V1.100", ("v1.100",)),
        (" v1.100, v1.83 ,", ("v1.83", "v1.100")),
    ],
)
def test_names_of_litellm_are_chosen(
    monkeypatch: pytest.MonkeyPatch, value: str, names: tuple[str, ...]
) -> None:
    """One, both or none; without a word the three that the report is about."""
    assert load_settings().compat == ("v1.83",)
    monkeypatch.setenv("SIDECAR_COMPAT", value)
    assert load_settings().compat == names


@pytest.mark.parametrize(
    ("value", "told"), [("off,v1.83", "off and on"), ("v1.83,v1.99", "unknown: v1.99")]
)
def test_names_that_are_none_are_faults(
    monkeypatch: pytest.MonkeyPatch, value: str, told: str
) -> None:
    """What cannot be meant is named."""
    (fault,) = faults(monkeypatch, COMPAT=value)
    assert f"({told})" in fault


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
    key = "-----BEGIN PRIVATE KEY-----\nMIIE"
    found = faults(
        monkeypatch, UPSTREAM="http://me:hunter2@h/x", HOST="", PORT="sk-abc123", TEAM_FILE=key
    )
    assert len(found) == 4
    for secret in ("hunter2", "abc123", "MIIE"):
        assert secret not in "".join(found)


@pytest.mark.parametrize("name", ["litellm_key", "admin_token"])
def test_secret_comes_from_the_environment_or_a_file(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One of the two says it, and none of what is shown does."""

    def found() -> str | None:
        secret = getattr(load_settings(), name)
        return None if secret is None else secret.get_secret_value()

    variable = f"SIDECAR_{name.upper()}"
    assert found() is None
    monkeypatch.setenv(variable, "sk-viewer-1")
    assert found() == "sk-viewer-1"
    assert "viewer" not in repr(load_settings())
    monkeypatch.setenv(variable, "")
    path = tmp_path / "key"
    path.write_text(" sk-viewer-2\r\n")
    monkeypatch.setenv(f"{variable}_FILE", str(path))
    assert found() == "sk-viewer-2"
    assert "viewer" not in repr(load_settings())


@pytest.mark.parametrize("content", ["", "\n", "two words", "sk-one\nsk-two", "clé", "x" * 5000])
def test_faulty_secret_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    """What cannot be a key is a fault, wherever it stands, and the fault does not repeat it."""
    path = tmp_path / "key"
    path.write_text(content)
    (fault,) = faults(monkeypatch, LITELLM_KEY_FILE=str(path))
    assert fault.startswith("SIDECAR_LITELLM_KEY='***' must be a LiteLLM key")
    assert "cannot stand in a header" in fault
    if content.strip():
        monkeypatch.delenv("SIDECAR_LITELLM_KEY_FILE")
        (fault,) = faults(monkeypatch, LITELLM_KEY=content)
        assert content not in fault


def test_secret_has_one_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A secret that is said twice could be two; a file that is not there is one fault."""
    path = tmp_path / "key"
    path.write_text("hunter2")
    (fault,) = faults(monkeypatch, LITELLM_KEY="hunter3", LITELLM_KEY_FILE=str(path))
    assert "both are set" in fault
    assert "hunter" not in fault
    (fault,) = faults(monkeypatch, LITELLM_KEY="", LITELLM_KEY_FILE=str(tmp_path / "absent"))
    assert fault.startswith("SIDECAR_LITELLM_KEY_FILE=")


def test_guard_of_the_admin_port_is_not_contradictory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Open and a token cannot both be meant, nor metrics that want a token which is not there."""
    (fault,) = faults(monkeypatch, ADMIN_GUARD_METRICS="true")
    assert fault.startswith("SIDECAR_ADMIN_GUARD_METRICS=")
    (fault,) = faults(monkeypatch, ADMIN_TOKEN="x", ADMIN_OPEN="true", ADMIN_GUARD_METRICS="true")
    assert fault.startswith("SIDECAR_ADMIN_OPEN=")


@pytest.mark.parametrize(
    "value",
    [
        "ftp://h",
        "http://",
        "http://h?x=1",
        "http://h:x",
        "http://u@h",
        "http://h:0",
        "http://h..test:1",
        "http://h h",
        "http://h\n:1",
        "http://hö.test",
        "http://[::1",
        "",
    ],
)
def test_upstream_must_be_an_address(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An upstream is a scheme, a host and a port, and nothing else."""
    (fault,) = faults(monkeypatch, UPSTREAM=value)
    assert "http://HOST:PORT" in fault


def test_two_ports_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """One port for both is named as what it is, also where the other one is a default; on two
    addresses it is two ports."""
    (fault,) = faults(monkeypatch, PORT="4002")
    assert fault.startswith("SIDECAR_ADMIN_PORT='4002'")
    assert "not the port for clients" in fault
    (fault,) = faults(monkeypatch, HOST="0.0.0.0", ADMIN_HOST="127.0.0.1")
    assert "not the port for clients" in fault
    monkeypatch.setenv("SIDECAR_HOST", "127.0.0.2")
    assert load_settings().port == load_settings().admin_port
    monkeypatch.setenv("SIDECAR_HOST", "127.0.0.1")
    monkeypatch.setenv("SIDECAR_PORT", "0")
    monkeypatch.setenv("SIDECAR_ADMIN_PORT", "0")
    assert load_settings().port == load_settings().admin_port


@pytest.mark.parametrize("value", ["x y", "x:", "clé", "x\n"])
def test_key_header_is_a_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """A header's name is a token, in any case; empty is not set."""
    monkeypatch.setenv("SIDECAR_KEY_HEADER", "X-Our-Key")
    assert load_settings().key_header == "x-our-key"
    monkeypatch.setenv("SIDECAR_KEY_HEADER", "")
    assert load_settings().key_header is None
    (fault,) = faults(monkeypatch, KEY_HEADER=value)
    assert fault.endswith("must be the name of a header (not a name)")


def test_files_are_looked_into(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is no file, or holds no certificate, is found at the start; empty is not set."""
    (tmp_path / "text").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    for value, told in {
        str(tmp_path): "that is not a file",
        str(tmp_path / "pipe"): "that is not a file",
        str(tmp_path / "absent"): "No such file",
        "x" * 5000: "File name too long",
    }.items():
        for fault in faults(monkeypatch, TEAM_FILE=value, UPSTREAM_CA_FILE=value):
            assert told in fault
            assert len(fault) < 300
    (fault,) = faults(monkeypatch, TEAM_FILE="", UPSTREAM_CA_FILE=str(tmp_path / "text"))
    assert "there is no certificate in it" in fault
    monkeypatch.setenv("SIDECAR_UPSTREAM_CA_FILE", "")
    assert (load_settings().team_file, load_settings().upstream_ca_file) == (None, None)


def test_value_is_shown_however_its_name_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are taken in any case, and so they are shown."""
    monkeypatch.setenv("sidecar_port", "seventy")
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert caught.value.faults[0].startswith("SIDECAR_PORT='seventy'")


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
