"""Measure how long each command takes to start.

1. Every command line runs in a new Python: `--help` of every command, the overview, and `info`.
2. The command lines take turns, so that a slow moment of the machine hits all of them alike.
3. The table has the median seconds, on the clock and of the CPU (which other programs disturb
   less), and whether torch or transformers was imported.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict

from lorascope.commands import COMMANDS

RUN = """
import sys
from lorascope.cli import call
try:
    call(sys.argv[1:])
except SystemExit:
    pass
print(*[name for name in ("torch", "transformers") if name in sys.modules], file=sys.stderr)
"""


def run(line: str) -> tuple[float, float, str]:
    """Run a command line; return its seconds on the clock and of the CPU, and what it imported."""
    before, begun = os.times(), time.perf_counter()
    words = [sys.executable, "-c", RUN, *line.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    after, wall = os.times(), time.perf_counter() - begun
    cpu = sum(after[2:4]) - sum(before[2:4])  # of the children, user and system
    return wall, cpu, done.stderr.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="adapters or artifacts for `lorascope info`")
    parser.add_argument("--runs", type=int, default=5, help="runs of each command line")
    given = parser.parse_args()
    lines = ["--help", *(f"info {path}" for path in given.paths)]
    lines += [f"{name} --help" for name in COMMANDS]
    times: dict[str, list[tuple[float, float, str]]] = defaultdict(list)
    for _ in range(given.runs):
        for line in lines:
            times[line].append(run(line))
    print("| lorascope … | seconds | CPU seconds | imports |\n|---|---|---|---|")
    for line, runs in times.items():
        walls, cpus, imported = zip(*runs, strict=True)
        shown = imported[0].replace(" ", ", ") or "neither"
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        print(f"| {line} | {wall:.2f} | {cpu:.2f} | {shown} |")


if __name__ == "__main__":
    main()
