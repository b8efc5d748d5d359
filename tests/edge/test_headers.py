from __future__ import annotations

import pytest
from multidict import CIMultiDict

from gateway.core.model import Refusal
from gateway.edge.headers import (
    SOCKET_HEADERS,
    downstream_headers,
    end_to_end,
    socket_headers,
    upstream_request_headers,
)

HOP_BY_HOP = [
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "Proxy",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
    "HTTP2-Settings",
    "keep-alive",
    "Keep_Alive",
]


def upstream(**headers: str) -> CIMultiDict[str]:
    named = CIMultiDict((name.replace("_", "-"), value) for name, value in headers.items())
    return upstream_request_headers(named, peer="203.0.113.7", scheme="https", host="app.example:8443")


OURS = {
    "X-Forwarded-For": "203.0.113.7",
    "X-Forwarded-Proto": "https",
    "X-Forwarded-Host": "app.example:8443",
}


@pytest.mark.parametrize("name", HOP_BY_HOP)
def test_what_belongs_to_a_connection_stays_on_it(name: str) -> None:
    """A Transfer-Encoding that passes is how requests are smuggled."""
    assert end_to_end(CIMultiDict({name: "x", "Accept": "*/*"})) == {"Accept": "*/*"}


def test_connection_names_more_headers_that_stay() -> None:
    """A proxy between that adds a header for us says so in Connection."""
    headers = CIMultiDict([("Connection", "close, X-One"), ("connection", "x-two ,"), ("X-One", "1")])
    headers.extend([("x-one", "1"), ("X-Two", "2"), ("X-Three", "3")])
    assert end_to_end(headers) == {"X-Three": "3"}


def test_a_client_cannot_take_away_what_the_gateway_says() -> None:
    """Naming X-Forwarded-For in Connection is a known way to hide where one comes from."""
    headers = upstream(Connection="Cookie, X-Forwarded-For, X-Forwarded-Host", Cookie="a=1", Accept="*/*")
    assert headers == {"Accept": "*/*", **OURS}


@pytest.mark.parametrize(
    "name",
    [
        "X-Forwarded-For",
        "x-forwarded-for",
        "X_Forwarded_For",
        "X-Forwarded_Host",
        "X-Forwarded-Port",
        "X-Forwarded-Prefix",
        "Forwarded",
        "X-Real-IP",
        "X_Real_IP",
    ],
)
def test_what_a_client_says_about_itself_is_not_believed(name: str) -> None:
    """A backend that trusts its proxy would log, limit or redirect by an address that the client made up."""
    given = CIMultiDict({name: "198.51.100.1", "Accept": "*/*"})
    headers = upstream_request_headers(given, peer="203.0.113.7", scheme="https", host="app.example:8443")
    assert headers == {"Accept": "*/*", **OURS}


def test_the_rest_of_a_request_passes() -> None:
    """The backend's own sign-in, languages and traces work as if the gateway were not there."""
    given = CIMultiDict([("Cookie", "a=1"), ("Cookie", "b=2"), ("Authorization", "Bearer t")])
    given.extend({"Accept-Encoding": "br", "X-Custom": "ö", "Host": "app", "Content-Length": "3"})
    given["Expect"] = "100-continue"
    headers = upstream_request_headers(given, peer="::1", scheme="http", host="app")
    assert headers.getall("Cookie") == ["a=1", "b=2"]
    del headers["Cookie"]
    assert headers == {
        "Authorization": "Bearer t",
        "Accept-Encoding": "br",
        "X-Custom": "ö",
        "X-Forwarded-For": "::1",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "app",
    }


def test_the_backend_is_asked_not_to_compress_what_we_read() -> None:
    """A compressed event stream could not be cut into chunks."""
    given = CIMultiDict([("Accept-Encoding", "gzip"), ("accept-encoding", "br")])
    headers = upstream_request_headers(given, peer="", scheme="http", host="", ask_identity=True)
    assert headers == {"Accept-Encoding": "identity", "X-Forwarded-Proto": "http"}


def test_bytes_that_are_no_utf8_are_not_lost() -> None:
    """The server keeps them as lone surrogates, which the client library leaves out when it writes."""
    assert end_to_end(CIMultiDict({"X-Name": "caf\udce9"})) == {"X-Name": "café"}


def socket(frame: dict[str, str], *more: str, **handshake: str) -> CIMultiDict[str]:
    named = CIMultiDict((name.replace("_", "-"), value) for name, value in handshake.items())
    return socket_headers(named, frame, {*SOCKET_HEADERS, *more})


def test_a_socket_hands_on_what_is_allowed() -> None:
    """A page can put any header into a frame, also those that browsers do not let it set."""
    frame = {"AUTHORIZATION": "Bearer t", "X-Admin": "1", "x-tenant": "acme"}
    headers = socket(frame, "x-tenant", User_Agent="UA", Origin="https://a.example", Sec_WebSocket_Key="k")
    assert headers == {"authorization": "Bearer t", "x-tenant": "acme", "User-Agent": "UA"}


def test_the_frame_wins_over_the_handshake() -> None:
    """A socket outlives its token; the send brings the new one."""
    given = CIMultiDict([("Cookie", "a=1"), ("cookie", "b=2"), ("Accept-Language", "de")])
    headers = socket_headers(given, {"cOOkie": "c=3"}, SOCKET_HEADERS)
    assert list(headers.items()) == [("Accept-Language", "de"), ("cookie", "c=3")]


@pytest.mark.parametrize("name", [*HOP_BY_HOP, "Host", "Content-Length", "X-Forwarded-For", "X-Real-IP"])
def test_some_headers_no_setting_lets_through(name: str) -> None:
    """A Content-Length from a frame would cut the body of the POST that we make of it."""
    assert not socket({name: "1"}, name.lower())
    assert not socket_headers(CIMultiDict({name: "1"}), {}, {name.lower()})


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("a\r\nX-Admin: 1", "control characters"),
        ("a\nb", "control characters"),
        ("a\0b", "control characters"),
        ("a\x7fb", "control characters"),
        ("a\ud800", "half a surrogate pair"),
        (7, "no text"),
    ],
)
def test_a_value_that_no_header_can_hold_is_refused(value: str, why: str) -> None:
    """A line end in a value would write headers of its own; a silent drop would hide why sign-in fails."""
    with pytest.raises(Refusal, match=f"unable to hand on the header 'Authorization'; its value .*{why}"):
        socket({"Authorization": value})
    assert not socket({"X-Not-Allowed": value})
    assert socket({"Authorization": "a\tb"}) == {"authorization": "a\tb"}


def test_an_answer_keeps_each_cookie_and_its_length() -> None:
    """Two Set-Cookie joined by a comma are no cookie at all."""
    given = CIMultiDict([("Set-Cookie", "a=1"), ("Set-Cookie", "b=2; Expires=Wed, 21 Oct 2026 07:28:00 GMT")])
    given.extend({"Content-Length": "3", "Connection": "close", "Transfer-Encoding": "chunked"})
    assert "Content-Length" not in downstream_headers(given, reframed=False)
    del given["Transfer-Encoding"]
    headers = downstream_headers(given, reframed=False)
    assert headers.popall("set-cookie") == ["a=1", "b=2; Expires=Wed, 21 Oct 2026 07:28:00 GMT"]
    assert headers == {"Content-Length": "3"}
    assert "Content-Length" not in downstream_headers(given, reframed=True)
