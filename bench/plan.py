"""How much is measured: in full, quickly, and at the least."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Pace:
    """One load: so many turns at once, each with so many chunks a second (0: as fast as they are taken)."""

    turns: int
    rate: int
    seconds: float = 0.0
    chunks: int = 0

    @property
    def offered(self) -> int:
        """Chunks a second, of all turns together; 0: without a limit."""
        return self.turns * self.rate


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """How much of the TypeScript client is measured.

    Attributes:
        repetitions: Of the load.
        steady: The load on each carrier. A long-poll for each chunk is mostly work of Node's ``fetch``:
            with more than some 600 a second, that would be measured.
        first_times: How often a first chunk is waited for, per network.
        cuts: Per carrier.
        timing: Of the client, in milliseconds, where it is not its default.
    """

    repetitions: int
    steady: Pace
    first_times: int
    cuts: int
    timing: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    repetitions: int
    steady: Pace
    many: Pace
    burst: Pace
    resume_chunks: int
    resume_times: int
    cancels: int
    cancel_rounds: int
    idle_sockets: int
    client: ClientPlan
    settle_seconds: float = 0.3


FULL = Plan(
    repetitions=4,
    steady=Pace(50, 100, seconds=3.0),
    many=Pace(400, 100, seconds=2.0),
    burst=Pace(8, 0, chunks=20_000),
    resume_chunks=10_000,
    resume_times=5,
    cancels=50,
    cancel_rounds=3,
    idle_sockets=2000,
    client=ClientPlan(repetitions=4, steady=Pace(10, 50, seconds=3.0), first_times=5, cuts=20),
)
QUICK = Plan(
    repetitions=1,
    steady=Pace(50, 100, seconds=1.0),
    many=Pace(200, 100, seconds=1.0),
    burst=Pace(8, 0, chunks=5000),
    resume_chunks=10_000,
    resume_times=2,
    cancels=20,
    cancel_rounds=1,
    idle_sockets=500,
    client=ClientPlan(repetitions=1, steady=Pace(10, 50, seconds=1.0), first_times=1, cuts=5),
)
SMOKE = Plan(
    repetitions=1,
    steady=Pace(4, 50, seconds=0.3),
    many=Pace(8, 50, seconds=0.3),
    burst=Pace(2, 0, chunks=500),
    resume_chunks=500,
    resume_times=1,
    cancels=3,
    cancel_rounds=1,
    idle_sockets=20,
    client=ClientPlan(
        repetitions=1,
        steady=Pace(2, 50, seconds=0.3),
        first_times=1,
        cuts=2,
        timing={"helloMs": 1000, "backoffBaseMs": 100},
    ),
    settle_seconds=0.05,
)
