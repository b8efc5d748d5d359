"""A cluster: primaries, with replicas if wanted, set up as ``redis-cli --cluster create`` would."""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, Self

import redis

from gateway.store.cluster import SLOTS, slot_of
from tests.support.servers import Server, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

NODE_TIMEOUT_MS = 800


class ClusterOfServers:
    """A cluster of processes (``with``), which serves every slot from the start; that takes it two seconds.

    Args:
        primaries: How many; they share the slots evenly.
        replicas: Of each primary: 0 or 1.
        spare: Servers that know the others and have no slot.
        options: Of every server.

    Attributes:
        primaries: To begin with; a failover changes who is one.
        replicas: ``replicas[i]`` is that of ``primaries[i]``.
        spare: Those without slots.
    """

    def __init__(
        self, primaries: int = 3, *, replicas: int = 0, spare: int = 0, options: tuple[str, ...] = ()
    ) -> None:
        def make(count: int) -> list[Server]:
            timing = ("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--repl-diskless-sync-delay", "0")
            # A primary without slots stays one.
            still = ("--cluster-allow-replica-migration", "no")
            return [Server("--cluster-enabled", "yes", *timing, *still, *options) for _ in range(count)]

        self.primaries, self.replicas, self.spare = make(primaries), make(primaries * replicas), make(spare)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in self.servers:
                stack.enter_context(server)
            self._join()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def servers(self) -> list[Server]:
        """All of them."""
        return [*self.primaries, *self.replicas, *self.spare]

    @property
    def url(self) -> str:
        """For a store; the first of them tells it the rest."""
        return f"redis+cluster://{self.servers[0].address}"

    def owner(self, key: str) -> Server:
        """Who has the slot of a key, as those say who are up."""
        return self.owner_of_slot(slot_of(key))

    def owner_of_slot(self, slot: int) -> Server:
        """Who has a slot, as the first says who is up."""
        for asked in self.servers:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                for entry in _tell(asked, "SLOTS"):
                    if entry[0] <= slot <= entry[1]:
                        return next(server for server in self.servers if server.port == entry[2][1])
        raise AssertionError(f"nobody has slot {slot}")

    def key_of(self, server: Server, start: str = "key") -> str:
        """A key whose slot a server has."""
        return next(
            key for key in (f"{start}{number}" for number in range(10_000)) if self.owner(key) is server
        )

    @contextlib.contextmanager
    def migrating(self, slot: int, target: Server) -> Iterator[Server]:
        """Begin to move a slot, and end it after: meanwhile who has it says ASK for keys it has not.

        Yields who has it.
        """
        source = self.owner_of_slot(slot)
        _tell(target, "SETSLOT", slot, "IMPORTING", node_id(source))
        _tell(source, "SETSLOT", slot, "MIGRATING", node_id(target))
        yield source
        self.move_keys(slot, source, target)
        self.settle_slot(slot, target)

    def move_keys(self, slot: int, source: Server, target: Server) -> None:
        """Those of a slot that is being moved."""
        while keys := _tell(source, "GETKEYSINSLOT", slot, 100):
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)

    def settle_slot(self, slot: int, owner: Server) -> None:
        """Have everybody know at once who has a slot."""
        for server in (owner, *self.servers):
            with contextlib.suppress(redis.ConnectionError, redis.ResponseError):  # replicas refuse
                _tell(server, "SETSLOT", slot, "NODE", node_id(owner))

    def move(self, slot: int, target: Server) -> None:
        """Move a slot with all its keys, as a reshard does."""
        with self.migrating(slot, target):
            pass

    def settle(self) -> None:
        """Wait until every server that is up finds the cluster whole."""
        up = [server for server in self.servers if server._process is not None]
        wait_until(lambda: all(_info(server)["cluster_state"] == "ok" for server in up))

    def _join(self) -> None:
        share = SLOTS / len(self.primaries)
        for number, server in enumerate(self.servers):
            _tell(server, "SET-CONFIG-EPOCH", number + 1)
        for number, server in enumerate(self.primaries):
            _tell(server, "ADDSLOTSRANGE", round(number * share), round((number + 1) * share) - 1)
        for server in self.servers[1:]:
            _tell(server, "MEET", "127.0.0.1", self.servers[0].port)
        count = str(len(self.servers))
        wait_until(lambda: all(_info(server)["cluster_known_nodes"] == count for server in self.servers))
        self.settle()
        for primary, replica in zip(self.primaries, self.replicas, strict=False):
            wait_until(functools.partial(_knows, replica, primary))
            _tell(replica, "REPLICATE", node_id(primary))
        wait_until(lambda: all(_is_linked(replica) for replica in self.replicas))
        if self.replicas:
            # Others must know of it, or nobody elects it.
            wait_until(lambda: all(_count_replicas(server) == len(self.replicas) for server in self.servers))
        self.settle()


def node_id(server: Server) -> str:
    """What the cluster calls a server."""
    return str(_tell(server, "MYID").decode())


def _tell(server: Server, *words: str | int) -> Any:
    return server.ask("CLUSTER", *words)


def _info(server: Server) -> dict[str, str]:
    return dict(line.split(":") for line in _tell(server, "INFO").decode().split())


def _nodes(server: Server) -> str:
    return str(_tell(server, "NODES").decode())


def _knows(server: Server, other: Server) -> bool:
    return node_id(other) in _nodes(server)


def _is_linked(replica: Server) -> bool:
    return bool(replica.admin.info("replication")["master_link_status"] == "up")


def _count_replicas(server: Server) -> int:
    return sum("slave" in line.split()[2] for line in _nodes(server).splitlines())
