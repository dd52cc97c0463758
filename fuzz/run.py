"""Runs targets one after the other, and says what each has done: `python -m fuzz.run --help`."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

from fuzz.seeds import write_seeds

__all__ = ["main"]

HERE = Path(__file__).parent
WORK = HERE.parent / ".fuzz"
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in HERE.glob("fuzz_*.py"))
DICTIONARIES = {
    **dict.fromkeys(("answer", "chunks", "handshake", "head", "response"), "http.dict"),
    **dict.fromkeys(("bedrock", "openai", "request", "rewrite", "sse", "tap"), "usage.dict"),
}
_PROGRESS = re.compile(r"#\d+\s+\w+\s+cov: (\d+) ft: (\d+)")
_EXECUTED = re.compile(r"stat::number_of_executed_units:\s+(\d+)")


def run(target: str, seconds: int) -> bool:
    """Run one target for a while; return whether nothing was found."""
    seeds, corpus, found = (WORK / name / target for name in ("seeds", "corpus", "found"))
    write_seeds(target, seeds)
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", f"fuzz.fuzz_{target}"]
    command += [f"-max_total_time={seconds}", "-max_len=4096", "-print_final_stats=1"]
    if words := DICTIONARIES.get(target):
        command.append(f"-dict={HERE / words}")
    command += [f"-artifact_prefix={found}/", str(corpus), str(seeds)]
    ended = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    coverage = _PROGRESS.findall(ended.stderr)[-1:]
    executed = _EXECUTED.findall(ended.stderr)
    record = {
        "target": target,
        "seconds": seconds,
        "executions": int(executed[-1]) if executed else 0,
        "coverage": int(coverage[0][0]) if coverage else 0,
        "features": int(coverage[0][1]) if coverage else 0,
        "found": ended.returncode != 0,
    }
    with (WORK / "runs.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)
    if ended.returncode:
        print(ended.stdout[-2000:], ended.stderr[-2000:], file=sys.stderr, flush=True)
    return ended.returncode == 0


def main() -> int:
    """Run what the command line names; return the exit code."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no target: {', '.join(sorted(unknown))}")
    clean = [run(target, arguments.seconds) for target in arguments.targets or TARGETS]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
