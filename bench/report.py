"""The figures as Markdown, ready for the README."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.blocking import Block
from bench.carriers import EXPECTED
from bench.measure_client import Reader
from bench.processes import cores
from bench.report_nodes import nodes_lines
from bench.rig import System
from bench.tables import NONE, duration, machine, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.measure import Results
    from bench.measure_client import ClientResults
    from bench.measure_nodes import NodesResults
    from bench.medians import Streamed
    from bench.plan import Pace

NO_CLIENT = "Node of tests/node, or client/dist, not found: the client is left out."
_FULL = "\\* the load's own core was full: the system could do more, or chunks came later by it."


def report(results: Results, command: str) -> str:
    """All tables, and what they were measured on."""
    plan = results.plan
    lines = [
        machine(),
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
    lines += ["", *nodes_lines(results.nodes)] if results.nodes else []
    if System.NGINX not in results.steady:
        lines += ["", "nginx not found: column left out."]
    client_rows = results.client.steady.values() if results.client else ()
    if any(row.load_was_full for row in (*results.many.values(), *results.burst.values(), *client_rows)):
        lines += ["", _FULL]
    return "\n".join(lines)


def report_client(results: ClientResults, command: str) -> str:
    """The client's tables alone."""
    lines = [machine(), "", f"`{command}`. {_how()}", "", *_client(results)]
    if any(row.load_was_full for row in results.steady.values()):
        lines += ["", _FULL]
    return "\n".join(lines)


def report_nodes(results: NodesResults, command: str) -> str:
    """The tables of crowds, several nodes and what breaks alone."""
    return "\n".join([machine(), "", f"`{command}`.", "", *nodes_lines(results)])


def _turns(pace: Pace) -> str:
    return f"{pace.turns} turns x {pace.rate} chunks/s ({pace.offered:,} chunks/s offered)"


def _how() -> str:
    split = "gateway and nginx on one core, backend, load and Valkey on another; " if cores() else ""
    return (
        f"On loopback: {split}systems interleaved. Processor time is that of the repetition "
        "with the lowest latency, all else the median. Every chunk was checked: each once, and in order. "
        "Added = less the latency of `direct` in the same repetition. p99 is mostly the host's."
    )


def _latency_table(rows: dict[System, Streamed]) -> list[str]:
    nginx = rows.get(System.NGINX)
    return table(
        ("", "p50", "added p50", "/ nginx", "added p99", "CPU per chunk", "/ nginx", "Valkey CPU per chunk"),
        [
            (
                system,
                duration(row.p50),
                NONE if system is System.DIRECT else duration(row.added_p50),
                _ratio(row, nginx, lambda one: one.added_p50 if one.system is not None else None),
                NONE if system is System.DIRECT else duration(row.added_p99),
                duration(row.system),
                _ratio(row, nginx, lambda one: one.system),
                duration(row.store),
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
                duration(row.p50),
                *_costs(row, many.get(System.NGINX)),
                _rate(other),
                *_costs(other, burst.get(System.NGINX)),
            )
        )
    return table(header, rows)


def _costs(row: Streamed, nginx: Streamed | None) -> tuple[str, str, str]:
    return duration(row.system), _ratio(row, nginx, lambda one: one.system), duration(row.store)


def _resume_table(results: Results) -> list[str]:
    return table(
        ("", f"{results.plan.resume_chunks:,} chunks", "per idle socket"),
        [
            (
                system,
                duration(taken),
                f"{results.idle[system] / 1000:.1f} kB" if system in results.idle else NONE,
            )
            for system, taken in results.resume.items()
        ],
    )


def _cancel_table(results: Results) -> list[str]:
    return table(
        ("", "backend saw the close: p50", "p99", "client had the answer: p50", "p99"),
        [
            (system, *map(duration, (row.close_p50, row.close_p99, row.answer_p50, row.answer_p99)))
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
    return table(
        (
            "", "p50", "added p50", "added p99", "CPU per chunk", "/ nginx", "Valkey CPU per chunk",
            "Node CPU per chunk", "requests/s per client", "after a cut",
        ),
        [
            (
                reader + ("*" if row.load_was_full else ""),
                duration(row.p50),
                NONE if reader is Reader.DIRECT else duration(row.added_p50),
                NONE if reader is Reader.DIRECT else duration(row.added_p99),
                duration(row.system),
                _ratio(row, nginx, lambda one: one.system),
                duration(row.store),
                duration(row.client),
                f"{row.requests:.1f}" if row.requests else NONE,
                duration(results.reconnect.get(reader.carrier or "")),
            )
            for reader, row in results.steady.items()
        ],
    )  # fmt: skip


def _first_table(results: ClientResults) -> list[str]:
    return table(
        ("blocked", "first time", "next", "carrier"),
        [
            (block, duration(row.first), duration(row.again), EXPECTED[Block(block)])
            for block, row in results.first.items()
        ],
    )


def _rate(row: Streamed) -> str:
    return f"{row.rate:,.0f}{'*' if row.load_was_full else ''}"


def _ratio(row: Streamed, base: Streamed | None, of: Callable[[Streamed], float | None]) -> str:
    mine, theirs = of(row), of(base) if base is not None else None
    return NONE if mine is None or not theirs else f"{mine / theirs:.2f}"
