"""A real LiteLLM proxy on a loopback port, with a stand-in for its providers.

Knows how to configure LiteLLM so that it needs no database, no provider and no network. It must
not know the sidecar: what is started here is what an operator already has.

Contract: everything it writes is under the directory it is given, several may run at once, and
the process group is ended when the context ends.

Each start takes ten seconds of a processor. So tests share one LiteLLM of each version for the
whole session, by the fixtures of `tests/e2e/conftest.py`:

- `litellm` has the shipped callback and `DEFAULT_IDENTITIES`; `clouds` are its providers, `front`
  is a sidecar before it, `prometheus` scrapes both. A test that needs a sidecar with other settings
  starts one of its own before the same LiteLLM.
- `keyed` looks keys up, without the callback: put keys, users and teams of your own into its
  tables.

A test that uses one of them runs once with each version, and no other test runs beside it with the
same LiteLLM: what `clouds.books` get in the meantime is its own. What others left is there, though:
ask with a topic of your own (or clear `clouds.cache`) where the first call has to write, count
what was added, and leave the LiteLLM as it was (`applied` does).

One version alone is `parametrize("litellm", ["1.100.5"], indirect=True, ids=["litellm-1.100.5"])`:
by that name `tests.support.schedule` knows which process has it. One of your own, for what must be
broken, ended, or configured so that it means something else (`with LiteLLM(...)`), belongs to one
file.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.dialects import OPENAI_MODEL
from tests.support.process import ManagedProcess, free_port

__all__ = [
    "BEDROCK_MODEL",
    "BLUE",
    "DEFAULT_IDENTITIES",
    "DIRECT_MODEL",
    "HAIKU_MODEL",
    "LONER",
    "MASTER_KEY",
    "RED",
    "STAR",
    "VERSIONS",
    "VERTEX_MODEL",
    "Identity",
    "LiteLLM",
    "find_litellm",
]

VERSIONS = ("1.83.10", "1.100.5")

_ROOT = Path(__file__).resolve().parents[2]
_IDENTITY_CALLBACK = _ROOT / "deploy" / "litellm" / "sidecar_identity.py"

# LiteLLM imports for 15 to 30 s, twice that beside another one on two cores.
_START_TIMEOUT_S = 180.0
_REQUEST_TIMEOUT_S = 5.0

MASTER_KEY = "sk-rig-master"
# A call with this key makes the rig's own module apply `runtime_general_settings`.
_RIG_KEY = "sk-rig-apply"
# ... and comes from here, which is always among the addresses that the rig allows.
_RIG_ADDRESS = "192.0.2.250"

# What LiteLLM asks the providers for; the names that `Books` has.
DIRECT_MODEL = "claude-sonnet-4-5-20250929"
HAIKU_MODEL = "claude-haiku-4-5-20251001"
VERTEX_MODEL = "claude-sonnet-4-5@20250929"
BEDROCK_MODEL = "us.anthropic.claude-sonnet-4-5-20250929-v1:0"

_VERTEX_PROJECT = "stand-in"
_VERTEX_LOCATION = "us-east5"


@dataclass(frozen=True, slots=True)
class Identity:
    """What LiteLLM finds out about one key."""

    key: str
    key_alias: str | None = None
    team_id: str | None = None
    team_alias: str | None = None


RED = Identity("sk-red-1", "red-laptop", "team-red", "Team Red")
BLUE = Identity("sk-blue-1", "blue-ci", "team-blue", "Team Blue")
LONER = Identity("sk-loner-1", "loner")
STAR = Identity("sk-star-1", "clé ★, 100%", "team-star", 'Équipe "★" \\ 50 %; a=b')
DEFAULT_IDENTITIES = (RED, BLUE, LONER, STAR)


def find_litellm(version: str) -> Path | None:
    """The `litellm` program of that version under the repository's `.litellm`, or None."""
    program = _ROOT / ".litellm" / version / "bin" / "litellm"
    return program if program.exists() else None


