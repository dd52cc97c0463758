"""The built image, run as an engine would run it: what its configuration says, and nothing else.

Knows Linux's namespaces: a process is the first of its own, has the image for its root, read-only,
and the user, the environment and the command that the image names. The network is the host's.

Contract: what is mounted goes with the process that it was mounted for.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.image import Store, image_name
from tests.support.process import ManagedProcess

__all__ = ["Image", "mounted_image"]

# Mounts are seen by the process alone. A shell is covered where there is one: nothing may ask
# for it. The interpreter of this script is the host's.
_ENTER = r"""
set -eu
root=$1 user=$2 directory=$3; shift 3
mount --bind "$root" "$root"
mount --bind -o ro /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
for shell in sh dash bash; do
  mount --bind /dev/null "$root/usr/bin/$shell"
done
mount -o remount,bind,ro "$root"
exec chroot --userspec="$user" --groups= "$root" "$@"
"""


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

    def command(self, arguments: Sequence[str]) -> list[str]:
        """What makes the process that has these for its command line."""
        return [
            *("unshare", "--mount", "--pid", "--fork", "--kill-child"),
            *("/bin/sh", "-c", _ENTER, "sh"),
            *(str(self.root), self.config["User"], self.config["WorkingDir"]),
            *arguments,
        ]

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """The image's environment, and what is added to it."""
        own = dict(entry.split("=", 1) for entry in self.config["Env"])
        return own | dict(more)

    def start(
        self, arguments: Sequence[str], directory: Path, environment: Mapping[str, str]
    ) -> ManagedProcess:
        """Start the entry point with these arguments; the image's own if there are none."""
        line = [*self.config["Entrypoint"], *(arguments or self.config["Cmd"])]
        return ManagedProcess(
            self.command(line),
            directory=directory,
            log=directory / "container.log",
            environment=self.environment(environment),
        )

    def run(
        self, arguments: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        return subprocess.run(
            self.command(arguments),
            env=self.environment(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
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
