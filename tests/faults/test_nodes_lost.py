"""Nodes that die, freeze and wake: real processes, killed with -9 and stopped with SIGSTOP."""

from __future__ import annotations

import asyncio
import secrets
import signal
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.backend import Exchange, ScriptedBackend, answers, never_ends, until_released
from tests.support.client import SessionClient
from tests.support.process import GatewayProcess
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Start = Callable[..., Awaitable[GatewayProcess]]

TURNS = 12


@pytest.fixture
async def start(valkey_url: str) -> AsyncIterator[Start]:
    """Start gateways on one store; whatever became of them, they are gone with the test."""
    prefix = f"t{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:

        async def start(backend: ScriptedBackend, **settings: object) -> GatewayProcess:
            defaults = {"redis_url": valkey_url, "key_prefix": prefix, "lease": 1, "drain": 0.1}
            gateway = GatewayProcess(upstream=backend.url, **{**defaults, **settings})
            await stack.enter_async_context(gateway)
            stack.callback(wake, gateway)
            return await gateway.started()

        yield start


def freeze(gateway: GatewayProcess) -> None:
    gateway.process.send_signal(signal.SIGSTOP)


def wake(gateway: GatewayProcess) -> None:
    if gateway.process.returncode is None:
        gateway.process.send_signal(signal.SIGCONT)


def sealed(*gateways: GatewayProcess) -> list[tuple[str, str]]:
    """The turns that were sealed, and by how many."""
    lines = [line for gateway in gateways for line in gateway.log if line.get("event") == "turn.sealed"]
    return sorted((line["session"], line["turn"]) for line in lines)


def is_chunk(line: dict[str, Any]) -> bool:
    return bool(line["type"] == "chunk")


async def speaks_on(exchange: Exchange) -> None:
    """Says something all the time, until the gateway hangs up."""
    await exchange.head()
    await exchange.text("one", finish=False)
    number = 0
    while not exchange.was_closed.is_set():
        number += 1
        await exchange.say({"type": "text-delta", "id": "t1", "delta": f"{number} "})
        await asyncio.sleep(0.01)


