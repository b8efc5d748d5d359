"""``python -m bench``: direct, nginx and each wire of the gateway, side by side in one run (Linux)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.answers import BenchError
from bench.measure import FULL, QUICK, measure
from bench.report import report
from bench.rig import has_nginx


def main() -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short repetition: whether it works")
    quick = parser.parse_args().quick
    if not Path("/proc/self/schedstat").exists():
        print("unable to measure; processor times are read from /proc of Linux", file=sys.stderr)
        return 1
    if not has_nginx():
        print("nginx not found: column left out", file=sys.stderr)
    try:
        results = measure(QUICK if quick else FULL, lambda line: print(line, file=sys.stderr, flush=True))
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    print(report(results, "python -m bench --quick" if quick else "make bench"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
