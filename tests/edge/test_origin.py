from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from aiohttp import WSServerHandshakeError, web

from gateway.config import AuthMode, load_config
from gateway.edge.origin import OriginPolicy, Refused, cors_signal, origin_middleware

if TYPE_CHECKING:
    from aiohttp.test_utils import TestClient
    from pytest_aiohttp import AiohttpClient

    Client = TestClient[web.Request, web.Application]

NAMED = "https://app.example.com"


def policy(*origins: str, auth: AuthMode | None = AuthMode.NONE) -> OriginPolicy:
    return OriginPolicy(load_config(upstream="http://127.0.0.1:3000", auth=auth, origins=origins))


@pytest.mark.parametrize(
    ("origin", "host", "allowed"),
    [
        (None, "gateway.example", True),
        ("https://gateway.example", "gateway.example", True),
        ("http://gateway.example", "gateway.example", True),
        ("https://GATEWAY.example", "gateway.EXAMPLE", True),
        ("https://gateway.example", "gateway.example:443", True),
        ("http://gateway.example", "gateway.example:80", True),
        ("http://localhost:8080", "localhost:8080", True),
        ("http://[::1]:8080", "[::1]:8080", True),
        ("http://localhost:8080", "localhost:8081", False),
        ("http://localhost:8080", "localhost", False),
        ("http://localhost", "127.0.0.1", False),
        ("https://gateway.example.evil.io", "gateway.example", False),
        ("https://evilgateway.example", "gateway.example", False),
        ("https://sub.gateway.example", "gateway.example", False),
        ("https://gateway.example.", "gateway.example", False),
        ("https://gateway.example/", "gateway.example", False),
        ("https://evil.io/gateway.example", "gateway.example", False),
        ("https://gateway.example@evil.io", "gateway.example", False),
        ("https://evil.io@gateway.example", "gateway.example", False),
        ("https://evil.io https://gateway.example", "gateway.example", False),
        ("chrome-extension://gateway.example", "gateway.example", False),
        ("file://", "gateway.example", False),
        ("gateway.example", "gateway.example", False),
        ("null", "gateway.example", False),
        ("null", "null", False),
        ("", "", False),
        ("https://", "", False),
        ("https://a b", "a b", False),
        ("https://app.example.com", "gateway.example", True),
        ("https://APP.example.com", "gateway.example", True),
        ("https://app.example.com:443", "gateway.example", True),
        ("http://app.example.com", "gateway.example", False),
        ("https://app.example.com:80", "gateway.example", False),
        ("https://app.example.com:8443", "gateway.example", False),
        ("https://app.example.com.evil.io", "gateway.example", False),
        ("http://other.example:3000", "gateway.example", True),
        ("http://other.example", "gateway.example", False),
        ("http://xn--bcher-kva.example", "xn--bcher-kva.example", True),
    ],
)
def test_origins_are_compared_exactly(origin: str | None, host: str, *, allowed: bool) -> None:
    """Anything looser than equality has been a hole somewhere."""
    named = policy(NAMED, "http://other.example:3000")
    assert named.allows(origin, host) is allowed


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LocalHost:3000", True),
        ("chat.localhost:3000", True),
        ("127.0.0.1", True),
        ("127.8.9.1:65535", True),
        ("[::1]", True),
        ("[::1]:8080", True),
        ("", True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("evillocalhost", False),
        ("127.0.0.1.evil.example", False),
        ("127.0.0.1.nip.io:8080", False),
        ("192.168.0.7", False),
        ("0.0.0.0", False),
        ("[::2]", False),
        ("[::ffff:192.168.0.7]", False),
        ("localhost:80:80", False),
        ("evil.example/localhost", False),
        ("localhost@evil.example", False),
        ("evil.example@localhost", False),
        ("app.example.com", True),
        ("APP.example.com:8443", True),
        ("app.example.com.evil.example", False),
    ],
)
def test_without_auth_only_loopback_names_are_answered(host: str, *, allowed: bool) -> None:
    """A page whose name was turned to 127.0.0.1 asks for its own host, and is its own origin."""
    assert policy(NAMED, auth=None).host_allowed(host) is allowed
    assert policy(NAMED, auth=AuthMode.NONE).host_allowed(host) is True


def test_only_allowed_foreign_origins_get_cors_headers() -> None:
    """A page of the gateway's own host needs none, and others must not read."""
    named = policy(NAMED)
    assert named.cors_headers("https://App.example.com", "gateway.example") == {
        "Access-Control-Allow-Origin": "https://App.example.com",
        "Access-Control-Allow-Credentials": "true",
        "Access-Control-Expose-Headers": "Session-Gateway-Turn, Retry-After, X-Vercel-AI-UI-Message-Stream",
        "Vary": "Origin",
    }
    for origin in (None, "null", "https://evil.io", "https://gateway.example"):
        assert named.cors_headers(origin, "gateway.example") == {"Vary": "Origin"}
    assert named.cors_headers(NAMED, "app.example.com") == {"Vary": "Origin"}
    assert policy().cors_headers("https://gateway.example", "gateway.example") == {}


@pytest.mark.parametrize("asked", [None, "", "a\r\nX-Evil: 1", "a b", "content-type,", "a, <b>"])
def test_a_preflight_that_asks_for_no_header_names_gets_none(asked: str | None) -> None:
    """What is echoed must be what it says it is."""
    assert "Access-Control-Allow-Headers" not in policy(NAMED).preflight_headers(asked)


