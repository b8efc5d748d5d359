"""The Valkey that comes along: its data outlives restarts and kills, and no second one is ever on it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from gateway.embedded import EmbeddedError, EmbeddedValkey
from gateway.embedded.host import processes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

MEMORY_BYTES = 64 * 1024 * 1024
LIMIT_SECONDS = 30

GATEWAY = textwrap.dedent(
    """
    import asyncio, sys
    from pathlib import Path

    import structlog
    import uvloop

    from gateway.embedded import EmbeddedError, EmbeddedValkey

    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))

    async def main() -> None:
        try:
            async with EmbeddedValkey(Path(sys.argv[1]), max_memory_bytes=64 * 1024 * 1024) as valkey:
                print("ready", valkey.pid, valkey.url, flush=True)
                await asyncio.Event().wait()
        except EmbeddedError as error:
            print("refused", error, flush=True)

    {"asyncio": asyncio.run, "uvloop": uvloop.run}[sys.argv[2]](main())
    """
)
"""A gateway that does nothing but have a Valkey; it says so in one line, and its log goes nowhere."""


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where sockets are made; each test leaves it empty, and no process that has it in its command line."""
    path = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    left = [pid for pid, command in servers().items() if f" {path}/" in command]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
    assert list(path.iterdir()) == []


def servers() -> dict[int, str]:
    """Each Valkey that runs (a dead one that nobody has waited for has no command line)."""
    return {pid: command for pid, command in processes() if "--unixsocket" in command}


def embedded(path: Path) -> EmbeddedValkey:
    return EmbeddedValkey(path, max_memory_bytes=MEMORY_BYTES)


@contextlib.asynccontextmanager
async def client(valkey: EmbeddedValkey | str) -> AsyncIterator[Redis]:
    url = valkey if isinstance(valkey, str) else valkey.url
    async with asyncio.timeout(LIMIT_SECONDS), Redis.from_url(url, decode_responses=True) as redis:
        yield redis


class GatewayProcess:
    """Another gateway: ``said`` is what it printed first, a list of words."""

    def __init__(self, process: asyncio.subprocess.Process, said: list[str]) -> None:
        self.process = process
        self.said = said

    @property
    def server_pid(self) -> int:
        return int(self.said[1])

    @property
    def url(self) -> str:
        return self.said[2]

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        if self.process.returncode is None:
            self.process.send_signal(number)
        await self.process.wait()


@pytest.fixture
async def start_gateway(tmp_path: Path) -> AsyncIterator[Callable[..., Awaitable[GatewayProcess]]]:
    started: list[asyncio.subprocess.Process] = []

    async def start(path: Path, loop: str = "asyncio", pass_fds: tuple[int, ...] = ()) -> GatewayProcess:
        with (tmp_path / "log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", GATEWAY, str(path), loop),
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=pass_fds,
            )
        started.append(process)
        assert process.stdout is not None
        async with asyncio.timeout(LIMIT_SECONDS):
            line = (await process.stdout.readline()).decode()
        assert line, (tmp_path / "log").read_text()
        return GatewayProcess(process, line.split())

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_restart_keeps_the_data(tmp_path: Path) -> None:
    """What was answered before a clean end is there after it."""
    async with embedded(tmp_path / "data") as valkey, client(valkey) as redis:
        await redis.set("chat", "kept")
    async with embedded(tmp_path / "data") as valkey, client(valkey) as redis:
        assert await redis.get("chat") == "kept"


async def test_it_refuses_writes_rather_than_forgets_and_listens_on_its_socket_alone(tmp_path: Path) -> None:
    """An evicted key is a lost chat, and an open port is somebody else's."""
    wanted = {
        "dir": str(tmp_path / "data"),
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory": str(MEMORY_BYTES),
        "maxmemory-policy": "noeviction",
        "protected-mode": "yes",
        "unixsocketperm": "700",
    }
    async with embedded(tmp_path / "data") as valkey, client(valkey) as redis:
        assert await redis.config_get(*wanted) == wanted


async def test_the_files_are_private_in_a_folder_that_is_not(tmp_path: Path) -> None:
    """A folder made by hand is often open to others; and our own umask is as it was."""
    (tmp_path / "data").mkdir(mode=0o755)
    umask = os.umask(0o022)
    try:
        async with embedded(tmp_path / "data"):
            assert os.umask(0o022) == 0o022
    finally:
        os.umask(umask)
    files = list((tmp_path / "data" / "appendonlydir").iterdir())
    assert files
    assert [path.name for path in files if path.stat().st_mode & 0o077] == []


async def test_only_this_user_reaches_the_data_and_the_socket(tmp_path: Path) -> None:
    """Chats are private on a machine with more users than one."""
    async with embedded(tmp_path / "data") as valkey:
        socket = Path(valkey.url.removeprefix("unix://"))
        modes = [os.stat(path).st_mode & 0o777 for path in (tmp_path / "data", socket.parent, socket)]  # noqa: PTH116 - a local file
        assert modes == [0o700] * 3


