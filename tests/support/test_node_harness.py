"""The Node fixtures alone, driver straight against backend: what the gateway's tests build on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, get_args

import aiohttp
import pytest
from aiohttp import web

from tests.support.node import Backend, Browser, ChatClient, Major, Message, NodeError
from tests.support.node_program import NODE_DIRECTORY

if TYPE_CHECKING:
    from pathlib import Path

    from aiohttp.test_utils import TestServer as Server
    from pytest_aiohttp.plugin import AiohttpServer

pytestmark = pytest.mark.node
majors = pytest.mark.parametrize("major", get_args(Major))
TEXT_OF_THREE = "tok0 tok1 tok2 "


def text_of(message: Message) -> str:
    return "".join(part["text"] for part in message["parts"] if part["type"] == "text")


def part_of(message: Message, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(part for part in message["parts"] if part["type"] == kind)
    return found


async def answer_of(backend: Backend, scenario: dict[str, Any]) -> list[Any]:
    """POST as a transport would, and return what the answer's ``data:`` lines held."""
    user = {"id": "u1", "role": "user", "parts": [{"type": "text", "text": json.dumps(scenario)}]}
    body = {"id": "raw", "messages": [user], "trigger": "submit-message"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{backend.url}/api/chat", json=body) as response,
    ):
        lines = (await response.text()).split("\n")
    events = [line.removeprefix("data: ") for line in lines if line]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


@majors
def test_a_client_and_its_backend_are_of_one_major(major: Major) -> None:
    """`@ai-sdk/react` brings an `ai` of its own; another major's would make every result worthless."""
    modules = NODE_DIRECTORY / "node_modules"
    nested = modules / f"react{major}" / "node_modules" / "ai"
    resolved = nested if nested.exists() else modules / "ai"
    versions = [
        json.loads((path / "package.json").read_text())["version"]
        for path in (resolved, modules / f"ai{major}")
    ]
    assert versions[0] == versions[1]
    assert versions[0].startswith(f"{major}.")


def test_the_lock_names_no_registry() -> None:
    """Whoever installs uses the registry of their own configuration."""
    assert '"resolved"' not in (NODE_DIRECTORY / "package-lock.json").read_text()


@majors
async def test_the_backend_names_no_message_unless_told_to(major: Major) -> None:
    """Most backends send `start` without `messageId`: that is what the gateway has to mend."""
    async with Backend(major) as backend:
        bare = await answer_of(backend, {"chunks": 1})
        named = await answer_of(backend, {"chunks": 1, "serverMessageId": "answer-1"})
    assert (bare[0], bare[-1]) == ({"type": "start"}, "[DONE]")
    assert named[0] == {"type": "start", "messageId": "answer-1"}


@majors
async def test_a_page_shows_what_the_model_said(major: Major) -> None:
    """The ground of everything else: text and reasoning arrive whole, in order, in one message."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "reasoning", "chunks": 3})
        state = await client.wait(status="ready", minMessages=2)
        request = await backend.wait_event("request", id="c1")
        await backend.wait_event("end", id="c1")
    assert [message["role"] for message in state["messages"]] == ["user", "assistant"]
    assert part_of(state["messages"][1], "reasoning")["text"] == "think0 think1 think2 "
    assert text_of(state["messages"][1]) == TEXT_OF_THREE
    assert state["finishes"][0]["isError"] is False
    assert request["body"]["trigger"] == "submit-message"
    assert request["headers"]["content-type"] == "application/json"


@majors
async def test_a_held_model_says_exactly_what_it_is_let(major: Major) -> None:
    """Tests steer a turn by its chunks and never by sleeping."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "hold", "key": "k1", "hold": 2, "chunks": 5})
        held = await backend.wait_event("hold", key="k1")
        partial = await client.wait(text="tok0 tok1 ")
        assert held["deltas"] == 2
        assert partial["status"] == "streaming"
        assert await backend.release("k1", 1) == 1
        again = await backend.wait_event("hold", after=held["n"], key="k1")
        assert (again["deltas"], text_of((await client.wait(text="tok2"))["messages"][1])) == (
            3,
            TEXT_OF_THREE,
        )
        await backend.release("k1")
        whole = await client.wait(status="ready")
        said = [event["delta"] for event in backend.named("chunk", key="k1") if "delta" in event]
    assert text_of(whole["messages"][1]) == TEXT_OF_THREE + "tok3 tok4 "
    assert said == [0, 1, 2, 3, 4]
    assert [event["n"] for event in backend.events] == list(range(1, len(backend.events) + 1))


