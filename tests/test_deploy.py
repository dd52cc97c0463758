"""What ships beside the package: it parses, its names agree, and its own tools accept it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sidecar import __version__
from sidecar.config import PREFIX, Settings
from tests.support.manifests import IMAGE, read, stopping_s
from tests.support.process import checked
from tests.support.requirements import require

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"


def settings_of(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Read an environment as the sidecar would."""
    for name, value in environment.items():
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields
        monkeypatch.setenv(name, value)
    return Settings()


# Everything


@pytest.mark.parametrize(
    "path",
    [COMPOSE, *sorted(DEPLOY.rglob("*.y*ml"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_yaml_parses(path: Path) -> None:
    """Every file is YAML and says something."""
    assert all(read(path))


def test_all_name_the_image_by_the_version_of_the_package() -> None:
    """One version everywhere, and no `latest`."""
    native = DEPLOY / "kubernetes" / "components" / "native-sidecar" / "deployment-patch.yaml"
    helm = DEPLOY / "helm" / "litellm-values.yaml"
    for path in (COMPOSE, native, helm, ROOT / "docs" / "quickstart.md"):
        found = set(re.findall(r"litellm-cache-sidecar:[\w.-]+", path.read_text()))
        assert found == {IMAGE}, path
    assert f"ARG VERSION={__version__}\n" in DOCKERFILE.read_text()


def test_callback_is_named_by_its_instance() -> None:
    """The name that LiteLLM's configuration gives is one that the callback's file defines."""
    defined = re.findall(
        r"(?m)^(\w+) = \w+\(\)$", (DEPLOY / "litellm" / "sidecar_identity.py").read_text()
    )
    name = f"sidecar_identity.{defined[0]}"

    (config,) = read(DEPLOY / "compose" / "litellm.yaml")

    assert name in config["litellm_settings"]["callbacks"]
    assert name in (DEPLOY / "litellm" / "README.md").read_text()


# The image


def test_image_is_built_from_pinned_and_hashed_parts() -> None:
    """Both stages begin with the same full tag, and every package is installed by its hash."""
    text = DOCKERFILE.read_text()

    assert re.findall(r"(?m)^FROM (\S+)", text) == ["${BASE}"] * 2
    assert re.search(r"(?m)^ARG BASE=python:3\.13\.\d+-slim-trixie$", text)
    installs = re.findall(r"pip.* install(.*\\\n.*)", text)
    assert len(installs) == 3
    assert [line for line in installs if "--require-hashes" not in line] == [
        " --no-compile \\\n        --no-deps --no-index --find-links dist litellm-cache-sidecar \\"
    ]


@pytest.mark.parametrize("name", ["runtime", "build"])
def test_lock_files_hash_every_package(name: str) -> None:
    """`--require-hashes` would refuse anything else."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    packages = [line for line in lines if line and line[0] not in " #"]

    assert packages
    assert all(re.match(r"[\w.-]+==\S+", line) and line.endswith("\\") for line in packages)


def test_lock_file_of_the_build_has_what_the_package_asks_for() -> None:
    """The backend that `pyproject.toml` names is the one that is locked."""
    text = (ROOT / "pyproject.toml").read_text()
    match = re.search(r'requires = \["(.+)"\]', text)
    assert match is not None

    assert (ROOT / "requirements" / "build.in").read_text().split() == [match[1]]


def test_image_gets_all_that_its_build_copies() -> None:
    """`.dockerignore` leaves in what `COPY` names, and what is named exists."""
    kept = re.findall(r"(?m)^!(.+)$", (ROOT / ".dockerignore").read_text())
    copied = [
        name
        for line in re.findall(r"(?m)^COPY (?!--from)(.+)$", DOCKERFILE.read_text())
        for name in line.split()[:-1]
    ]

    assert sorted(kept) == sorted(copied)
    assert [name for name in kept if not (ROOT / name).exists()] == []


def test_image_runs_as_no_user_in_particular_and_without_a_shell() -> None:
    """A numeric user, exec form, and the signal that starts a drain."""
    text = DOCKERFILE.read_text()

    assert "\nUSER 65532:65532\n" in text
    assert '\nENTRYPOINT ["sidecar"]\nCMD ["serve"]\n' in text
    assert "\nSTOPSIGNAL SIGTERM\n" in text
    assert '\n    CMD ["sidecar", "healthcheck"]\n' in text


def test_image_listens_on_all_addresses_at_the_ports_it_exposes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From outside a container its loopback cannot be reached."""
    text = DOCKERFILE.read_text()
    settings = settings_of(dict(re.findall(rf"({PREFIX}\w+)=(\S+)", text)), monkeypatch)

    assert (settings.host, settings.admin_host) == ("0.0.0.0", "0.0.0.0")
    assert f"EXPOSE {settings.port} {settings.admin_port}\n" in text


# Compose


def test_compose_file_is_valid() -> None:
    """docker-compose itself accepts it."""
    program = require(shutil.which("docker-compose"), "docker-compose")

    checked(program, "--file", str(COMPOSE), "config", "--quiet", directory=ROOT)


def test_compose_mounts_what_exists_and_publishes_on_loopback() -> None:
    """A missing file would be made a directory; the keys in there are no secrets."""
    services = read(COMPOSE)[0]["services"]

    for service in services.values():
        for volume in service.get("volumes", ()):
            assert (ROOT / volume.split(":")[0]).exists()
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert service["image"] == IMAGE or re.search(r":v?\d+\.\d+\.\d+", service["image"])
        for needed in service.get("depends_on", {}):
            # The sidecar's image has one of its own.
            assert "healthcheck" in services[needed] or needed == "sidecar"


def test_compose_starts_nothing_that_can_change_its_image() -> None:
    """Read-only roots and no capabilities for all but LiteLLM, which writes to its own folders."""
    services = read(COMPOSE)[0]["services"]

    assert set(services) == {"provider", "litellm", "sidecar", "prometheus", "grafana", "traffic"}
    for name, service in services.items():
        assert service["restart"] == "unless-stopped"
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert name == "litellm" or (service["read_only"] and service["cap_drop"] == ["ALL"])


def test_health_checks_need_what_their_images_are_for() -> None:
    """Their own programs, which no slimmer image of the next version leaves out; Grafana has none
    that asks, and its image is Alpine's."""
    services = read(COMPOSE)[0]["services"]
    asked = {
        name: service["healthcheck"]["test"][:2]
        for name, service in services.items()
        if "test" in service.get("healthcheck", {})
    }

    assert asked == {
        "provider": ["CMD", "python"],
        "litellm": ["CMD", "python3"],
        "prometheus": ["CMD", "promtool"],
        "grafana": ["CMD", "wget"],
    }


def test_grafana_of_compose_shows_the_dashboard_first() -> None:
    """Its folders lie where its provisioning looks, its data where it can write."""
    grafana = read(COMPOSE)[0]["services"]["grafana"]
    environment = grafana["environment"]
    mounts = {
        target: ROOT / source for source, target, _ in (v.split(":") for v in grafana["volumes"])
    }
    provisioning = mounts[environment["GF_PATHS_PROVISIONING"]]
    (dashboards,) = read(next((provisioning / "dashboards").glob("*.yaml")))
    (sources,) = read(next((provisioning / "datasources").glob("*.yaml")))
    home = Path(environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])

    assert [one["options"]["path"] for one in dashboards["providers"]] == [str(home.parent)]
    board = json.loads((mounts[str(home.parent)] / home.name).read_text())
    assert board["uid"] == home.stem
    assert [(one["uid"], one["url"]) for one in sources["datasources"]] == [
        ("prometheus", "http://prometheus:9090")
    ]
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert any(environment["GF_PATHS_DATA"].startswith(f"{path}/") for path in grafana["tmpfs"])


def test_compose_gives_the_sidecar_the_time_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grace period is longer than the whole drain, and the names are settings."""
    sidecar = read(COMPOSE)[0]["services"]["sidecar"]
    settings = settings_of(sidecar["environment"], monkeypatch)

    assert settings.upstream == "http://litellm:4000"
    assert float(sidecar["stop_grace_period"].removesuffix("s")) > stopping_s(
        sidecar["environment"]
    )


@pytest.mark.parametrize("path", ["README.md", "docs/operating.md"])
def test_grace_period_that_the_docs_ask_for(path: str) -> None:
    """It is longer than a stop with the defaults."""
    match = re.search(r"(\d+) seconds with the defaults", (ROOT / path).read_text())
    assert match is not None
    assert int(match[1]) > stopping_s({})
