"""Which headers pass from one side of the gateway to the other.

Hop-by-hop headers belong to one connection and never pass (RFC 9110, 7.6.1:
https://www.rfc-editor.org/rfc/rfc9110#section-7.6.1). What a client says about its own address and host is
not believed: the gateway says it, from what it saw. Names with ``_`` for ``-`` are the same header to many
backends (CGI, WSGI), so a client's ``X_Forwarded_For`` is not believed either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from multidict import CIMultiDict, MultiMapping

from gateway.core.model import bad_request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SOCKET_HEADERS = frozenset({"authorization", "cookie", "accept-language", "user-agent", "traceparent"})
"""What a socket's handshake or frame may hand on to the backend; ``Config.forward_headers`` adds to it."""

_HOP_BY_HOP = frozenset(
    {"connection", "http2-settings", "keep-alive", "proxy", "te", "trailer", "transfer-encoding", "upgrade"}
)
_ABOUT_THE_CLIENT = frozenset({"forwarded", "x-real-ip"})
# The client library writes Host and the framing for its own connection, and the server has answered Expect.
_OF_THE_REQUEST = frozenset({"content-length", "expect", "host"})


def end_to_end(headers: MultiMapping[str]) -> CIMultiDict[str]:
    """Leave out what is meant for one connection only, and what ``Connection`` says is."""
    nominated = {
        name.strip().lower() for value in headers.getall("Connection", ()) for name in value.split(",")
    }
    return CIMultiDict(
        (name, _text(value))
        for name, value in headers.items()
        if not (_is_hop_by_hop(name) or name.lower() in nominated)
    )


def upstream_request_headers(
    headers: MultiMapping[str], *, peer: str, scheme: str, host: str, ask_identity: bool = False
) -> CIMultiDict[str]:
    """The headers of a client's request as the backend gets them.

    ``Host`` and ``Content-Length`` are missing: the client library writes them. ``X-Forwarded-*`` are set
    last, so that no ``Connection`` header of the client's can take them away.

    Args:
        headers: What the client sent.
        peer: The address that the client connected from; empty on a unix socket.
        scheme: ``http`` or ``https``, as the client asked.
        host: The ``Host`` that the client asked for; empty if it named none.
        ask_identity: Whether the backend is asked not to compress, because its answer is read here.
    """
    passed = CIMultiDict(
        (name, value) for name, value in end_to_end(headers).items() if not _is_set_by_us(name.lower())
    )
    if ask_identity:
        passed["Accept-Encoding"] = "identity"
    for name, value in (("For", peer), ("Proto", scheme), ("Host", host)):
        if value:
            passed[f"X-Forwarded-{name}"] = value
    return passed


def socket_headers(
    handshake: MultiMapping[str], frame: Mapping[str, str], allowed: Iterable[str]
) -> CIMultiDict[str]:
    """The headers that a socket's send hands on: the frame's, and the handshake's where the frame is silent.

    Hop-by-hop headers, ``Host`` and ``X-Forwarded-*`` do not pass even when they are allowed. Give the
    result to :func:`upstream_request_headers`, which sets the last of these.

    Args:
        handshake: Of the request that opened the socket.
        frame: As the client named them in the send.
        allowed: Lower-case names, such as ``SOCKET_HEADERS`` and ``Config.forward_headers`` together.

    Raises:
        Refusal: An allowed header of the frame holds what no header can.
    """
    passing = {name for name in allowed if not (_is_hop_by_hop(name) or _is_set_by_us(name))}
    named = {name.lower(): _checked(name, value) for name, value in frame.items() if name.lower() in passing}
    passed = CIMultiDict(
        (name, value)
        for name, value in end_to_end(handshake).items()
        if name.lower() in passing and name.lower() not in named
    )
    passed.extend(named)
    return passed


def downstream_headers(headers: MultiMapping[str], *, reframed: bool) -> CIMultiDict[str]:
    """The headers of a backend's answer as the client gets them; each ``Set-Cookie`` stays its own.

    Args:
        headers: What the backend sent.
        reframed: Whether the body is written anew, so that its length is another one.
    """
    passed = end_to_end(headers)
    # A message that has both is framed by its Transfer-Encoding (RFC 9112, 6.3).
    if reframed or "Transfer-Encoding" in headers:
        passed.popall("Content-Length", None)
    return passed


def _is_hop_by_hop(name: str) -> bool:
    plain = name.lower().replace("_", "-")
    return plain in _HOP_BY_HOP or plain.startswith("proxy-")


def _is_set_by_us(name: str) -> bool:
    plain = name.replace("_", "-")
    return plain in _OF_THE_REQUEST or plain in _ABOUT_THE_CLIENT or plain.startswith("x-forwarded-")


def _text(value: str) -> str:
    """Bytes that are no UTF-8, which aiohttp keeps as lone surrogates and cannot write, as Latin-1."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode(errors="surrogateescape").decode("latin-1")
    return value


def _checked(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise bad_request(f"unable to hand on the header {name!r}; its value is no text")
    if any((character < " " and character != "\t") or character == "\x7f" for character in value):
        raise bad_request(f"unable to hand on the header {name!r}; its value holds control characters")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise bad_request(
            f"unable to hand on the header {name!r}; its value holds half a surrogate pair"
        ) from None
    return value.strip()
