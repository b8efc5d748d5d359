"""The demo's backend speaks as an AI SDK backend does, and stops when nobody listens."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import ClientSession, web

from gateway.demo.answers import ANSWERS, choose_answer
from gateway.demo.backend import PAGE_HEADERS, Pace, answer_chunks, question_of, serve_backend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

AT_ONCE = Pace(chunk_seconds=0.0, tool_seconds=0.0)
QUESTION = "What happens when I cut the network?"


@asynccontextmanager
async def backend(pace: Pace) -> AsyncIterator[ClientSession]:
    """A client of a running backend, under a timeout for all that a test does with it."""
    async with (
        asyncio.timeout(20),
        serve_backend(pace=pace) as port,
        ClientSession(f"http://127.0.0.1:{port}") as client,
    ):
        yield client


def body(text: str) -> dict[str, Any]:
    """What ``DefaultChatTransport`` posts."""
    message = {"id": "m1", "role": "user", "parts": [{"type": "text", "text": text}]}
    return {"id": "chat-1", "messages": [message], "trigger": "submit-message"}


async def status_until(client: ClientSession, key: str, value: int) -> dict[str, Any]:
    """The backend's status, once ``key`` has ``value``."""
    while True:
        async with client.get("/demo/status") as response:
            status: dict[str, Any] = await response.json()
        if status[key] == value:
            return status


