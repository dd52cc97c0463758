"""The peers: how each is configured, started and asked what it counted.

Each runs as one process (or one worker) on a core of its own, access logs off, connections to
the upstream kept, nothing buffered that it need not. The templates are in `configs/`.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import bodies
from tests.support.process import ManagedProcess, free_port

__all__ = [
    "DEFAULT",
    "PEERS",
    "SLOW",
    "Peer",
    "Running",
    "missing",
    "pinned",
    "start",
    "version_of",
]

_ROOT = Path(__file__).resolve().parents[1]
_CONFIGS = Path(__file__).with_name("configs")
_ENVOY = _ROOT / ".bench" / "envoy" / "bin" / "envoy"
_MITMPROXY = _ROOT / ".bench" / "mitmproxy" / "bin" / "mitmdump"
_PORTKEY = (
    _ROOT / ".bench" / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
)
_LITELLM = _ROOT / ".litellm" / "1.83.10" / "bin" / "litellm"
_NGINX_LUA = Path("/usr/lib/nginx/modules/ngx_http_lua_module.so")

PROXY_CORE = 0
LOAD_CORE = 1


def pinned(core: int, command: Sequence[str]) -> list[str]:
    """Put a command on one core, so that proxy and load never take turns on one."""
    return ["taskset", "-c", str(core), *command]


@dataclass(frozen=True, slots=True)
class Place:
    """What a peer is told: where to listen, where to send, where to put its files."""

    port: int
    admin_port: int
    upstream_port: int
    directory: Path

    def fill(self, template: str) -> Path:
        """Fill a template of `configs/` in, and return the file."""
        text = (_CONFIGS / template).read_text()
        values = {
            "PORT": str(self.port),
            "ADMIN_PORT": str(self.admin_port),
            "UPSTREAM_PORT": str(self.upstream_port),
            "CONFIGS": str(_CONFIGS),
            "MODEL": bodies.MODEL,
        }
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        path = self.directory / template
        path.write_text(text)
        return path


@dataclass(frozen=True, slots=True)
class Peer:
    """One proxy to measure."""

    name: str
    title: str
    command: Callable[[Place], list[str]]
    needs: tuple[Path | str, ...]
    """Programs and files without which it cannot run."""
    version: tuple[str, ...]
    """A command that says its version."""
    environment: Callable[[Place], Mapping[str, str]] = lambda _: {}
    counted: Callable[[Place], tuple[int, int]] | None = None
    """Asks for how many answers and cache read tokens it counted; None if it counts nothing."""
    slow: bool = False
    """Two orders of magnitude slower than the others: gets less to do."""
    measures: tuple[str, ...] | None = None
    """What it is put through; None for everything."""
    headers: Callable[[Place], Mapping[str, str]] = lambda _: {}
    """Further request headers that it asks for."""
    alters: bool = False
    """Whether it writes the answer anew, so that lengths may differ from the upstream's."""


