"""The sidecar as a bare relay, the control of the measures: `python -m bench.observation_off`.

The same composition, settings and commands as `python -m sidecar serve`, but that no route is
observed and nobody counts: what remains is the price of relaying. Not a setting, because
nobody should want it.
"""

from __future__ import annotations

from sidecar import app, cli
from sidecar.config import Settings
from sidecar.exchange import Exchange, Route
from sidecar.proxy import relay, routes

__all__: list[str] = []


class _NoAccounts:
    def begin(self, route: Route) -> None:
        pass

    def submit(self, exchange: Exchange) -> None:
        pass

    def contain(self, room: str, exc: Exception) -> None:
        raise exc


class _BareSidecar(app.Sidecar):
    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.relay.accounts = _NoAccounts()


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
