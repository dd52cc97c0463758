"""The image that was built of this tree: what it is made of, and that it does its work as it is.

It is run with the user, environment and command lines of its own configuration, with a read-only
root, as the first process of its namespace, and with no shell to be had.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.image import MAX_ADDED_BYTES, Store, added_layers, image_name, pip_settings
from sidecar import __version__
from tests.support.calls import ask_now, body_for, post
from tests.support.clouds import Clouds
from tests.support.container import Image, first_process, mounted_image
from tests.support.litellm import DIRECT_MODEL
from tests.support.process import ManagedProcess, free_port
from tests.support.requirements import require

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store() -> Store:
    """The store that `make image` has filled."""
    require(shutil.which("buildah"), "buildah")
    require(os.geteuid() == 0, "root, without whom no image is mounted,")
    store = Store()
    require(store.has(image_name()), "the image of this tree (make image)")
    return store


@pytest.fixture(scope="module")
def image(store: Store) -> Iterator[Image]:
    """Mount the image."""
    with mounted_image(store) as mounted:
        yield mounted


class Served:
    """A sidecar that runs from the image."""

    def __init__(self, image: Image, upstream: str, directory: Path) -> None:
        """Start it as it is, but for its ports, its upstream and the delays of its end."""
        self.port, self.admin_port = free_port(), free_port()
        self.environment = {
            "SIDECAR_UPSTREAM": upstream,
            "SIDECAR_PORT": str(self.port),
            "SIDECAR_ADMIN_PORT": str(self.admin_port),
            "SIDECAR_DRAIN_DELAY_S": "0",
            "SIDECAR_FINAL_SCRAPE_WAIT_S": "0",
            "SIDECAR_PRICE_SOURCES": "file,package",
        }
        line = [*image.config["Entrypoint"], *image.config["Cmd"]]
        self.process: ManagedProcess = image.container(self.environment).start(line, directory)

    def get(self, path: str) -> str:
        """Fetch a page from the admin port."""
        url = f"http://127.0.0.1:{self.admin_port}{path}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())

    def ready(self) -> bool:
        """Whether it answers."""
        try:
            return bool(self.get("/readyz"))
        except OSError:
            return False


@pytest.fixture(scope="module")
def served(
    image: Image, clouds: Clouds, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Run the image before the stand-in."""
    served = Served(image, clouds.url, tmp_path_factory.mktemp("image"))
    try:
        served.process.wait_until(served.ready, timeout_s=30)
        yield served
    finally:
        served.process.stop()


# What it is


def test_image_is_small_and_one_folder(store: Store, image: Image) -> None:
    """One layer with anything in it, of less than 100 MB, and that in /opt/sidecar alone."""
    layers = {digest: size for digest, size in added_layers(store, image_name()).items() if size}

    assert sum(layers.values()) < MAX_ADDED_BYTES
    assert len(layers) == 1
    assert os.listdir(image.root / "opt") == ["sidecar"]
    assert sum(path.lstat().st_size for path in (image.root / "opt").rglob("*")) == pytest.approx(
        sum(layers.values()), rel=0.1
    )


