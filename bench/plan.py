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
class NodesPlan:
    """How much is measured of crowds, of several nodes, and of what breaks.

    Attributes:
        repetitions: Of each part but the soak.
        lease_seconds: Of the nodes.
        beside: The turns that stream beside a crowd.
        sockets: Of a crowd that is idle.
        idle_seconds: For which it is watched; less than a heartbeat's 25 and a poll's 30 tells of neither.
        storm_clients: Of a node that dies.
        storm_sessions: Among which they share.
        storm_records: In each.
        storm_back: Records that each client has still to get.
        rush_clients: That catch up at once.
        rush_sessions: Among which they share.
        rush_records: That each has to get.
        soak_turns: In all.
        soak_steps: How often the size is taken.
        soak_hold_seconds: What a node holds of an ended turn it holds for 10 s.
        across: Loads whose clients are on another node than the producers.
        cancels: From another node, and from the same.
        broken: The turns of the node that is killed, and of the store that is frozen.
        frozen_seconds: For which the store stands still.
        after_seconds: For which its turns go on.
    """

    repetitions: int
    beside: Pace
    sockets: int
    idle_seconds: float
    storm_clients: int
    storm_sessions: int
    storm_records: int
    storm_back: int
    rush_clients: int
    rush_sessions: int
    rush_records: int
    soak_turns: int
    soak_steps: int
    soak_hold_seconds: float
    across: tuple[Pace, ...]
    cancels: int
    broken: Pace
    frozen_seconds: float
    after_seconds: float
    lease_seconds: float = 10.0


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
    nodes: NodesPlan
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
    nodes=NodesPlan(
        repetitions=3,
        beside=Pace(50, 20, seconds=5.0),
        sockets=5000,
        idle_seconds=30.0,
        storm_clients=5000,
        storm_sessions=500,
        storm_records=300,
        storm_back=100,
        rush_clients=1000,
        rush_sessions=100,
        rush_records=5000,
        soak_turns=3000,
        soak_steps=6,
        soak_hold_seconds=12.0,
        across=(Pace(1, 20, seconds=5.0), Pace(25, 20, seconds=3.0), Pace(50, 100, seconds=3.0)),
        cancels=100,
        broken=Pace(50, 20),
        frozen_seconds=10.0,
        after_seconds=5.0,
    ),
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
    nodes=NodesPlan(
        repetitions=1,
        beside=Pace(50, 20, seconds=2.0),
        sockets=1000,
        idle_seconds=5.0,
        storm_clients=1000,
        storm_sessions=100,
        storm_records=300,
        storm_back=100,
        rush_clients=100,
        rush_sessions=10,
        rush_records=5000,
        soak_turns=400,
        soak_steps=4,
        soak_hold_seconds=1.0,
        across=(Pace(1, 20, seconds=2.0), Pace(25, 20, seconds=1.0), Pace(50, 100, seconds=1.0)),
        cancels=20,
        broken=Pace(50, 20),
        frozen_seconds=3.0,
        after_seconds=2.0,
        lease_seconds=3.0,
    ),
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
    nodes=NodesPlan(
        repetitions=1,
        beside=Pace(2, 50, seconds=0.3),
        sockets=20,
        idle_seconds=0.2,
        storm_clients=20,
        storm_sessions=4,
        storm_records=30,
        storm_back=10,
        rush_clients=10,
        rush_sessions=2,
        rush_records=100,
        soak_turns=40,
        soak_steps=2,
        soak_hold_seconds=0.1,
        across=(Pace(2, 50, seconds=0.3),),
        cancels=3,
        broken=Pace(4, 50),
        frozen_seconds=0.5,
        after_seconds=0.3,
        lease_seconds=1.0,
    ),
    settle_seconds=0.05,
)