async def test_a_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    """The gateway ends it after its own drain; a terminal signals its session's foreground group."""
    async with embedded(tmp_path / "data") as valkey:
        assert os.getsid(valkey.pid) == valkey.pid != os.getsid(0)


async def test_a_second_start_on_the_same_directory_is_refused_and_the_first_lives_on(
    tmp_path: Path, start_gateway: Callable[..., Awaitable[GatewayProcess]]
) -> None:
    """Two servers on one file destroy it; the message names the process to stop."""
    (tmp_path / "gateway.lock").write_text("999999999\n")
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        await redis.set("chat", "kept")
        other = await start_gateway(tmp_path)
        assert " ".join(other.said) == (
            f"refused unable to use {tmp_path}; the gateway with pid {os.getpid()} uses it; "
            "stop it, or set GATEWAY_DATA_DIR to another folder"
        )
        with pytest.raises(EmbeddedError, match=f"the gateway with pid {os.getpid()} uses it"):
            await embedded(tmp_path).__aenter__()
        assert await redis.get("chat") == "kept"


async def test_the_refusal_names_no_pid_that_cannot_be_the_owners(tmp_path: Path) -> None:
    """The owner may be in another container, whose pids mean nothing here."""
    async with embedded(tmp_path):
        (tmp_path / "gateway.lock").write_text("999999999\n")
        with pytest.raises(EmbeddedError, match="another gateway uses it"):
            await embedded(tmp_path).__aenter__()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_gateway_killed_with_its_server_alive_stops_no_start_and_loses_nothing(
    tmp_path: Path, start_gateway: Callable[..., Awaitable[GatewayProcess]], loop: str
) -> None:
    """The next start ends the orphan, which flushes, before it starts its own."""
    killed = await start_gateway(tmp_path, loop)
    async with client(killed.url) as redis:
        await redis.set("before", "kept")
        await killed.kill()
        # A living orphan: it still writes, and says things into a pipe that nobody reads.
        await redis.set("after", "kept too")
        await redis.bgrewriteaof()
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        assert valkey.pid != killed.server_pid
        assert killed.server_pid not in servers()
        assert await redis.mget("before", "after") == ["kept", "kept too"]