def is_ours(request: web.Request) -> bool:
    return request.path.startswith("/ours")


async def answer(request: web.Request) -> web.StreamResponse:
    if request.path.endswith("/socket"):
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.close()
        return socket
    headers = {"Vary": "Accept", "Access-Control-Allow-Origin": "*"}
    stream = web.StreamResponse(headers=headers)
    await stream.prepare(request)
    await stream.write(b"answer")
    return stream


@pytest.fixture
def refused() -> list[Refused]:
    return []


@pytest.fixture
async def client(aiohttp_client: AiohttpClient, refused: list[Refused]) -> Client:
    named = policy(NAMED, auth=None)
    app = web.Application(middlewares=[origin_middleware(named, is_ours, refused.append)])
    app.on_response_prepare.append(cors_signal(named, is_ours))
    app.router.add_route("*", "/{path:.*}", answer)
    return await aiohttp_client(app)


@pytest.mark.parametrize("path", ["/ours", "/theirs"])
async def test_a_foreign_host_is_told_what_to_set(client: Client, refused: list[Refused], path: str) -> None:
    """Someone who put a proxy in front meets this on the first day."""
    response = await client.get(path, headers={"Host": "laptop.example:8080"})
    assert response.status == 421
    text = await response.text()
    assert text.startswith("unable to answer as 'laptop.example:8080'; ")
    assert "GATEWAY_ORIGINS=http://laptop.example:8080" in text
    assert response.content_type == "text/plain"
    assert refused == [Refused.HOST]


async def test_a_foreign_origin_is_refused_on_our_endpoints_only(
    client: Client, refused: list[Refused]
) -> None:
    """What is proxied is the backend's to judge, as it would be without us."""
    response = await client.post("/ours", headers={"Origin": "https://evil.io"})
    assert response.status == 403
    assert "GATEWAY_ORIGINS" in await response.text()
    assert "Access-Control-Allow-Origin" not in response.headers
    with pytest.raises(WSServerHandshakeError, match="403"):
        await client.ws_connect("/ours/socket", headers={"Origin": "https://evil.io"})
    assert refused == [Refused.ORIGIN, Refused.ORIGIN]
    response = await client.post("/theirs", headers={"Origin": "https://evil.io"})
    assert (response.status, response.headers["Vary"]) == (200, "Accept")
    assert response.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 200), ("same-origin", 200), ("none", 200)]
)
async def test_what_a_foreign_page_embeds_is_refused_on_our_endpoints_only(
    client: Client, refused: list[Refused], site: str, status: int
) -> None:
    """An image comes without ``Origin``; it cannot be read, but it would count as a reader of the chat."""
    ours = await client.get("/ours", headers={"Sec-Fetch-Site": site})
    assert ours.status == status
    assert refused == ([] if status == 200 else [Refused.ORIGIN])
    theirs = await client.get("/theirs", headers={"Sec-Fetch-Site": site})
    assert (theirs.status, await theirs.text()) == (200, "answer")


async def test_a_page_that_is_named_may_ask_from_another_site(client: Client) -> None:
    """Every request of it is cross-site, its preflight too; but it says where it comes from."""
    headers = {"Sec-Fetch-Site": "cross-site", "Origin": NAMED}
    for method in ("GET", "POST"):
        response = await client.request(method, "/ours", headers=headers)
        assert (response.status, response.headers["Access-Control-Allow-Origin"]) == (200, NAMED)
    preflight = await client.options("/ours", headers={**headers, "Access-Control-Request-Method": "POST"})
    assert preflight.status == 204
    async with client.ws_connect("/ours/socket", headers=headers) as socket:
        assert not socket.closed


async def test_a_streamed_answer_can_be_read_by_a_named_origin(client: Client) -> None:
    """Its headers leave before the handler returns; what comes after it would be too late."""
    response = await client.get("/ours", headers={"Origin": NAMED})
    assert response.headers.getall("Access-Control-Allow-Origin") == [NAMED]
    assert response.headers.getall("Vary") == ["Accept, Origin"]
    assert await response.text() == "answer"
    async with client.ws_connect("/ours/socket", headers={"Origin": NAMED}) as socket:
        assert not socket.closed


async def test_a_preflight_of_a_named_origin_is_answered(client: Client, refused: list[Refused]) -> None:
    """The backend never hears of it: most have no OPTIONS route."""
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type, idempotency-key",
    }
    response = await client.options("/ours", headers={"Origin": NAMED, **asked})
    assert response.status == 204
    assert response.headers["Access-Control-Allow-Origin"] == NAMED
    assert response.headers["Access-Control-Allow-Credentials"] == "true"
    assert response.headers["Access-Control-Allow-Headers"] == "content-type, idempotency-key"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert (await client.options("/ours", headers={"Origin": "https://evil.io", **asked})).status == 403
    assert await (await client.options("/ours", headers={"Origin": NAMED})).text() == "answer"
    assert await (await client.options("/ours", headers=asked)).text() == "answer"
    assert await (await client.options("/theirs", headers={"Origin": NAMED, **asked})).text() == "answer"
    assert refused == [Refused.ORIGIN]