async def test_the_turns_of_a_killed_node_are_ended_by_another(start: Start) -> None:
    """G1: each has one end, which whoever is attached elsewhere sees behind all they had; then they go on."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await start(backend), await start(backend)
        async with (
            SessionClient(one.address) as here,
            SessionClient(two.address) as there,
            HttpChat(two.address) as http,
            SdkClient(two.address) as sdk,
        ):
            for number in range(TURNS):
                await there.attach(f"s{number}")
                await here.send(f"s{number}", f"t{number}")
            await there.wait(is_chunk, 4 * TURNS)
            answer = await http.stream("s0")
            await answer.has(4)
            await sdk.resume("r1", "s1")
            await sdk.has("r1", 4)
            await one.kill()
            for number in range(TURNS):
                end = await there.ended(f"t{number}")
                assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost")
                mine = [record for record in there.records if record["session"] == f"s{number}"]
                assert [record["offset"] for record in mine] == list(range(1, 7))
            await answer.end()
            assert (answer.text, answer.whole) == ("one", False)  # its framing says that it broke off
            assert (await sdk.ended("r1"))["type"] == "end"
            assert sdk.chunks("r1")[-1]["type"] == "error"
            assert all(exchange.was_closed.is_set() for exchange in backend.exchanges)
            assert len(backend.exchanges) == TURNS, "nothing is ever sent again by us"
            backend.script = answers
            for number in range(TURNS):
                assert (await there.send(f"s{number}", f"t{number}"))["duplicate"]
                await there.send(f"s{number}", f"again{number}")
                assert (await there.ended(f"again{number}"))["reason"] == "complete"


async def test_many_nodes_that_find_one_dead_end_each_of_its_turns_once(start: Start) -> None:
    """G5: whoever comes first; the others see that it has ended."""
    async with ScriptedBackend(never_ends) as backend:
        one, *others = [await start(backend) for _ in range(4)]
        async with SessionClient(one.address) as here:
            for number in range(TURNS):
                await here.send(f"s{number}", f"t{number}")
            await here.wait(lambda line: line["type"] == "turn-start", TURNS)
            await one.kill()
        expected = sorted((f"s{number}", f"t{number}") for number in range(TURNS))
        await eventually(lambda: sealed(*others) == expected)
        for gateway in others:
            async with SessionClient(gateway.address) as client:
                for number in range(TURNS):
                    await client.attach(f"s{number}")
                    assert (await client.ended(f"t{number}"))["reason"] == "interrupted"
        assert sealed(*others) == expected


async def test_a_fleet_that_was_killed_is_buried_by_the_first_that_comes(start: Start) -> None:
    """G4: nobody is attached, nobody asks; and turns do not run on for ever in the journal."""
    async with ScriptedBackend(never_ends) as backend:
        fleet = [await start(backend) for _ in range(3)]
        for number, gateway in enumerate(fleet):
            async with SessionClient(gateway.address) as client:
                await client.send(f"s{number}", f"t{number}")
                await client.wait(is_chunk, 4)
        await asyncio.gather(*(gateway.kill() for gateway in fleet))
        new = await start(backend)
        expected = [(f"s{number}", f"t{number}") for number in range(3)]
        await eventually(lambda: sealed(new) == expected)
        async with SessionClient(new.address) as client:
            for number in range(3):
                reply = await client.attach(f"s{number}")
                assert [turn["state"] for turn in reply["turns"]] == ["interrupted"]
                assert (await client.ended(f"t{number}"))["error"]["code"] == "node-lost"


async def test_a_node_that_was_frozen_past_its_lease_writes_nothing_more(start: Start) -> None:
    """G2: no record follows the turn-end, its backend is let go of, and it serves on as before."""
    async with ScriptedBackend(speaks_on) as backend:
        one, two = await start(backend), await start(backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await there.attach("s")
            await here.send("s", "t1")
            await there.wait(is_chunk, 20)
            freeze(one)
            end = await there.ended("t1")
            assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost")
            exchange = await backend.exchange()
            assert not exchange.was_closed.is_set()
            wake(one)
            await exchange.closed()
            told = await one.said("turn.given-up")
            assert told["turn"] == "t1"
            assert (await here.ended("t1")) == end
            backend.script = answers
            await here.send("s", "t2")
            for client in (here, there):
                assert (await client.ended("t2"))["reason"] == "complete"
            mine = [record for record in there.records if record["turn"] == "t1"]
            assert mine[-1] == end
            assert there.offsets == list(range(1, len(there.records) + 1))
            assert here.records == there.records
            await here.send("s", "t3")
            assert (await there.ended("t3"))["reason"] == "complete"
        assert sealed(one, two) == [("s", "t1")]


async def test_a_frozen_node_whose_turns_say_nothing_lets_them_go_when_it_wakes(start: Start) -> None:
    """Nothing is appended that the journal could refuse: it asks, at its first beat."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await start(backend), await start(backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await there.attach("s")
            await here.send("s", "t1")
            await there.wait(is_chunk, 4)
            freeze(one)
            assert (await there.ended("t1"))["reason"] == "interrupted"
            wake(one)
            await (await backend.exchange()).closed()
            assert (await here.ended("t1"))["reason"] == "interrupted"


async def test_a_node_that_stood_still_for_less_than_its_lease_goes_on(start: Start) -> None:
    """A machine that swaps, a collector that takes its time: no reason to end an answer."""
    async with ScriptedBackend(until_released) as backend:
        one, two = await start(backend, lease=20), await start(backend, lease=20)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await there.attach("s")
            await here.send("s", "t1")
            await there.wait(is_chunk, 4)
            freeze(one)
            (await backend.exchange()).release.set()
            assert (await there.ask(type="ping"))["type"] == "pong"
            wake(one)
            assert (await there.ended("t1"))["reason"] == "complete"
            assert there.text == "onetwo"
        assert sealed(one, two) == []


async def test_a_cancel_of_a_turn_whose_node_is_dead_is_answered_as_interrupted(start: Start) -> None:
    """C19: it waits for as long as it takes to know, and ends the turn itself."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await start(backend), await start(backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            for number in range(4):
                await here.send("s", f"t{number}")
            await here.wait(is_chunk, 16)
            await one.kill()
            reply = await there.cancel("s")
            assert [told["result"] for told in reply["turns"]] == ["interrupted"] * 4
            await there.attach("s")
            for number in range(4):
                assert (await there.ended(f"t{number}"))["reason"] == "interrupted"


async def test_a_send_that_interrupts_a_dead_nodes_turn_goes_ahead(start: Start) -> None:
    """C7: it waits no longer than it takes to know that nobody is left to let go."""
    async with ScriptedBackend(never_ends) as backend:
        one, two = await start(backend), await start(backend)
        async with SessionClient(one.address) as here, SessionClient(two.address) as there:
            await here.send("s", "t1")
            await here.wait(is_chunk, 4)
            await one.kill()
            backend.script = answers
            await there.send("s", "t2", overlap="interrupt")
            assert (await there.ended("t2"))["reason"] == "complete"
            assert (await there.ended("t1"))["reason"] == "interrupted"
            ends = [record["turn"] for record in there.records if record["type"] == "turn-end"]
            assert ends == ["t1", "t2"]
