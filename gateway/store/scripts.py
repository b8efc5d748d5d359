"""The Lua scripts: everything that the journal does to the store is one of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from gateway.store.pipeline import pack, packed

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Script:
    """One Lua script.

    Attributes:
        name: Its file.
        source: With what all scripts share in front.
        sha: What EVALSHA calls it.
    """

    name: str
    source: bytes
    sha: str


def load_script(name: str) -> Script:
    """Read ``gateway/lua/<name>.lua``, with ``common.lua`` pasted below its ``#!lua`` line."""
    folder = files("gateway") / "lua"
    shebang, _, body = (folder / f"{name}.lua").read_text().partition("\n")
    source = "\n".join((shebang, (folder / "common.lua").read_text(), body)).encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


def loading(scripts: Sequence[Script]) -> list[bytes]:
    """The commands that make a server know the scripts, packed."""
    return [part for script in scripts for part in pack(2, _LOAD, (script.source,))]


_LOAD = packed("SCRIPT") + packed("LOAD")
