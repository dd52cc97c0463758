"""The command line: what an operator types, and the exit codes that come back.

0 is a clean end, 1 a failure at run time or of a socket, 2 wrong usage or settings.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Coroutine
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import uvloop

from sidecar import __version__
from sidecar.account.price_report import price_lines
from sidecar.account.rates import STANDARD
from sidecar.app import Sidecar
from sidecar.config import (
    Settings,
    load_admin_address,
    load_settings,
    shown_settings,
    unknown_settings,
)
from sidecar.descriptors import raise_limit
from sidecar.errors import ConfigError, SidecarError, StartError
from sidecar.exchange import End, Observation, Outcome, RequestFacts, Status
from sidecar.lifecycle import Lifecycle, authority
from sidecar.lines import LineWriter
from sidecar.logs import set_up_logging
from sidecar.observe.tap import MESSAGES_TYPE, STREAM_TYPE, outcome_of, tap_for
from sidecar.proxy.routes import classify
from sidecar.terminal import shown

__all__ = ["main"]

logger = logging.getLogger("sidecar")

T = TypeVar("T")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sidecar")
def cli() -> None:
    """Count the provider's prompt cache in front of LiteLLM.

    Settings come from the environment, as SIDECAR_… variables; `sidecar check` shows them.
    """


@cli.command()
def serve() -> None:
    """Relay requests to LiteLLM and serve metrics, until SIGTERM or Ctrl-C."""
    settings = load_settings()
    stdout = set_up_logging(settings.log_level)
    for warning in unknown_settings(os.environ):
        logger.warning("unknown_setting", extra={"detail": warning})
    raise_limit()
    _run(_serve(settings, stdout))


async def _serve(settings: Settings, stdout: LineWriter) -> None:
    sidecar = Sidecar(settings, stdout=stdout)
    sidecar.descriptors.check(
        settings.max_concurrent_requests or None, settings.max_connections or None
    )
    lifecycle = Lifecycle(sidecar)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lifecycle.stop, number)
    await lifecycle.run()
    logger.info("stopped")


@cli.command()
def check() -> None:
    """Check the settings and whether LiteLLM answers, and show both."""
    settings = load_settings()
    sidecar = Sidecar(settings)
    for name, value in shown_settings(settings).items():
        _say(f"{name}={value}")
    for warning in unknown_settings(os.environ):
        _say(f"warning: {warning}", err=True)

    async def probe() -> str | None:
        sidecar.readiness.started = True
        try:
            reason = await sidecar.readiness.reason()
            if reason is None and sidecar.prices is not None:
                logger.addHandler(logging.NullHandler())  # what failed is said below
                await sidecar.prices.refresh()
            return reason
        finally:
            await sidecar.aclose()

    reason = _run(probe())
    if reason is not None:
        raise StartError(f"the settings are sound, but LiteLLM does not answer: {reason}")
    for line in sidecar.prices.describe() if sidecar.prices is not None else ():
        _say(f"prices from {line}")
    _say(f"ok: LiteLLM answers at {settings.upstream}")


@cli.command()
@click.option("--tier", default=STANDARD, show_default=True, help="Service tier of the answer.")
@click.option("--geo", default="", help="Where the answer was made (inference_geo), such as us.")
@click.argument("models", nargs=-1, required=True)
def prices(models: tuple[str, ...], tier: str, geo: str) -> None:
    """Say what models would cost, and from which source each price comes.

    Prices are USD per million tokens, and per thousand web searches.
    """
    sidecar = Sidecar(load_settings())
    keeper = sidecar.prices
    if keeper is None:
        raise StartError("no source of prices is in use: SIDECAR_PRICE_SOURCES is empty")

    async def refresh() -> None:
        logger.addHandler(logging.NullHandler())  # what failed is said below
        try:
            await keeper.refresh()
        finally:
            await sidecar.aclose()

    _run(refresh())
    for line in keeper.describe():
        _say(line)
    for model in models:
        for line in price_lines(keeper.pricing, model, tier=tier, geo=geo):
            _say(line)


@cli.command()
@click.option("--ready", is_flag=True, help="Ask /readyz instead of /healthz.")
def healthcheck(ready: bool) -> None:
    """Ask a running sidecar how it is; for probes that run a command."""
    host, port = load_admin_address()
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    url = f"http://{authority(host, port)}/{'readyz' if ready else 'healthz'}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            _say(response.read().decode().strip())
    except urllib.error.HTTPError as exc:
        raise StartError(
            f"{url}: {exc.code} {exc.read().decode(errors='replace').strip()}"
        ) from None
    except OSError as exc:
        raise StartError(f"{url}: {exc}") from None


@cli.command()
@click.option("--route", default="/v1/messages", show_default=True, help="Path it was asked for.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
def inspect(route: str, as_json: bool, files: tuple[Path, ...]) -> None:
    """Say what would be counted for recorded response bodies (.json, .sse or .eventstream)."""
    info = classify("POST", route.partition("?")[0])
    if info.dialect is None:
        raise click.BadParameter(f"{route} is not an observed route", param_hint="--route")
    for path in files:
        with path.open("rb") as body:
            chunk = body.read(64 * 1024)
            tap = tap_for(info.dialect, 200, [(b"content-type", _content_type(path, chunk))])
            while chunk:
                tap.feed(chunk)
                chunk = body.read(64 * 1024)
        observation = tap.finish(End.COMPLETE)
        outcome = _outcome(observation)
        if as_json:
            click.echo(json.dumps(_inspected(path, observation, outcome)))
        else:
            _print_inspected(path, observation, outcome)


_CONTENT_TYPES = {
    ".json": b"application/json",
    ".sse": STREAM_TYPE,
    ".eventstream": MESSAGES_TYPE,
}


def _content_type(path: Path, beginning: bytes) -> bytes:
    """Tell what a body is by the file's name, else by how it begins."""
    found = _CONTENT_TYPES.get(path.suffix.lower())
    if found is not None:
        return found
    if beginning.startswith(b"\0"):
        return MESSAGES_TYPE  # no message is as long as 16 MB
    return _CONTENT_TYPES[".json" if beginning.lstrip().startswith(b"{") else ".sse"]


