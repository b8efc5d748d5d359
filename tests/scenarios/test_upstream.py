"""What a backend can do wrong: each told truthfully, with the right status, and nobody else harmed."""

# ruff: noqa: E501 - the table of cases reads as a table

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.backend import AI_HEADERS, SSE_HEADERS, Exchange, ScriptedBackend
from tests.support.client import SessionClient
from tests.support.wires import HttpChat, SdkClient, eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

START = {"type": "start", "messageId": "m1"}
DELTA = {"type": "text-delta", "id": "t1", "delta": "x"}
FINISH = {"type": "finish"}


async def answers(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.text("one", "two")


def asked(exchange: Exchange) -> str:
    text: str = exchange.json["messages"][0]["parts"][0]["text"]
    return text


# -- answers that are no stream


def refusing(
    status: str, headers: dict[str, str] | None = None, body: bytes = b"no"
) -> Callable[[Exchange], Awaitable[None]]:
    async def script(exchange: Exchange) -> None:
        await exchange.head(status, {"Content-Type": "text/plain", **(headers or {})})
        await exchange.raw(body)
        await exchange.end()

    return script


async def no_content(exchange: Exchange) -> None:
    await exchange.head("204 No Content", {}, chunked=False)


async def resets_at_once(exchange: Exchange) -> None:
    exchange.drop()


async def says_nothing(exchange: Exchange) -> None:
    await exchange.closed()


async def megabyte_of_headers(exchange: Exchange) -> None:
    await exchange.head(headers={f"X-{number}": "y" * 4000 for number in range(256)})
    await exchange.text("one")


async def one_long_header(exchange: Exchange) -> None:
    await exchange.head(headers={**AI_HEADERS, "X": "y" * 1024 * 1024})
    await exchange.text("one")


async def no_http(exchange: Exchange) -> None:
    exchange.writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    await exchange.writer.drain()
    await exchange.closed()


# -- streams that go wrong


def streaming(
    *writes: bytes | dict[str, Any] | str, headers: dict[str, str] | None = None, then: str = "end"
) -> Callable[[Exchange], Awaitable[None]]:
    async def script(exchange: Exchange) -> None:
        await exchange.head(headers=headers or AI_HEADERS)
        for write in writes:
            if isinstance(write, bytes):
                await exchange.raw(write)
            else:
                await exchange.say(write)
        match then:
            case "end":
                await exchange.end()
            case "reset":
                await exchange.release.wait()
                exchange.drop()
            case "silence":
                await exchange.closed()
            case _:
                raise ValueError(then)

    return script


async def fifty_megabytes(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.say(START)
    await exchange.raw(b'data: {"type":"text-delta","id":"t1","delta":"')
    for _ in range(50):
        await exchange.raw(b"x" * 1024 * 1024)
    await exchange.raw(b'"}\n\n')
    await exchange.text(start=False)


async def endless_line_of_comment(exchange: Exchange) -> None:
    await exchange.head()
    await exchange.say(START)
    await exchange.raw(b":")
    for _ in range(50):
        await exchange.raw(b"x" * 1024 * 1024)


async def without_length(exchange: Exchange) -> None:
    """As Node writes with ``Connection: close`` to an HTTP/1.0 peer: the end is the connection's."""
    await exchange.head(headers={**AI_HEADERS, "Connection": "close"}, chunked=False)
    await exchange.text("one", "two")
    exchange.writer.close()


async def instantly(exchange: Exchange) -> None:
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in (START, DELTA, FINISH))
    body += b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    exchange.writer.write(head + body)
    await exchange.writer.drain()


def compressed(encoding: str, *, cut: bool = False) -> Callable[[Exchange], Awaitable[None]]:
    text = (
        b"".join(b"data: " + json.dumps(c).encode() + b"\n\n" for c in (START, DELTA, FINISH))
        + b"data: [DONE]\n\n"
    )
    body = gzip.compress(text) if encoding == "gzip" else zlib.compress(text)
    headers = {**AI_HEADERS, "Content-Encoding": encoding}
    pieces = [body[index : index + 7] for index in range(0, len(body), 7)]
    return streaming(*(pieces[:4] if cut else pieces), headers=headers)


@dataclass
class Case:
    """What the backend does, and what it must look like from outside."""

    script: Callable[[Exchange], Awaitable[None]]
    reason: str = "error"
    code: str | None = None
    status: int = 200
    whole: bool = True
    tells: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)