def test_image_says_what_it_is(image: Image) -> None:
    """Labels, user, ports, signal and commands are those of the Dockerfile."""
    config = image.config
    labels = {
        name.removeprefix("org.opencontainers.image."): value
        for name, value in config["Labels"].items()
    }

    assert labels["title"] == "litellm-cache-sidecar"
    assert "prompt cache" in labels["description"]
    assert (labels["version"], labels["licenses"]) == (__version__, "MIT")
    assert labels["base.name"].startswith("docker.io/library/python:3.13.")
    assert re.fullmatch(r"[0-9a-f]{40}", labels["revision"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", labels["created"])
    assert config["User"] == "65532:65532"
    assert set(config["ExposedPorts"]) == {"4001/tcp", "4002/tcp"}
    assert config["StopSignal"] in {"SIGTERM", "15"}
    assert (config["Entrypoint"], config["Cmd"]) == (["sidecar"], ["serve"])
    assert config["Healthcheck"]["Test"] == ["CMD", "sidecar", "healthcheck"]


def test_image_has_what_runs_and_nothing_that_builds(image: Image) -> None:
    """No pip, no other package's program, and the live page's files are there."""
    site = next((image.root / "opt/sidecar/lib").glob("python3.*/site-packages"))

    assert list(site.glob("pip*")) == []
    assert list(site.glob("hatchling*")) == []
    programs = {path.name for path in (image.root / "opt/sidecar/bin").iterdir()}
    assert {name for name in programs if not name.startswith("python")} == {"sidecar"}
    assert not [path for path in ("usr/bin/gcc", "usr/bin/cc") if (image.root / path).exists()]
    sources = ROOT / "sidecar"
    ours = {
        path.relative_to(sources)
        for path in sources.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert ours <= {path.relative_to(site / "sidecar") for path in (site / "sidecar").rglob("*")}


def test_modules_are_compiled_for_good(image: Image) -> None:
    """Each has its bytecode, which no time of modification makes stale, and none is left over."""
    site = next((image.root / "opt/sidecar/lib").glob("python3.*/site-packages"))
    compiled = {path.parent.parent / f"{path.name.split('.')[0]}.py": path for path in
                site.rglob("__pycache__/*.pyc")}  # fmt: skip

    assert set((site / "sidecar").rglob("*.py")) <= compiled.keys()
    assert [source for source in compiled if not source.is_file()] == []
    flags = {struct.unpack("<I", path.read_bytes()[4:8])[0] for path in compiled.values()}
    assert flags == {0b01}  # by hash, and not to be checked


def test_nothing_of_the_machine_that_built_it_is_left(image: Image) -> None:
    """Neither pip's settings nor the certificate, nor a name of an index, are in it."""
    listing = subprocess.run(
        [shutil.which("python3") or "python3", "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    settings, _ = pip_settings(listing)
    hosts = {host.encode() for host in re.findall(r"//([^/\s]+)", settings)}
    about = json.dumps(image.about).encode()

    assert not (image.root / "etc/pip.conf").exists()
    assert not (image.root / "run/secrets").exists()
    assert not (image.root / "build").exists()
    assert b"index-url" not in about
    assert not any(host in about for host in hosts)
    for path in (image.root / "opt").rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            assert not any(host in content for host in hosts), path
            assert b"/build/dist" not in content, path
            assert path.stat().st_uid == 0
            assert not path.stat().st_mode & 0o022, path


def test_settings_of_pip_go_in_without_what_only_this_machine_knows() -> None:
    """Addresses are kept, paths are not, and the certificate is named where the build has it."""
    text, certificate = pip_settings(
        "global.index-url='https://index.test/simple'\n"
        "global.extra-index-url='file:///opt/one https://more.test/simple'\n"
        "global.find-links='/opt/wheels'\n"
        "global.cert='/old.pem'\n"
        ":env:.cert='/etc/ssl/ca.pem'\n"
    )

    assert text.splitlines() == [
        "[global]",
        "index-url = https://index.test/simple",
        "extra-index-url = https://more.test/simple",
        "cert = /run/secrets/ca.pem",
    ]
    assert certificate == Path("/etc/ssl/ca.pem")


# What it does


def test_call_through_the_image_is_counted(served: Served, clouds: Clouds) -> None:
    """The write of one call and the read of the next, as the provider has them in its books."""
    raw = post(body_for(DIRECT_MODEL, "the image"), "sk-image")
    before = len(clouds.books.entries)

    answers = [ask_now(f"http://127.0.0.1:{served.port}", raw) for _ in range(2)]

    assert [answer.status for answer in answers] == [200, 200]
    written, read = clouds.books.entries[before:]
    metrics = served.get("/metrics")
    expected = {
        "write_5m": written.ephemeral_5m_input_tokens,
        "read": read.cache_read_input_tokens,
    }
    for cache, tokens in expected.items():
        (count,) = re.findall(
            rf'litellm_sidecar_input_tokens_total{{.*cache="{cache}".*}} (\S+)', metrics
        )
        assert float(count) == tokens > 0


def test_sidecar_of_the_image_is_nobody_and_the_first_process(served: Served) -> None:
    """By number, with no group besides, no shell in between, and no place to write to."""
    pid = first_process(served.process)
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )

    assert status["NSpid"].split()[-1] == "1"
    assert set(status["Uid"].split()) == set(status["Gid"].split()) == {"65532"}
    assert status["Groups"].split() in ([], ["65532"])
    assert int(status["CapEff"], 16) == 0
    assert b"/opt/sidecar/bin/sidecar\0serve" in Path(f"/proc/{pid}/cmdline").read_bytes()
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    (root,) = [line.split() for line in mounts if line.split()[4] == "/"]
    assert "ro" in root[5].split(",")


def test_health_check_of_the_image_tells_one_that_serves(
    image: Image, served: Served, tmp_path: Path
) -> None:
    """The command of its own configuration, in exec form: 0 while it serves, 1 where none does."""
    command = image.config["Healthcheck"]["Test"][1:]

    well = image.container(served.environment).run(command, tmp_path)
    nobody = image.container({"SIDECAR_ADMIN_PORT": str(free_port())}).run(command, tmp_path)

    assert (well.returncode, nobody.returncode) == (0, 1), well.stderr + nobody.stderr


def test_page_is_served_from_the_image(served: Served) -> None:
    """Its files came along; it wants a token or leave, as the image listens on all addresses."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        served.get("/")

    with refused.value:
        assert refused.value.code in {401, 403}


def test_nothing_asks_for_a_shell(image: Image, tmp_path: Path) -> None:
    """In these tests there is none."""
    assert image.container({}).run(["sh", "-c", "true"], tmp_path).returncode in {126, 127}


def test_bad_settings_end_it_with_their_names(image: Image, clouds: Clouds, tmp_path: Path) -> None:
    """`check` runs in the image, too."""
    good = image.container({"SIDECAR_UPSTREAM": clouds.url}).run(["sidecar", "check"], tmp_path)
    bad = image.container({"SIDECAR_PORT": "none"}).run(["sidecar", "check"], tmp_path)

    assert good.returncode == 0, good.stderr
    assert bad.returncode == 2
    assert "SIDECAR_PORT" in bad.stderr


def test_any_other_user_will_do(image: Image, clouds: Clouds, tmp_path: Path) -> None:
    """Some clusters give each namespace a number of its own, with root's group and no home."""
    environment = {"SIDECAR_UPSTREAM": clouds.url, "HOME": "/nowhere"}
    somebody = replace(image.container(environment), user="1000730000:0")

    done = somebody.run(["sidecar", "check"], tmp_path)

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_demo_of_the_image_counts_what_is_true(image: Image, tmp_path: Path) -> None:
    """All its parts work on the image's interpreter; it writes to /tmp, as the demo does."""
    container = image.container({}, {"/tmp": "tmpfs"})  # noqa: S108 - that of the container
    done = container.run(["sidecar", "demo", "--once"], tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr


def test_signal_ends_it_in_good_order(image: Image, clouds: Clouds, tmp_path: Path) -> None:
    """SIGTERM reaches the sidecar, which has a handler, and it ends with 0."""
    served = Served(image, clouds.url, tmp_path)
    try:
        served.process.wait_until(served.ready, timeout_s=30)
        os.kill(first_process(served.process), signal.SIGTERM)
        code = served.process.exit_code(timeout_s=20)
    finally:
        served.process.stop()

    assert code == 0
    log = served.process.log.read_text()
    assert "Read-only file system" not in log
    assert "Traceback" not in log
