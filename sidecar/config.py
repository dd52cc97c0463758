"""Settings, from the environment, read once and frozen.

Every fault is found in one go and named with what is allowed, so that a pod that will not
start is mended in one step. The README's table is generated from the fields below.
"""

from __future__ import annotations

import difflib
import os
import re
import ssl
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from sidecar.errors import ConfigError
from sidecar.exchange import LABEL_NAMES, PRICE_SOURCES

__all__ = [
    "PREFIX",
    "Settings",
    "load_admin_address",
    "load_settings",
    "shown_settings",
    "unknown_settings",
]

PREFIX = "SIDECAR_"

_Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
_Port = Annotated[int, Field(ge=0, le=65_535)]
_Host = Annotated[str, Field(min_length=1)]
_Network = IPv4Network | IPv6Network

_MAX_SECRET_BYTES = 4096
"""Longest secret: what stands in a header. A JWT has some hundreds."""
_MAX_SHOWN = 100
"""Characters of a faulty value that are shown: a file's content may have been put there."""


def _setting(default: Any, description: str, allowed: str, *, shown: str = "") -> Any:
    """Describe a setting: what it is for, and what it may be, in words."""
    extra: dict[str, Any] = {"allowed": allowed, "shown": shown}
    return Field(default, description=description, json_schema_extra=extra)


