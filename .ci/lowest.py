"""Print pip constraints: the lower bounds of lorascope's dependencies as exact versions.

The tools of the tests stay at the versions in `constraints.txt`. `--keep NAME` keeps a
dependency there too: `torch`, where only one build for CPUs can be installed.
"""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
lines = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
pinned = dict(line.split("==") for line in lines if "==" in line)
tools = [re.split(r"[>;\s]", line)[0] for line in project["optional-dependencies"]["test"]]
kept = {*tools, *sys.argv[2::2]}
if "torch" not in kept:
    kept.remove("triton")  # each torch brings its own
for line in project["dependencies"]:
    name, version = line.split(">=")
    if name not in kept:
        print(f"{name}=={version}")
for name in sorted(kept & pinned.keys()):
    print(f"{name}=={pinned[name]}")
