"""What the end-to-end tests share: providers, one LiteLLM at a time, a sidecar, a Prometheus.

LiteLLM takes ten seconds to start. These fixtures live for the session, and the tests of one
version run one after the other: pytest sorts them by their parameters, and where there are
several processes `tests.support.schedule` gives all of them to one. How to use the shared LiteLLM
so that another test finds it as it was, `tests.support.litellm` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.support.clouds import Clouds, run_clouds
from tests.support.litellm import DIRECT_MODEL, HAIKU_MODEL, VERSIONS, LiteLLM, find_litellm
from tests.support.litellm_database import VIEWER, Database, KeyedLiteLLM
from tests.support.prometheus import Prometheus, find_prometheus
from tests.support.requirements import require
from tests.support.running import SidecarProcess, sidecar_process
from tests.support.schedule import rig_id

# Single sign-on that leads nowhere; nobody is asked, LiteLLM only redirects there.
SSO = {
    "GENERIC_CLIENT_ID": "rig",
    "GENERIC_CLIENT_SECRET": "rig",
    "GENERIC_AUTHORIZATION_ENDPOINT": "http://login.test/authorize",
    "GENERIC_TOKEN_ENDPOINT": "http://login.test/token",
    "GENERIC_USERINFO_ENDPOINT": "http://login.test/user",
}


@pytest.fixture(scope="session")
def clouds() -> Iterator[Clouds]:
    """Run the three providers."""
    with run_clouds() as running:
        yield running


@pytest.fixture(scope="session", params=VERSIONS, ids=partial(rig_id, "litellm"))
def litellm(
    request: pytest.FixtureRequest, clouds: Clouds, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiteLLM]:
    """Run a real LiteLLM of each version, one after the other."""
    version = request.param
    require(find_litellm(version), f"LiteLLM {version}")
    directory = tmp_path_factory.mktemp("litellm")
    # One name, two deployments, whose caches are apart.
    models = [
        {
            "model_name": "claude-hop",
            "litellm_params": {
                "model": f"anthropic/{model}",
                "api_base": clouds.url,
                "api_key": "sk-stand-in",
            },
        }
        for model in (DIRECT_MODEL, HAIKU_MODEL)
    ]
    with LiteLLM(version, clouds.url, directory, environment=SSO, models=models) as running:
        yield running


@pytest.fixture(scope="session", params=VERSIONS, ids=partial(rig_id, "keyed"))
def keyed(
    request: pytest.FixtureRequest, clouds: Clouds, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KeyedLiteLLM]:
    """Run a real LiteLLM of each version that looks keys up, without the callback."""
    version = request.param
    require(find_litellm(version), f"LiteLLM {version}")
    directory = tmp_path_factory.mktemp("litellm-keys")
    database = Database(directory)
    database.put_user("viewer", "proxy_admin_viewer")
    database.put_user("somebody", "internal_user")
    database.put_key(VIEWER, user_id="viewer")
    with LiteLLM(
        version,
        clouds.url,
        directory,
        identity_headers=False,
        database=True,
        # It keeps what it knows of a key for a minute, unless told otherwise.
        general_settings={"user_api_key_cache_ttl": 1},
        environment={"DEFAULT_MANAGEMENT_OBJECT_IN_MEMORY_CACHE_TTL": "1"},
    ) as running:
        yield KeyedLiteLLM(running, database)


@pytest.fixture(scope="session")
def front(litellm: LiteLLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    """Run a sidecar in front of LiteLLM."""
    settings = {"SIDECAR_UPSTREAM": litellm.url, "SIDECAR_TRUSTED_PROXIES": "127.0.0.1/32"}
    with sidecar_process(tmp_path_factory.mktemp("sidecar"), settings) as running:
        yield running


@pytest.fixture(scope="session")
def prometheus(
    litellm: LiteLLM, front: SidecarProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes both of them every second."""
    require(find_prometheus(), "Prometheus")
    targets = {
        "sidecar": front.admin_url.removeprefix("http://"),
        "litellm": f"{litellm.url.removeprefix('http://')}/metrics/",
    }
    with Prometheus(targets, tmp_path_factory.mktemp("prometheus")) as running:
        yield running