async def test_an_orphan_that_does_not_end_when_asked_is_killed(
    tmp_path: Path,
    start_gateway: Callable[..., Awaitable[GatewayProcess]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A frozen server must not keep a gateway from starting for ever."""
    monkeypatch.setattr("gateway.embedded.server._END_SECONDS", 0.2)
    killed = await start_gateway(tmp_path)
    os.kill(killed.server_pid, signal.SIGSTOP)
    await killed.kill()
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        assert killed.server_pid not in servers()
        assert await redis.ping()


async def test_both_killed_leaves_nothing_that_stops_the_next_start(
    tmp_path: Path, start_gateway: Callable[..., Awaitable[GatewayProcess]]
) -> None:
    """A machine that lost its power comes back by itself, and the old socket's folder goes."""
    killed = await start_gateway(tmp_path)
    async with client(killed.url) as redis:
        await redis.set("chat", "kept")
        await redis.waitaof(1, 0, LIMIT_SECONDS * 1000)
    await killed.kill()
    os.kill(killed.server_pid, signal.SIGKILL)
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        assert await redis.get("chat") == "kept"


async def test_a_server_that_cannot_be_found_is_not_joined_by_a_second_one(
    tmp_path: Path,
    start_gateway: Callable[..., Awaitable[GatewayProcess]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lock alone says that it lives; its record may be gone, or written by somebody else."""
    monkeypatch.setattr("gateway.embedded.server._END_SECONDS", 0.1)
    monkeypatch.setattr("gateway.embedded.server._KILL_SECONDS", 0.1)
    killed = await start_gateway(tmp_path)
    await killed.kill()
    record = (tmp_path / "valkey.json").read_text()
    for bad in ("", "{", "[]", '{"socket": ""}', '{"socket": 1}', '{"socket": "/tmp"}'):
        (tmp_path / "valkey.json").write_text(bad)
        with pytest.raises(EmbeddedError, match="a Valkey that this gateway cannot end holds"):
            await embedded(tmp_path).__aenter__()
        assert killed.server_pid in servers()
    (tmp_path / "valkey.json").write_text(record)
    monkeypatch.undo()
    async with embedded(tmp_path):
        assert killed.server_pid not in servers()


async def test_a_record_that_names_some_other_file_removes_nothing(tmp_path: Path) -> None:
    """The next start takes away an old socket; a record is a file like any other, and may be wrong."""
    other = tmp_path / "other" / "valkey.sock"
    other.parent.mkdir()
    other.write_text("precious")
    for record in (json.dumps({"socket": str(other)}), "{", "[]", "null", '"socket"'):
        (tmp_path / "valkey.json").write_text(record)
        async with embedded(tmp_path) as valkey, client(valkey) as redis:
            assert await redis.ping()
    assert other.read_text() == "precious"


async def test_a_running_servers_warnings_are_ours(tmp_path: Path) -> None:
    """A full disk is told in one place; what every server says while it starts and ends is no news."""
    with capture_logs() as logs:
        async with embedded(tmp_path) as valkey, client(valkey) as redis:
            await redis.eval("server.log(server.LOG_WARNING, 'disk full')", 0)
            while not any(entry.get("text") == "<lua> disk full" for entry in logs):  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0)
    assert [entry["text"] for entry in logs if entry["log_level"] != "debug"] == ["<lua> disk full"]


async def test_a_process_that_only_mentions_the_socket_is_left_alone(
    tmp_path: Path, start_gateway: Callable[..., Awaitable[GatewayProcess]]
) -> None:
    """An operator's ``valkey-cli -s <socket>`` is no orphan."""
    killed = await start_gateway(tmp_path)
    await killed.kill()
    socket = json.loads((tmp_path / "valkey.json").read_text())["socket"]
    looking = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", "import time; time.sleep(60)", "-s", socket)
    )
    try:
        async with embedded(tmp_path):
            assert killed.server_pid not in servers()
        assert looking.returncode is None
    finally:
        looking.kill()
        assert await looking.wait() == -signal.SIGKILL


async def test_of_many_that_start_at_once_on_an_orphan_one_wins(
    tmp_path: Path, start_gateway: Callable[..., Awaitable[GatewayProcess]]
) -> None:
    """Nothing lies between looking for an orphan and starting anew: two would both end it, and both start."""
    killed = await start_gateway(tmp_path)
    await killed.kill()
    gateways = await asyncio.gather(*(start_gateway(tmp_path) for _ in range(4)))
    assert sorted(gateway.said[0] for gateway in gateways) == ["ready", "refused", "refused", "refused"]
    winner = next(gateway for gateway in gateways if gateway.said[0] == "ready")
    assert killed.server_pid not in servers()
    async with client(winner.url) as redis:
        assert (await redis.info("server"))["process_id"] == winner.server_pid
    for gateway in gateways:
        await gateway.process.communicate() if gateway is not winner else await winner.kill()
    async with embedded(tmp_path):
        assert winner.server_pid not in servers()


async def test_a_server_that_ends_by_itself_is_told(tmp_path: Path) -> None:
    """The gateway is to say so and stop, not to answer with errors for ever."""
    async with embedded(tmp_path) as valkey:
        waiting = asyncio.create_task(valkey.wait_exit())
        os.kill(valkey.pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT_SECONDS):
            assert await waiting == -signal.SIGKILL


async def test_a_server_that_does_not_end_when_asked_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that waits for a frozen server never ends itself."""
    monkeypatch.setattr("gateway.embedded.server._END_SECONDS", 0.2)
    async with embedded(tmp_path) as valkey:
        os.kill(valkey.pid, signal.SIGSTOP)
    assert valkey.pid not in servers()


async def test_a_deep_directory_works(tmp_path: Path) -> None:
    """A unix socket's path holds 107 bytes, a folder's 4,096; blanks and quotes are its right."""
    deep = tmp_path.joinpath(*["a 'deep' \"folder\" \\ é"] * 8)
    assert len(os.fsencode(deep)) > 107
    for expected in (1, 2):
        async with embedded(deep) as valkey, client(valkey) as redis:
            assert await redis.incr("starts") == expected


async def test_a_relative_directory_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``.gateway`` is the default."""
    monkeypatch.chdir(tmp_path)
    async with embedded(Path(".gateway")):
        assert (tmp_path / ".gateway" / "appendonlydir").is_dir()


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("file", errno.EEXIST),
        ("file/below", errno.ENOTDIR),
        ("x" * 300, errno.ENAMETOOLONG),
        ("/proc/gateway", errno.ENOENT),
    ],
)
async def test_a_directory_that_cannot_be_used_is_a_clear_error(
    tmp_path: Path, path: str, reason: int
) -> None:
    """The person who set GATEWAY_DATA_DIR is told what is wrong with it; permissions would not stop root."""
    (tmp_path / "file").write_text("")
    with pytest.raises(EmbeddedError) as caught:
        await embedded(tmp_path / path).__aenter__()
    assert str(caught.value) == (
        f"unable to use {tmp_path / path} for the gateway's own Valkey; {os.strerror(reason)}; "
        "set GATEWAY_DATA_DIR to a folder that can be written, or GATEWAY_REDIS_URL to a server"
    )


async def test_a_damaged_file_is_not_repaired_in_silence(tmp_path: Path) -> None:
    """The error has the server's own words, what to do, and leaves the file as it was."""
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        await redis.set("chat", "kept")
    (journal,) = (tmp_path / "appendonlydir").glob("*.incr.aof")
    sound = journal.read_bytes()
    journal.write_bytes(b"this is no command\r\n" + sound)
    with pytest.raises(EmbeddedError) as caught:
        await embedded(tmp_path).__aenter__()
    assert "Bad file format reading the append only file" in str(caught.value)
    assert f"repair {tmp_path / 'appendonlydir'} with valkey-check-aof --fix, or move it away" in str(
        caught.value
    )
    assert journal.read_bytes() == b"this is no command\r\n" + sound
    journal.write_bytes(sound)
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        assert await redis.get("chat") == "kept"


async def test_a_half_written_last_command_costs_that_command_alone(tmp_path: Path) -> None:
    """What a power cut leaves is no damage."""
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        await redis.set("chat", "kept")
    (journal,) = (tmp_path / "appendonlydir").glob("*.incr.aof")
    journal.write_bytes(journal.read_bytes() + b"*3\r\n$3\r\nSET\r\n$4\r\nch")
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        assert await redis.get("chat") == "kept"


async def test_a_start_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """A Ctrl-C while the file is read; the fixture looks for what is left."""
    valkey = embedded(tmp_path)
    starting = asyncio.create_task(valkey.__aenter__())
    async with asyncio.timeout(LIMIT_SECONDS):
        while valkey.pid not in servers():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert valkey.pid not in servers()


async def test_a_frozen_gateway_does_not_stop_its_server(
    tmp_path: Path, start_gateway: Callable[..., Awaitable[GatewayProcess]]
) -> None:
    """Other nodes may use it; what it says is lost rather than waited for."""
    gateway = await start_gateway(tmp_path)
    gateway.process.send_signal(signal.SIGSTOP)
    async with client(gateway.url) as redis:
        for _ in range(300):
            await redis.eval("server.log(server.LOG_WARNING, string.rep('x', 1000))", 0)
        assert await redis.ping()
    await gateway.kill()
    async with embedded(tmp_path):
        assert gateway.server_pid not in servers()


async def test_a_server_that_does_not_answer_is_a_clear_error(tmp_path: Path) -> None:
    """A start ends, one way or the other, and leaves no process."""
    with pytest.raises(EmbeddedError, match="it did not answer for 0 s; it said last: "):
        await EmbeddedValkey(tmp_path, max_memory_bytes=MEMORY_BYTES, start_timeout_seconds=0).__aenter__()
    async with embedded(tmp_path) as valkey, client(valkey) as redis:
        assert await redis.ping()


@pytest.mark.parametrize("unusable", ["missing", "file", "x" * 100, ""])
async def test_a_runtime_directory_that_cannot_be_used_is_passed_over(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unusable: str
) -> None:
    """XDG_RUNTIME_DIR is often inherited from somebody else, or its path too long for a socket."""
    (tmp_path / "file").write_text("")
    (tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / unusable) if unusable else "")
    monkeypatch.setattr("tempfile.tempdir", str(runtime))
    async with embedded(tmp_path / "data") as valkey, client(valkey) as redis:
        assert valkey.url.startswith(f"unix://{runtime}/session-gateway-")
        assert await redis.ping()
    assert list((tmp_path / ("x" * 100)).iterdir()) == []


