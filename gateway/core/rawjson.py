r"""JSON that is looked at and handed on: validated whole, decoded in part, never encoded again.

msgspec reads a typed part of a document and leaves the rest as raw slices, checking all of it against
RFC 8259. It refuses one thing that JavaScript writes: half of a surrogate pair (``"\ud83d"``), which real
streams hold when a model's token ends inside an emoji. Such a document is read a second time with each half
replaced by U+FFFD, as every UTF-8 encoder would have done.
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from gateway.core.model import GatewayError

T = TypeVar("T")

_encoder = msgspec.json.Encoder()

_ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"  # a pair stays
    rb"|(?P<half>\\u[dD][89abcdefABCDEF][0-9a-fA-F]{2})"
    rb"|\\."  # any other escape, so that the backslash of "\\ud800" is not taken for one
)


class NotJSON(GatewayError):
    """The bytes are no JSON document."""


class WrongShape(GatewayError):
    """A JSON document, but not of the expected types. The message names the place."""


def decode(decoder: msgspec.json.Decoder[T], data: bytes | str) -> T:
    """Decode with halves of surrogate pairs forgiven.

    Raises:
        NotJSON: It is no JSON.
        WrongShape: It is JSON of other types than the decoder's.
    """
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise WrongShape(str(error)) from None
    except RecursionError:
        raise NotJSON("nested too deeply") from None
    except (msgspec.DecodeError, UnicodeError) as error:
        mended = whole_characters(data if isinstance(data, bytes) else data.encode("utf-8", "replace"))
        if mended == data:
            raise NotJSON(str(error)) from None
    try:
        return decoder.decode(mended)
    except msgspec.ValidationError as error:
        raise WrongShape(str(error)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise NotJSON(str(error)) from None


def whole_characters(data: bytes) -> bytes:
    """The document with each half of a surrogate pair, and each byte that is no UTF-8, as U+FFFD."""
    valid = data if data.isascii() else data.decode("utf-8", "replace").encode()
    return _ESCAPES.sub(lambda found: rb"\ufffd" if found["half"] else found[0], valid)


def encode(value: Any) -> bytes:
    """A value of ours as JSON on one line."""
    return _encoder.encode(value)


def one_line(document: bytes) -> bytes:
    """A *valid* JSON document without line breaks.

    JSON allows them between its tokens only, where a space means the same. Without one it is not copied.
    """
    return document.replace(b"\r", b" ").replace(b"\n", b" ")
