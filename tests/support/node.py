"""Real AI SDK backends, `useChat` clients and a Chromium for the tests (``tests/node/README.md``)."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict

from tests.support.node_program import WAIT_SECONDS, NodeError, NodeProgram, chromium_binary

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Backend", "Browser", "ChatClient", "ChatState", "Event", "Major", "Message", "NodeError"]

Major = Literal[5, 6, 7]
Event = dict[str, Any]
"""A happening in a backend: ``event``, ``n`` (1, 2, 3 ...), ``at`` (epoch ms) and what belongs to it."""
Message = dict[str, Any]


class ChatState(TypedDict):
    """What a page sees of its chat, and what its callbacks were called with so far."""

    status: str
    messages: list[Message]
    finishes: list[dict[str, Any]]
    errors: list[dict[str, Any]]
    data: list[dict[str, Any]]
    toolCalls: list[dict[str, Any]]
    statuses: list[str]
    error: Any
    connection: Any
    """From here on of the gateway's transport only: ``state``, ``carrier``, ``error``."""
    connections: list[dict[str, Any]]
    """All that ``connection`` has been, the newest last."""
    lastTurnEnd: Any
    """What the hook of the gateway gives: ``turn``, ``reason``, ``by``, ``error``."""
    ends: list[dict[str, Any]]
    """The ends of all turns of the chat that the transport has told, in order."""
    position: Any
    """``offset`` and ``last``."""
    client: str
    transports: int
    """How many were made for it, with ``inline`` one with each rendering."""
    connected: int
    """How many of them have been used."""


class Backend(NodeProgram):
    """A backend with the real ``ai`` package of a major; scenarios are in ``tests/node/README.md``."""

    def __init__(self, major: Major) -> None:
        super().__init__("backend.mjs", str(major))
        self.events: list[Event] = []
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        try:
            port = (await self.wait_event("listening"))["port"]
        except BaseException:
            await self.__aexit__()
            raise
        self.url = f"http://127.0.0.1:{port}"
        return self

    async def _happened(self, event: Event | None) -> None:
        async with self._changed:
            if event is not None:
                self.events.append(event)
            self._changed.notify_all()

    async def wait_event(
        self,
        wanted: str | Callable[[Event], bool],
        *,
        after: int = 0,
        seconds: float = WAIT_SECONDS,
        **facts: Any,
    ) -> Event:
        """Return the first event after number ``after`` that is wanted, now or when it happens.

        Args:
            wanted: An event's name, or a test of one.
            after: The ``n`` of the last event that does not count.
            seconds: Then it is a TimeoutError, with the last events noted on it.
            facts: What the event must hold as well, e.g. ``key="k1"``.
        """
        matches = wanted if callable(wanted) else lambda event: event["event"] == wanted
        try:
            async with asyncio.timeout(seconds), self._changed:
                while True:
                    for event in self.events[after:]:
                        if matches(event) and facts.items() <= event.items():
                            return event
                    after = max(after, len(self.events))
                    if self._ended:
                        raise self._gone(f"see {wanted}")
                    await self._changed.wait()
        except TimeoutError as error:
            error.add_note(f"unable to see {wanted} {facts}; the last events were {self.events[-5:]}")
            raise

    def named(self, name: str, **facts: Any) -> list[Event]:
        """Return the events of a name so far, those that hold the facts."""
        return [event for event in self.events if event["event"] == name and facts.items() <= event.items()]

    async def release(self, key: str, count: int | None = None) -> int:
        """Let the model say ``count`` more deltas, or all, in the turns of a key; return how many heard.

        With no such turn yet it is kept for the next one.
        """
        return int(await self.do("release", key=key, count=count))

    async def answer(self, key: str) -> int:
        """Let a ``holdAnswer`` turn begin its response."""
        return int(await self.do("answer", key=key))

    async def fail(self, key: str, message: str | None = None) -> int:
        """Have the model of a held turn throw."""
        return int(await self.do("fail", key=key, message=message))

    async def cut(self, key: str) -> int:
        """Destroy the sockets of a key's responses, mid-stream."""
        return int(await self.do("cut", key=key))


