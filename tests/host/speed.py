"""A short table of times beside this host's own overlayfs, by the programs of `scripts/compare`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.host.host import Host, Wrong, run

WORKLOADS = "find,read,write,tar,rm-new,chmod,append,sqlite,mount"
QUICK_WORKLOADS = "tar,mount"
SPEED_SECONDS = 1800.0
"""Longest time of it all, for a slow and busy host."""


def speed(host: Host, room: Path) -> str:
    """Measure some workloads on small data. Ratios are told and judge nothing: who knows what else this host does.

    On an emulated processor they say little, and a mount takes ten seconds: the whole table of fifty would take half an hour.
    """
    only, rounds = (QUICK_WORKLOADS, "1") if host.quick or host.emulated else (WORKLOADS, "3")
    words = ["--quick", "--rounds", rounds, "--only", only, "--subjects", "overlayfs,unionfs", "--markdown"]
    words += ["--fs", "none", "--dir", str(room), "--json", str(room / "times.json")]
    python = [host.program("python"), "-m", "tests.compare"]
    shown = run([*python, *words], cwd=host.checks, env=host.python_environment(), seconds=SPEED_SECONDS)
    found = json.loads((room / "times.json").read_text())
    measured = found["comparisons"][0]["measurements"]
    host.facts["speed"] = [
        {"workload": each["title"], "medians": each["medians"], "ratios": each["ratios"]} for each in measured
    ]
    fails = {each["title"]: each["fails"] for each in measured if each["fails"]}
    if fails or not found["complete"]:
        raise Wrong(f"the comparison failed\n{json.dumps(fails, indent=1)}")
    print("\n".join(f"    {line}" for line in shown.strip().splitlines()))
    return f"{len(measured)} lines above, passthrough {_passthrough(host)}"


def _passthrough(host: Host) -> str:
    """What `unionfs doctor` says of FUSE passthrough, which makes the difference."""
    lines = host.unionfs("doctor", host.base).splitlines()
    said = next((line.partition("passthrough: ")[2] for line in lines if "passthrough: " in line), "unknown")
    host.facts["passthrough"] = said
    return said