@majors
async def test_a_release_before_its_send_is_kept(major: Major) -> None:
    """A test need not wait for the request before it lets the answer go."""
    async with Backend(major) as backend:
        assert await backend.release("k1") == 0
        answer = await answer_of(backend, {"kind": "hold", "key": "k1"})
    assert answer[-1] == "[DONE]"


@majors
async def test_a_slow_backend_answers_when_told(major: Major) -> None:
    """The gateway's early open and header timeout need a backend that has not begun to answer."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "slow", "chunks": 3})
        await backend.wait_event("request", id="c1")
        assert (await client.state())["status"] == "submitted"
        assert await backend.answer("c1") == 1
        assert text_of((await client.wait(status="ready"))["messages"][1]) == TEXT_OF_THREE


@majors
async def test_stop_reaches_a_model_whose_route_listens(major: Major) -> None:
    """The chain that a cancel through the gateway relies on: connection, route, signal, model."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "hold", "key": "k1"})
        await client.wait(text="tok4")
        await client.stop()
        closed = await backend.wait_event("close", key="k1")
        await backend.wait_event("abort", key="k1")
        state = await client.wait(status="ready", finishes=1)
        assert await backend.release("k1") == 0
        assert backend.named("chunk", key="k1")[-1]["n"] < closed["n"]
    assert state["finishes"][0]["isAbort"] is True


@majors
async def test_a_route_that_consumes_its_stream_ignores_a_closed_connection(major: Major) -> None:
    """Such backends exist: their model runs to the end whatever the clients do."""
    scenario = {"kind": "hold", "key": "k1", "plumb": False, "consume": True}
    async with Backend(major) as backend:
        async with ChatClient(major) as client:
            await client.mount(f"{backend.url}/api/chat", "c1")
            await client.send(scenario)
            await client.wait(text="tok4")
            client.kill()
        await backend.wait_event("close", key="k1")
        assert await backend.release("k1") == 1
        await backend.wait_event("chunk", key="k1", type="finish")
        assert not backend.named("abort")


@majors
async def test_the_stop_url_reaches_a_model_whose_route_ignores_a_closed_connection(major: Major) -> None:
    """The backends that `GATEWAY_UPSTREAM_STOP` is for, in the shape of the SDK's documentation."""
    async with Backend(major) as backend:
        async with ChatClient(major) as client:
            await client.mount(f"{backend.url}/api/chat", "c1")
            await client.send({"kind": "hold", "plumb": False})
            await client.wait(text="tok4")
            client.kill()
        await backend.wait_event("close", id="c1")
        assert not backend.named("abort")
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{backend.url}/api/chat/c1/stop") as answer,
        ):
            assert await answer.json() == {"success": True}
        await backend.wait_event("abort", id="c1")


@majors
async def test_a_killed_page_is_a_closed_connection(major: Major) -> None:
    """A reload runs no React cleanup: the backend sees its socket go and nothing else."""
    async with Backend(major) as backend:
        async with ChatClient(major) as client:
            await client.mount(f"{backend.url}/api/chat", "c1")
            await client.send({"kind": "hold"})
            await client.wait(text="tok4")
            client.kill()
            await backend.wait_event("close", id="c1")
        assert not backend.named("stop")


