from __future__ import annotations

from typing import TYPE_CHECKING

import aiohttp
import pytest

from gateway.edge import clientmodule
from tests.support.wires import HttpChat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from gateway.app import Node

    MakeNode = Callable[..., Awaitable[Node]]

MODULE = "export const greeting = 'Grüße'\n"


def build(path: Path, module: str = MODULE) -> None:
    path.write_text(module)


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the client is taken from; not there yet."""
    path = tmp_path / "client.js"
    monkeypatch.setattr(clientmodule, "BUILT", path)
    return path


async def test_a_page_gets_the_client_from_its_gateway(make_node: MakeNode, built: Path) -> None:
    """One `import`, and always the version that this gateway speaks."""
    build(built)
    node = await make_node("http://127.0.0.1:1")
    async with HttpChat(node.address) as http:
        answer = await http.request("GET", f"{http.base}/gateway/v1/client.js?v=1")
        assert (answer.status, (await answer.end()).decode()) == (200, MODULE)
        assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-cache"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "cross-origin"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        head = await http.request("HEAD", f"{http.base}/gateway/v1/client.js")
        assert (head.status, head.headers["ETag"]) == (200, answer.headers["ETag"])
        assert int(head.headers["Content-Length"]) == len(MODULE.encode())


async def test_a_browser_asks_again_and_gets_it_only_when_it_has_changed(
    make_node: MakeNode, built: Path
) -> None:
    """A page never runs the client of the gateway before the last deploy."""
    build(built)
    node = await make_node("http://127.0.0.1:1")
    async with HttpChat(node.address) as http:
        url = f"{http.base}/gateway/v1/client.js"
        tag = (await http.request("GET", url)).headers["ETag"]
        for known in (tag, f"W/{tag}", f'"x", {tag}', "*"):
            answer = await http.request("GET", url, headers={"If-None-Match": known})
            assert (answer.status, await answer.end()) == (304, b"")
            assert (answer.headers["ETag"], answer.headers["Cache-Control"]) == (tag, "no-cache")
        for other in ('"x"', "x", ""):
            assert (await http.request("GET", url, headers={"If-None-Match": other})).status == 200
        build(built, MODULE + "// later\n")
        answer = await http.request("GET", url, headers={"If-None-Match": tag})
        assert (answer.status, (await answer.end()).decode()) == (200, MODULE + "// later\n")
        assert answer.headers["ETag"] != tag


async def test_a_client_that_was_not_built_says_how(make_node: MakeNode, built: Path) -> None:
    """A checkout has none until somebody makes it; then it is there without a restart."""
    node = await make_node("http://127.0.0.1:1")
    async with HttpChat(node.address) as http:
        url = f"{http.base}/gateway/v1/client.js"
        answer = await http.request("GET", url)
        assert answer.status == 404
        assert await answer.end() == b'unable to find the client; build it with "make client"\n'
        build(built)
        assert (await http.request("GET", url)).status == 200


async def test_a_page_of_a_named_origin_may_import_it(make_node: MakeNode, built: Path) -> None:
    """A module of another origin is fetched with CORS, and refused without its headers."""
    build(built)
    node = await make_node("http://127.0.0.1:1", origins="https://app.example")
    async with aiohttp.ClientSession() as http:
        for origin, status in (("https://app.example", 200), ("https://evil.example", 403)):
            url = f"http://{node.address}/gateway/v1/client.js"
            async with http.get(url, headers={"Origin": origin}) as answer:
                assert answer.status == status
                allowed = answer.headers.get("Access-Control-Allow-Origin")
                assert allowed == (origin if status == 200 else None)
