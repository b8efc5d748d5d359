"""The torture, briefly: it finds nothing in the gateway, and each bug that is planted in it."""

from __future__ import annotations

import pytest

from tests.faults.torture_world.plans import CARRIERS, Scale
from tests.faults.torture_world.run import Order, torture
from tests.faults.torture_world.verdict import check, figures

SMALL = Scale(
    nodes=2, sessions=6, clients=12, lease_seconds=1.5, pace=0.4, fault_pace=0.35, patience_seconds=5.0
)


async def test_a_short_torture_finds_no_violation() -> None:
    """Every kind of fault but those that take long, on every carrier; `make torture` has the rest."""
    kinds = (
        "kill",
        "stop-short",
        "drain",
        "restart",
        "failover",
        "cut-normal",
        "cut-pubsub",
        "script-flush",
        "weather",
    )
    world, errors = await torture(Order(seed=3, seconds=10, scale=SMALL, kinds=kinds))
    facts, violations = check(world.history)
    assert not violations, "\n".join(map(str, violations))
    assert not errors
    assert {reading.carrier for reading in world.history.readings} == set(CARRIERS)
    assert world.history.faults
    told = figures(facts)
    assert isinstance(told["turns by end"], dict)
    assert {"complete", "cancelled", "error"} <= told["turns by end"].keys()


@pytest.mark.parametrize(
    ("plant", "kinds", "rules"),
    [
        ("fence", ("stop-long",), {"G6", "G7"}),
        ("race", (), {"G2"}),
        ("ack", ("stop-short", "stop-long"), {"G4"}),
    ],
)
async def test_a_planted_bug_is_found(plant: str, kinds: tuple[str, ...], rules: set[str]) -> None:
    """A torture that finds nothing is worth what it would have found."""
    world, _ = await torture(Order(seed=8, seconds=10, scale=SMALL, kinds=kinds, plant=plant))
    _, violations = check(world.history)
    assert rules & {violation.rule for violation in violations}
