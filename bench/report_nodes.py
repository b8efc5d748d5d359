"""The figures of crowds, of several nodes, and of what breaks, as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.node_parts import SOAK_CHUNKS, Figures, Place
from bench.tables import NONE, duration, table

if TYPE_CHECKING:
    from bench.measure_nodes import NodesResults
    from bench.plan import NodesPlan

MEBI = 1024 * 1024


def nodes_lines(results: NodesResults) -> list[str]:
    """All tables."""
    plan = results.plan
    parts = {
        f"**{plan.sockets:,} idle sockets** on one node, a session each, beside {_beside(plan)}": _crowd(
            results.crowd
        ),
        f"**Storm**: {_storm_title(plan)}": _storm(results.storm),
        f"**Catch-up of a crowd**: {_rush_title(plan)}": _rush(results.rush),
        "**Two nodes on one store**: turns of node A, by where their clients are attached": _across(results),
        f"**Cancel** of {plan.cancels} turns of node A, one by one, by where it is asked for": _cancel(
            results.cancel
        ),
        f"**What breaks**, with {plan.broken.turns} turns x {plan.broken.rate} chunks/s on A": _broken(
            results
        ),
        f"**Soak**: {_soak_title(plan)}": _soak(results.soak),
    }
    lines = [f"**Crowds, nodes, and what breaks**: {_how(plan)}"]
    for title, rows in parts.items():
        lines += ["", title, "", *rows]
    return lines


def _how(plan: NodesPlan) -> str:
    return (
        f"{plan.repetitions} repetitions (of the soak and the cancels one), medians. The nodes share a core; "
        "clients, backend and Valkey share the other, so a crowd's own work is in the latencies beside it. "
        f"Lease {plan.lease_seconds:g} s. Memory is resident."
    )


def _storm_title(plan: NodesPlan) -> str:
    return (
        f"node A of two is killed with {plan.storm_clients:,} attached clients, each {plan.storm_back} "
        f"records behind; all come to B, which streams {_beside(plan)}"
    )


def _rush_title(plan: NodesPlan) -> str:
    return (
        f"{plan.rush_clients:,} clients come at once, each {plan.rush_records:,} records behind in one of "
        f"{plan.rush_sessions} sessions"
    )


def _soak_title(plan: NodesPlan) -> str:
    return (
        f"{plan.soak_turns:,} turns of {SOAK_CHUNKS} chunks through one node, on every carrier, with cancels "
        "and losses; its size when it holds none of them any more"
    )


def _beside(plan: NodesPlan) -> str:
    pace = plan.beside
    return f"{pace.turns} turns x {pace.rate} chunks/s"


def _crowd(crowd: Figures) -> list[str]:
    rows = []
    for name, label in (("alone", "alone"), ("among", "beside the sockets")):
        told = crowd[name]
        cost = told["cpu_ns_per_chunk"]
        rows.append(
            (
                label,
                duration(told["p50_ns"]),
                duration(told["p99_ns"]),
                duration(cost["system"]),
                duration(cost["store"]),
                f"{told['idle']['system']:.2%}",
                f"{told['idle']['store']:.2%}",
                NONE if name == "alone" else f"{crowd['bytes_per_socket'] / 1000:.1f} kB",
            )
        )
    header = (
        "", "p50", "p99", "CPU per chunk", "Valkey CPU per chunk", "idle: CPU of a core", "Valkey's",
        "per idle socket",
    )  # fmt: skip
    return table(header, rows)


def _storm(storm: dict[bool, Figures]) -> list[str]:
    header = (
        "clients", "attached: p50", "all", "caught up: p50", "all", "peak memory of B", "kept", "refused",
        "lost", "its turns before: p50", "p99", "max", "meanwhile: p50", "p99", "max",
    )  # fmt: skip
    return table(
        header,
        [
            (
                "wait as ours do" if jitter else "come at once",
                *_arrival(told),
                *(
                    duration(told[when][name])
                    for when in ("calm", "stormy")
                    for name in ("p50_ns", "p99_ns", "max_ns")
                ),
            )
            for jitter, told in storm.items()
        ],
    )


def _latencies(told: Figures) -> tuple[str, ...]:
    return tuple(duration(told[name]) for name in ("p50_ns", "p99_ns", "max_ns"))


def _arrival(told: Figures) -> tuple[str, ...]:
    moments = ("attached_p50_ns", "attached_max_ns", "caught_up_p50_ns", "caught_up_max_ns")
    return (
        *(duration(told[name]) for name in moments),
        f"+{told['peak_bytes'] / MEBI:.0f} MiB",
        f"+{told['kept_bytes'] / MEBI:.0f} MiB",
        f"{told['refused']:.0f}",
        f"{told['lost']:.0f}",
    )


def _rush(rush: Figures) -> list[str]:
    header = (
        "attached: p50", "all", "caught up: p50", "all", "peak memory", "kept", "refused", "lost",
        "records/s",
    )  # fmt: skip
    rate = rush["records"] / rush["caught_up_max_ns"] * 1e9
    return table(header, [(*_arrival(rush), f"{rate:,.0f}")])


def _across(results: NodesResults) -> list[str]:
    rows = []
    for pace, streamed in results.across:
        for place, row in streamed.items():
            is_direct = place is Place.DIRECT
            rows.append(
                (
                    f"{pace.turns} x {pace.rate}/s, {place}",
                    duration(row.p50),
                    duration(row.p99),
                    NONE if is_direct else duration(row.added_p50),
                    NONE if is_direct else duration(row.added_p99),
                    duration(row.system),
                    duration(row.other),
                    duration(row.store),
                )
            )
    header = (
        "", "p50", "p99", "added p50", "added p99", "A's CPU per chunk", "B's", "Valkey's",
    )  # fmt: skip
    return table(header, rows)


def _cancel(cancel: dict[Place, Figures]) -> list[str]:
    names = ("close_p50_ns", "close_p99_ns", "answer_p50_ns", "answer_p99_ns")
    return table(
        ("asked at", "backend saw the close: p50", "p99", "client had the answer: p50", "p99"),
        [(place, *(duration(told[name]) for name in names)) for place, told in cancel.items()],
    )


def _broken(results: NodesResults) -> list[str]:
    kill, freeze, plan = results.kill, results.freeze, results.plan
    rows = [
        ("A is killed (-9): until all its turns are sealed", duration(kill["sealed_ns"])),
        ("until the clients at B had the `turn-end`: p50", duration(kill["told_p50_ns"])),
        ("the last of them", duration(kill["told_max_ns"])),
        (f"Valkey is frozen for {plan.frozen_seconds:g} s: chunks lost", f"0 of {freeze['chunks']:,.0f}"),
        ("longest silence of any client, half of them at B", duration(freeze["longest_gap_ns"])),
        ("after the thaw: until no chunk was later than 100 ms any more", duration(freeze["settled_ns"])),
    ]
    return table(("", ""), rows)


def _soak(samples: list[dict[str, int]]) -> list[str]:
    rows = [(f"{one['turns']:,}", f"{one['bytes'] / MEBI:.1f} MiB", str(one["files"])) for one in samples]
    warm, last = samples[(len(samples) - 1) // 2], samples[-1]
    slope = (last["bytes"] - warm["bytes"]) / (last["turns"] - warm["turns"])
    return [
        *table(("turns", "memory", "open files"), rows),
        "",
        f"Growth after the first {warm['turns']:,}: {slope:,.0f} bytes per turn and session.",
    ]
