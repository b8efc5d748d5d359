"""What the scenarios of ``useChat`` through the gateway share."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final, TypeVar

from gateway.core.model import SessionId
from tests.support.node_program import WAIT_SECONDS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from gateway.app import Node
    from tests.support.node import Backend, ChatClient, ChatState, Message

T = TypeVar("T")
Scenario = dict[str, Any]

GATEWAY_ID: Final = "msg-"
"""How the ids begin that the gateway gives to messages; no SDK makes such ones."""

OF_20: Final = "".join(f"tok{index} " for index in range(20))
OF_5: Final = "".join(f"tok{index} " for index in range(5))
"""Where a ``hold`` stands still."""

HELD: Final[dict[str, Scenario]] = {
    "text": {"kind": "hold"},
    "reasoning": {"kind": "reasoning", "hold": 3},
    "tool": {"kind": "tool", "hold": 3},
    "named": {"kind": "hold", "serverMessageId": True},
}
"""Answers that stand still in a text, in reasoning, in a tool's input; and one with an id of its own."""

HALF: Final[dict[str, dict[str, Any]]] = {
    "text": {"type": "text", "text": OF_5},
    "reasoning": {"type": "reasoning", "text": "think0 think1 think2 "},
    "tool": {"type": "tool-weather", "state": "input-streaming"},
    "named": {"type": "text", "text": OF_5},
}
"""The part that a page shows while they do."""


def api(node: Node, path: str = "/api/chat") -> str:
    return f"http://{node.address}{path}"


def text_of(message: Message) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def part_of(message: Message, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(part for part in message["parts"] if part["type"] == kind)
    return found


def roles_of(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


def roles(state: ChatState) -> list[str]:
    return roles_of(state["messages"])


def as_bytes(state: ChatState) -> str:
    """The messages as a page would store them: the order of keys counts."""
    return json.dumps(state["messages"])


def payloads(body: bytes) -> list[bytes]:
    """What the ``data:`` lines of an event stream hold."""
    return [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]


async def settled(client: ChatClient, *, chat: str = "main", finishes: int = 1, **wanted: Any) -> ChatState:
    """The state of a chat that waits for nothing any more."""
    return await client.wait(chat=chat, status=["ready", "error"], finishes=finishes, **wanted)


async def gone(client: ChatClient) -> None:
    """Kill a page as a reload or a crash does, and see that its connections are closed."""
    client.kill()
    async with asyncio.timeout(WAIT_SECONDS):
        await client._process.wait()


async def until(value: Callable[[], Awaitable[T]], wanted: Callable[[T], bool]) -> T:
    """Ask again until the answer is as wanted."""
    async with asyncio.timeout(WAIT_SECONDS):
        while not wanted(found := await value()):  # noqa: ASYNC110 - it is the store that is asked
            await asyncio.sleep(0)
    return found


async def ended(node: Node, *chats: str) -> None:
    """Wait until no turn of these chats runs. Reads nothing: who reads an answer's end, has been shown it."""
    for chat in chats:
        look = await until(
            lambda chat=chat: node._sessions._look(SessionId(chat)),  # type: ignore[misc]
            lambda look: not any(turn.is_running for turn in look.turns),
        )
        assert look.turns, f"{chat} had a turn"


async def nothing_to_resume(node: Node, chat: str) -> None:
    """Wait until a resume of this chat would be told that there is nothing; again without reading."""
    await until(lambda: node._sessions.newest_turn(SessionId(chat)), lambda found: found is None)


async def nobody_attached(node: Node, chat: str) -> None:
    """Wait until the gateway has noticed that all of a chat's clients are gone, and means to end no turn."""

    async def subscribers() -> int:
        tail = node._sessions._hub._tails.get(SessionId(chat))
        return 0 if tail is None else len(tail.subscribers)

    await until(subscribers, lambda count: count == 0)
    under_way = [task.get_name() for task in node._turns._tasks]
    assert not [name for name in under_way if name.startswith(("abort", "cancel"))]


async def assert_model_was_stopped(backend: Backend, key: str) -> None:
    """Whoever was told of a stop finds that the backend knew before.

    By order and not by clock: what is said to the backend after the stop was told is too late for it.
    """
    assert await backend.release(key) == 0, "its route has let go of the turn"
    (closed,) = backend.named("close", key=key)
    assert backend.named("abort", key=key)
    assert all(chunk["n"] < closed["n"] for chunk in backend.named("chunk", key=key))


async def each(chats: Iterable[str], action: Callable[[str], Awaitable[T]]) -> dict[str, T]:
    """Do the same in several chats at once."""
    names = list(chats)
    return dict(zip(names, await asyncio.gather(*map(action, names)), strict=True))


def questions(states: dict[str, ChatState]) -> dict[str, Sequence[Message]]:
    """What a reloaded page has: the history up to the question."""
    return {chat: state["messages"][:1] for chat, state in states.items()}