class Settings(BaseSettings):
    """All settings of the sidecar."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="ignore")

    upstream: str = _setting(
        "http://127.0.0.1:4000",
        "LiteLLM's address.",
        "http://HOST:PORT or https://HOST:PORT, without a path, or unix:/PATH",
    )
    upstream_ca_file: Path | None = _setting(
        None,
        "Certificates that an https upstream is checked against; the system's if unset.",
        "the path of a PEM file",
    )
    host: _Host = _setting(
        "127.0.0.1", "Where clients connect.", "an address to listen on; 0.0.0.0 or :: for all"
    )
    port: _Port = _setting(4001, "Port for clients.", "0 to 65535; 0 picks a free one")
    admin_host: _Host = _setting(
        "127.0.0.1",
        "Where metrics, probes and the live page are asked for.",
        "an address to listen on; 0.0.0.0 or :: for all",
    )
    admin_port: _Port = _setting(
        4002, "Port for metrics, probes and the live page.", "0 to 65535; 0 picks a free one"
    )
    admin_token_file: Path | None = _setting(
        None, "File that holds SIDECAR_ADMIN_TOKEN.", "the path of a file with nothing else in it"
    )
    admin_token: Annotated[SecretStr | None, Field(validate_default=True)] = _setting(
        None,
        "What the admin port wants to see, but for metrics and probes, as `Bearer` token or as "
        "password of `Basic`.",
        "a secret, unless SIDECAR_ADMIN_TOKEN_FILE is set",
    )
    admin_open: bool = _setting(
        False,
        "Opens all of the admin port to whoever reaches it. Without this and without a token "
        "that is so on loopback alone.",
        "true or false; not with a token",
    )
    admin_guard_metrics: bool = _setting(
        False, "Has /metrics want the token as well.", "true or false; true only with a token"
    )
    labels: Annotated[tuple[str, ...], NoDecode] = _setting(
        ("model", "team_alias", "provider"),
        "Labels of the token and response series.",
        f"a comma-separated choice of {', '.join(LABEL_NAMES)}",
    )
    max_label_values: Annotated[int, Field(ge=1, le=100_000)] = _setting(
        200, "Values kept for each label; later ones are counted under `other`.", "1 to 100000"
    )
    max_series: Annotated[int, Field(ge=100, le=1_000_000)] = _setting(
        50_000,
        "Token and response series kept in all; later label sets are counted under `other`.",
        "100 to 1000000",
    )
    miss_reasons: bool = _setting(
        True,
        "Tells why requests that asked for caching read nothing; see docs/misses.md.",
        "true or false",
    )
    max_conversations: Annotated[int, Field(ge=100, le=1_000_000)] = _setting(
        10_000,
        "Conversations whose hashes are held for that, up to 6 KB each; the least recent leave.",
        "100 to 1000000",
    )
    compat: Annotated[tuple[str, ...], NoDecode] = _setting(
        ("v1.83",),
        "LiteLLM's own metric names to export: `v1.83` for its three cache metrics, `v1.100` for "
        "the four that newer versions have themselves; see docs/migration.md.",
        "a comma-separated choice of v1.83 and v1.100, or off",
    )
    team_file: Path | None = _setting(
        None,
        "File that maps sha256 key hashes to team aliases; read again when it changes.",
        "the path of a JSON or YAML file",
    )
    litellm_key_file: Path | None = _setting(
        None, "File that holds SIDECAR_LITELLM_KEY.", "the path of a file with nothing else in it"
    )
    litellm_key: Annotated[SecretStr | None, Field(validate_default=True)] = _setting(
        None,
        "Key with which LiteLLM is asked what it knows; the role `proxy_admin_viewer` is enough.",
        "a LiteLLM key, unless SIDECAR_LITELLM_KEY_FILE is set",
    )
    identity_ttl_s: Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)] = _setting(
        120.0,
        "How long LiteLLM's word on a key's team holds, where SIDECAR_LITELLM_KEY is set.",
        "seconds, 1 to 86400",
    )
    key_header: str | None = _setting(
        None,
        "LiteLLM's `litellm_key_header_name`, if that is set: keys are then taken from it alone.",
        "the name of a header",
    )
    price_file: Path | None = _setting(
        None,
        "File with your own prices, in USD per million tokens; read again when it changes.",
        "the path of a JSON or YAML file",
    )
    price_sources: Annotated[tuple[str, ...], NoDecode] = _setting(
        PRICE_SOURCES,
        "Where prices come from, in this order, rate by rate; without any, no cost is counted.",
        f"a comma-separated choice of {', '.join(PRICE_SOURCES)}, or nothing",
    )
    price_refresh_s: Annotated[float, Field(ge=60, le=604_800, allow_inf_nan=False)] = _setting(
        21_600.0,
        "How often LiteLLM is asked for its prices. Its cost map takes it up to half a second.",
        "seconds, 60 to 604800",
    )
    trusted_proxies: Annotated[tuple[_Network, ...], NoDecode] = _setting(
        (ip_network("127.0.0.0/8"), ip_network("::1/128")),
        "Peers whose X-Forwarded-* headers are believed; the twin of uvicorn's "
        "FORWARDED_ALLOW_IPS.",
        "a comma-separated list of networks such as 10.0.0.0/8, * for all, or nothing for none",
        shown="127.0.0.0/8,::1/128",
    )
    rewrite_usage: Literal["off", "openai", "openai-full"] = _setting(
        "off",
        "Adds `prompt_tokens_details` to the usage of Anthropic's answers; `openai-full` also "
        "`prompt_tokens` and `completion_tokens`. Mind what that does to readers that guess.",
        "off, openai or openai-full",
    )
    rewrite_only: Annotated[tuple[str, ...], NoDecode] = _setting(
        (),
        "Limits that to answers whose request one of these fits; all if unset.",
        "a comma-separated list of model:PATTERN and user-agent:PATTERN, with *, ? and […]",
    )
    max_request_body_bytes: Annotated[int, Field(ge=0)] = _setting(
        0, "Longest request that is passed on; longer ones get 413.", "bytes; 0 for no limit"
    )
    max_request_capture_bytes: Annotated[int, Field(ge=0, le=1 << 30)] = _setting(
        32 * 1024 * 1024,
        "Longest request whose model is read. Anthropic's own limit is 32 MB.",
        "bytes, 0 to 1073741824",
    )
    connect_timeout_s: _Seconds = _setting(
        5.0, "Time for a connection to LiteLLM; then 504.", "seconds; 0 for no limit"
    )
    send_timeout_s: _Seconds = _setting(
        600.0,
        "How long LiteLLM may take nothing of a request that is being sent; then 504. The "
        "clients of Anthropic and OpenAI wait as long.",
        "seconds; 0 for no limit",
    )
    first_byte_timeout_s: _Seconds = _setting(
        0.0,
        "Time from the end of a request to the head of its answer; then 504.",
        "seconds; 0 for no limit",
    )
    idle_timeout_s: _Seconds = _setting(
        0.0,
        "Time between two pieces of an answer; then it is cut.",
        "seconds; 0 for no limit",
    )
    max_concurrent_requests: Annotated[int, Field(ge=0)] = _setting(
        4096,
        "Requests under way at once, WebSockets among them; one more gets 503.",
        "0 or more; 0 for no limit",
    )
    max_connections: Annotated[int, Field(ge=0)] = _setting(
        0,
        "Client connections held at once; one more gets 503.",
        "0 or more; 0 for as many as there are file descriptors",
    )
    max_head_bytes: Annotated[int, Field(ge=1024, le=1 << 20)] = _setting(
        64 * 1024,
        "Longest request head; a longer one gets 431. LiteLLM's own server takes 16 KiB, "
        "and more where it comes in one piece.",
        "bytes, 1024 to 1048576",
    )
    head_timeout_s: _Seconds = _setting(
        60.0,
        "Time for a client to send the head of a request; then 408.",
        "seconds; 0 for no limit",
    )
    stall_timeout_s: _Seconds = _setting(
        300.0,
        "How long a client may stop sending a request's body, or taking an answer; then its "
        "connection is closed.",
        "seconds; 0 for no limit",
    )
    keep_alive_timeout_s: Annotated[int, Field(ge=1, le=86_400)] = _setting(
        75,
        "How long an idle client connection is kept. Longer than the load balancer's.",
        "whole seconds, 1 to 86400",
    )
    drain_delay_s: _Seconds = _setting(
        5.0,
        "After SIGTERM, how long requests are still accepted while /readyz says 503.",
        "seconds",
    )
    drain_timeout_s: _Seconds = _setting(
        60.0, "After that, how long running answers may take before they are cut.", "seconds"
    )
    final_scrape_wait_s: _Seconds = _setting(
        20.0,
        "After that, how long to wait for a last scrape, if Prometheus scraped lately.",
        "seconds",
    )
    usage_log: Literal["stdout", "off"] | Path = _setting(
        "stdout",
        "Where a line with the usage of each observed answer goes; see docs/usage-log.md.",
        "stdout, off, or the path of a file",
    )
    usage_log_max_bytes: Annotated[int, Field(ge=0)] = _setting(
        100 * 1024 * 1024,
        "Size from which on that file is renamed to `PATH.1`, and a new one begun.",
        "bytes; 0 where something else rotates it",
    )
    usage_log_files: Annotated[int, Field(ge=1, le=100)] = _setting(
        10, "Renamed files that are kept.", "1 to 100"
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Least severity that is logged.", "debug, info, warning or error"
    )

    @field_validator("upstream", mode="after")
    @classmethod
    def _check_upstream(cls, value: str) -> str:
        # urlsplit drops line ends and takes blanks; neither can stand in a Host header.
        if not re.fullmatch(r"[!-~]+", value):
            raise ValueError("not an address")
        parts = urlsplit(value)
        if parts.scheme == "unix":
            if parts.netloc or not parts.path.startswith("/") or parts.query or parts.fragment:
                raise ValueError("not the path of a socket")
            return value
        bare = parts.path in ("", "/") and not parts.query and not parts.fragment
        named = parts.hostname and "@" not in parts.netloc
        if parts.scheme not in ("http", "https") or not named or not bare:
            raise ValueError("not an address")
        if parts.port == 0:  # and what is no port at all raises ValueError
            raise ValueError("not a port to connect to")
        parts.netloc.encode("idna")  # raises ValueError if a label is empty or too long
        return f"{parts.scheme}://{parts.netloc}"

    @field_validator("labels", mode="before")
    @classmethod
    def _split_labels(cls, value: object) -> object:
        if isinstance(value, str):
            names = {name.strip() for name in value.split(",") if name.strip()}
            unknown = sorted(names - set(LABEL_NAMES))
            if unknown or not names:
                raise ValueError(f"unknown: {', '.join(unknown)}" if unknown else "none named")
            # One order for all, whatever was written: a permutation is no change.
            return tuple(name for name in LABEL_NAMES if name in names)
        return value

    @field_validator("price_sources", mode="before")
    @classmethod
    def _split_sources(cls, value: object) -> object:
        if isinstance(value, str):
            names = {name.strip() for name in value.split(",") if name.strip()}
            if unknown := sorted(names - set(PRICE_SOURCES)):
                raise ValueError(f"unknown: {', '.join(unknown)}")
            return tuple(name for name in PRICE_SOURCES if name in names)
        return value

    @field_validator("compat", mode="before")
    @classmethod
    def _split_compat(cls, value: object) -> object:
        if isinstance(value, str):
            names = {name.strip().lower() for name in value.split(",") if name.strip()}
            unknown = sorted(names - {"off", "v1.83", "v1.100"})
            if unknown or ("off" in names and len(names) > 1):
                raise ValueError(f"unknown: {', '.join(unknown)}" if unknown else "off and on")
            return tuple(name for name in ("v1.83", "v1.100") if name in names)
        return value

    @field_validator("rewrite_only", mode="before")
    @classmethod
    def _split_rules(cls, value: object) -> object:
        if isinstance(value, str):
            rules = tuple(part.strip() for part in value.split(",") if part.strip())
            for rule in rules:
                kind, _, pattern = rule.partition(":")
                if kind not in ("model", "user-agent") or not pattern:
                    raise ValueError(f"not a rule: {rule}")
            return rules
        return value

    @field_validator("trusted_proxies", mode="before")
    @classmethod
    def _split_networks(cls, value: object) -> object:
        if isinstance(value, str):
            text = value.replace("*", "0.0.0.0/0,::/0")
            return tuple(
                ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip()
            )
        return value

    @field_validator("admin_port", mode="after")
    @classmethod
    def _check_apart(cls, value: int, info: ValidationInfo) -> int:
        hosts = {info.data.get("host"), info.data.get("admin_host")}
        same = len(hosts) == 1 or hosts & {"0.0.0.0", "::"}  # noqa: S104
        if value and value == info.data.get("port") and same:
            raise ValueError("not the port for clients")
        return value

    @field_validator("key_header", mode="after")
    @classmethod
    def _check_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", value):
            raise ValueError("not a name")  # RFC 9110 section 5.6.2
        return value and value.lower()

    @field_validator(
        *("upstream_ca_file", "team_file", "litellm_key_file", "litellm_key", "key_header"),
        *("price_file", "admin_token_file", "admin_token"),
        mode="before",
    )
    @classmethod
    def _unset_if_empty(cls, value: object) -> object:
        # `check` shows it so, and compose sets a variable that is not there to nothing.
        return None if value == "" else value

    @field_validator(
        *("upstream_ca_file", "team_file", "litellm_key_file", "price_file", "admin_token_file"),
        mode="after",
    )
    @classmethod
    def _check_file(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                if not S_ISREG(value.stat().st_mode):
                    raise ValueError("that is not a file")
                with value.open("rb"):
                    pass
            except OSError as exc:
                raise ValueError(exc.strerror or "it cannot be read") from None
        return value

    @field_validator("litellm_key", "admin_token", mode="after")
    @classmethod
    def _read_secret(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        """Take the secret from its file, where one is named."""
        path: Path | None = info.data.get(f"{info.field_name}_file")
        if path is not None:
            if value is not None:
                raise ValueError("both are set")
            with path.open("rb") as file:
                text = file.read(_MAX_SECRET_BYTES + 1).decode("latin-1").strip()
            value = SecretStr(text)
        if value is not None and not re.fullmatch(
            rf"[!-~]{{1,{_MAX_SECRET_BYTES}}}", value.get_secret_value()
        ):
            raise ValueError("that cannot stand in a header")
        return value

    @field_validator("admin_open", "admin_guard_metrics", mode="after")
    @classmethod
    def _check_guard(cls, value: bool, info: ValidationInfo) -> bool:
        if value and (info.field_name == "admin_open") == bool(info.data.get("admin_token")):
            raise ValueError("there is a token" if info.data.get("admin_token") else "no token")
        return value

    @field_validator("upstream_ca_file", mode="after")
    @classmethod
    def _check_certificates(cls, value: Path | None) -> Path | None:
        if value is not None:
            try:
                ssl.create_default_context(cafile=value)
            except OSError:
                raise ValueError("there is no certificate in it") from None
        return value

    @field_validator("usage_log", mode="before")
    @classmethod
    def _read_usage_log(cls, value: object) -> object:
        if isinstance(value, str):
            if value.lower() in ("", "stdout"):
                return "stdout"
            return "off" if value.lower() == "off" else Path(value)
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


class _AdminAddress(BaseSettings):
    """The two settings that say where to ask a running sidecar."""

    model_config = Settings.model_config

    admin_host: _Host = Settings.model_fields["admin_host"].default
    admin_port: _Port = Settings.model_fields["admin_port"].default


def load_admin_address() -> tuple[str, int]:
    """Read where a running sidecar is asked how it is.

    A probe must not fail because of a file that has gone since the start: nothing else is read.

    Raises:
        ConfigError: as `load_settings`.
    """
    try:
        found = _AdminAddress()
    except ValidationError as exc:
        raise ConfigError([_fault(error) for error in exc.errors()]) from None
    return found.admin_host, found.admin_port


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        ConfigError: with all faults, each naming the setting, its value and what is allowed.
    """
    try:
        return Settings()
    except ValidationError as exc:
        raise ConfigError([_fault(error) for error in exc.errors()]) from None


