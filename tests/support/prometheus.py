"""A real Prometheus server on a loopback port that scrapes what a test names.

Knows Prometheus's configuration file and its HTTP API; judges nothing that it scrapes.

Contract: everything it writes is under the directory it is given, and the process group is ended
when the context ends.
"""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from tests.support.process import ManagedProcess, free_port

__all__ = ["Prometheus", "find_prometheus"]

_START_TIMEOUT_S = 30.0
_REQUEST_TIMEOUT_S = 10.0

Sample = tuple[dict[str, str], float]


def find_prometheus() -> str | None:
    """The `prometheus` program, or None where it is not installed."""
    return shutil.which("prometheus")


class Prometheus:
    """One Prometheus; a context manager. It scrapes every second."""

    def __init__(
        self,
        targets: Mapping[str, str | Sequence[str]],
        directory: Path,
        *,
        rule_files: Sequence[Path] = (),
        scrape_options: Mapping[str, Any] | None = None,
        scrape_interval: str = "1s",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Say what to scrape; nothing is started or written yet.

        Args:
            targets: job name to one `host:port` or several, optionally with a path: `host:port/p`.
            directory: existing and writable; configuration, log and storage go there.
            rule_files: rules to evaluate, at the scrape interval.
            scrape_options: added to every scrape job (`metric_relabel_configs` and the like).
            scrape_interval: Prometheus's notation.
            config: a whole configuration, in the place of all of these but `targets`, which
                replace those of its jobs.
        """
        self.log = directory / "prometheus.log"
        self._directory = directory
        if config is None:
            self._config = _config(targets, rule_files, scrape_options or {}, scrape_interval)
        else:
            self._config = _aimed(config, targets)
        self._port = 0
        self._process: ManagedProcess | None = None

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Prometheus:
        """Start, and wait until it is ready.

        Raises:
            ReadinessError: with the end of its log.
        """
        program = find_prometheus()
        if program is None:
            raise FileNotFoundError("prometheus is not installed")
        config = self._directory / "prometheus.yml"
        config.write_text(yaml.safe_dump(self._config))
        self._port = free_port()
        self._process = ManagedProcess(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={self._directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self._port}",
                "--log.level=warn",
            ],
            directory=self._directory,
            log=self.log,
            environment={"PATH": "/usr/bin:/bin", "HOME": str(self._directory)},
            watched=False,
        )
        self._process.wait_until(self._ready, timeout_s=_START_TIMEOUT_S)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        assert self._process is not None, "not started"
        self._process.stop()

    def query(self, expression: str, *, at: float | None = None) -> list[Sample]:
        """Evaluate an instant query, now or at a Unix time.

        Returns:
            Labels (metric name as `__name__` included) and value of each row; a scalar is one row
            without labels.

        Raises:
            ValueError: when Prometheus refuses the expression; with its words.
        """
        try:
            time_ = {} if at is None else {"time": f"{at:.3f}"}
            data = self._api("/api/v1/query", {"query": expression} | time_)
        except urllib.error.HTTPError as refused:
            with refused:
                raise ValueError(refused.read().decode(errors="replace")) from refused
        result = data["result"]
        if data["resultType"] == "scalar":
            return [({}, float(result[1]))]
        return [(dict(row["metric"]), float(row["value"][1])) for row in result]

    def rules(self) -> list[dict[str, Any]]:
        """All rules as Prometheus has them: `name`, `health`, `lastError` and so on."""
        groups = self._api("/api/v1/rules", {})["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def query_range(
        self, expression: str, *, begin: float, end: float, step_s: float
    ) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
        """Evaluate a query at every step between two Unix times, as a graph does.

        Returns:
            Labels of each series, and its points: time and value.

        Raises:
            ValueError: when Prometheus refuses the expression; with its words.
        """
        span = {"start": f"{begin:.3f}", "end": f"{end:.3f}", "step": f"{step_s:g}"}
        try:
            data = self._api("/api/v1/query_range", {"query": expression} | span)
        except urllib.error.HTTPError as refused:
            with refused:
                raise ValueError(refused.read().decode(errors="replace")) from refused
        return [
            (dict(row["metric"]), [(float(at), float(value)) for at, value in row["values"]])
            for row in data["result"]
        ]

    def label_values(self, metric: str, label: str) -> list[str]:
        """The values that a label has on the series of a metric."""
        values: list[str] = self._api(f"/api/v1/label/{label}/values", {"match[]": metric})
        return values

    def wait_for_scrapes(self, number: int, *, timeout_s: float = 30.0) -> None:
        """Wait until every target was scraped successfully so many more times.

        Raises:
            TimeoutError: with the state of the targets.
        """
        deadline = time.monotonic() + timeout_s
        seen: dict[str, set[str]] = {}
        while True:
            targets = self._api("/api/v1/targets", {"state": "active"})["activeTargets"]
            for target in targets:
                stamps = seen.setdefault(target["scrapeUrl"], {target["lastScrape"]})
                if target["health"] == "up":
                    stamps.add(target["lastScrape"])
            # The first stamp of each target is of a scrape from before this call.
            enough = targets and all(len(stamps) > number for stamps in seen.values())
            if enough and all(self._is_stored(target) for target in targets):
                return
            if time.monotonic() > deadline:
                states = [(t["scrapeUrl"], t["health"], t["lastError"]) for t in targets]
                raise TimeoutError(f"not scraped {number} times: {states}")
            time.sleep(0.1)

    def _is_stored(self, target: Mapping[str, Any]) -> bool:
        """Whether what the last scrape brought can be asked for: that is a moment later."""
        at = datetime.fromisoformat(target["lastScrape"]).timestamp()
        labels = ",".join(f'{name}="{target["labels"][name]}"' for name in ("job", "instance"))
        # Prometheus puts a scrape up to 2 ms before or after its time.
        return any(value >= at - 0.005 for _, value in self.query(f"timestamp(up{{{labels}}})"))

    def wait_for(self, expression: str, *, timeout_s: float = 30.0) -> list[Sample]:
        """The first non-empty result of a query."""
        deadline = time.monotonic() + timeout_s
        while not (rows := self.query(expression)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no rows for {expression}")
            time.sleep(0.2)
        return rows

    def _api(self, path: str, parameters: Mapping[str, str]) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(
            f"{self.url}{path}?{query}", timeout=_REQUEST_TIMEOUT_S
        ) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
        return data

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(
                f"{self.url}/-/ready", timeout=_REQUEST_TIMEOUT_S
            ) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


def _aimed(config: Mapping[str, Any], targets: Mapping[str, str | Sequence[str]]) -> dict[str, Any]:
    jobs = []
    for job in config["scrape_configs"]:
        named = targets[job["job_name"]]
        addresses = [named] if isinstance(named, str) else list(named)
        jobs.append(job | {"static_configs": [{"targets": addresses}]})
    return dict(config) | {"scrape_configs": jobs}


def _config(
    targets: Mapping[str, str | Sequence[str]],
    rule_files: Sequence[Path],
    scrape_options: Mapping[str, Any],
    scrape_interval: str,
) -> dict[str, Any]:
    jobs = []
    for job, named in targets.items():
        addresses = [named] if isinstance(named, str) else list(named)
        path = next((a.partition("/")[2] for a in addresses if "/" in a), "metrics")
        jobs.append(
            {
                "job_name": job,
                "metrics_path": f"/{path}",
                "static_configs": [{"targets": [a.partition("/")[0] for a in addresses]}],
                **scrape_options,
            }
        )
    interval = {"scrape_interval": scrape_interval, "evaluation_interval": scrape_interval}
    return {
        "global": {**interval, "scrape_timeout": scrape_interval},
        "rule_files": [str(path) for path in rule_files],
        "scrape_configs": jobs,
    }