# The module LiteLLM imports for `general_settings.custom_auth`. `general_settings` is read at every
# request, so an entry put there later works like one that LiteLLM's own `/add/allowed_ip` put
# there. `free_sso` stands for a database without users: up to five of them may use single
# sign-on without a licence, and LiteLLM counts them before it redirects; 1.100 takes a type of
# the database client's for the count.
_AUTH_MODULE = """\
import json
import pathlib
import sys
import types

from litellm.proxy._types import LitellmUserRoles, ProxyException, UserAPIKeyAuth
from litellm.proxy.pass_through_endpoints import llm_passthrough_endpoints

_FILE = pathlib.Path(__file__).with_name("rig.json")
_RIG = json.loads(_FILE.read_text())
_APPLIED = set()

# Where requests that pass through to Vertex AI go is no setting.
llm_passthrough_endpoints.get_vertex_base_url = lambda location: _RIG["provider_url"] + "/"


class _NoUsers:
    def __getattr__(self, name):
        return _NoUsers()

    async def count(self, *args, **kwargs):
        return 0


async def authenticate(request, api_key):
    from litellm.proxy import proxy_server

    if api_key == _RIG["rig_key"]:
        rig = json.loads(_FILE.read_text())
        for name in _APPLIED:
            proxy_server.general_settings.pop(name, None)
        _APPLIED.clear()
        _APPLIED.update(rig["runtime_general_settings"])
        proxy_server.general_settings.update(rig["runtime_general_settings"])
        if isinstance(proxy_server.prisma_client, _NoUsers):
            proxy_server.prisma_client = None
        if rig["free_sso"]:
            client = types.ModuleType("prisma")
            client.Json = bool
            sys.modules.setdefault("prisma", client)
            proxy_server.prisma_client = _NoUsers()
        return UserAPIKeyAuth(api_key=api_key)
    if api_key == _RIG["master_key"]:
        return UserAPIKeyAuth(api_key=api_key, user_role=LitellmUserRoles.PROXY_ADMIN)
    for identity in _RIG["identities"]:
        if identity["key"] == api_key:
            return UserAPIKeyAuth(
                api_key=api_key,
                key_alias=identity["key_alias"],
                team_id=identity["team_id"],
                team_alias=identity["team_alias"],
            )
    # What LiteLLM itself raises: for any other exception 1.100 wants the database client package.
    raise ProxyException("unknown key", type="auth_error", param="key", code=401)
"""


