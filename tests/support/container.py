"""Processes that run as an engine would run them, and the built image, run like that.

Knows Linux's namespaces: a process is the first of its own, and its root is a layer over a folder
which is not changed, with what is mounted into it. The network is the host's, or one of its own.

Contract: what is mounted goes with the process that it was mounted for.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.image import Store, image_name
from tests.support.process import ManagedProcess

__all__ = ["Container", "Image", "first_process", "mounted_image"]

# The shell is the host's. Mounts are pairs of source and target up to `--`; all of them, and the
# root's upper layer, are seen by the process alone.
_ENTER = r"""
set -eu
lower=$1 scratch=$2 user=$3 directory=$4 mode=$5; shift 5
mount -t tmpfs tmpfs "$scratch"
root=$scratch/root
mkdir "$scratch/upper" "$scratch/work" "$root"
mount -t overlay -o "lowerdir=$lower,upperdir=$scratch/upper,workdir=$scratch/work" overlay "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
while [ "$1" != -- ]; do
  if [ "$1" = tmpfs ]; then
    mkdir -p "$root$2"; mount -t tmpfs -o mode=1777 tmpfs "$root$2"
  elif [ -d "$1" ]; then
    mkdir -p "$root$2"; mount --bind "$1" "$root$2"; mount -o remount,bind,ro "$root$2"
  else
    mkdir -p "$root${2%/*}"; : > "$root$2"; mount --bind "$1" "$root$2"
    mount -o remount,bind,ro "$root$2"
  fi
  shift 2
done
shift
mount -o "remount,$mode" "$root"
cd /
exec /usr/sbin/chroot --userspec="$user" --groups= "$root" /usr/bin/env -C "$directory" "$@"
"""
# A shell is there in most bases; here nothing may ask for it.
_NO_SHELL = {"/usr/bin/dash": "/dev/null", "/usr/bin/bash": "/dev/null"}


@dataclass(frozen=True, slots=True)
class Container:
    """How processes are to be run."""

    root: Path
    """What lies below their root."""
    user: str
    """Its number and its group's."""
    environment: Mapping[str, str]
    mounts: Mapping[str, str] = field(default_factory=dict)
    """Target to source, which is a path of the host or `tmpfs`; only the latter can be written."""
    directory: str = "/"
    read_only: bool = True
    network: int | None = None
    """The process whose network it has; None for the host's."""

    def command(self, arguments: Sequence[str], scratch: Path) -> list[str]:
        """What makes the process that has these for its command line.

        Args:
            scratch: an empty folder of its own.
        """
        network = [] if self.network is None else ["nsenter", f"--net=/proc/{self.network}/ns/net"]
        return [
            *network,
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("/bin/sh", "-c", _ENTER, "sh"),
            *(str(self.root), str(scratch), self.user, self.directory),
            "ro" if self.read_only else "rw",
            *(part for target, source in self.mounts.items() for part in (source, target)),
            *("--", *arguments),
        ]

    def start(self, arguments: Sequence[str], directory: Path) -> ManagedProcess:
        """Start a command; its log goes to the directory."""
        scratch = directory / "scratch"
        scratch.mkdir(parents=True)
        return ManagedProcess(
            self.command(arguments, scratch),
            directory=directory,
            log=directory / "container.log",
            environment=self.environment,
        )

    def run(self, arguments: Sequence[str], scratch: Path) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(arguments, scratch),
            env=dict(self.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is mounted."""

    root: Path
    about: dict[str, Any]
    """What `buildah inspect` says of it."""

    @property
    def config(self) -> dict[str, Any]:
        """Its configuration in Docker's format."""
        config: dict[str, Any] = self.about["Docker"]["config"]
        return config

    def container(
        self,
        environment: Mapping[str, str],
        mounts: Mapping[str, str] | None = None,
        network: int | None = None,
    ) -> Container:
        """Run what it says as it says: its user and environment, and what is added to them."""
        own = dict(entry.split("=", 1) for entry in self.config["Env"])
        return Container(
            root=self.root,
            user=self.config["User"],
            environment=own | dict(environment),
            mounts=_NO_SHELL | dict(mounts or {}),
            directory=self.config["WorkingDir"],
            network=network,
        )


def first_process(process: ManagedProcess) -> int:
    """The host's id of the process that is the first one in its namespace."""
    pid = process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


@contextmanager
def mounted_image(store: Store) -> Iterator[Image]:
    """Mount the image that was built of this tree."""
    name = image_name()
    about = store.inspect(name)
    container = store.buildah("from", "--pull-never", name)
    try:
        yield Image(Path(store.buildah("mount", container)), about)
    finally:
        store.buildah("rm", container)
