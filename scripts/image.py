"""Builds the image without a registry, and says what it adds to its base.

    python scripts/image.py

The engine is buildah with chroot isolation: root, Debian's packages and Python's package index
are all that is needed. A registry is not asked for the base: one of the same name is made of
Debian's packages, with Debian's Python in the place of the official one. It ends with 1 where
the image adds more than 100 MB.

What is built is kept in a store of its own, outside of the tree (IMAGE_STORE, else a folder of
the user's cache), and not built again while nothing has changed that goes into it.

pip is set up here as it is for whoever calls this: its settings go into the build as secrets.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["MAX_ADDED_BYTES", "Store", "added_layers", "image_name", "main", "pip_settings"]

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "Dockerfile"

MAX_ADDED_BYTES = 100_000_000

_NAME = "localhost/litellm-cache-sidecar"
# The release that the base's tag names, and what of it stands for the official base.
_SUITE = "trixie"
_PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
# What pip is told by addresses; paths of this machine mean nothing in there.
_PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "retries")
_CA = "/run/secrets/ca.pem"


class Store:
    """Where images are kept; all of buildah's commands go through it."""

    def __init__(self, directory: Path | None = None) -> None:
        """Use a directory, or the one that the environment names."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        default = os.environ.get("IMAGE_STORE") or cache / "litellm-cache-sidecar" / "images"
        self.directory = directory or Path(default)

    def buildah(self, *arguments: str) -> str:
        """Run a command and return what it prints.

        Raises:
            subprocess.CalledProcessError: its words have gone to standard error.
        """
        # vfs copies whole layers, and is the one driver that works on any file system.
        places = ("--root", str(self.directory / "root"), "--runroot", str(self.directory / "run"))
        return subprocess.run(
            ["buildah", "--storage-driver", "vfs", *places, *arguments],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()

    def has(self, image: str) -> bool:
        """Whether there is an image of this name."""
        return image in self.names()

    def names(self) -> list[str]:
        """The names of all images, with their tags."""
        if not (self.directory / "root").is_dir():
            return []
        return self.buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()

    def inspect(self, image: str) -> dict[str, Any]:
        """What is written about an image."""
        about: dict[str, Any] = json.loads(self.buildah("inspect", "--type", "image", image))
        return about

    def layer_bytes(self) -> dict[str, int]:
        """The size of each layer, by the digest of what is in it."""
        text = (self.directory / "root" / "vfs-layers" / "layers.json").read_text()
        # That of a container has no digest as long as it may change.
        return {
            layer["diff-digest"]: layer["diff-size"]
            for layer in json.loads(text)
            if "diff-digest" in layer
        }


def base_name() -> str:
    """The base that the Dockerfile names."""
    match = re.search(r"(?m)^ARG BASE=(\S+)$", DOCKERFILE.read_text())
    assert match is not None
    return f"localhost/{match[1]}"


def image_name() -> str:
    """The image's name, with a tag that changes with whatever goes into it."""
    digest = hashlib.sha256()
    kept = re.findall(r"(?m)^!(.+)$", (ROOT / ".dockerignore").read_text())
    paths = [Path(__file__), DOCKERFILE, ROOT / ".dockerignore"]
    for name in kept:
        paths += sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]
    for path in paths:
        if path.is_file() and path.suffix not in {".pyc", ".pyo"}:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT)} {len(content)}\n".encode() + content)
    return f"{_NAME}:{digest.hexdigest()[:16]}"


def make_base(store: Store, name: str) -> None:
    """Make a stand-in for the official base out of Debian's packages."""
    container = store.buildah("from", "scratch")
    try:
        root = Path(store.buildah("mount", container))
        _loudly("debootstrap", "--variant=minbase", f"--include={_PACKAGES}", _SUITE, str(root))
        for folder in ("var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc"):
            shutil.rmtree(root / folder)
        # The official image has its Python there.
        for program, target in (("python", "python3"), ("python3", "python3")):
            (root / "usr/local/bin" / program).symlink_to(f"/usr/bin/{target}")
        store.buildah("umount", container)
        store.buildah("commit", "--quiet", container, name)
    finally:
        store.buildah("rm", container)


def pip_settings(listing: str) -> tuple[str, Path | None]:
    """What a build has to know of pip's settings: a pip.conf, and the certificate to trust.

    Args:
        listing: what `pip config list` prints; of two settings of a name the last one holds.
    """
    found: dict[str, str] = {}
    for line in listing.splitlines():
        name, _, value = line.partition("=")
        found[name.rpartition(".")[2]] = str(ast.literal_eval(value))
    kept = {name: found[name] for name in _PIP_SETTINGS if name in found}
    for name in ("index-url", "extra-index-url"):
        urls = [url for url in kept.get(name, "").split() if not url.startswith("file:")]
        kept[name] = " ".join(urls)
    certificate = Path(found["cert"]) if "cert" in found else None
    if certificate:
        kept["cert"] = _CA
    lines = [f"{name} = {value}" for name, value in kept.items() if value]
    return "\n".join(["[global]", *lines, ""]), certificate


def build(store: Store, name: str) -> None:
    """Build the image, on a base that is in the store."""
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    text, certificate = pip_settings(listing)
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    created = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with tempfile.NamedTemporaryFile("w", prefix="pip-", suffix=".conf") as settings:
        settings.write(text)
        settings.flush()
        secrets = ["--secret", f"id=pip.conf,src={settings.name}"]
        if certificate:
            secrets += ["--secret", f"id=ca.pem,src={certificate}"]
        # Docker's format: OCI's has no health check.
        store.buildah(
            *("bud", "--quiet", "--isolation", "chroot", "--format", "docker", "--pull-never"),
            *("--build-arg", f"REVISION={revision}", "--build-arg", f"CREATED={created}"),
            *(*secrets, "--tag", name, str(ROOT)),
        )


def added_layers(store: Store, name: str) -> dict[str, int]:
    """The layers that the image has above its base, with the bytes in each."""
    layers, base = (
        store.inspect(image)["OCIv1"]["rootfs"]["diff_ids"] for image in (name, base_name())
    )
    assert layers[: len(base)] == base
    sizes = store.layer_bytes()
    return {digest: sizes[digest] for digest in layers[len(base) :]}


def _loudly(*command: str) -> None:
    """Run a command; show what it printed only if it failed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise subprocess.CalledProcessError(done.returncode, command)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keep others from building in the same store."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _timed(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> int:
    """Build what is not there; return the exit code."""
    store, name = Store(), image_name()
    with _alone(store.directory):
        if not store.has(base_name()):
            with _timed("Made a base of Debian's packages"):
                make_base(store, base_name())
        if not store.has(name):
            for older in store.names():
                if older.startswith(f"{_NAME}:"):
                    store.buildah("rmi", older)
            with _timed("Built the image"):
                build(store, name)
    added = sum(added_layers(store, name).values())
    print(
        f"{name} adds {added / 1e6:.1f} MB to its base, of {MAX_ADDED_BYTES / 1e6:.0f} MB at most."
    )
    return 1 if added > MAX_ADDED_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
