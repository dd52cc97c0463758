"""The peers side by side: `python -m bench.peers` (`make bench` installs what it needs first).

    python -m bench.peers --only json32,burst --peers sidecar,envoy-lua --rounds 3

Rounds are interleaved: each round takes every measure, each measure every peer, so that a
drift of the machine hits all alike; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

from bench import proxies, report
from bench.measures import MEASURES, MeasureError, build_upstream, run
from tests.support.process import ReadinessError

__all__: list[str] = []

DIRECT = "direct"


def _choice(text: str, known: list[str], what: str) -> list[str]:
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"no such {what}: {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in chosen]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--only", default=",".join(MEASURES), help="measures, of %(default)s")
    parser.add_argument(
        "--peers",
        default="default",
        help="names, `default` or `all`, of direct," + ",".join(proxies.PEERS),
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long one run takes")
    parser.add_argument("--write", type=Path, help="write the report here (Markdown)")
    parser.add_argument("--raw", type=Path, help="write every run's figures here (JSON)")
    return parser.parse_args()


def _tap() -> dict[str, float]:
    command = [sys.executable, "-m", "bench.microbench", "--json"]
    done = subprocess.run(
        proxies.pinned(proxies.PROXY_CORE, command), stdout=subprocess.PIPE, check=True
    )
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Run and report."""
    # Whoever ends this by SIGTERM wants what it started ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = _arguments()
    measures = _choice(arguments.only, list(MEASURES), "measure")
    everyone = [DIRECT, *proxies.PEERS]
    named = {"default": ",".join([DIRECT, *proxies.DEFAULT]), "all": ",".join(everyone)}
    peers = _choice(named.get(arguments.peers, arguments.peers), everyone, "peer")
    absent = {
        name: lacking
        for name in peers
        if name != DIRECT and (lacking := proxies.missing(proxies.PEERS[name]))
    }
    for name, lacking in absent.items():
        print(f"{name} is left out for want of {', '.join(lacking)}", file=sys.stderr)
    peers = [name for name in peers if name not in absent]
    try:
        build_upstream()
    except MeasureError as error:
        raise SystemExit(str(error)) from None

    results = report.Results(measures, peers, absent, arguments.rounds)
    for number in range(1, arguments.rounds + 1):
        for measure in measures:
            for name in peers:
                peer = None if name == DIRECT else proxies.PEERS[name]
                if peer is not None and measure not in (peer.measures or MEASURES):
                    continue
                try:
                    figures = run(measure, peer, arguments.seconds)
                except (MeasureError, ReadinessError) as error:
                    results.failures.append(
                        f"{measure}, {name}, round {number}: {str(error).strip().splitlines()[-1]}"
                    )
                    print(f"{number} {measure:9} {name:11} FAILED: {error}", file=sys.stderr)
                    continue
                results.runs[measure, name, number] = figures
                shown = "  ".join(f"{key} {value:,.2f}" for key, value in figures.items())
                print(f"{number} {measure:9} {name:11} {shown}", file=sys.stderr, flush=True)
    if arguments.write and "sidecar" in peers:
        results.tap = _tap()
    text = report.render(results)
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
    if arguments.raw:
        rows = [[*key, figures] for key, figures in results.runs.items()]
        arguments.raw.write_text(json.dumps(rows, indent=1))
    if results.failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