@majors
async def test_a_server_tool_runs_between_two_steps(major: Major) -> None:
    """Replays have to carry tool input, output and the second step's text, whose ids repeat."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "tool", "chunks": 3})
        answer = (await client.wait(status="ready", finishes=1))["messages"][1]
        assert len(backend.named("tool")) == 1
    assert part_of(answer, "tool-weather")["output"] == {"done": 'Zürich "x" 😀'}
    assert text_of(answer) == "before " + TEXT_OF_THREE


@majors
async def test_a_client_tool_is_answered_by_a_second_send(major: Major) -> None:
    """There is no tool result request: the continuation is a POST whose last message is the assistant's."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1", answerTools={"askUser": {"answer": 42}})
        await client.send({"kind": "clienttool", "chunks": 3})
        state = await client.wait(status="ready", finishes=2)
        sent = [event["body"] for event in backend.named("request")]
    answer = state["messages"][1]
    assert len(state["messages"]) == 2
    assert [body["messages"][-1]["role"] for body in sent] == ["user", "assistant"]
    assert sent[1]["messageId"] == answer["id"]
    assert part_of(answer, "tool-askUser")["output"] == {"answer": 42}
    assert text_of(answer) == "before " + TEXT_OF_THREE


@majors
async def test_a_tool_can_be_answered_by_hand(major: Major) -> None:
    """A second device may be the one that answers: the test decides which."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "clienttool", "chunks": 3})
        call = (await client.wait(status="ready", toolCalls=1))["toolCalls"][0]
        await client.add_tool_output(call["toolName"], call["toolCallId"], "by hand")
        answer = (await client.wait(status="ready", finishes=2))["messages"][1]
    assert part_of(answer, "tool-askUser")["output"] == "by hand"


@pytest.mark.parametrize("major", [6, 7])
async def test_an_approved_tool_runs_in_the_continuation(major: Major) -> None:
    """An approval is a turn of its own, which a resume must not break (it does in stock setups)."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "approval", "chunks": 3})
        asked = await client.wait(status="ready", part={"state": "approval-requested"})
        assert not backend.named("tool")
        await client.approve(part_of(asked["messages"][1], "tool-deleteFile")["approval"]["id"])
        answer = (await client.wait(status="ready", finishes=2))["messages"][1]
        assert len(backend.named("tool")) == 1
    assert part_of(answer, "tool-deleteFile")["state"] == "output-available"
    assert text_of(answer) == "before " + TEXT_OF_THREE


@majors
async def test_data_parts_come_transient_replaced_and_before_the_start(major: Major) -> None:
    """A chunk before `start` and one that is never stored are both legal, and easily lost."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "data", "chunks": 3})
        state = await client.wait(status="ready", finishes=1)
        await client.mount(f"{backend.url}/api/chat", "c2", chat="bare")
        await client.send({"kind": "databefore", "chunks": 3}, chat="bare")
        bare = await client.wait(status="ready", finishes=1, chat="bare")
    assert [part["type"] for part in state["data"]] == ["data-status", "data-doc", "data-doc"]
    # The SDK keeps an orphan: what came before `start` stays under the id that `start` then changes.
    _, orphan, answer = state["messages"]
    assert orphan["parts"] == [{"type": "data-doc", "id": "doc1", "data": {"version": 2}}]
    # Where `start` names no message there is none.
    assert bare["data"] == state["data"]
    assert bare["messages"][1]["parts"] == answer["parts"]
    assert (len(bare["messages"]), text_of(answer)) == (2, TEXT_OF_THREE)


@majors
async def test_text_of_every_kind_arrives_as_it_was_said(major: Major) -> None:
    """Surrogates split across deltas, line separators, controls: what byte for byte is about."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "unicode"})
        answer = text_of((await client.wait(status="ready", finishes=1))["messages"][1])
    assert answer.startswith("Zürich 😀 \u2028\u2029 \r\n\ndata: no event\n\n\0\x1fe\u0301 ")
    assert answer.endswith("漢字")


