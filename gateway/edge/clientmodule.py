"""The built client, as one ES module that a page imports from the gateway itself."""

from __future__ import annotations

import hashlib
from http import HTTPStatus
from pathlib import Path

from aiohttp import web

BUILT = Path(__file__).parent / "static/client.js"
"""What ``make client`` makes of ``client/``; not in the repository, and in the wheel."""

_HEADERS = {
    "Cache-Control": "no-cache",
    # A page that is cross-origin isolated refuses what does not say that it may be embedded.
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


class ClientModule:
    """Serves ``GET /gateway/v1/client.js``.

    Args:
        path: The file, if not the one that is built; read again when it has changed.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = BUILT if path is None else path
        self._stamp = (0, 0)
        self._text = b""
        self._tag = ""

    def handle(self, request: web.Request) -> web.Response:
        """Answer a GET or HEAD."""
        try:
            self._read_if_changed()
        except FileNotFoundError:
            text = 'unable to find the client; build it with "make client"\n'
            return web.Response(status=HTTPStatus.NOT_FOUND, text=text)
        headers = {**_HEADERS, "ETag": f'"{self._tag}"'}
        if any(known.value in {self._tag, "*"} for known in request.if_none_match or ()):
            return web.Response(status=HTTPStatus.NOT_MODIFIED, headers=headers)
        return web.Response(body=self._text, content_type="text/javascript", charset="utf-8", headers=headers)

    def _read_if_changed(self) -> None:
        found = self._path.stat()
        stamp = (found.st_mtime_ns, found.st_size)
        if stamp != self._stamp:
            self._text = self._path.read_bytes()
            self._tag = hashlib.sha256(self._text).hexdigest()[:32]
            self._stamp = stamp
