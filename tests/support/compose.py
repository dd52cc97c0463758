"""The services of docker-compose.yml, each with its own command line and files, and no engine.

Knows the compose file as `docker-compose config` prints it. The sidecar's image is the built one;
of other images it has the program of the same name from this machine, in a root of its own with
what the file mounts. All have one network, which no other process has, and there every service's
name leads to loopback.

Contract: services start one after the other, and none before its dependencies are as it wants
them; all end with the context.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.support.container import Container, Image
from tests.support.process import ManagedProcess

__all__ = ["Stack"]

ROOT = Path(__file__).resolve().parents[2]

_POLL_S = 0.5
_FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())
"""


class Stack:
    """The whole set-up; a context manager."""

    def __init__(
        self, compose: str, image: Image, programs: Mapping[str, Path], directory: Path
    ) -> None:
        """Say what runs; nothing is started yet.

        Args:
            compose: what `docker-compose config` prints.
            image: what stands for the services that are built here.
            programs: the program of each other service that is to run; those without one do not.
            directory: existing and writable; logs go there.
        """
        everything: dict[str, Any] = yaml.safe_load(compose)["services"]
        self.services = {
            name: service
            for name, service in everything.items()
            if "build" in service or name in programs
        }
        self.processes: dict[str, ManagedProcess] = {}
        self.started: list[str] = []
        """The services in the order in which they were started."""
        self._image = image
        self._programs = programs
        self._directory = directory
        self._containers: dict[str, Container] = {}
        self._network = 0
        self._exits = ExitStack()
        hosts = directory / "hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(everything)}\n")
        self._hosts = hosts

    def __enter__(self) -> Stack:
        """Start all services; each turns healthy before one that asks for that is started.

        Raises:
            ReadinessError: one did not; with the end of its log.
        """
        with ExitStack() as exits:
            network = ManagedProcess(
                ["unshare", "--net", "sh", "-c", "ip link set lo up; echo up; exec sleep 600"],
                directory=self._directory,
                log=self._directory / "network.log",
                environment={"PATH": os.environ["PATH"]},
            )
            exits.callback(network.stop)
            network.wait_until(lambda: "up" in network.log_tail(), timeout_s=10)
            self._network = network.pid
            while waiting := [name for name in self.services if name not in self.processes]:
                name = next(name for name in waiting if self._may_start(name))
                self._start(name)
                exits.callback(self._end, name)
                if self.health_check(name):
                    self.processes[name].wait_until(partial(self.healthy, name), timeout_s=120)
            self._exits = exits.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End all, in the reverse order."""
        self._exits.close()

    def health_check(self, name: str) -> list[str]:
        """The command that says whether a service is well; empty if there is none."""
        check = self.services[name].get("healthcheck", self._image.config["Healthcheck"])
        kind, *command = check.get("test") or check["Test"]
        assert kind in {"CMD", "NONE"}
        return list(command)

    def healthy(self, name: str) -> bool:
        """Run a service's health check, with the service's own root, user and environment."""
        scratch = self._directory / f"{name}-check"
        scratch.mkdir(exist_ok=True)
        return self._containers[name].run(self.health_check(name), scratch).returncode == 0

    def fetch(self, url: str) -> str:
        """Fetch a URL in the services' network."""
        network = ["nsenter", f"--net=/proc/{self._network}/ns/net"]
        return subprocess.run(
            [*network, "python3", "-c", _FETCH, url],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout

    def ask_prometheus(self, path: str, **parameters: str) -> Any:
        """Ask Prometheus's HTTP API."""
        query = urllib.parse.urlencode(parameters)
        return json.loads(self.fetch(f"http://127.0.0.1:9090/api/v1/{path}?{query}"))["data"]

    def wait_for(self, expression: str, *, timeout_s: float = 45.0) -> list[dict[str, str]]:
        """Wait until a query has rows; return their labels."""
        deadline = time.monotonic() + timeout_s
        while not (rows := self.ask_prometheus("query", query=expression)["result"]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no rows for {expression}")
            time.sleep(_POLL_S)
        return [row["metric"] for row in rows]

    def _may_start(self, name: str) -> bool:
        needed = self.services[name].get("depends_on", {})
        assert {want["condition"] for want in needed.values()} <= {"service_healthy"}
        # Who was started has turned healthy, or has no check; then nobody may wait for it.
        assert all(self.health_check(other) for other in needed)
        return all(other in self.started for other in needed)

    def _start(self, name: str) -> None:
        self._containers[name] = self._container(name)
        self.processes[name] = self._containers[name].start(
            self._command(name), self._directory / name
        )
        self.started.append(name)

    def _command(self, name: str) -> Sequence[str]:
        service = self.services[name]
        if name in self._programs:
            assert "entrypoint" not in service
            return [str(self._programs[name]), *service["command"]]
        entrypoint = service.get("entrypoint", self._image.config["Entrypoint"])
        return [*entrypoint, *service.get("command", self._image.config["Cmd"])]

    def _end(self, name: str) -> None:
        # At once: how each of them stops in good order is asked elsewhere.
        self.processes[name].send(signal.SIGKILL)
        self.processes[name].stop()

    def _container(self, name: str) -> Container:
        service = self.services[name]
        mounts = {"/etc/hosts": str(self._hosts)}
        mounts |= {target.partition(":")[0]: "tmpfs" for target in service.get("tmpfs", ())}
        for volume in service.get("volumes", ()):
            source, target, mode = volume.split(":")
            assert mode == "ro"
            assert Path(source).is_relative_to(ROOT)
            mounts[target] = source
        environment = {key: str(value) for key, value in service.get("environment", {}).items()}
        if name not in self._programs:
            return self._image.container(environment, mounts, self._network)
        folder = re.sub(r"/[^/]+$", "", str(self._programs[name]))
        own = {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp"}  # noqa: S108
        return Container(
            root=Path("/"),
            user="0:0",
            environment=own | environment,
            # What the image of Prometheus declares as a volume.
            mounts=mounts | ({"/prometheus": "tmpfs"} if name == "prometheus" else {}),
            read_only=bool(service.get("read_only")),
            network=self._network,
        )
