"""Looks at the journal for who is attached: a server in trouble is left in peace, and troubles no other."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from gateway import journal, tailreader
from gateway.core.model import NodeId, SessionId, TurnId
from gateway.core.tail import Tail
from gateway.journal import SessionJournal
from gateway.repairs import Repairs
from gateway.store import Shard, Store, StoreUnavailable
from gateway.tailreader import TailReader
from tests.support.servers import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.outcomes import Look

WAIT_SECONDS = 10.0
STUCK, OTHER = "stuck-", "other"


class Reading:
    """Somebody who is attached."""

    carrier = "websocket"

    def wake(self) -> None:
        """As the protocol says."""


class TwoShards(SessionJournal):
    """The real one; sessions of :data:`STUCK` are on a shard of their own, which may be frozen."""

    def __init__(self, store: Store) -> None:
        super().__init__(
            store, node=NodeId("n"), prefix=f"t{secrets.token_hex(4)}", ttl_seconds=60, window_seconds=60
        )
        self.looks = 0
        self.thawed = asyncio.Event()
        self.thawed.set()

    def shard_of(self, session: SessionId) -> Shard | None:
        """As the base class."""
        shard = super().shard_of(session)
        assert shard is not None
        return Shard("stuck", shard.pool) if session.startswith(STUCK) else shard

    async def look(self, session: SessionId, *, offset: int = 0) -> Look:
        """As the base class."""
        self.looks += 1
        if session.startswith(STUCK):
            await self.thawed.wait()
        return await super().look(session, offset=offset)


@asynccontextmanager
async def reading(journal_: SessionJournal) -> AsyncIterator[TailReader]:
    repairs = Repairs(journal_, wait_seconds=0.1)
    reader = TailReader(journal_, repairs, lambda tail: pytest.fail(f"lost {tail.session}"))
    try:
        yield reader
    finally:
        await reader.close()
        await repairs.close()


def attached(reader: TailReader, *sessions: str) -> list[Tail]:
    """Tails that look at their journals."""
    tails = [Tail(SessionId(session)) for session in sessions]
    for tail in tails:
        tail.subscribers.add(Reading())
        reader.look_soon(tail)
    return tails


async def looked(tail: Tail) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not tail.looked_at:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)


async def test_a_shard_that_does_not_answer_keeps_no_other_waiting(valkey_url: str) -> None:
    """One of three is frozen; two thirds of the users must not see it (FAULTS R17)."""
    async with Store(valkey_url, journal.SCRIPTS) as store:
        sessions = TwoShards(store)
        sessions.thawed.clear()
        async with reading(sessions) as reader:
            stuck = attached(reader, *(f"{STUCK}{number}" for number in range(2 * tailreader.MAX_LOOKS)))
            [other] = attached(reader, OTHER)
            await looked(other)
            assert sessions.looks == tailreader.MAX_LOOKS + 1
            sessions.thawed.set()
            for tail in stuck:
                await looked(tail)


async def test_a_server_that_refuses_at_once_is_asked_a_few_times_and_then_left_in_peace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands are attached, each asks again; together they would keep it, and the log, busy."""
    monkeypatch.setattr(tailreader, "RETRY_SECONDS", 600.0)
    with Server() as server:
        async with Store(server.url, journal.SCRIPTS) as store:
            sessions = TwoShards(store)
            async with reading(sessions) as reader:
                [first] = attached(reader, OTHER)
                await looked(first)
                server.ask("ACL", "SETUSER", "default", "-evalsha")
                sessions.looks = 0
                tails = attached(reader, *(f"{STUCK}{number}" for number in range(4 * tailreader.MAX_LOOKS)))
                refused = reader._looks[sessions.shard_of(tails[0].session)]
                for _ in range(5):  # as many answers as they would have asked for
                    with pytest.raises(StoreUnavailable):
                        await sessions.turn(SessionId(OTHER), TurnId("t"))
                assert refused.locked()
                assert sessions.looks == tailreader.MAX_LOOKS
