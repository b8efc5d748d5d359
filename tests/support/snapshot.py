"""Snapshot: a store as a replica has it that hears nothing more; to restore it is a lossy failover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import redis


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys below a prefix as they once were.

    Attributes:
        admin: A connection to the server.
        prefix: Of the keys.
        dumped: Each key with its time to live in ms (0: for ever) and what DUMP gave.
    """

    admin: redis.Redis
    prefix: str
    dumped: dict[bytes, tuple[int, bytes]]

    def restore(self) -> None:
        """Put it all back, and remove what came later; in one step."""
        later = set(_keys(self.admin, self.prefix)) - set(self.dumped)
        with self.admin.pipeline(transaction=True) as step:
            for key in later:
                step.delete(key)
            for key, (ttl, value) in self.dumped.items():
                step.restore(key, ttl, value, replace=True)
            step.execute()


def take_snapshot(admin: redis.Redis, prefix: str) -> Snapshot:
    """How the keys that start with a prefix are now; in a cluster they are all of one slot."""
    keys = _keys(admin, prefix)
    with admin.pipeline(transaction=True) as step:
        for key in keys:
            step.pttl(key)
            step.dump(key)
        found = step.execute()
    pairs = zip(found[::2], found[1::2], strict=True)
    dumped = {
        key: (max(0, ttl), value) for key, (ttl, value) in zip(keys, pairs, strict=True) if value is not None
    }
    return Snapshot(admin, prefix, dumped)


def _keys(admin: redis.Redis, prefix: str) -> list[bytes]:
    escaped = prefix.replace("[", r"\[")
    return sorted(admin.scan_iter(f"{escaped}*", count=1000))
