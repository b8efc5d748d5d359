"""What Linux says of a process: processor time, memory, children, and the core it may run on."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_PROC = Path("/proc")
_MEMORY = re.compile(r"^Vm(\w+):\s+(\d+) kB", re.MULTILINE)


def processor_nanoseconds(pids: Iterable[int]) -> int:
    """Processor time of all threads so far, from the scheduler's own count; 0 for a process that is gone."""
    total = 0
    for pid in pids:
        for path in _PROC.glob(f"{pid}/task/*/schedstat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total += int(path.read_text().split()[0])
    return total


def memory_bytes(pid: int) -> int:
    """Proportional set size: what the process holds, and its share of what it shares."""
    found = re.search(r"^Pss:\s+(\d+) kB", (_PROC / str(pid) / "smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found is not None else 0


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes of a process that are in memory: now, and at the most since :func:`forget_peak`."""

    now: int
    peak: int


def resident(pid: int) -> Resident:
    """What is in memory."""
    status = (_PROC / str(pid) / "status").read_text()
    found = {name: int(kilobytes) * 1024 for name, kilobytes in _MEMORY.findall(status)}
    return Resident(found["RSS"], found["HWM"])


def forget_peak(pid: int) -> None:
    """The most that was in memory begins anew."""
    (_PROC / str(pid) / "clear_refs").write_text("5")


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    return sum(1 for _ in (_PROC / str(pid) / "fd").iterdir())


def descendants(pid: int) -> list[int]:
    """Children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in _PROC.glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    found = list(children.get(pid, ()))
    for child in found:
        found += children.get(child, ())
    return found


def cores() -> tuple[int, int] | None:
    """The core of what is measured, and the core of all else; ``None`` where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[1]) if len(allowed) > 1 else None


@contextlib.contextmanager
def started_on(core: int | None) -> Iterator[None]:
    """What is started inside inherits the core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def move_to(core: int | None, pids: Iterable[int]) -> None:
    """Bind all threads of running processes to a core."""
    if core is None:
        return
    for pid in pids:
        for task in _PROC.glob(f"{pid}/task/[0-9]*"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task.name), {core})