class ChatClient(NodeProgram):
    """A page with the real ``useChat`` of a major. ``chat`` names one of several mounted in the same page."""

    def __init__(self, major: Major) -> None:
        super().__init__("client.mjs", str(major))
        self.major: Final = major

    async def mount(
        self,
        api: str,
        chat_id: str,
        *,
        chat: str = "main",
        transport: Literal["http", "websocket", "gateway"] = "http",
        resume: bool = False,
        messages: Sequence[Message] = (),
        **options: Any,
    ) -> ChatState:
        """Render a component with ``useChat`` and return its first state.

        Args:
            api: The URL of the chat route, absolute; of ``gateway`` only its origin is used.
            chat_id: The chat's id.
            chat: A name for it in the calls below.
            transport: The stock one to use (``websocket`` needs major 7), or this project's.
            resume: As in ``useChat``.
            messages: The history that the page starts with.
            options: ``headers``, ``body`` (of the transport), ``external`` (a ``Chat`` of its own, which v7
                does not stop at unmount), ``answerTools`` (tool name to output), ``autoSend`` (default true),
                ``messageOnly`` (send ``{id, message}`` instead of the history), ``strict`` (in React's
                ``StrictMode``), ``hook``: ``useChat``, ``useGatewayChat`` (the default with ``gateway``) or
                ``observe`` (no hook: a bare ``Chat`` that is observed).
                With ``gateway``: ``url``, ``carriers``, ``timing``, ``onAbort``, ``client``, ``overlap``,
                ``credentials``, ``path`` (its ``api``), ``resolvable`` (what belongs to a send is given as
                functions), ``prepared`` (what ``prepareSendMessagesRequest`` gives back beside the body of
                ``messageOnly``), ``transportName`` (all chats of the page that say the same share it),
                ``inline`` (a new one is made with each rendering).
        """
        facts = {
            "chatId": chat_id,
            "transport": transport,
            "resume": resume,
            "messages": list(messages),
            **options,
        }
        return self._state(await self.do("mount", chat=chat, api=api, **facts))

    async def send(self, text: str | dict[str, Any], *, chat: str = "main", **options: Any) -> None:
        """Send a user message, or a scenario as JSON; options: ``messageId``, ``headers``, ``body``."""
        said = text if isinstance(text, str) else json.dumps(text)
        await self.do("send", chat=chat, text=said, **options)

    async def state(self, *, chat: str = "main") -> ChatState:
        return self._state(await self.do("state", chat=chat))

    async def wait(
        self,
        *,
        chat: str = "main",
        seconds: float = WAIT_SECONDS,
        **wanted: Any,
    ) -> ChatState:
        """Return the state as soon as it meets all conditions.

        ``status`` (or several), ``minMessages``, of the last message ``role``, ``text`` (held) and ``part``
        (some part has these fields), of any message ``anyText``; at least so many ``finishes``, ``errors``,
        ``data``, ``toolCalls``, ``ends``; ``connection`` (its state, or one of several) and ``carrier``.
        """
        reply = await self.do("wait", seconds=seconds + 5, chat=chat, timeoutSeconds=seconds, **wanted)
        return self._state(reply)

    async def stop(self, *, chat: str = "main") -> None:
        """Call the hook's ``stop()``, as a Stop button does, and wait until it resolved."""
        await self.do("stop", chat=chat)

    async def cancel(
        self, chat_id: str, *, turn: str | None = None, chat: str = "main"
    ) -> list[dict[str, Any]]:
        """Call the gateway transport's ``cancel``; return what became of each turn."""
        return list(await self.do("cancel", chat=chat, chatId=chat_id, turn=turn))

    async def regenerate(self, *, chat: str = "main", **options: Any) -> None:
        await self.do("regenerate", chat=chat, **options)

    async def resume_stream(self, *, chat: str = "main") -> None:
        await self.do("resumeStream", chat=chat)

    async def add_tool_output(self, tool: str, tool_call_id: str, output: Any, *, chat: str = "main") -> None:
        await self.do("addToolOutput", chat=chat, tool=tool, toolCallId=tool_call_id, output=output)

    async def approve(self, approval_id: str, *, approved: bool = True, chat: str = "main") -> None:
        await self.do("approve", chat=chat, approvalId=approval_id, approved=approved)

    async def clear_error(self, *, chat: str = "main") -> None:
        await self.do("clearError", chat=chat)

    async def set_messages(self, messages: Sequence[Message], *, chat: str = "main") -> None:
        await self.do("setMessages", chat=chat, messages=list(messages))

    async def unmount(self, *, chat: str = "main") -> None:
        await self.do("unmount", chat=chat)

    async def remount(self, *, chat: str = "main", messages: Sequence[Message] = ()) -> ChatState:
        """Unmount the component and mount it again, with this history; its transport lives on."""
        return self._state(await self.do("remount", chat=chat, messages=list(messages)))

    async def reconnect(self, *, chat: str = "main") -> None:
        await self.do("reconnect", chat=chat)

    async def close_transport(self, *, chat: str = "main") -> None:
        await self.do("closeTransport", chat=chat)

    async def set_online(self, *, online: bool) -> None:
        """Tell the page that its network is gone, or back: ``navigator.onLine`` and the event."""
        await self.do("setOnline", online=online)

    async def wake(
        self, event: Literal["visibilitychange", "pageshow", "online"] = "visibilitychange"
    ) -> None:
        """Tell the page that it is in front again."""
        await self.do("wake", event=event)

    async def cut(self) -> int:
        """Destroy the page's connections and return how many; React lives on."""
        return int(await self.do("cut"))

    @staticmethod
    def _state(reply: Any) -> ChatState:
        state: ChatState = reply
        return state


