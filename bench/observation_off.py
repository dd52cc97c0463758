"""The sidecar as a bare relay, the control of the measures: `python -m bench.observation_off`.

The same composition, settings and commands as `python -m sidecar serve`, but that no route is
observed and nobody counts: what remains is the price of relaying. Not a setting, because
nobody should want it.
"""

from __future__ import annotations

from sidecar import app, cli
from sidecar.config import Settings
from sidecar.exchange import Accounts
from sidecar.lines import LineWriter
from sidecar.proxy import relay, routes

__all__: list[str] = []


class _NoAccounts(Accounts):
    """Takes everything and does nothing: the protocol's own empty methods."""

    def contain(self, room: str, exc: Exception) -> None:
        raise exc


class _BareSidecar(app.Sidecar):
    def __init__(self, settings: Settings, *, stdout: LineWriter) -> None:
        super().__init__(settings, stdout=stdout)
        self.relay.accounts = _NoAccounts()  # type: ignore[abstract] # empty is what they have to be


def _unobserved(method: str, path: str) -> routes.RouteInfo:
    return routes.classify(method, path)._replace(dialect=None)


if __name__ == "__main__":
    for module, name, original, replacement in (
        (relay, "classify", routes.classify, _unobserved),
        (cli, "Sidecar", app.Sidecar, _BareSidecar),
    ):
        # If the name moved, this must fail, not measure the wrong thing.
        assert getattr(module, name) is original
        setattr(module, name, replacement)
    cli.cli(["serve"])
