"""How many connections a node has, and how they come to end."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from gateway.core.model import ErrorCode, Refusal
from gateway.edge.admission import Connection, NoRoom, OpenConnections, UntilItsEnd
from gateway.edge.replies import refusal_response
from gateway.telemetry import registry


class Noting(Connection):
    """Notes when it is to leave."""

    def __init__(self) -> None:
        super().__init__("sse")
        self.left: list[float] = []
        self.was_closed = False

    def leave(self, seconds: float) -> None:
        self.left.append(seconds)

    async def close(self) -> None:
        self.was_closed = True


def refused(reason: str) -> float:
    return registry.get_sample_value("gateway_refused_connections_total", {"reason": reason}) or 0.0


def is_open() -> float | None:
    return registry.get_sample_value("gateway_open_connections", {"carrier": "sse"})


def test_one_more_than_allowed_is_refused_and_let_in_when_there_is_room() -> None:
    """At the limit, and not one before it."""
    connections = OpenConnections(2)
    before, opened = refused("rate-limited"), is_open()
    assert opened is not None
    with connections.hold(Noting()):
        with connections.hold(Noting()):
            assert is_open() == opened + 2
            with pytest.raises(NoRoom) as refusal, connections.hold(Noting()):
                pass
        with connections.hold(Noting()):
            assert len(connections) == 2
    assert (is_open(), len(connections)) == (opened, 0)
    assert refused("rate-limited") == before + 1
    assert (refusal.value.code, refusal.value.retryable) == (ErrorCode.RATE_LIMITED, True)


def test_who_is_refused_together_does_not_come_back_together() -> None:
    """From one to five seconds, told in the header as well, rounded up."""
    delays = {NoRoom(1).retry_after_seconds for _ in range(50)}
    assert len(delays) > 10
    assert all(delay is not None and 1 <= delay <= 5 for delay in delays)
    response = refusal_response(NoRoom(1))
    assert response.status == 503
    assert response.headers["Retry-After"] in {"1", "2", "3", "4", "5"}
    assert response.keep_alive is False


def test_a_limit_on_commands_is_another_status() -> None:
    """429 is this client's, 503 the node's."""
    assert refusal_response(Refusal(ErrorCode.RATE_LIMITED, "unable to send")).status == 429


def test_nobody_is_let_in_by_a_node_that_its_clients_leave() -> None:
    """On a connection that was kept it would be told to go again at once."""
    connections = OpenConnections(10)
    inside = [Noting() for _ in range(8)]
    before = refused("draining")
    with contextlib.ExitStack() as stack:
        for each in inside:
            stack.enter_context(connections.hold(each))
        assert connections.leave(40.0) == 8
        moments = [moment for each in inside for moment in each.left]
        assert len(set(moments)) == 8
        assert all(0 <= moment <= 40 for moment in moments)
        with pytest.raises(Refusal) as refusal, connections.hold(Noting()):
            pass
    assert (refusal.value.code, refusal.value.retryable) == (ErrorCode.DRAINING, True)
    assert refused("draining") == before + 1


async def test_that_all_are_gone_is_told_when_the_last_one_is() -> None:
    """Also to who asks when there is none."""
    connections = OpenConnections(10)
    await connections.gone()
    first, second = connections.hold(Noting()), connections.hold(UntilItsEnd("http"))
    first.__enter__()
    second.__enter__()
    gone = asyncio.create_task(connections.gone())
    await asyncio.sleep(0)
    first.__exit__(None, None, None)
    await asyncio.sleep(0)
    assert not gone.done()
    second.__exit__(None, None, None)
    async with asyncio.timeout(1):
        await gone


async def test_all_are_closed_at_the_end() -> None:
    """What cannot go on elsewhere is left to the server, which has a limit of its own."""
    connections = OpenConnections(10)
    noting = Noting()
    with connections.hold(noting), connections.hold(UntilItsEnd("http")):
        await connections.close()
        assert noting.was_closed
