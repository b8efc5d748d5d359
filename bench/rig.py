"""The processes of a run: started fresh, bound to their cores, ended by their pids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from bench.answers import BenchError
from bench.clients import Wire
from bench.processes import cores, descendants, move_to, started_on
from bench.starting import START_SECONDS, start, wait_for_line

if TYPE_CHECKING:
    from collections.abc import Iterator

_NGINX = """
{user}
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} backlog=2048;
    location / {{
      proxy_pass http://127.0.0.1:{backend_port};
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""


class System(StrEnum):
    """What is measured."""

    DIRECT = "direct"
    NGINX = "nginx proxy_pass"
    GATEWAY_HTTP = "gateway, HTTP"
    GATEWAY_SDK = "gateway, SDK WebSocket"
    GATEWAY_SESSION = "gateway, session protocol"

    @property
    def wire(self) -> Wire:
        """How a client speaks to it."""
        match self:
            case System.GATEWAY_SDK:
                return Wire.SDK
            case System.GATEWAY_SESSION:
                return Wire.SESSION
            case _:
                return Wire.HTTP


@dataclass(frozen=True, slots=True)
class Rig:
    """What runs.

    Attributes:
        ports: Of each system there is.
        backend_port: Of the backend.
        pids: Of what is measured, by the name that its processor time is told under.
        beside: Pids of what shares the load's core.
    """

    ports: dict[System, int]
    backend_port: int
    gateway: int
    valkey: list[int]
    nginx: list[int]
    beside: list[int]

    def watched(self, system: System) -> dict[str, list[int]]:
        """Whose processor time a chunk through a system costs."""
        match system:
            case System.DIRECT:
                return {"beside": self.beside}
            case System.NGINX:
                return {"system": self.nginx, "beside": self.beside}
            case _:
                return {"system": [self.gateway], "store": self.valkey, "beside": self.beside + self.valkey}


def has_nginx() -> bool:
    """Whether there is one to compare with."""
    return shutil.which("nginx") is not None


@contextlib.contextmanager
def running() -> Iterator[Rig]:
    """Start backend, nginx and a gateway on an empty store of its own."""
    measured, other = cores() or (None, None)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bench-")))
        with started_on(other):
            backend = start(stack, folder, "backend", [sys.executable, "-m", "bench.backend"])
        backend_port = int(wait_for_line(backend, folder / "backend.out", ""))
        ports = {System.DIRECT: backend_port}
        nginx: list[int] = []
        with started_on(measured):
            gateway = start(
                stack,
                folder,
                "gateway",
                [sys.executable, "-m", "gateway"],
                GATEWAY_UPSTREAM=f"http://127.0.0.1:{backend_port}",
                GATEWAY_LISTEN="127.0.0.1:0",
                GATEWAY_ADMIN_LISTEN="127.0.0.1:0",
                GATEWAY_DATA_DIR=str(folder / "data"),
                GATEWAY_LOG_FORMAT="json",
                GATEWAY_DRAIN="0.1",
            )
            if has_nginx():
                ports[System.NGINX], nginx = _start_nginx(stack, folder, backend_port)
        started = json.loads(wait_for_line(gateway, folder / "gateway.err", '"node.started"'))
        valkey = descendants(gateway.pid)
        move_to(other, valkey)
        port = int(started["listen"].rpartition(":")[2])
        ports |= dict.fromkeys((System.GATEWAY_HTTP, System.GATEWAY_SDK, System.GATEWAY_SESSION), port)
        yield Rig(ports, backend_port, gateway.pid, valkey, nginx, [backend.pid])


def _start_nginx(stack: ExitStack, folder: Path, backend_port: int) -> tuple[int, list[int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        _NGINX.format(user=user, folder=folder, port=port, backend_port=backend_port)
    )
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "nginx.log", "-g", "daemon off;"]
    process = start(stack, folder, "nginx", command)
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return port, [process.pid, *descendants(process.pid)]
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"unable to start nginx; {(folder / 'nginx.err').read_text()}")
        time.sleep(0.02)