@majors
async def test_a_long_answer_arrives_whole(major: Major) -> None:
    """The 2,000 chunks that the resume tests cut into pieces."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send({"kind": "long"})
        answer = text_of((await client.wait(status="ready", finishes=1))["messages"][1])
    assert answer == "".join(f"tok{index} " for index in range(2000))


@majors
async def test_a_model_that_throws_mid_stream_ends_its_answer_without_a_word(major: Major) -> None:
    """The silent truncation that the gateway must tell as an error: a clean end, no finish, no [DONE]."""
    async with Backend(major) as backend:
        broken = await answer_of(backend, {"kind": "error", "chunks": 2})
        told = await answer_of(backend, {"kind": "errorpart", "chunks": 1})
        at_once = await answer_of(backend, {"kind": "errorbefore"})
        after = await answer_of(backend, {"chunks": 1})
    assert broken[-1] == {"type": "text-delta", "id": "t1", "delta": "tok0 "}
    assert {"type": "error", "errorText": "An error occurred."} in told
    assert at_once[1]["type"] == "error"
    assert after[-1] == "[DONE]"


@majors
async def test_a_refusal_and_a_cut_connection_are_errors_of_the_page(major: Major) -> None:
    """What a page makes of them without a gateway, to compare with."""
    refuse = {"kind": "refuse", "status": 429, "headers": {"retry-after": "3"}, "body": "slow down"}
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        await client.send(refuse)
        refused = await client.wait(status="error", errors=1)
        await client.send({"kind": "hold"})
        await client.wait(text="tok4")
        assert await backend.cut("c1") == 1
        cut = await client.wait(status="error", errors=2)
        await client.send({"kind": "hold"})
        await client.wait(text="tok4", minMessages=4)
        assert await client.cut() >= 1
        await client.wait(status="error", errors=3)
    assert refused["errors"][0]["message"] == "slow down"
    assert text_of(cut["messages"][-1]) == "tok0 tok1 tok2 tok3 tok4 "


@majors
async def test_resume_asks_for_the_stream_of_the_chat(major: Major) -> None:
    """The backend alone has none and says 404, which is an error of the page; the gateway will answer."""
    async with Backend(major) as backend, ChatClient(major) as client:
        await client.mount(f"{backend.url}/api/chat", "c1", resume=True)
        asked = await backend.wait_event("other")
        state = await client.wait(errors=1)
    assert (asked["method"], asked["url"]) == ("GET", "/api/chat/c1/stream")
    assert "not found" in state["errors"][0]["message"]


@majors
async def test_a_page_can_hold_several_chats_and_regenerate(major: Major) -> None:
    """Two panes of one page share its connections; a regenerate is a send with another trigger."""
    async with Backend(major) as backend, ChatClient(major) as client:
        for chat in ("left", "right"):
            await client.mount(f"{backend.url}/api/chat", chat, chat=chat, headers={"x-chat": chat})
            await client.send({"chunks": 3}, chat=chat)
            await client.wait(status="ready", minMessages=2, chat=chat)
        await client.regenerate(chat="right")
        again = await client.wait(status="ready", finishes=2, chat="right")
        sent = [(e["id"], e["headers"]["x-chat"], e["body"]["trigger"]) for e in backend.named("request")]
        await client.unmount(chat="left")
        with pytest.raises(NodeError, match="mount it first"):
            await client.state(chat="left")
    assert text_of(again["messages"][-1]) == TEXT_OF_THREE
    assert sent == [
        ("left", "left", "submit-message"),
        ("right", "right", "submit-message"),
        ("right", "right", "regenerate-message"),
    ]


async def websocket_server(aiohttp_server: AiohttpServer, frames: list[dict[str, Any]]) -> Server:
    """A server of one canned answer on the wire of `WebSocketChatTransport`; notes the client's frames."""

    async def serve(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            frame = json.loads(message.data)
            frames.append(frame)
            named = {"requestId": frame.get("requestId")}
            if frame["type"] == "resume":
                await socket.send_json({"type": "no-active", **named})
            if frame["type"] != "send":
                continue
            chunks = [{"type": "start", "messageId": "m1"}, {"type": "text-start", "id": "t1"}]
            chunks += [{"type": "text-delta", "id": "t1", "delta": "hi"}, {"type": "text-end", "id": "t1"}]
            for sequence, chunk in enumerate([*chunks, {"type": "finish"}]):
                await socket.send_json({"type": "chunk", **named, "sequence": sequence, "chunk": chunk})
            await socket.send_json({"type": "end", **named})
        return socket

    app = web.Application()
    app.router.add_get("/api/chat", serve)
    return await aiohttp_server(app)


async def test_the_stock_websocket_transport_speaks_its_wire(aiohttp_server: AiohttpServer) -> None:
    """The gateway is the server that this transport has none of: the driver must be able to use it."""
    frames: list[dict[str, Any]] = []
    server = await websocket_server(aiohttp_server, frames)
    async with ChatClient(7) as client:
        await client.mount(str(server.make_url("/api/chat")), "c1", transport="websocket", resume=True)
        await client.send("hello")
        state = await client.wait(status="ready", finishes=1)
    assert (text_of(state["messages"][1]), state["messages"][1]["id"]) == ("hi", "m1")
    assert [frame["type"] for frame in frames] == ["resume", "send"]
    assert frames[1]["messages"][0]["parts"] == [{"type": "text", "text": "hello"}]


async def test_a_program_that_ended_says_so_with_its_complaints() -> None:
    """A crash in Node must not look like a timeout in Python."""
    async with ChatClient(7) as client:
        with pytest.raises(NodeError, match="unable to do nonsense"):
            await client.do("nonsense")
        client.kill()
        with pytest.raises(NodeError, match="has ended"):
            await client.do("state")
    with pytest.raises(NodeError, match="Cannot find package 'ai8'"):
        async with Backend(8):  # type: ignore[arg-type]  # no such major: what a broken install looks like
            pass


async def test_a_wait_that_fails_tells_what_it_saw() -> None:
    """A red test has to be readable without running it again."""
    async with Backend(7) as backend, ChatClient(7) as client:
        await client.mount(f"{backend.url}/api/chat", "c1")
        with pytest.raises(NodeError, match=r'unable to see \{"status":"error"\}; saw \{"status":"ready"'):
            await client.wait(status="error", seconds=0.05)
        with pytest.raises(TimeoutError) as seen:
            await backend.wait_event("close", seconds=0.05)
    assert "the last events were [{'event': 'listening'" in seen.value.__notes__[0]


@pytest.mark.browser
async def test_chromium_shows_sends_stops_and_reloads(tmp_path: Path) -> None:
    """The page that the main path is proven with, in a browser that people use."""
    async with Backend(7) as backend, Browser() as browser:
        await browser.open(f"{backend.url}/?chat=c1&resume=false")
        await browser.fill("input", {"chunks": 3})
        await browser.click("send")
        await browser.wait_text("message-1", TEXT_OF_THREE, exactly=True)
        await browser.wait_text("status", "ready")
        await browser.fill("input", {"kind": "hold", "key": "k1"})
        await browser.click("send")
        await browser.wait_text("message-3", "tok4")
        assert await browser.text("status") == "streaming"
        await browser.click("stop")
        await backend.wait_event("stop", id="c1")
        await browser.wait_text("status", "ready")
        before = await browser.messages()
        await backend.wait_event("abort", key="k1")
        await browser.reload()
        await browser.open(f"{backend.url}/?chat=c1&resume=false", page="tablet", context="tablet")
        await browser.wait_text("message-1", TEXT_OF_THREE, page="tablet")
        await browser.wait_text("message-1", TEXT_OF_THREE)
        assert (await browser.messages())[:2] == before[:2]
        await browser.screenshot(tmp_path / "page.png")
        assert await browser.page_errors() == []
    assert (tmp_path / "page.png").stat().st_size > 1000