def shown_settings(settings: Settings) -> dict[str, str]:
    """Write what is in force, by variable, as the environment would; secrets are masked."""
    return {
        PREFIX + name.upper(): _shown(getattr(settings, name)) for name in Settings.model_fields
    }


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _fault(error: Any) -> str:
    name = str(error["loc"][0])
    field = Settings.model_fields[name]
    # pydantic-settings takes the names in any case.
    environ = {key.upper(): value for key, value in os.environ.items()}
    value = environ.get(PREFIX + name.upper(), str(field.default))
    if len(value) > _MAX_SHOWN:
        value = f"{value[:_MAX_SHOWN]}…"
    shown = "***" if field.annotation == SecretStr | None else _masked(value)
    fault = f"{PREFIX}{name.upper()}={shown!r} must be {allowed(field)}"
    if error["type"] == "value_error" and (reason := str(error["ctx"]["error"])):
        fault += f" ({_masked(reason)})"
    if re.match(r"tcp://[\d.]+:\d+$", value):
        fault += (
            "; Kubernetes sets this variable for a Service named `sidecar`: set "
            "enableServiceLinks: false in the pod"
        )
    return fault


def allowed(field: FieldInfo) -> str:
    """Say in words what a setting may be."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return str(extra["allowed"])


def _masked(value: str) -> str:
    """Hide what may be a secret: the user part of a URL, and anything that looks like a key."""
    value = re.sub(r"-----BEGIN.*", "-----BEGIN ***", value, flags=re.DOTALL)
    value = re.sub(r"//[^/@\s]*@", "//***@", value)
    return re.sub(r"sk-[\w-]+", "sk-***", value)


def unknown_settings(environ: Mapping[str, str]) -> list[str]:
    """Name the variables with our prefix that mean nothing, with a guess at what was meant."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    # What Kubernetes sets for a Service named `sidecar`, and compose for one of that name.
    links = re.compile(rf"{PREFIX}(SERVICE_|PORT_\d|ADMIN_SERVICE_|ADMIN_PORT_\d)")
    warnings = []
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known and not links.match(name):
            close = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            hint = f"; did you mean {close[0]}?" if close else ""
            warnings.append(f"{name} is not a setting{hint}")
    return warnings