def parts_of(chunks: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Reasoning, tool input and text. Fails where a part is not opened or not closed, as the AI SDK does."""
    open_parts: set[tuple[str, str]] = set()
    texts = {"reasoning": "", "tool-input": "", "text": ""}
    for chunk in chunks:
        match chunk["type"].rpartition("-"):
            case ("text" | "reasoning" as kind, _, "start"):
                open_parts.add((kind, chunk["id"]))
            case ("text" | "reasoning" as kind, _, "delta"):
                assert (kind, chunk["id"]) in open_parts
                texts[kind] += chunk["delta"]
            case ("text" | "reasoning" as kind, _, "end"):
                open_parts.remove((kind, chunk["id"]))
            case ("tool-input", _, "delta"):
                texts["tool-input"] += chunk["inputTextDelta"]
            case _:
                pass
    assert not open_parts
    return texts["reasoning"], texts["tool-input"], texts["text"]


async def test_the_answer_is_a_stream_that_the_ai_sdk_reads() -> None:
    """The gateway classifies a turn by these headers and this ending."""
    async with backend(AT_ONCE) as client, client.post("/api/chat", json=body(QUESTION)) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["x-vercel-ai-ui-message-stream"] == "v1"
        events = (await response.text()).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert chunks[0] == {"type": "start"}
        assert chunks[-1] == {"type": "finish", "finishReason": "stop"}
        assert await status_until(client, "finished", 1) == {
            "running": 0,
            "started": 1,
            "finished": 1,
            "stoppedByClose": 0,
            "chunks": len(chunks),
            "last": "finished",
        }


def test_the_parts_of_an_answer_come_in_order_and_are_closed() -> None:
    """Reasoning, tool and text are what the page colours; an unopened part is an error in the SDK."""
    answer = choose_answer(QUESTION)
    chunks = list(answer_chunks(answer, QUESTION, lambda: {"seen": 1}))
    outline = [chunk["type"] for chunk in chunks if not chunk["type"].endswith("-delta")]
    assert outline == [
        *("start", "start-step", "reasoning-start", "reasoning-end"),
        *("tool-input-start", "tool-input-available", "tool-output-available", "finish-step"),
        *("start-step", "text-start", "text-end", "finish-step", "finish"),
    ]
    thought, tool_input, text = parts_of(chunks)
    assert QUESTION in thought
    assert json.loads(tool_input) == next(c["input"] for c in chunks if c["type"] == "tool-input-available")
    assert next(c["output"] for c in chunks if c["type"] == "tool-output-available") == {"seen": 1}
    assert text == answer.text


async def test_it_stops_when_its_client_leaves_and_says_so() -> None:
    """The page shows this as the proof that Stop has reached the model."""
    # Its tool never comes back: only the closed connection can end this answer.
    async with backend(Pace(chunk_seconds=0.0, tool_seconds=3600.0)) as client:
        async with client.post("/api/chat", json=body(QUESTION)) as response:
            await response.content.readuntil(b"tool-input-available")
            assert (await status_until(client, "running", 1))["stoppedByClose"] == 0
            response.close()
        status = await status_until(client, "running", 0)
        assert (status["stoppedByClose"], status["finished"]) == (1, 0)
        assert status["last"] == "stoppedByClose"


async def test_a_body_that_is_not_json_is_refused() -> None:
    """And starts no answer."""
    async with backend(AT_ONCE) as client, client.post("/api/chat", data=b"{") as response:
        assert response.status == 400
        assert (await status_until(client, "running", 0))["started"] == 0


@pytest.mark.parametrize(
    "strange",
    [None, [], {}, {"messages": 1}, {"messages": []}, {"messages": ["x"]}, {"messages": [{"parts": [1]}]}],
)
def test_a_body_without_a_question_still_gets_an_answer(strange: object) -> None:
    """A demo that falls over is no demo."""
    question = question_of(strange)
    assert question == ""
    assert parts_of(list(answer_chunks(choose_answer(question), question, dict)))[2]


def test_half_a_surrogate_pair_is_echoed_as_text() -> None:
    """JSON can hold it and UTF-8 cannot; an answer that repeats it would break off in the middle."""
    question = question_of(
        json.loads(r'{"messages": [{"parts": [{"type": "text", "text": "\ud83d hello"}]}]}')
    )
    chunks = list(answer_chunks(choose_answer(question), question, dict))
    assert "hello" in json.dumps(chunks, ensure_ascii=False).encode().decode()


def test_different_questions_get_different_answers() -> None:
    """And every answer can be asked for by its own topic."""
    for answer in ANSWERS:
        assert choose_answer(f"Is it about {answer.topic}") is answer


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.topic)
def test_an_answer_leaves_time_to_cut_and_to_stop(answer: Any) -> None:
    """Twelve to twenty seconds, counted in chunks at the demo's mean pace."""
    pace = Pace()
    chunks = list(answer_chunks(answer, QUESTION, dict))
    assert 12 <= len(chunks) * pace.chunk_seconds + pace.tool_seconds <= 20


async def test_the_page_needs_nothing_from_elsewhere() -> None:
    """It works offline, and its content security policy allows no inline script and no other host."""
    async with backend(AT_ONCE) as client:
        async with client.get("/") as response:
            page = await response.text()
            assert response.headers["Content-Security-Policy"] == PAGE_HEADERS["Content-Security-Policy"]
        assert not re.search(r"https?://|<script>|<style|\sstyle=|\son\w+=", page)
        names = re.findall(r'"(/demo/[^"]+)"', page)
        modules = set()
        for name in names:
            async with client.get(name) as response:
                assert response.status == 200, name
                text = (await response.text()).replace('xmlns="http://www.w3.org/2000/svg"', "")
                assert not re.search(r"https?://|@import|innerHTML|eval\(", text), name
            imported = re.findall(r"(?:from|import\()\s*'([^']+)'", text)
            modules.update(imported)
            names += [f"/demo/{module.removeprefix('./')}" for module in imported if module.startswith("./")]
    # The one that it does not have itself is the gateway's; without it the page says so.
    assert {module for module in modules if not module.startswith("./")} == {"/gateway/v1/client.js"}


@pytest.mark.parametrize("path", ["/demo/backend.py", "/demo/answers.toml", "/demo/..%2fconfig.py", "/demo/"])
async def test_only_the_files_of_the_page_are_served(path: str) -> None:
    """The folder also holds code."""
    async with backend(AT_ONCE) as client, client.get(path) as response:
        assert response.status == web.HTTPNotFound.status_code