ANYWHERE = {"upstream_idle_timeout_seconds": 0.5}
ERROR_CHUNK = {"type": "error", "errorText": "boom"}
CASES = {
    "302": Case(refusing("302 Found", {"Location": "/login"}), code="upstream-refused", status=302,
                error={"status": 302, "message": "no"}),
    "401": Case(refusing("401 Unauthorized"), code="upstream-refused", status=401, error={"status": 401}),
    "429": Case(refusing("429 Too Many", {"Retry-After": "7"}, b"slow down"), code="upstream-refused", status=429,
                error={"status": 429, "retryAfter": 7.0, "message": "slow down"}),
    "429-date": Case(refusing("429 Too Many", {"Retry-After": "Fri, 31 Dec 2049 23:59:59 GMT"}),
                     code="upstream-refused", status=429, error={"status": 429}),
    "429-gzip": Case(refusing("429 Too Many", {"Content-Encoding": "gzip"}, gzip.compress(b"slow down")),
                     code="upstream-refused", status=429, error={"status": 429, "message": "slow down"}),
    "500-html": Case(refusing("500 Oops", {"Content-Type": "text/html"}, b"<h1>Oops</h1>" * 1000),
                     code="upstream-refused", status=500,
                     error={"status": 500, "message": ("<h1>Oops</h1>" * 1000)[:4096]}),
    "500-empty": Case(refusing("500 Oops", body=b""), code="upstream-refused", status=500,
                      error={"status": 500, "message": "the backend answered 500 Oops"}),
    "200-json": Case(refusing("200 OK", {"Content-Type": "application/json"}, b'{"text":"hi"}'),
                     code="upstream-not-sse", error={"status": 200}),
    "200-text": Case(refusing("200 OK", {"Content-Type": "text/plain; charset=utf-8"}, b"hi"),
                     code="upstream-not-sse", error={"status": 200}),
    "201-sse": Case(refusing("201 Created", {"Content-Type": "text/event-stream"}, b"data: x\n\n"),
                    code="upstream-not-sse", status=201, error={"status": 201}),
    "204": Case(no_content, code="upstream-not-sse", status=204, error={"status": 204}),
    "reset-at-once": Case(resets_at_once, code="upstream-cut-off", status=502),
    "no-http": Case(no_http, code="upstream-cut-off", status=502),
    "header-timeout": Case(says_nothing, code="upstream-timeout", status=504,
                           settings={"upstream_header_timeout_seconds": 0.5}),
    "megabyte-of-headers": Case(megabyte_of_headers, code="upstream-cut-off", status=502),
    "one-long-header": Case(one_long_header, code="upstream-cut-off", status=502),
    "br": Case(streaming(b"\x0b\x02\x80", headers={**AI_HEADERS, "Content-Encoding": "br"}),
               code="upstream-not-sse", status=502),
    "gzip": Case(compressed("gzip"), reason="complete", tells=FINISH),
    "deflate": Case(compressed("deflate"), reason="complete", tells=FINISH),
    "gzip-cut": Case(compressed("gzip", cut=True), code="upstream-cut-off", tells="error"),
    "gzip-bad": Case(streaming(b"nonsense", headers={**AI_HEADERS, "Content-Encoding": "gzip"}),
                     code="upstream-cut-off", tells="error"),
    "fifty-megabytes": Case(fifty_megabytes, code="event-too-large", tells="error"),
    "endless-comment": Case(endless_line_of_comment, code="event-too-large", tells="error"),
    "half-a-chunk-then-reset": Case(streaming(START, b'data: {"type":"te', then="reset"),
                                    code="upstream-cut-off", tells="error"),
    "reset": Case(streaming(START, DELTA, then="reset"), code="upstream-cut-off", tells="error"),
    "clean-end-without-finish": Case(streaming(START, DELTA), code="upstream-cut-off", tells="error"),
    "half-an-event-then-end": Case(streaming(START, b"data: {"), code="upstream-cut-off", tells="error"),
    "nothing-at-all": Case(streaming(), code="upstream-cut-off", tells="error"),
    "idle": Case(streaming(START, DELTA, then="silence"), code="upstream-timeout", tells="error", settings=ANYWHERE),
    "error-chunk": Case(streaming(START, ERROR_CHUNK, "[DONE]"), code="upstream-error", tells=ERROR_CHUNK,
                        error={"message": "boom"}),
    "error-then-finish": Case(streaming(START, ERROR_CHUNK, FINISH, "[DONE]"), code="upstream-error", tells=FINISH),
    "error-then-reset": Case(streaming(START, ERROR_CHUNK, then="reset"), code="upstream-error", tells=ERROR_CHUNK),
    "abort-chunk": Case(streaming(START, {"type": "abort"}, "[DONE]"), reason="cancelled", tells={"type": "abort"}),
    "done-then-silence": Case(streaming(START, FINISH, "[DONE]", then="silence"), reason="complete", tells=FINISH),
    "done-alone": Case(streaming(START, DELTA, "[DONE]"), reason="complete", tells=DELTA),
    "finish-then-silence": Case(streaming(START, FINISH, then="silence"), reason="complete", tells=FINISH,
                                settings=ANYWHERE),
    "finish-then-reset": Case(streaming(START, FINISH, then="reset"), reason="complete", tells=FINISH),
    "finish-without-done": Case(streaming(START, FINISH), reason="complete", tells=FINISH),
    "too-large": Case(streaming(START, *[{**DELTA, "delta": "x" * 1000}] * 100), code="turn-too-large", tells="error",
                      settings={"max_turn_bytes": 50_000}),
    "without-length": Case(without_length, reason="complete", tells=FINISH),
    "instantly": Case(instantly, reason="complete", tells=FINISH),
    "plain-clean": Case(streaming(b"data: {}\n\n", headers=SSE_HEADERS), reason="complete", tells={}),
    "plain-reset": Case(streaming(b"data: {}\n\n", headers=SSE_HEADERS, then="reset"), code="upstream-cut-off",
                        tells={}, whole=False),
    "plain-done": Case(streaming({"choices": []}, "[DONE]", headers=SSE_HEADERS, then="silence"), reason="complete",
                       tells={"choices": []}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_what_went_wrong_is_told_as_it_was(make_node: MakeNode, name: str) -> None:
    """In the journal, as a status where there is one, as a chunk where the stream had begun; no one else hurt."""
    case = CASES[name]

    async def script(exchange: Exchange) -> None:
        if asked(exchange) == "fine":
            await exchange.head()
            await exchange.text("one", finish=False)
            await exchange.release.wait()
            await exchange.text("two", start=False)
        else:
            await case.script(exchange)

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url, **case.settings)
        async with (
            SessionClient(node.address) as client,
            HttpChat(node.address) as http,
            SdkClient(node.address) as sdk,
        ):
            fine = await http.post("fine", "fine")
            await fine.has(4)
            if case.settings is ANYWHERE:
                (await backend.exchange()).release.set()
                await fine.end()
            await client.attach("s")
            posted = asyncio.create_task(http.post("s"))
            await released(backend, 1, client, case)
            answer = await posted
            body = await answer.end()
            end = await client.ended(answer.turn)
            assert (end["reason"], end.get("error", {}).get("code")) == (case.reason, case.code)
            assert case.error.items() <= end.get("error", {}).items()
            assert (answer.status, answer.whole) == (case.status, case.whole)
            if case.tells is not None:
                told_to_an_sdk_client(answer.chunks, case.tells, end)
                assert answer.headers["Content-Type"].startswith("text/event-stream")
                assert "Content-Encoding" not in answer.headers
                assert (answer.events[-1].data == "[DONE]") == (name not in {"plain-clean", "plain-reset"})
            elif case.status in {502, 504}:
                assert json.loads(body)["code"] == case.code
            # The same over the sockets, which have no status.
            await client.send("s", "t2")
            await released(backend, 2, client, case)
            second = await client.ended("t2")
            assert (second["reason"], second.get("error")) == (end["reason"], end.get("error"))
            await sdk.send("r1", "s")
            await released(backend, 3, client, case)
            last = await sdk.ended("r1")
            if last["type"] == "end":
                told_to_an_sdk_client(sdk.chunks("r1"), case.tells or "error", end)
            (await backend.exchange()).release.set()
            await fine.end()
            assert fine.text == "onetwo"
            await eventually(lambda: not node._turns._producers)


async def released(backend: ScriptedBackend, number: int, client: SessionClient, case: Case) -> None:
    """Let a backend that resets do so when what it said before has been seen: a reset may overtake data."""
    exchange = await backend.exchange(number)
    if case.script.__qualname__.startswith("streaming"):
        starts = [r for r in client.records if r["type"] == "turn-start"]
        await client.wait(lambda line: line["type"] == "turn-start", count=max(number, len(starts)))
        await client.wait(lambda line: line["type"] in {"chunk", "turn-end"}, count=number)
    exchange.release.set()


def told_to_an_sdk_client(chunks: list[Any], tells: Any, end: dict[str, Any]) -> None:
    if tells == "error":
        assert chunks[-1] == {"type": "error", "errorText": end["error"]["message"]}
    elif end["reason"] == "error" and chunks[-1] != tells:
        assert chunks[-2:] == [tells, {"type": "error", "errorText": end["error"]["message"]}]
    else:
        assert chunks[-1] == tells


async def test_a_backend_that_is_not_there_is_a_bad_gateway(make_node: MakeNode) -> None:
    """Down, or no such name: told at once, and the next send is tried again."""
    for upstream in ("http://127.0.0.1:1", "http://no-such-host.invalid:80"):
        node = await make_node(upstream)
        async with SessionClient(node.address) as client, HttpChat(node.address) as http:
            answer = await http.post("s")
            assert answer.status == 502
            told = json.loads(await answer.end())
            assert (told["code"], told["retryable"]) == ("upstream-unreachable", True)
            await client.send("s", "t1")
            end = await client.ended("t1")
            assert (end["reason"], end["error"]["code"]) == ("error", "upstream-unreachable")


async def test_a_refusal_passes_as_it_came(make_node: MakeNode) -> None:
    """Status, body and headers are the backend's own; what one connection says to another stays behind."""
    page = b'{"error":"slow down","padding":"' + b"x" * 10_000 + b'"}'
    headers = {
        "Content-Type": "application/problem+json", "Retry-After": "7", "Set-Cookie": "a=1", "X-Reason": "quota",
        "Connection": "close, X-Hop", "X-Hop": "1",
    }  # fmt: skip

    async with ScriptedBackend(refusing("429 Slow Down", headers, page)) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, SessionClient(node.address) as client:
            answer = await http.post("s")
            assert await answer.end() == page
            assert (answer.status, answer.response.reason) == (429, "Slow Down")
            assert answer.headers["Content-Type"] == "application/problem+json"
            assert (answer.headers["Retry-After"], answer.headers["X-Reason"]) == ("7", "quota")
            assert answer.headers.getall("Set-Cookie") == ["a=1"]
            assert "X-Hop" not in answer.headers
            await client.attach("s")
            error = (await client.ended(answer.turn))["error"]
            assert error == {
                "code": "upstream-refused", "message": page[:4096].decode(), "status": 429, "retryAfter": 7.0,
            }  # fmt: skip


async def test_an_answer_that_is_no_stream_passes_to_its_sender_as_it_comes(make_node: MakeNode) -> None:
    """``TextStreamChatTransport`` works behind the gateway as it did without."""

    async def script(exchange: Exchange) -> None:
        await exchange.head(headers={"Content-Type": "text/plain; charset=utf-8", "Set-Cookie": "a=1"})
        await exchange.raw(b"one ")
        await exchange.release.wait()
        await exchange.raw(b"two")
        if asked(exchange) == "drop":
            exchange.drop()
        await exchange.end()

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http:
            for number, text in enumerate(("hello", "drop")):
                answer = await http.post(text, text)
                await answer.came(b"one ")
                (await backend.exchange(number)).release.set()
                await answer.end()
                assert answer.whole == (text == "hello")
                assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
                if text == "hello":
                    assert answer.raw == b"one two"
            leaving = await http.post("leaving")
            await leaving.came(b"one ")
            exchange = await backend.exchange(2)
            await leaving.cut()
            await exchange.closed()


async def test_invalid_utf8_is_replaced_and_passed_on(make_node: MakeNode) -> None:
    """As a browser would read it: U+FFFD, and the rest of the answer lives."""
    broken = b'data: {"type":"text-delta","id":"t1","delta":"a\xffb\xc3"}\n\ndata: \xe2\x82\n\n'
    async with ScriptedBackend(streaming(START, broken, FINISH, "[DONE]")) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, SessionClient(node.address) as client:
            await client.attach("s")
            answer = await http.post("s")
            await answer.end()
            assert [event.data for event in answer.events][2] == "\ufffd"
            assert answer.events[1].json["delta"] == "a\ufffdb\ufffd"
            assert (await client.ended(answer.turn))["reason"] == "complete"
            assert client.records[3]["text"] == "\ufffd"


async def test_comments_keep_a_quiet_stream_alive(make_node: MakeNode) -> None:
    """A model that thinks for minutes behind a server that pings is not idle."""

    async def script(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.say(START)
        for _ in range(16):
            await asyncio.sleep(0.05)
            await exchange.raw(b": thinking\n\n")
        await exchange.say(FINISH, "[DONE]")
        await exchange.end()

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url, upstream_idle_timeout_seconds=0.6)
        async with SessionClient(node.address) as client:
            await client.send("s", "t1")
            assert (await client.ended("t1"))["reason"] == "complete"


async def test_any_event_stream_passes_not_only_the_sdks(make_node: MakeNode) -> None:
    """Names, CRLF, several data lines, comments, OpenAI's `[DONE]`: cut at every byte, the same events."""
    stream = (
        "\ufeff: hello\r\n\r\nevent: ping\r\ndata\r\n\r\nid: 7\r\nretry: 5\r\ndata:no space\r\ndata:  two\r\n\r\n"
        'data: {"choices":[{"delta":{"content":"hi \u2028"}}]}\r\n\r\nevent: message\ndata: 1\n\n'
        "data: [DONE]\n\ndata: after the end\n\n"
    ).encode()
    headers = {"Content-Type": "text/event-stream;charset=UTF-8", "X-Mine": "yes"}
    pieces = [stream[index : index + 1] for index in range(len(stream))]
    async with ScriptedBackend(streaming(*pieces, headers=headers)) as backend:
        node = await make_node(backend.url)
        async with HttpChat(node.address) as http, SessionClient(node.address) as client:
            await client.attach("s")
            answer = await http.post("s")
            await answer.end()
            assert answer.whole
            assert answer.headers["X-Mine"] == "yes"
            assert "x-vercel-ai-ui-message-stream" not in answer.headers
            assert [(event.event, event.data) for event in answer.events] == [
                ("ping", ""), ("", "no space\n two"), ("", '{"choices":[{"delta":{"content":"hi \u2028"}}]}'),
                ("", "1"), ("", "[DONE]"),
            ]  # fmt: skip
            assert (await client.ended(answer.turn))["reason"] == "complete"
            told = [{k: r[k] for k in ("event", "text", "data") if k in r} for r in client.records[1:-1]]
            assert told == [
                {"event": "ping", "text": ""}, {"text": "no space\n two"},
                {"data": {"choices": [{"delta": {"content": "hi \u2028"}}]}}, {"data": 1},
            ]  # fmt: skip


async def test_the_sdks_socket_is_spared_what_would_break_it(make_node: MakeNode) -> None:
    """A payload that is no JSON would make the client drop the whole socket; the request ends instead."""

    async def script(exchange: Exchange) -> None:
        await exchange.head(headers=SSE_HEADERS)
        await exchange.raw(
            b"data: hello\n\n" if asked(exchange) == "plain" else b'data: {"type":"start"}\n\n'
        )
        await exchange.release.wait()
        await exchange.say(FINISH, "[DONE]")
        await exchange.end()

    async with ScriptedBackend(script) as backend:
        node = await make_node(backend.url)
        async with SdkClient(node.address) as sdk:
            await sdk.send("r2", "b", "json")
            await sdk.has("r2", 1)
            await sdk.send("r1", "a", "plain")
            assert (await sdk.ended("r1"))["type"] == "error"
            for number in range(2):
                (await backend.exchange(number)).release.set()
            assert (await sdk.ended("r2"))["type"] == "end"