class Browser(NodeProgram):
    """A Chromium. ``page`` names a tab; ``context`` names a device, with cookies of its own."""

    def __init__(self) -> None:
        super().__init__("browser.mjs", chromium_binary())

    async def open(self, url: str, *, page: str = "main", context: str = "main") -> None:
        await self.do("open", url=url, page=page, context=context)

    async def fill(self, test_id: str, text: str | dict[str, Any], *, page: str = "main") -> None:
        said = text if isinstance(text, str) else json.dumps(text)
        await self.do("fill", testId=test_id, text=said, page=page)

    async def click(self, test_id: str, *, page: str = "main") -> None:
        await self.do("click", testId=test_id, page=page)

    async def text(self, test_id: str, *, page: str = "main") -> str:
        return str(await self.do("text", testId=test_id, page=page))

    async def wait_text(
        self,
        test_id: str,
        text: str,
        *,
        page: str = "main",
        exactly: bool = False,
        seconds: float = WAIT_SECONDS,
    ) -> str:
        """Return an element's text as soon as it holds ``text``, or is exactly it."""
        facts = {"testId": test_id, "text": text, "exactly": exactly, "timeoutSeconds": seconds}
        return str(await self.do("waitText", seconds=seconds + 5, page=page, **facts))

    async def messages(self, *, page: str = "main") -> list[Message]:
        """Return all messages of the page's ``useChat`` (``tests/node/page``)."""
        return list(await self.do("messages", page=page))

    async def evaluate(self, expression: str, *, page: str = "main") -> Any:
        return await self.do("evaluate", expression=expression, page=page)

    async def reload(self, *, page: str = "main") -> None:
        await self.do("reload", page=page)

    async def screenshot(self, path: Path, *, page: str = "main") -> None:
        await self.do("screenshot", path=str(path), page=page)

    async def offline(self, *, offline: bool, context: str = "main") -> None:
        await self.do("offline", offline=offline, context=context)

    async def page_errors(self, *, page: str = "main") -> list[str]:
        """Return uncaught errors and console errors of the page so far."""
        return list(await self.do("complaints", page=page))

    async def close(self, *, page: str = "main") -> None:
        await self.do("close", page=page)