def _nginx(template: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        path = place.fill(template)
        return ["nginx", "-e", "stderr", "-p", str(place.directory), "-c", str(path)]

    return command


def _envoy(template: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        path = place.fill(template)
        command = [str(_ENVOY), "-c", str(path), "--concurrency", "1"]
        return [*command, "--disable-hot-restart", "--log-level", "error"]

    return command


def _sidecar(*words: str) -> Callable[[Place], list[str]]:
    return lambda _: [sys.executable, "-m", *words]


def _sidecar_environment(place: Place) -> dict[str, str]:
    return {
        "SIDECAR_UPSTREAM": f"http://127.0.0.1:{place.upstream_port}",
        "SIDECAR_PORT": str(place.port),
        "SIDECAR_ADMIN_PORT": str(place.admin_port),
        "SIDECAR_USAGE_LOG": "off",  # like the access logs of the others
        "SIDECAR_MISS_REASONS": "false",  # which no other tells
    }


def _sidecar_counts(place: Place) -> tuple[int, int]:
    return _totals(
        place,
        "/metrics",
        r'litellm_sidecar_responses_total\{.*outcome="hit".*',
        r'litellm_sidecar_input_tokens_total\{.*cache="read".*',
    )


def _litellm(place: Place) -> list[str]:
    path = place.fill("litellm.yaml")
    words = ["--config", str(path), "--host", "127.0.0.1", "--port", str(place.port)]
    return [str(_LITELLM), *words, "--telemetry", "False", "--num_workers", "1"]


def _mitmproxy(place: Place) -> list[str]:
    mode = f"reverse:http://127.0.0.1:{place.upstream_port}"
    words = ["--mode", mode, "--listen-host", "127.0.0.1", "--listen-port", str(place.port)]
    words += ["--set", f"confdir={place.directory}", "--set", "flow_detail=0", "--quiet"]
    return [str(_MITMPROXY), *words, "-s", str(_CONFIGS / "mitmproxy_usage.py")]


def _get(port: int, path: str) -> tuple[str, Mapping[str, str]]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=10) as response:
        return response.read().decode(), response.headers


def _pair(text: str) -> tuple[int, int]:
    responses, read = text.split()
    return int(float(responses)), int(float(read))


def _totals(place: Place, path: str, *series: str) -> tuple[int, int]:
    """Sum the series that match two patterns, on the admin port."""
    text, _ = _get(place.admin_port, path)
    found = [re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE) for pattern in series]
    responses, read = (int(sum(map(float, values))) for values in found)
    return responses, read


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "nginx",
            "nginx",
            _nginx("nginx.conf"),
            ("nginx",),
            ("nginx", "-v"),
        ),
        Peer(
            "nginx-lua",
            "nginx + Lua, usage into a variable",
            _nginx("nginx-lua.conf"),
            ("nginx", _NGINX_LUA),
            ("nginx", "-v"),
            counted=lambda place: _pair(_get(place.port, "/bench/usage")[0]),
        ),
        Peer(
            "envoy",
            "Envoy",
            _envoy("envoy.yaml"),
            (_ENVOY,),
            (str(_ENVOY), "--version"),
        ),
        Peer(
            "envoy-lua-lean",
            "Envoy + Lua, usage into a variable",
            _envoy("envoy-lua-lean.yaml"),
            (_ENVOY,),
            (str(_ENVOY), "--version"),
            counted=lambda place: _pair(_get(place.port, "/bench/usage")[1]["x-bench-usage"]),
        ),
        Peer(
            "envoy-lua",
            "Envoy + Lua, usage into metrics",
            _envoy("envoy-lua.yaml"),
            (_ENVOY,),
            (str(_ENVOY), "--version"),
            counted=lambda place: _totals(
                place,
                "/stats/prometheus",
                r"envoy_usage_responses\{.*",
                r"envoy_usage_read_tokens\{.*",
            ),
        ),
        Peer(
            "sidecar-off",
            "sidecar, observation off",
            _sidecar("bench.observation_off"),
            (),
            (sys.executable, "-m", "sidecar", "--version"),
            environment=_sidecar_environment,
        ),
        Peer(
            "sidecar",
            "**sidecar**",
            _sidecar("sidecar", "serve"),
            (),
            (sys.executable, "-m", "sidecar", "--version"),
            environment=_sidecar_environment,
            counted=_sidecar_counts,
        ),
        Peer(
            "sidecar-log",
            "sidecar, usage log on",
            _sidecar("sidecar", "serve"),
            (),
            (sys.executable, "-m", "sidecar", "--version"),
            environment=lambda place: _sidecar_environment(place) | {"SIDECAR_USAGE_LOG": "stdout"},
            counted=_sidecar_counts,
        ),
        Peer(
            "sidecar-misses",
            "sidecar, reasons of misses on",
            _sidecar("sidecar", "serve"),
            (),
            (sys.executable, "-m", "sidecar", "--version"),
            environment=lambda place: (
                _sidecar_environment(place) | {"SIDECAR_MISS_REASONS": "true"}
            ),
            counted=_sidecar_counts,
        ),
        Peer(
            "mitmproxy",
            "mitmproxy + add-on reading usage",
            _mitmproxy,
            (_MITMPROXY,),
            (str(_MITMPROXY), "--version"),
            slow=True,
            measures=("json32", "burst"),
        ),
        Peer(
            "portkey",
            "Portkey gateway",
            lambda place: ["node", str(_PORTKEY), f"--port={place.port}", "--headless"],
            ("node", _PORTKEY),
            ("sed", "-n", 's/.*"version": "/ /p', str(_PORTKEY.parents[1] / "package.json")),
            environment=lambda _: {
                "NODE_ENV": "production",
                "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost",
            },
            headers=lambda place: {
                "x-portkey-provider": "anthropic",
                "x-portkey-custom-host": f"http://127.0.0.1:{place.upstream_port}/v1",
            },
            slow=True,
            # Its streams fail under Node.js 20 and its own bundle: "TypeError: immutable".
            measures=("json32",),
            alters=True,
        ),
        Peer(
            "litellm",
            "LiteLLM 1.83.10 itself",
            _litellm,
            (_LITELLM,),
            (str(_LITELLM), "--version"),
            environment=lambda _: {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            slow=True,
            measures=("json32", "burst"),
            alters=True,
        ),
    )
}
DEFAULT = tuple(name for name, peer in PEERS.items() if not peer.slow)
SLOW = tuple(name for name, peer in PEERS.items() if peer.slow)

