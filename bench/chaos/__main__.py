"""Whether every token is counted once while everything breaks: `python -m bench.chaos`."""

from __future__ import annotations

import argparse
import random
import sys

from bench.chaos.run import Report, run
from bench.inspected import run_until_terminated
from tests.support.prometheus import find_prometheus

_SHOWN = 20


def print_report(report: Report) -> None:
    """Print the table, and what is wrong."""
    verdict, books = report.verdict, report.books
    print(
        f"\n{'':15}{'books, certain':>16}{'books, bounded':>16}"
        f"{'usage log':>16}{'Prometheus':>16}{'difference':>12}"
    )
    for name, certain, chosen, log, metrics in verdict.table:
        off = abs(certain + chosen - log) + abs(log - metrics)
        print(f"{name:15}{certain:16,}{chosen:16,}{log:16,}{metrics:16,}{off:12,}")
    rate = verdict.exchanges / report.seconds
    print(
        f"\n{verdict.exchanges:,} exchanges in {report.seconds:.0f} s ({rate:,.0f}/s), "
        f"{verdict.lines:,} lines; {verdict.whole:,} answers were seen whole; "
        f"{verdict.by_bounds:,} exchanges were decided by bounds; {books.restarts} restarts of "
        f"the upstream, 1 of the sidecar; exit codes {report.exit_codes}"
    )
    for offence in verdict.offences[:_SHOWN]:
        print(f"OFFENCE: {offence}")
    if len(verdict.offences) > _SHOWN:
        print(f"... and {len(verdict.offences) - _SHOWN:,} more")
    if not report.passed:
        for tail in report.log_tails:
            print(tail)
    for leak in report.leaks:
        print(f"LEAK: {leak}")


def main() -> None:
    """Run, and exit with 1 if anything is not as it has to be."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    parser.add_argument("--exchanges", type=int, default=220_000)
    parser.add_argument("--clients", type=int, default=96)
    parser.add_argument("--restarts", type=int, default=8, help="of the upstream")
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, if not given")
    arguments = parser.parse_args()
    if find_prometheus() is None:
        sys.exit("Prometheus is needed: no `prometheus` on PATH")
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    report = run_until_terminated(
        run(
            arguments.exchanges,
            seed,
            clients=arguments.clients,
            restarts=arguments.restarts,
            say=lambda text: print(text, flush=True),
        )
    )
    print_report(report)
    if not report.passed:
        sys.exit(f"not all is as it has to be (seed {seed})")
    print("difference 0; nothing stayed behind")


if __name__ == "__main__":
    main()
