"""Gateway processes that die, freeze, run out of something or are told to stop; others end what they left."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.faults.watching import (
    Crowd,
    Numbers,
    Watcher,
    command,
    cpu_seconds,
    ends_of,
    faults_of,
    numbers,
    resident_bytes,
    send,
    send_until_accepted,
    text_of,
    until,
    whole_journal,
)
from tests.support.backend import Exchange, ScriptedBackend
from tests.support.network import Network
from tests.support.process import GatewayProcess
from tests.support.servers import Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MANY = 50
FOREVER = float("inf")

StartNodes = Any


@pytest.fixture
async def start(valkey_url: str, make_config: Callable[..., Any]) -> AsyncIterator[StartNodes]:
    """Starts processes on one store; they end with the test, and none of them may have failed by itself."""
    async with AsyncExitStack() as stack:
        started: list[GatewayProcess] = []

        async def start(count: int, upstream: str, **settings: Any) -> list[GatewayProcess]:
            own = {
                "upstream": upstream,
                "redis_url": valkey_url,
                "key_prefix": make_config(upstream).key_prefix,
                "lease": 1,
                "poll": 0.5,
                "drain": 20,
                "goaway_spread": 0.2,
            }
            processes = [GatewayProcess(**{**own, **settings}) for _ in range(count)]
            await asyncio.gather(*(stack.enter_async_context(process) for process in processes))
            await asyncio.gather(*(process.started() for process in processes))
            started.extend(processes)
            return processes

        yield start
    for process in started:
        assert not faults_of(process)


def addresses(processes: list[GatewayProcess]) -> list[str]:
    return [process.address for process in processes]


# -- killed


async def test_g1_fifty_turns_of_a_killed_node_are_ended_by_the_other(start: StartNodes) -> None:
    """Its clients are elsewhere and settled; none sees a record twice, and each may ask again (G7, N20)."""
    script = Numbers(FOREVER, pace_seconds=0.05)
    async with ScriptedBackend(script) as backend:
        one, two = await start(2, backend.url)
        async with Crowd(script, [one.address], MANY) as crowd, Watcher("s0", two.address) as other:
            await crowd.words(5)
            for watcher in crowd.watchers:
                watcher.addresses[:] = addresses([one, two])
            await one.kill()
            await until(lambda: len(script.closed) == MANY)
            for session, end in (await crowd.ended()).items():
                assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost"), session
            await other.ended("t")
            for watcher in crowd.watchers:
                shown = text_of(watcher.view, "t")
                assert shown == numbers(shown.count(" "))
                assert watcher.resyncs == []
                assert await whole_journal(two.address, watcher.session) == watcher.view
            assert other.view == crowd.watchers[0].view
            await script.finish()
            for watcher in crowd.watchers[:5]:
                await send(two.address, watcher.session, "again")
                assert (await watcher.ended("again"))["reason"] == "complete"
        assert {count for question, count in script.asked.items() if question.endswith("/t")} == {1}


# -- told to stop


async def test_g8_a_second_signal_ends_turns_at_once_and_says_so(start: StartNodes) -> None:
    """Whoever is in a hurry is not kept for GATEWAY_DRAIN; each turn has its end all the same."""
    script = Numbers(3)
    async with ScriptedBackend(script) as backend:
        one, two = await start(2, backend.url, drain=600, goaway_spread=600)
        async with Crowd(script, [one.address], 5) as crowd:
            await crowd.words(3)
            for watcher in crowd.watchers:
                watcher.addresses[:] = [two.address]
            one.terminate()
            await one.said("node.draining")
            one.process.send_signal(signal.SIGINT)
            assert await one.exited() == 0
            for end in (await crowd.ended()).values():
                assert (end["reason"], end["error"]["code"]) == ("interrupted", "node-lost")
            assert len(script.closed) == 5


async def test_g9_a_stop_in_the_middle_of_sends_leaves_no_turn_that_runs(start: StartNodes) -> None:
    """A send was refused, or has an end: nothing in between, whenever the signal comes."""
    script = Numbers(1)
    async with ScriptedBackend(script) as backend:
        await script.finish()
        one, two = await start(2, backend.url, drain=5)
        replies: dict[str, Any] = {}

        async def send_one(number: int) -> None:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
                replies[f"s{number}"] = await send(one.address, f"s{number}", "t")

        sends = []
        for number in range(60):
            sends.append(asyncio.create_task(send_one(number)))
            if number == 30:
                await until(lambda: len(replies) > 3)
                one.terminate()
            await asyncio.sleep(0)
        await asyncio.gather(*sends)
        assert await one.exited() == 0
        accepted = {s for s, reply in replies.items() if reply["type"] == "accepted"}
        refused = [reply for reply in replies.values() if reply["type"] == "error"]
        assert all((r["code"], r["retryable"]) == ("draining", True) for r in refused)
        assert accepted
        for number in range(60):
            session = f"s{number}"
            journal = await whole_journal(two.address, session)
            assert set(ends_of(journal)) == ({"t"} if journal else set())
            assert journal or session not in accepted
            assert script.asked.get(f"{session}/t", 0) <= 1


# -- short of something


async def test_g13_a_node_that_runs_out_of_files_serves_again_when_there_are_some(
    start: StartNodes,
) -> None:
    """It takes no more connections, does not spin, and who is connected notices nothing."""
    script = Numbers(3)
    async with ScriptedBackend(script) as backend:
        (one,) = await start(1, backend.url)
        async with Watcher("s", one.address) as watcher:
            await watcher.attached()
            await send(one.address, "s", "t")
            await watcher.has_words("t", 3)
            pid = one.process.pid
            limit = highest_file(pid) + 10
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, before[1]))
            host, port = one.address.split(":")
            async with AsyncExitStack() as stack:
                for _ in range(limit + 20):
                    idle = stack.enter_context(socket.socket())
                    idle.setblocking(False)  # noqa: FBT003 - positional only
                    await asyncio.get_running_loop().sock_connect(idle, (host, int(port)))
                await until(lambda: has_no_answer(one.address))
                spent = cpu_seconds(one)
                await script.allow(40)
                await watcher.has_words("t", 40)
                assert cpu_seconds(one) - spent < 1.0
            await until(lambda: answers(one.address))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            await send_until_accepted(one.address, "s", "u")
            await script.finish()
            for turn in ("t", "u"):
                assert (await watcher.ended(turn))["reason"] == "complete"
            assert watcher.attaches == 1


def highest_file(pid: int) -> int:
    return max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir())


async def has_no_answer(address: str) -> bool:
    return not await answers(address)


async def answers(address: str) -> bool:
    try:
        return bool((await command(address, type="ping"))["type"] == "pong")
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


# -- what is held is bounded while the store is away


async def test_g12_what_is_held_while_the_store_is_away_has_a_bound(
    make_config: Callable[..., Any],
) -> None:
    """A flood from the backend meanwhile fills GATEWAY_MAX_BUFFER and no more: then sends are refused."""
    half_megabyte = "x" * 500_000
    hung_up: list[Exchange] = []

    async def script(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.text(finish=False)
        await exchange.release.wait()
        try:
            for _ in range(100):
                await exchange.text(half_megabyte, start=False, finish=False)
        except ConnectionError:
            hung_up.append(exchange)

    with Server() as server:
        async with AsyncExitStack() as stack:
            network = await stack.enter_async_context(Network(server.address))
            backend = await stack.enter_async_context(ScriptedBackend(script))
            process = GatewayProcess(
                upstream=backend.url,
                redis_url=f"redis://{network.address}",
                key_prefix=make_config(backend.url).key_prefix,
                lease=1,
                max_turn=4 * 1024 * 1024,
                max_buffer=16 * 1024 * 1024,
            )
            await stack.enter_async_context(process)
            await process.started()
            sessions = [f"s{number}" for number in range(8)]
            watchers = [await stack.enter_async_context(Watcher(s, process.address)) for s in sessions]
            for session in sessions:
                await send(process.address, session, "t")
            for number, watcher in enumerate(watchers):
                await watcher.has(4)
                await backend.exchange(number)
            before = resident_bytes(process)
            network.freeze()
            for exchange in backend.exchanges:
                exchange.release.set()
            await until(lambda: len(hung_up) == len(sessions))
            grown = resident_bytes(process) - before
            reply = await send(process.address, "more", "t")
            assert (reply["type"], reply["code"]) == ("error", "rate-limited")
            network.cut()
            network.thaw()
            for watcher in watchers:
                assert (await watcher.ended("t"))["error"]["code"] == "turn-too-large"
                assert watcher.resyncs == []
            assert not faults_of(process)
    assert grown < 160 * 1024 * 1024, grown
