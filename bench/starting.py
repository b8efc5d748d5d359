"""How processes are started and ended: in a folder of their own, bound to their core, ended by their pids."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.answers import BenchError
from bench.clients import SECONDS
from bench.processes import cores, started_on

if TYPE_CHECKING:
    from contextlib import ExitStack

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 20.0
_END_SECONDS = 10.0
_SCENARIO_SECONDS = 4 * SECONDS


def start(
    stack: ExitStack, folder: Path, name: str, command: list[str], **settings: str
) -> subprocess.Popen[bytes]:
    """Start a process in the folder; it is told to stop, and waited for, with the stack."""
    with (folder / f"{name}.out").open("wb") as out, (folder / f"{name}.err").open("wb") as err:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment() | settings,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        )
    stack.callback(_end, process)
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(_END_SECONDS)


def environment() -> dict[str, str]:
    """No setting of whoever runs the bench reaches what is measured."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    return kept | {"PYTHONPATH": str(ROOT)}


def wait_for_line(process: subprocess.Popen[bytes], path: Path, wanted: str) -> str:
    """The first whole line of a file that holds what is wanted.

    Raises:
        BenchError: The process ended, or it took too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        for line in path.read_text().splitlines(keepends=True):
            if wanted in line and line.endswith("\n"):
                return line
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"unable to start {path.stem}; {path.with_suffix('.err').read_text()[-2000:]}")
        time.sleep(0.02)


def load(scenario: str, **arguments: Any) -> dict[str, Any]:
    """Run one scenario of ``bench.load`` in a process of its own, on the core of the load.

    Raises:
        BenchError: Something was lost, doubled, out of order, refused or late.
    """
    _, other = cores() or (None, None)
    with started_on(other):
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.load"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    asked = json.dumps({"scenario": scenario, "arguments": arguments}).encode()
    try:
        told, complaints = process.communicate(asked, timeout=_SCENARIO_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise BenchError(f"unable to measure; {scenario} took too long") from None
    if process.returncode != 0:
        raise BenchError(f"{scenario} {arguments.get('wire', '')}: {complaints.decode()[-3000:]}")
    result: dict[str, Any] = json.loads(told)
    return result


def allow_descriptors(needed: int) -> None:
    """Raise the limit of open files of this process and all that it starts from here on.

    Raises:
        BenchError: The machine does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise BenchError(f"unable to open {needed} files; the hard limit is {hard} (ulimit -Hn)")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