class LiteLLM:
    """One LiteLLM; a context manager. `url` is good from entering to leaving.

    Models: `claude-direct`, `claude-vertex`, `claude-bedrock` (Sonnet 4.5 through the three
    clouds), `claude-haiku` (Anthropic, a prefix of 4,096 tokens) and `claude-sonnet-4-5` (the same
    as `claude-direct`, under a name that price maps know); `gpt-direct` (OpenAI).
    """

    def __init__(
        self,
        version: str,
        provider_url: str,
        directory: Path,
        *,
        host: str = "127.0.0.1",
        identities: Sequence[Identity] = DEFAULT_IDENTITIES,
        identity_headers: bool = True,
        models: Sequence[Mapping[str, Any]] = (),
        general_settings: Mapping[str, Any] | None = None,
        runtime_general_settings: Mapping[str, Any] | None = None,
        litellm_settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        free_sso: bool = False,
        database: bool = False,
    ) -> None:
        """Say what to start; nothing is started or written yet.

        Args:
            version: one that `find_litellm` finds.
            provider_url: the clouds of `tests.support.clouds`.
            directory: existing and writable; all files of this LiteLLM go there.
            host: address to listen on.
            identities: the keys it knows besides `MASTER_KEY`.
            identity_headers: whether the shipped callback is among its callbacks.
            models: further entries of `model_list`.
            general_settings: added to that section of the configuration.
            runtime_general_settings: put into LiteLLM's `general_settings` once it runs, for
                settings that its start refuses without a licence while its requests read them
                freely (`allowed_ips`).
            litellm_settings: added to that section of the configuration.
            environment: added to its environment.
            free_sso: let single sign-on redirect although there is no database.
            database: LiteLLM's own authentication, with the keys that a `Database` in the same
                directory knows, in the place of `identities`.
        """
        self.version = version
        self.log = directory / "litellm.log"
        self._provider_url = provider_url
        self._directory = directory
        self._host = host
        self._port = 0
        self._identities = identities
        self._identity_headers = identity_headers
        self._models = models
        self._general_settings = dict(general_settings or {})
        self._runtime_general_settings = dict(runtime_general_settings or {})
        self._litellm_settings = dict(litellm_settings or {})
        self._environment = dict(environment or {})
        self._free_sso = free_sso
        self._database = database
        self._process: ManagedProcess | None = None

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        # A wildcard address is one to listen on and none to connect to.
        host = "127.0.0.1" if self._host == "0.0.0.0" else self._host
        return f"http://{host}:{self._port}"

    @property
    def pid(self) -> int:
        """Process id, which is that of its group too."""
        assert self._process is not None, "not started"
        return self._process.pid

    def __enter__(self) -> LiteLLM:
        """Start, and wait until it answers.

        Raises:
            ReadinessError: with the end of its log.
        """
        program = find_litellm(self.version)
        if program is None:
            raise FileNotFoundError(f"no LiteLLM {self.version} under .litellm")
        config = self._write_files()
        self._port = free_port(self._host)
        self._process = ManagedProcess(
            [
                *(str(program), "--config", str(config), "--telemetry", "False"),
                *("--host", self._host, "--port", str(self._port), "--num_workers", "1"),
            ],
            directory=self._directory,
            log=self.log,
            environment=self._full_environment(program),
            watched=False,
        )
        try:
            self._process.wait_until(self._answers, timeout_s=_START_TIMEOUT_S)
            if self._runtime_general_settings or self._free_sso:
                self.apply(self._runtime_general_settings, free_sso=self._free_sso)
        except BaseException:
            self._process.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the whole group."""
        assert self._process is not None, "not started"
        self._process.stop()

    def metrics(self) -> str:
        """Its own exposition text."""
        with urllib.request.urlopen(f"{self.url}/metrics/", timeout=_REQUEST_TIMEOUT_S) as answer:
            return str(answer.read().decode())

    def wait_for_metric(self, text: str, *, timeout_s: float = 15.0) -> str:
        """The exposition once it contains this text; LiteLLM counts after it has answered."""
        deadline = time.monotonic() + timeout_s
        while text not in (exposition := self.metrics()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{text!r} did not appear in LiteLLM's metrics")
            time.sleep(0.1)
        return exposition

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"{self.url}/health/liveliness", timeout=_REQUEST_TIMEOUT_S
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def apply(self, runtime_general_settings: Mapping[str, Any], *, free_sso: bool = False) -> None:
        """Put these in the place of all that was applied at run time before."""
        self._runtime_general_settings = dict(runtime_general_settings)
        self._free_sso = free_sso
        self._write_rig()
        request = urllib.request.Request(
            f"{self.url}/v1/models",
            headers={"authorization": f"Bearer {_RIG_KEY}", "x-forwarded-for": _RIG_ADDRESS},
        )
        try:
            with urllib.request.urlopen(request, timeout=30):
                pass
        except urllib.error.HTTPError as refused:
            # The settings are in place before the rest of the call, which they may refuse.
            refused.close()

    @contextmanager
    def applied(
        self, runtime_general_settings: Mapping[str, Any], *, free_sso: bool = False
    ) -> Iterator[None]:
        """Apply for a while, and take back what was applied."""
        self.apply(runtime_general_settings, free_sso=free_sso)
        try:
            yield
        finally:
            self.apply({})

    def _full_environment(self, program: Path) -> dict[str, str]:
        home = self._directory / "home"
        home.mkdir(exist_ok=True)
        return {
            "PATH": f"{program.parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(home),
            "TMPDIR": str(home),
            "PYTHONUNBUFFERED": "1",
            # Where it was installed is not ours to write to.
            "PYTHONDONTWRITEBYTECODE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            # Keeps it from reading a `.env` of a directory above.
            "LITELLM_MODE": "PRODUCTION",
            "AWS_EC2_METADATA_DISABLED": "true",
            # It makes a copy of its UI there (20 MB); without this it rearranges the files where
            # it was installed.
            "LITELLM_UI_PATH": str(self._directory / "ui"),
            "NO_PROXY": "*",
            # Where requests pass through to, and with which credentials.
            "ANTHROPIC_API_BASE": self._provider_url,
            "ANTHROPIC_API_KEY": "sk-ant-stand-in",
            "OPENAI_API_BASE": self._provider_url,
            "OPENAI_API_KEY": "sk-stand-in",
            "AWS_BEDROCK_RUNTIME_ENDPOINT": self._provider_url,
            "AWS_REGION_NAME": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIASTANDIN",
            "AWS_SECRET_ACCESS_KEY": "stand-in",
            "DEFAULT_VERTEXAI_PROJECT": _VERTEX_PROJECT,
            "DEFAULT_VERTEXAI_LOCATION": _VERTEX_LOCATION,
            "DEFAULT_GOOGLE_APPLICATION_CREDENTIALS": str(self._directory / "vertex.json"),
            **self._environment,
        }

    def _write_files(self) -> Path:
        directory = self._directory
        shutil.copyfile(_IDENTITY_CALLBACK, directory / _IDENTITY_CALLBACK.name)
        (directory / "rig_auth.py").write_text(_AUTH_MODULE)
        self._write_rig()
        credentials = directory / "vertex.json"
        credentials.write_text(json.dumps(_service_account(f"{self._provider_url}/token")))
        config = directory / "config.yaml"
        config.write_text(yaml.safe_dump(self._config(credentials)))
        return config

    def _write_rig(self) -> None:
        settings = dict(self._runtime_general_settings)
        if "allowed_ips" in settings:
            settings["allowed_ips"] = [*settings["allowed_ips"], _RIG_ADDRESS]
        rig = {
            "provider_url": self._provider_url,
            "rig_key": _RIG_KEY,
            "master_key": MASTER_KEY,
            "identities": [asdict(identity) for identity in self._identities],
            "runtime_general_settings": settings,
            "free_sso": self._free_sso,
        }
        (self._directory / "rig.json").write_text(json.dumps(rig))

    def _config(self, credentials: Path) -> dict[str, Any]:
        callbacks = ["prometheus"]
        if self._identity_headers:
            callbacks.append("sidecar_identity.identity_headers")
        authentication = {"custom_auth": "rig_auth.authenticate"}
        if self._database:
            callbacks.append("rig_database.installed")
            authentication = {}
        return {
            "model_list": [*_models(self._provider_url, credentials), *self._models],
            "litellm_settings": {
                "callbacks": callbacks,
                # 1.100 asks for a key at /metrics unless told not to.
                "require_auth_for_metrics_endpoint": False,
                "num_retries": 0,
                "telemetry": False,
                **self._litellm_settings,
            },
            # One failure that a test asked for must not take the deployment away from the next.
            "router_settings": {"disable_cooldowns": True, "num_retries": 0},
            "general_settings": {
                "master_key": MASTER_KEY,
                **authentication,
                **self._general_settings,
            },
        }


def _models(provider_url: str, credentials: Path) -> list[dict[str, Any]]:
    def anthropic(name: str, model: str) -> dict[str, Any]:
        return {
            "model_name": name,
            "litellm_params": {
                "model": f"anthropic/{model}",
                "api_base": provider_url,
                "api_key": "sk-ant-stand-in",
            },
        }

    vertex_path = (
        f"/v1/projects/{_VERTEX_PROJECT}/locations/{_VERTEX_LOCATION}"
        f"/publishers/anthropic/models/{VERTEX_MODEL}"
    )
    vertex = {
        "model": f"vertex_ai/{VERTEX_MODEL}",
        "vertex_project": _VERTEX_PROJECT,
        "vertex_location": _VERTEX_LOCATION,
        "vertex_credentials": str(credentials),
        "api_base": provider_url + vertex_path,
    }
    bedrock = {
        "model": f"bedrock/{BEDROCK_MODEL}",
        "aws_bedrock_runtime_endpoint": provider_url,
        "aws_region_name": "us-east-1",
        "aws_access_key_id": "AKIASTANDIN",
        "aws_secret_access_key": "stand-in",
    }
    return [
        anthropic("claude-direct", DIRECT_MODEL),
        anthropic("claude-sonnet-4-5", DIRECT_MODEL),
        anthropic("claude-haiku", HAIKU_MODEL),
        {"model_name": "claude-vertex", "litellm_params": vertex},
        {"model_name": "claude-bedrock", "litellm_params": bedrock},
        {
            "model_name": "gpt-direct",
            "litellm_params": {
                "model": f"openai/{OPENAI_MODEL}",
                "api_base": provider_url,
                "api_key": "sk-stand-in",
            },
        },
    ]


def _service_account(token_uri: str) -> dict[str, str]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        "type": "service_account",
        "project_id": _VERTEX_PROJECT,
        "private_key_id": "0001",
        "private_key": pem.decode(),
        "client_email": f"rig@{_VERTEX_PROJECT}.invalid",
        "client_id": "1",
        "token_uri": token_uri,
    }