_HINTS = {
    "nginx": "apt-get install nginx",
    str(_NGINX_LUA): "apt-get install libnginx-mod-http-lua",
    str(_ENVOY): "make bench-tools",
    str(_MITMPROXY): "make bench-tools PEERS=all",
    str(_PORTKEY): "make bench-tools PEERS=all",
    "node": "apt-get install nodejs npm",
    str(_LITELLM): "make litellm",
}


def missing(peer: Peer) -> list[str]:
    """Say what is missing to run a peer, and how to get it."""
    return [
        f"{need} ({_HINTS[str(need)]})"
        for need in peer.needs
        if not (shutil.which(need) if isinstance(need, str) else need.exists())
    ]


@dataclass(frozen=True, slots=True)
class Running:
    """A peer that answers."""

    peer: Peer
    place: Place
    pid: int

    @property
    def port(self) -> int:
        return self.place.port

    @property
    def headers(self) -> dict[str, str]:
        """The headers of a request to it."""
        return {**bodies.REQUEST_HEADERS, **self.peer.headers(self.place)}

    def counted(self) -> tuple[int, int] | None:
        """How many answers and cache read tokens it counted."""
        return self.peer.counted(self.place) if self.peer.counted else None


_START_TIMEOUT_S = 120.0


@contextmanager
def start(peer: Peer, upstream_port: int, directory: Path) -> Iterator[Running]:
    """Run a peer until the context ends.

    Raises:
        ReadinessError: it did not answer; the text has the end of its log.
    """
    place = Place(free_port(), free_port(), upstream_port, directory)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(directory),
        "PYTHONPATH": str(_ROOT),
        **peer.environment(place),
    }
    command = peer.command(place)
    process = ManagedProcess(
        pinned(PROXY_CORE, command),
        directory=directory,
        log=directory / "log",
        environment=environment,
        watched="sidecar" in command,
    )
    try:
        process.wait_until(lambda: _answers(place.port), timeout_s=_START_TIMEOUT_S)
        yield Running(peer, place, process.pid)
    finally:
        process.stop()


def _answers(port: int) -> bool:
    """Whether the port answers HTTP; with what does not matter, nor how long it is."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")
            return connection.recv(9) == b"HTTP/1.1 "
    except OSError:
        return False


def version_of(peer: Peer) -> str:
    """Ask for a version, and cut it to what tells."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(
        peer.version, capture_output=True, text=True, check=False, env=environment, cwd=_ROOT
    )
    found = re.search(r"\d+\.\d+[\w.]*", done.stdout + done.stderr)
    return found[0] if found else "unknown"
