"""Torture: N nodes, M sessions, clients that come and go by every carrier, faults; and a judge at the end.

    python -m tests.faults.torture --seconds 60 --seed 7

Everything is real: gateways as processes, a Valkey on its append-only file, sockets through a TCP proxy, a
backend whose chunks can be told apart. Every frame is written down. When the faults are over and the last
turns have ended, guarantees G1-G7 are checked from what clients were told and from what the backend saw.
The seed settles faults, visits and answers, not the machine's timing: a seed that found something may have to
be run a few times. Exit status 1 means that something was violated; the history is kept then.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from tests.faults.torture_world.plans import FAULTS, Scale
from tests.faults.torture_world.run import Order, torture
from tests.faults.torture_world.verdict import check, figures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.torture_world.history import History

SHOWN_VIOLATIONS = 20
SHOWN_ERRORS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; returns the exit status."""
    order = _order(arguments)
    _say(f"torture: seed {order.seed}, {order.seconds:g} s, {order.scale}, {order.plant or 'no'} bug planted")
    _say(f"  faults: {', '.join(order.kinds) or 'none'}")
    world, errors = uvloop.run(torture(order))
    began_at = time.monotonic()
    facts, violations = check(world.history)
    for name, figure in {**figures(facts), **world.figures}.items():
        _say(f"  {name}: {figure}")
    _say_faults(world.history)
    _say(f"  judged in {time.monotonic() - began_at:.1f} s")
    for line in errors[:SHOWN_ERRORS]:
        _say(f"  logged: {line[:2000]}")
    if len(errors) > SHOWN_ERRORS:
        _say(f"  logged: {len(errors)} lines of this kind")
    for violation in violations[:SHOWN_VIOLATIONS]:
        _say(f"VIOLATION {violation}")
    if violations:
        kept = Path(tempfile.mkdtemp(prefix="torture-")) / "history.jsonl"
        world.history.save(kept)
        _say(f"{len(violations)} violations; seed {order.seed}; the history is in {kept}")
        return 1
    _say("no violation")
    return 0


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _say_faults(history: History) -> None:
    for fault in history.faults:
        where = "store" if fault.slot is None else f"node {fault.slot}"
        at = fault.at - history.began_at
        _say(f"  {at:7.2f} s  {where} {fault.kind} for {fault.until - fault.at:.2f} s {fault.note}")


def _order(arguments: Sequence[str] | None) -> Order:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.torture", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults and visits go on")
    parser.add_argument("--seed", type=int, default=None, help="default: a new one")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--lease", type=float, default=3.0, help="GATEWAY_LEASE")
    parser.add_argument(
        "--pace", type=float, default=1.0, help="times the clients' pauses: 2 is half the load"
    )
    parser.add_argument("--fault-pace", type=float, default=1.0, help="times the pauses between faults")
    parser.add_argument("--faults", default=",".join(FAULTS), help="comma separated; default: %(default)s")
    parser.add_argument("--without", default="", help="faults to leave out")
    parser.add_argument(
        "--plant", choices=("fence", "race", "ack"), default="", help="a bug that must be found"
    )
    given = parser.parse_args(arguments)
    kinds = [kind for kind in given.faults.split(",") if kind and kind not in given.without.split(",")]
    if unknown := [kind for kind in kinds if kind not in FAULTS]:
        parser.error(f"unable to do {', '.join(unknown)}; known are {', '.join(FAULTS)}")
    return Order(
        seed=random.SystemRandom().randrange(10**6) if given.seed is None else given.seed,
        seconds=given.seconds,
        scale=Scale(
            nodes=given.nodes, sessions=given.sessions, clients=given.clients, lease_seconds=given.lease,
            pace=given.pace, fault_pace=given.fault_pace,
        ),
        kinds=tuple(kinds),
        plant=given.plant,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