def _outcome(observation: Observation) -> Outcome | None:
    """Say the outcome of a recorded answer, whose request is not at hand."""
    if observation.status is Status.ERROR:
        return None
    return outcome_of(observation, RequestFacts())


def _inspected(path: Path, observation: Observation, outcome: Outcome | None) -> dict[str, object]:
    usage = observation.usage
    names = (
        "input_tokens",
        "output_tokens",
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "ephemeral_5m_input_tokens",
        "ephemeral_1h_input_tokens",
    )
    return {
        "file": str(path),
        "status": observation.status.value,
        "outcome": outcome.value if outcome else None,
        "usage": {name: getattr(usage, name) for name in names},
        "terms": {
            name: said for name, said in observation.terms._asdict().items() if said is not None
        },
    }


def _print_inspected(path: Path, observation: Observation, outcome: Outcome | None) -> None:
    fault = f" ({observation.fault})" if observation.fault else ""
    _say(f"{path}: {observation.status.value}{fault}, outcome {outcome or 'none'}")
    uncached, read, write_5m, write_1h, write_unknown = observation.usage.input_classes()
    _say(
        f"  input: uncached {uncached}, read {read}, write_5m {write_5m}, write_1h {write_1h}, "
        f"write_unknown {write_unknown}; output {observation.usage.output_tokens or 0}"
    )


@cli.command()
@click.option(
    "--by",
    default="model,team_alias",
    show_default=True,
    metavar="NAMES",
    help="What to group by: names from model, team_alias, provider, response_model, model_id, "
    "key_hash, client, route, day, separated by commas.",
)
@click.option("--since", metavar="TIME", default="", help="Leave out what ended before (UTC).")
@click.option("--until", metavar="TIME", default="", help="Leave out what ended then or later.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, allow_dash=True)
)
def report(by: str, since: str, until: str, as_json: bool, files: tuple[str, ...]) -> None:
    """Sum the lines of usage logs: hit ratios, tokens, cost.

    FILES may be rotated or packed with gzip, and may hold other lines too; - is standard input.
    """
    from sidecar import report as reports  # needs rich, which a pod does not

    names = [name.strip() for name in by.split(",") if name.strip()]
    unknown = [name for name in names if name not in reports.GROUPINGS]
    if unknown or not names:
        raise click.BadParameter(
            f"{', '.join(unknown) or 'nothing'} is not among {', '.join(reports.GROUPINGS)}",
            param_hint="--by",
        )
    summed = reports.Report(names, _moment("--since", since), _moment("--until", until))
    for file in files:
        try:
            with click.open_file(file, "rb") as stream:
                summed.take(reports.lines_of(cast("BufferedReader", stream)))
        except OSError as exc:
            raise StartError(f"{file}: {exc.strerror or exc}") from None
    if as_json:
        click.echo(json.dumps(summed.as_json()))
    else:
        reports.print_report(summed)
    if summed.malformed:
        _say(f"sidecar: {summed.malformed} lines could not be read", err=True)


def _moment(option: str, text: str) -> str:
    from sidecar.report import read_time

    try:
        return read_time(text) if text else ""
    except ValueError:
        raise click.BadParameter(f"{text} is not a date or time", param_hint=option) from None


@cli.command()
@click.option("--once", is_flag=True, help="End after one round; exit 0 only if counts are true.")
def demo(once: bool) -> None:
    """Run the sidecar before an embedded stand-in provider, and compare its counts."""
    from sidecar.demo.run import run_demo  # not a part of what a pod runs

    raise SystemExit(_run(run_demo(once=once)))


def _say(text: str, *, err: bool = False) -> None:
    """Print a line for a person."""
    click.echo(shown(text), err=err)


def _run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def _drop_output() -> None:
    """Let go of what could not be written: to fail at it again would change the exit code."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Run the command line and exit."""
    try:
        cli(standalone_mode=False)
    except ConfigError as error:
        for fault in error.faults:
            _say(f"sidecar: {fault}", err=True)
        sys.exit(2)
    except SidecarError as error:
        _say(f"sidecar: {error}", err=True)
        sys.exit(1)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except OSError as error:
        # Whoever reads only the first lines knows that the others are missing.
        if not isinstance(error, BrokenPipeError):
            _say(f"sidecar: {error}", err=True)
        _drop_output()
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
