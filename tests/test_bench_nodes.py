"""The bench's crowds, nodes and breakages: they work, and a run with a loss is an error there as well."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest
from aiohttp import WSMsgType, web
from aiohttp.test_utils import TestServer

from bench.answers import BenchError, Meter
from bench.breaking import LATE_NANOSECONDS, TimedAnswer
from bench.crowd import Crowd
from bench.measure_nodes import measure_nodes, median_of
from bench.member import Filler, Member, RetryError
from bench.node_parts import Place
from bench.plan import SMOKE
from bench.report import report_nodes

if TYPE_CHECKING:
    from collections.abc import Sequence

ATTACHED = {"type": "attached", "id": 1, "session": "s", "cursor": "e.2", "offset": 2, "last": 4, "turns": []}


def _line(**members: object) -> bytes:
    """As the gateway writes it: without a blank."""
    return json.dumps(members, separators=(",", ":")).encode()


def _frame(offsets: Sequence[int], **attached: object) -> bytes:
    """An ``attached`` with a place of 2 of 4, and records behind it."""
    records = [_line(type="chunk", session="s", offset=one, cursor=f"e.{one}") for one in offsets]
    return b"\n".join([_line(**ATTACHED | attached), *records])


def test_every_part_has_its_figures_and_its_table() -> None:
    """The figures of the README come out of this; the shortest run of each part must hold together."""
    plan = SMOKE.nodes

    results = measure_nodes(plan, SMOKE.settle_seconds, lambda _: None)

    assert set(results.storm) == {False, True}
    # Everybody got what it was behind, from the other node, and once: two kinds of turn-end are not the same.
    assert {told["records"] for told in results.storm.values()} == {plan.storm_clients * plan.storm_back}
    assert results.rush["records"] == plan.rush_clients * plan.rush_records
    assert [set(streamed) for _, streamed in results.across] == [set(Place)]
    assert set(results.cancel) == {Place.SAME, Place.OTHER}
    assert results.freeze["longest_gap_ns"] >= plan.frozen_seconds * 1e9
    assert [one["turns"] for one in results.soak] == [plan.soak_turns // 2, plan.soak_turns]
    lines = report_nodes(results, "test").splitlines()
    assert sum(line.startswith("**") for line in lines) == 8
    assert sum(line.startswith("|---") for line in lines) == 7


async def test_one_of_a_crowd_is_caught_up_when_it_has_had_what_there_was() -> None:
    """Records that came later are not what it was behind."""
    member = Member("s", "e.2")

    member.frame(_frame([3]), now=7)
    assert not member.caught_up.done()
    member.frame(b"\n".join(_frame([4, 5]).split(b"\n")[1:]), now=9)

    assert await member.caught_up == 9
    assert (member.attached_at, member.records) == (7, 3)


@pytest.mark.parametrize(
    ("offsets", "why"),
    [
        ((4,), "4 came where 3"),
        ((3, 3, 4), "3 came where 4"),
        ((4, 3), "4 came where 3"),
        ((2, 3), "2 came where 3"),
    ],
    ids=["lost", "twice", "swapped", "had"],
)
async def test_a_loss_in_a_crowd_is_no_figure(offsets: Sequence[int], why: str) -> None:
    """A storm is weathered best by whoever leaves out what is due."""
    member = Member("s", "e.2")

    member.frame(_frame(offsets), now=1)

    with pytest.raises(BenchError, match=f"{why} was due"):
        await asyncio.wait_for(member.caught_up, 10)


async def test_a_place_that_is_gone_is_no_figure() -> None:
    """Starting afresh is not what the clients of a dead node are promised."""
    member = Member("s", "e.2")

    member.frame(_frame([3, 4], resync="trimmed"), now=1)

    with pytest.raises(BenchError, match="trimmed"):
        await asyncio.wait_for(member.caught_up, 10)


@pytest.mark.parametrize(("retryable", "kind"), [(True, RetryError), (False, BenchError)])
async def test_a_refusal_is_for_now_or_for_good(*, retryable: bool, kind: type[BenchError]) -> None:
    """One is counted, as it is part of a storm; the other ends the run."""
    member = Member("s", None)

    member.frame(_line(type="error", id=1, retryable=retryable), now=1)

    with pytest.raises(BenchError) as raised:
        await member.caught_up
    assert type(raised.value) is kind


async def test_a_session_that_could_not_be_filled_is_no_figure() -> None:
    """Its readers would have nothing to catch up."""
    filler = Filler()

    filler.frame(b'{"type":"error","code":"store-unavailable"}', now=1)

    with pytest.raises(BenchError, match="store-unavailable"):
        await filler.ended


async def test_whoever_is_refused_for_now_comes_again_and_is_counted() -> None:
    """A node that turns most of a storm away may not look as if it had served it at once."""
    asked = 0

    async def serve(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked == 1:
            return web.Response(status=503)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            assert message.type is WSMsgType.TEXT
            await socket.send_str(_frame([3, 4]).decode())
        return socket

    app = web.Application()
    app.router.add_get("/gateway/v1/ws", serve)
    crowd = Crowd()
    async with TestServer(app) as server:
        assert server.port is not None
        told = await crowd.come(port=server.port, count=1, together=1)
        await crowd.leave()

    assert (told["refused"], told["lost"], told["records"]) == (1, 0, 2)


async def test_silences_and_late_chunks_are_noted() -> None:
    """They are what a client sees of a store that stood still."""
    answer = TimedAnswer(3, Meter())
    late = LATE_NANOSECONDS + 1

    for index, came in enumerate((10, 10 + late, 12 + late)):
        stamp = came if index != 1 else came - late
        answer.take(b'"delta":"%08d.%020d"' % (index, stamp), now=came)

    assert (answer.longest_gap, answer.late_until) == (late, 10 + late)


def test_repetitions_become_one_number_by_number() -> None:
    """One repetition that the host disturbed shall not be the figure."""
    told = [{"a": 1, "b": {"c": 9}}, {"a": 5, "b": {"c": 2}}, {"a": 3, "b": {"c": 4}}]

    assert median_of(told) == {"a": 3, "b": {"c": 4}}
