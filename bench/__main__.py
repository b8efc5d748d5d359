"""``python -m bench``: direct, nginx, each wire of the gateway, the client, nodes, in one run (Linux)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.answers import BenchError
from bench.measure import measure
from bench.measure_client import measure_client
from bench.measure_nodes import measure_nodes
from bench.node import has_client
from bench.plan import FULL, QUICK
from bench.report import NO_CLIENT, report, report_client, report_nodes
from bench.rig import has_nginx


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short repetition: whether it works")
    parser.add_argument("--only", choices=["client", "nodes"], help="measure this part alone")
    arguments = parser.parse_args()
    missing = _missing()
    for line in missing:
        _tell(line)
    if not Path("/proc/self/schedstat").exists() or (arguments.only == "client" and NO_CLIENT in missing):
        return 1
    try:
        print(_measured(quick=arguments.quick, only=arguments.only))
    except BenchError as error:
        _tell(str(error))
        return 1
    return 0


def _missing() -> list[str]:
    found = []
    if not Path("/proc/self/schedstat").exists():
        found.append("unable to measure; processor times are read from /proc of Linux")
    if not has_nginx():
        found.append("nginx not found: column left out")
    if not has_client():
        found.append(NO_CLIENT)
    return found


def _measured(*, quick: bool, only: str | None) -> str:
    plan, command = (QUICK, "python -m bench --quick") if quick else (FULL, "make bench")
    if only is not None:
        command = f"python -m bench{' --quick' if quick else ''} --only {only}"
    if only == "client":
        return report_client(measure_client(plan.client, plan.settle_seconds, _tell), command)
    if only == "nodes":
        return report_nodes(measure_nodes(plan.nodes, plan.settle_seconds, _tell), command)
    results = measure(plan, _tell)
    results.nodes = measure_nodes(plan.nodes, plan.settle_seconds, _tell)
    return report(results, command)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
