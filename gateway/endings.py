"""The ends of turns that other nodes produce: waited for, or, when the node is gone, made."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from gateway import telemetry
from gateway.core import wire
from gateway.core.model import EndCode, EndReason, NodeId, SessionId, TurnError, TurnId
from gateway.core.turn import End
from gateway.outcomes import Appended, Rewound
from gateway.store import StoreUnavailable

if TYPE_CHECKING:
    from gateway.hub import Hub
    from gateway.journal import SessionJournal
    from gateway.lease import Lease
    from gateway.repairs import Repairs

log = structlog.get_logger(__name__)

FIRST_LOOK_SECONDS = 0.002
LAST_LOOK_SECONDS = 0.1
"""Between looks at a turn: twice as long each time, up to this. Its node needs a few milliseconds, as a rule,
to hear of the cancel and close the backend's connection; a quarter of a second if that does not let go."""

MESSAGE = "the gateway that read this answer is gone; send again"


class Endings:
    """How turns of other nodes end.

    Args:
        journal: Where it is told.
        hub: Who is shown it.
        lease: Who is gone.
        repairs: Told of a journal that has lost something.
    """

    def __init__(self, journal: SessionJournal, *, hub: Hub, lease: Lease, repairs: Repairs) -> None:
        self._journal = journal
        self._hub = hub
        self._lease = lease
        self._repairs = repairs

    async def seal(self, session: SessionId, turn: TurnId, node: NodeId) -> bool:
        """End a turn whose node is gone, if it has not ended.

        Returns:
            Whether this call ended it.

        Raises:
            StoreUnavailable: Not now; try again later.
        """
        end = wire.turn_end(End(EndReason.INTERRUPTED, error=TurnError(EndCode.NODE_LOST, MESSAGE)))
        result = await self._journal.seal(session, turn, node=node, reason=EndReason.INTERRUPTED, end=end)
        if isinstance(result, Rewound):
            # The end would stand where records were that somebody has seen, and that may come back.
            self._repairs.suspect(session)
            raise StoreUnavailable("unable to end the turn; the journal is behind what was seen of it")
        if not isinstance(result, Appended):
            return False
        log.info("turn.sealed", session=session, turn=turn, node=node)
        telemetry.turns_ended.labels(reason=EndReason.INTERRUPTED).inc()
        self._hub.publish(session, ())
        return True

    async def wait(self, session: SessionId, turn: TurnId, *, seconds: float) -> str | None:
        """Wait until a turn has ended, whoever produces it; end it when its node turns out to be gone.

        Args:
            session: Whose.
            turn: Which.
            seconds: How long; a store that is away is asked again.

        Returns:
            Its end reason, empty for a turn that the journal does not know; ``None``: it runs still.

        Raises:
            StoreUnavailable: The time is over, and the store is away.
            StoreError: The store refused.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + seconds
        pause = FIRST_LOOK_SECONDS
        while True:
            try:
                reason = await self._look(session, turn)
                if reason is not None or loop.time() >= give_up_at:
                    return reason
            except StoreUnavailable:
                if loop.time() >= give_up_at:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_LOOK_SECONDS)

    async def _look(self, session: SessionId, turn: TurnId) -> str | None:
        known = await self._journal.turn(session, turn)
        if known is None:
            return ""
        if known.is_running and await self._lease.is_gone(known.node):
            await self.seal(session, turn, known.node)
            known = await self._journal.turn(session, turn) or known
        return None if known.is_running else known.state