async def test_no_runtime_directory_at_all_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place that was tried is named with what is wrong with it."""

    def full(prefix: str, dir: str) -> str:  # noqa: A002 - tempfile's own word
        del prefix, dir
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(EmbeddedError, match=r"/tmp: No space left on device.*set TMPDIR to a folder"):
        await embedded(tmp_path).__aenter__()


async def test_a_platform_without_a_server_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel exists for four platforms; elsewhere a Redis is to be set."""

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.files", absent)
    with pytest.raises(EmbeddedError, match="set GATEWAY_REDIS_URL to a Redis or Valkey"):
        await embedded(tmp_path).__aenter__()


async def test_the_server_holds_no_descriptor_that_was_left_open_in_the_gateway(
    tmp_path: Path, start_gateway: Callable[..., Awaitable[GatewayProcess]]
) -> None:
    """A server that outlives a killed gateway would keep a pipe open that somebody reads to its end."""
    reading, writing = os.pipe()
    try:
        gateway = await start_gateway(tmp_path, "uvloop", (writing,))
        os.close(writing)
        await gateway.kill()
        os.set_blocking(reading, False)
        assert os.read(reading, 1) == b""
    finally:
        os.close(reading)
    async with embedded(tmp_path):
        assert gateway.server_pid not in servers()
