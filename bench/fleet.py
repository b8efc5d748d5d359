"""Nodes of one store, for what takes more than one, or a store that may be frozen."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.answers import BenchError
from bench.processes import cores, started_on
from bench.starting import START_SECONDS, allow_descriptors, start, wait_for_line
from gateway.embedded.host import binary

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

DESCRIPTORS = 16_000


@dataclass(frozen=True, slots=True)
class Node:
    """A running gateway."""

    pid: int
    port: int
    admin_port: int


@dataclass(frozen=True, slots=True)
class Fleet:
    """What runs: backend, store and nodes, each by its pid."""

    backend: int
    backend_port: int
    store: int
    nodes: list[Node]

    def watched(self) -> dict[str, list[int]]:
        """Whose processor time a chunk costs; ``other`` is the second node."""
        others = {"other": [self.nodes[1].pid]} if len(self.nodes) > 1 else {}
        beside = [self.backend, self.store]
        return {"system": [self.nodes[0].pid], **others, "store": [self.store], "beside": beside}


@contextlib.contextmanager
def running_fleet(nodes: int, *, lease_seconds: float) -> Iterator[Fleet]:
    """Start a backend, an empty store, and nodes, which share a core."""
    allow_descriptors(DESCRIPTORS)
    measured, other = cores() or (None, None)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bench-")))
        with started_on(other):
            backend = start(stack, folder, "backend", [sys.executable, "-m", "bench.backend"])
            store = _start_store(stack, folder)
        backend_port = int(wait_for_line(backend, folder / "backend.out", ""))
        with started_on(measured):
            processes = [
                start(
                    stack,
                    folder,
                    f"node{index}",
                    [sys.executable, "-m", "gateway"],
                    GATEWAY_UPSTREAM=f"http://127.0.0.1:{backend_port}",
                    GATEWAY_LISTEN="127.0.0.1:0",
                    GATEWAY_ADMIN_LISTEN="127.0.0.1:0",
                    GATEWAY_REDIS_URL=f"unix://{folder}/store.sock",
                    GATEWAY_LOG_FORMAT="json",
                    GATEWAY_LEASE=str(lease_seconds),
                    GATEWAY_DRAIN="0.1",
                )
                for index in range(nodes)
            ]
        started = [_node(process, folder / f"node{index}.err") for index, process in enumerate(processes)]
        yield Fleet(backend.pid, backend_port, store.pid, started)


def _node(process: subprocess.Popen[bytes], log: Path) -> Node:
    told = json.loads(wait_for_line(process, log, '"node.started"'))
    listen, admin = (int(told[name].rpartition(":")[2]) for name in ("listen", "admin"))
    return Node(process.pid, listen, admin)


def _start_store(stack: ExitStack, folder: Path) -> subprocess.Popen[bytes]:
    path = folder / "store.sock"
    options = [
        "--port",
        "0",
        "--unixsocket",
        str(path),
        "--save",
        "",
        "--appendonly",
        "no",
        "--dir",
        str(folder),
    ]
    process = start(stack, folder, "store", [binary(), *options])
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return process
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"unable to start a Valkey; {(folder / 'store.out').read_text()[-500:]}")
        time.sleep(0.02)
