"""Clients that come, go, drop and move between nodes, at every place and in every way."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal

import pytest

from tests.faults.watching import (
    Chronicle,
    Numbers,
    Watcher,
    command,
    faults_of,
    metric,
    numbers,
    resident_bytes,
    send,
    text_of,
    until,
    whole_journal,
)
from tests.support.backend import ScriptedBackend, answers
from tests.support.client import SessionClient
from tests.support.fallback import CARRIERS, Follower, following
from tests.support.process import GatewayProcess

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

pytestmark = pytest.mark.usefixtures("node_logs")

SEED = 20261120
SETTINGS: dict[str, Any] = {"poll_seconds": 0.5, "lease_seconds": 0.6}


async def two_nodes(make_node: MakeNode, upstream: str, **settings: Any) -> list[Node]:
    return [await make_node(upstream, **{**SETTINGS, **settings}) for _ in range(2)]


async def test_n1_a_client_that_comes_back_at_any_place_gets_the_exact_rest_on_each_node_and_carrier(
    make_node: MakeNode,
) -> None:
    """At every offset of an answer that has ended, also at its ends."""
    script = Numbers(8)
    async with ScriptedBackend(script) as backend:
        nodes = await two_nodes(make_node, backend.url)
        await script.finish()
        await send(nodes[0].address, "s", "t")
        async with Watcher("s", nodes[1].address) as watcher:
            await watcher.ended("t")
        journal = watcher.view
        for number, record in enumerate(journal):
            rest = journal[number + 1 :]
            for node in nodes:
                carrier = CARRIERS[number % len(CARRIERS)]
                async with following(carrier, node.address, "s", after=record["cursor"]) as follower:
                    await has_lines(follower, len(rest))
                    assert follower.records == rest


async def test_n2_a_client_that_is_cut_fifty_times_and_goes_from_node_to_node_reads_one_order(
    make_node: MakeNode,
) -> None:
    """The pieces, put together, are what one who never left was shown."""
    dice = random.Random(SEED)
    script = Numbers(float("inf"), pace_seconds=0.005)
    async with ScriptedBackend(script) as backend:
        nodes = [*await two_nodes(make_node, backend.url), await make_node(backend.url, **SETTINGS)]
        addresses = [node.address for node in nodes]
        chronicle = Chronicle()
        async with (
            Watcher("s", *addresses, chronicle=chronicle) as mover,
            Watcher("s", addresses[1], chronicle=chronicle) as stays,
        ):
            await stays.attached()
            await send(addresses[0], "s", "t")
            for count in range(50):
                await mover.came_back(count)
                await mover.has(len(mover.view) + dice.randrange(3))
                mover.cut()
            await script.finish()
            for watcher in (mover, stays):
                await watcher.ended("t")
            assert mover.view == stays.view
            assert (mover.resyncs, stays.resyncs) == ([], [])
            assert mover.attaches > 50


async def test_n3_a_client_with_two_overlapping_sockets_on_two_nodes_is_right_on_both(
    make_node: MakeNode,
) -> None:
    """It reconnected before the old socket was known to be dead (N26: or it is two tabs of one device)."""
    script = Numbers(2)
    async with ScriptedBackend(script) as backend:
        nodes = await two_nodes(make_node, backend.url)
        async with AsyncExitStack() as stack:
            same = [
                await stack.enter_async_context(SessionClient(node.address, client="one-and-the-same"))
                for node in (*nodes, nodes[0])
            ]
            for client in same:
                await client.attach("s")
            await same[0].send("s", "t")
            await script.allow(6)
            await script.finish()
            for client in same:
                await client.ended("t")
                assert client.records == same[0].records
                assert client.offsets == list(range(1, len(client.records) + 1))


async def test_n4_a_client_that_changes_carrier_and_node_in_the_middle_of_an_answer_misses_nothing(
    make_node: MakeNode,
) -> None:
    """The same bytes, wherever and by whatever they came."""
    script = Numbers(0)
    async with ScriptedBackend(script) as backend:
        nodes = await two_nodes(make_node, backend.url)
        async with SessionClient(nodes[0].address) as stays:
            await stays.send("s", "t")
            cursor, had = (await stays.wait(lambda line: line["type"] == "turn-start"))["cursor"], []
            for step in range(12):
                node, carrier = nodes[step % 2], CARRIERS[step % 3]
                async with following(carrier, node.address, "s", after=cursor) as follower:
                    await script.allow(step + 1)
                    await has_word(follower, f"{step} ")
                    assert "resync" not in follower.attached
                    had += follower.records
                    cursor = had[-1]["cursor"]
            await script.finish()
            await stays.ended("t")
            assert stays.records[1 : 1 + len(had)] == had
            assert text_of(had, "t") == numbers(12)


async def has_lines(follower: Follower, count: int) -> None:
    await until(lambda: len(follower.lines) >= count)


async def has_word(follower: Follower, word: str) -> None:
    await until(lambda: text_of(follower.records, "t").endswith(word))


PLACES = {
    "of-another-epoch": "0123456789abcdef.3.aaaaaa",
    "of-no-epoch": "-.3.aaaaaa",
    "text": "hello",
    "empty": "",
    "negative": "{epoch}.-1.{tag}",
    "huge": "{epoch}.9223372036854775808.{tag}",
    "in-the-future": "{epoch}.1000.{tag}",
    "of-another-turn": "{epoch}.3.ffffff",
    "of-another-history": "{epoch}.3.{tag}.00000000",
    "too-long": "x" * 5000,
}


@pytest.mark.parametrize("name", PLACES)
async def test_n6_a_place_that_cannot_be_is_resync_or_refused_on_each_node(
    make_node: MakeNode, name: str
) -> None:
    """Clients are not to be trusted, and may be old; what they say renews no journal, and is never a 500."""
    async with ScriptedBackend(answers) as backend:
        nodes = await two_nodes(make_node, backend.url)
        async with SessionClient(nodes[0].address) as client:
            await client.send("s", "t")
            await client.ended("t")
            epoch, _, tag, *_ = client.records[2]["cursor"].split(".")
            journal = client.records
            place = PLACES[name].format(epoch=epoch, tag=tag)
            for node in nodes:
                async with SessionClient(node.address) as asker:
                    reply = await asker.attach("s", place)
                    if reply["type"] == "error":
                        assert (reply["code"], reply["retryable"]) == ("bad-request", False)
                    else:
                        assert reply["resync"] in {"epoch-changed", "trimmed"}
                        await asker.ended("t")
                        assert asker.records == journal
            assert await whole_journal(nodes[1].address, "s") == journal


async def test_n8_devices_that_join_at_random_times_on_all_nodes_end_with_the_same(
    make_node: MakeNode,
) -> None:
    """Before, during and after; with turns of all nodes beside each other."""
    dice = random.Random(SEED)
    script = Numbers(float("inf"), pace_seconds=0.005)
    async with ScriptedBackend(script) as backend:
        nodes = [*await two_nodes(make_node, backend.url), await make_node(backend.url, **SETTINGS)]
        addresses = [node.address for node in nodes]
        chronicle = Chronicle()
        async with AsyncExitStack() as stack:
            watchers = []

            async def join() -> None:
                address = dice.choice(addresses)
                watcher = Watcher("s", address, chronicle=chronicle)
                watchers.append(await stack.enter_async_context(watcher))

            await join()
            for number in range(12):
                if number % 2 == 0:
                    await send(dice.choice(addresses), "s", f"t{number}")
                await watchers[0].has(len(watchers[0].view) + dice.randrange(20))
                await join()
            await script.finish()
            await join()
            for watcher in watchers:
                for number in range(0, 12, 2):
                    await watcher.ended(f"t{number}")
                assert watcher.view == watchers[0].view
                assert watcher.resyncs == []


async def test_n15_hundreds_of_readers_who_do_not_read_slow_nobody_down(
    make_config: Callable[..., Any], valkey_url: str
) -> None:
    """The backend is read as fast as it writes, who reads gets all, and memory has a bound (G8, G10)."""
    readers = 200
    word = 4000
    script = Numbers(2)
    async with AsyncExitStack() as stack:
        backend = await stack.enter_async_context(ScriptedBackend(script))
        node = GatewayProcess(
            upstream=backend.url, redis_url=valkey_url, key_prefix=make_config(backend.url).key_prefix
        )
        await stack.enter_async_context(node)
        await node.started()
        watcher = await stack.enter_async_context(Watcher("s", node.address))
        await watcher.attached()
        for _ in range(readers):
            stack.enter_context(await one_who_does_not_read(node.address, "s"))
        await until(lambda: is_attached(node, readers + 1))
        before = resident_bytes(node)
        await send(node.address, "s", "t")
        await script.allow(word)
        await watcher.has_words("t", word)
        await script.finish()
        await watcher.ended("t")
        assert text_of(watcher.view, "t") == numbers(word)
        grown = resident_bytes(node) - before
        assert not faults_of(node)
    assert grown < 200 * 1024 * 1024, grown


async def is_attached(node: GatewayProcess, count: int) -> bool:
    return await metric(node.admin_address, "gateway_attached_subscribers") >= count


async def one_who_does_not_read(address: str, session: str) -> socket.socket:
    """A WebSocket that attaches and takes nothing, with as small a buffer as there is."""
    host, port = address.split(":")
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)  # noqa: FBT003 - positional only
    await loop.sock_connect(connection, (host, int(port)))
    head = (
        f"GET /gateway/v1/ws HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Protocol: session-gateway.v1\r\n\r\n"
    )
    await loop.sock_sendall(connection, head.encode())
    await loop.sock_recv(connection, 100)
    command_ = f'{{"type":"attach","id":1,"session":"{session}"}}'.encode()
    mask = b"\0\0\0\0"
    await loop.sock_sendall(connection, bytes([0x81, 0x80 | len(command_)]) + mask + command_)
    return connection


# -- connections that break at every step

STEPS: dict[str, list[bytes]] = {
    "nothing": [b""],
    "half-a-head": [b"GET /gateway/v1/ws HTTP/1.1\r\nHo"],
    "a-head-without-its-body": [
        (
            b"POST /api/chat HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            b"Content-Length: 500\r\n\r\n{{"
        )
    ],
    "an-upgrade": [b"{upgrade}"],
    "half-a-frame": [b"{upgrade}", b"\x81\xfe\x01\x00\0\0\0\0{{"],
    "an-attach": [b"{upgrade}", b"{attach}"],
    "an-event-stream": [
        b"GET /gateway/v1/sessions/s/events HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n\r\n"
    ],
    "a-poll": [
        (
            b"GET /gateway/v1/sessions/s/events?wait=30&after={cursor} HTTP/1.1\r\nHost: {host}\r\n"
            b"Accept: application/json\r\n\r\n"
        )
    ],
    "a-stream-of-the-sdk": [b"GET /api/chat/s/stream HTTP/1.1\r\nHost: {host}\r\n\r\n"],
}
UPGRADE = (
    b"GET /gateway/v1/ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Protocol: session-gateway.v1\r\n\r\n"
)
ATTACH = b'{"type":"attach","id":1,"session":"s"}'


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", ["reset", "closed", "half-closed"])
async def test_n24_a_connection_that_ends_at_any_step_leaves_nothing_behind(
    make_node: MakeNode, step: str, how: Literal["reset", "closed", "half-closed"]
) -> None:
    """No task, no subscription, no connection; the turn that it watched runs on."""
    script = Numbers(3)
    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url, heartbeat_seconds=0.2, **SETTINGS)
        async with SessionClient(node.address) as client:
            await client.send("s", "t")
            await client.wait(lambda line: line.get("data", {}).get("delta") == "2 ")
            cursor = client.records[-1]["cursor"].encode()
            await until(lambda: is_at_rest(node, client))
            before = standing(node)
            for _ in range(5):
                await break_off(node.address, STEPS[step], how, cursor)
            await until(lambda: standing(node) == before)
            await script.allow(5)
            await script.finish()
            assert (await client.ended("t"))["reason"] == "complete"


def is_at_rest(node: Node, client: SessionClient) -> bool:
    del client
    return len(node._sessions._hub._tails) == 1


def standing(node: Node) -> dict[str, Any]:
    """What a connection may leave behind."""
    hub = node._sessions._hub
    own = {"turn-", "read-", "tail-", "abort-", "was-read-", "attach-", "send-", "wait-"}
    tasks = [task.get_name() for task in asyncio.all_tasks()]
    return {
        "subscribers": {session: len(tail.subscribers) for session, tail in hub._tails.items()},
        "tasks": sorted(name for name in tasks if any(name.startswith(start) for start in own)),
        "connections": len(node._departure._connections),
    }


async def break_off(address: str, parts: list[bytes], how: str, cursor: bytes) -> None:
    loop = asyncio.get_running_loop()
    host, port = address.split(":")
    with socket.socket() as connection:
        connection.setblocking(False)  # noqa: FBT003 - positional only
        await loop.sock_connect(connection, (host, int(port)))
        for part in parts:
            data = part.replace(b"{upgrade}", UPGRADE).replace(b"{host}", address.encode())
            data = data.replace(b"{attach}", bytes([0x81, 0x80 | len(ATTACH)]) + b"\0\0\0\0" + ATTACH)
            await loop.sock_sendall(connection, data.replace(b"{cursor}", cursor).replace(b"{{", b"{"))
            is_frame = data.endswith(ATTACH)
            if is_frame or (b"\r\n\r\n" in data and b"POST" not in data and b"wait=" not in data):
                await loop.sock_recv(connection, 100)  # it has been taken
            while is_frame and b'"attached"' not in await loop.sock_recv(connection, 65_536):
                pass  # hello
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif how == "half-closed":
            connection.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(10):
                try:
                    while await loop.sock_recv(connection, 65_536):
                        pass
                except ConnectionError:
                    pass


# -- sends and cancels from many nodes at once


async def test_c2_a_send_given_to_both_nodes_at_once_two_hundred_times_is_asked_once(
    make_node: MakeNode,
) -> None:
    """Whoever retries elsewhere what was under way here pays for one answer (C1, G3)."""
    async with ScriptedBackend(answers) as backend:
        nodes = await two_nodes(make_node, backend.url)
        sends = [send(nodes[number % 2].address, "s", "t") for number in range(200)]
        replies = await asyncio.gather(*sends)
        assert {reply["type"] for reply in replies} == {"accepted"}
        assert [reply.get("duplicate", False) for reply in replies].count(False) == 1
        assert len({reply["cursor"] for reply in replies}) == 1
        other = await command(
            nodes[1].address, type="send", session="s", turn="t", body={"messages": [{"another": "body"}]}
        )
        assert (other["type"], other["code"]) == ("error", "conflict")
        assert len(backend.exchanges) == 1


async def test_c4_a_send_repeated_after_its_end_on_another_node_replays(make_node: MakeNode) -> None:
    """Also on a node that was not there when it ran."""
    async with ScriptedBackend(answers) as backend:
        nodes = await two_nodes(make_node, backend.url)
        async with SessionClient(nodes[0].address) as client:
            await client.send("s", "t", "s/t")
            await client.ended("t")
        late = await make_node(backend.url, **SETTINGS)
        async with SessionClient(late.address) as client:
            assert (await client.send("s", "t", "s/t"))["duplicate"] is True
            assert (await client.ended("t"))["reason"] == "complete"
        assert len(backend.exchanges) == 1
