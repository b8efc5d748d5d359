"""The judge of the torture, on histories made by hand: each rule finds what breaks it, and nothing else."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.faults.torture_world.history import Ask, Befallen, History, Reading, Request
from tests.faults.torture_world.verdict import check, figures

if TYPE_CHECKING:
    from collections.abc import Callable

SESSION = "s"
DELTAS = [{"type": "text-delta", "id": "t", "delta": f"t1:{index}:"} for index in range(3)]
WRITTEN: list[dict[str, Any]] = [
    {"type": "start"},
    {"type": "text-start", "id": "t"},
    *DELTAS,
    {"type": "text-end", "id": "t"},
    {"type": "finish"},
]


def record(offset: int, kind: str, turn: str = "t1", epoch: str = "e", **more: Any) -> str:
    cursor = f"{epoch}.{offset}.tag"
    return json.dumps(
        {"type": kind, "session": SESSION, "offset": offset, "cursor": cursor, "turn": turn, **more}
    )


def journal(
    epoch: str = "e", *, reason: str = "complete", chunks: int = len(WRITTEN), **end: Any
) -> list[str]:
    """A session of one turn."""
    told = [{**chunk, "messageId": "m"} if chunk["type"] == "start" else chunk for chunk in WRITTEN[:chunks]]
    lines = [record(1, "turn-start", epoch=epoch)]
    lines += [record(2 + index, "chunk", epoch=epoch, data=chunk) for index, chunk in enumerate(told)]
    return [*lines, record(len(lines) + 1, "turn-end", epoch=epoch, reason=reason, **end)]


def reading(
    lines: list[str], *, begin: int = 0, at: float = 10.0, asked: str = "start", **more: Any
) -> Reading:
    """Somebody is told some lines, 10 ms apart."""
    placed: dict[str, Any] = {
        "client": "c1", "connection": 1, "carrier": "websocket", "node": "0.1", "session": SESSION,
        "asked": asked, "at": at, "cursor": f"e.{begin}.tag", "offset": begin, "ending": "left",
    }  # fmt: skip
    timed = [(at + 0.01 * (number + 1), line) for number, line in enumerate(lines)]
    return Reading(**{**placed, **more}, lines=timed)


def ask(command: dict[str, Any], reply: dict[str, Any] | None, at: float = 9.0, **more: Any) -> Ask:
    named = {"session": SESSION, "id": 1, **command}
    about: dict[str, Any] = {"client": "c1", "connection": 1, "carrier": "websocket", "node": "0.1", **more}
    return Ask(
        **about, command=named, asked_at=at, reply=reply, replied_at=None if reply is None else at + 0.5
    )


def sent(turn: str = "t1", **more: Any) -> Ask:
    return ask({"type": "send", "turn": turn}, {"type": "accepted", "cursor": "e.0.", "turn": turn}, **more)


def cancelled(result: str = "cancelled", *, named: bool = True, at: float = 9.6) -> Ask:
    command = {"type": "cancel", **({"turn": "t1"} if named else {})}
    return ask(command, {"type": "cancelled", "turns": [{"turn": "t1", "result": result}]}, at)


def asked_of_backend(
    written: list[dict[str, Any]] | None = None, *, plan: str = "complete", **more: Any
) -> Request:
    chunks = WRITTEN if written is None else written
    finished = 9.8 if written is None and plan == "complete" else None
    about: dict[str, Any] = {"arrived_at": 9.2, "open_at_arrival": True, "finished_at": finished, **more}
    return Request("t1", SESSION, {"end": plan}, written=list(chunks), **about)


def history(lines: list[str] | None = None, **more: Any) -> History:
    """All is well: one turn, a move between carriers, and two nodes that tell the same at the end."""
    told = journal() if lines is None else lines
    members: dict[str, Any] = {
        "readings": [
            reading(told[:4]),
            reading(told[4:], begin=4, asked="e.4.tag", connection=2, carrier="sse", ending="open"),
        ],
        "finals": [reading(told, at=20, node=node) for node in ("0.1", "1.1")],
        "asks": [sent()],
        "requests": [asked_of_backend()],
        "calm_at": 15.0,
    }
    return History(seed=1, lease_seconds=3.0, drain_seconds=14.0, **{**members, **more})


def cut_short(**end: Any) -> list[str]:
    """A turn that ended after its first delta."""
    return journal(chunks=3, **end)


def rules_of(judged: History) -> set[str]:
    """Which guarantees were violated."""
    return {violation.rule for violation in check(judged)[1]}


def test_a_correct_history_has_no_violation_and_its_figures() -> None:
    """A judge that cries wolf is switched off."""
    facts, violations = check(history())
    assert violations == []
    told = figures(facts)
    assert (told["turns by end"], told["records"], told["resumed by cursor"]) == ({"complete": 1}, 9, 1)


def test_the_ends_that_may_be_are_no_violation() -> None:
    """Cancelled by name or by all; interrupted with its node; an error as it was planned."""
    short, written = cut_short(reason="cancelled"), WRITTEN[:4]
    request = asked_of_backend(written)
    assert rules_of(history(short, asks=[sent(), cancelled()], requests=[request])) == set()
    assert rules_of(history(short, asks=[sent(), cancelled(named=False)], requests=[request])) == set()
    interrupting = ask({"type": "send", "turn": "t2", "overlap": "interrupt"}, None, 9.6)
    assert rules_of(history(short, asks=[sent(), interrupting], requests=[request])) == set()
    closers = [*short[:-1], record(5, "chunk", data=WRITTEN[-2]), record(6, "turn-end", reason="cancelled")]
    assert rules_of(history(closers, asks=[sent(), cancelled()], requests=[request])) == set()
    killed = [Befallen("kill", 0, 9.5, 12.0)]
    lost = cut_short(reason="interrupted", error={"code": "node-lost"})
    assert rules_of(history(lost, faults=killed, requests=[request])) == set()
    cut = cut_short(reason="error", error={"code": "upstream-cut-off"})
    assert rules_of(history(cut, requests=[asked_of_backend(written, plan="cut")])) == set()


def _swap_content(judged: History) -> None:
    at, _ = judged.readings[0].lines[3]
    judged.readings[0].lines[3] = (
        at,
        record(4, "chunk", data={"type": "text-delta", "id": "t", "delta": "other"}),
    )


def _gap(judged: History) -> None:
    del judged.readings[0].lines[1]


def _again(judged: History) -> None:
    judged.readings[0].lines.insert(2, judged.readings[0].lines[1])


def _elsewhere(judged: History) -> None:
    judged.readings[1].asked = "e.3.tag"


def _silent_epoch(judged: History) -> None:
    judged.readings[1].lines = [(at, line.replace("e.", "f.")) for at, line in judged.readings[1].lines]
    judged.faults.append(Befallen("failover", None, 9.5, 9.6))


def _partial_recovery(judged: History) -> None:
    judged.readings[1].resync = "epoch-changed"
    judged.faults.append(Befallen("failover", None, 9.5, 9.6))


def _needless_resync(judged: History) -> None:
    judged.readings[0].reason, judged.readings[0].ending = "epoch-changed", "resync"


def _stray(judged: History) -> None:
    judged.strays.append(("c1", journal()[0]))


def _seen_and_gone(judged: History) -> None:
    judged.readings.append(reading([record(10, "turn-start", "t9")], begin=9, asked="e.9.tag"))


def _nodes_differ(judged: History) -> None:
    judged.finals[1].lines.pop()


def _never_told(judged: History) -> None:
    judged.readings[1].lines.pop()


def _unreadable(judged: History) -> None:
    judged.unreadable.append("s on node 1.1")


def _twice_asked(judged: History) -> None:
    judged.requests.append(copy.deepcopy(judged.requests[0]))


def _refused_and_begun(judged: History) -> None:
    judged.requests.append(asked_of_backend())
    judged.requests[-1].turn = "t7"


def _accepted_and_gone(judged: History) -> None:
    judged.asks.append(sent("t8"))


def _accepted_elsewhere(judged: History) -> None:
    judged.asks[0].reply = {"type": "accepted", "cursor": "e.3.tag", "turn": "t1"}


def _record_before_accepted(judged: History) -> None:
    judged.asks[0].replied_at = 10.02


def _runs_for_ever(judged: History) -> None:
    judged.finals[1].turns = [{"turn": "t1", "state": "running", "offset": 1}]


CHANGES: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        _swap_content, _gap, _again, _elsewhere, _silent_epoch, _partial_recovery, _needless_resync, _stray,
        _seen_and_gone,
        _nodes_differ, _never_told, _unreadable, _twice_asked, _refused_and_begun, _accepted_and_gone,
        _accepted_elsewhere, _record_before_accepted, _runs_for_ever,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("_swap_content", "G1"), ("_seen_and_gone", "G1"), ("_nodes_differ", "G1"), ("_unreadable", "G1"),
        ("_needless_resync", "G1"), ("_gap", "G2"), ("_again", "G2"), ("_elsewhere", "G2"),
        ("_silent_epoch", "G2"), ("_partial_recovery", "G2"), ("_stray", "G2"), ("_never_told", "G2"),
        ("_accepted_elsewhere", "G2"), ("_record_before_accepted", "G2"), ("_twice_asked", "G3"),
        ("_refused_and_begun", "G7"), ("_accepted_and_gone", "G7"), ("_runs_for_ever", "G7"),
    ],
)  # fmt: skip
def test_each_change_of_a_correct_history_is_found(name: str, rule: str) -> None:
    """A rule that finds nothing is none."""
    judged = history()
    CHANGES[name](judged)
    assert rule in rules_of(judged)


@pytest.mark.parametrize(
    ("lines", "requests", "rule"),
    [
        (cut_short(reason="complete"), [asked_of_backend(WRITTEN[:4])], "G7"),
        (cut_short(reason="complete"), [asked_of_backend()], "G6"),
        (cut_short(reason="cancelled"), [asked_of_backend(WRITTEN[:4])], "G5"),
        (cut_short(reason="interrupted", error={"code": "node-lost"}), [asked_of_backend(WRITTEN[:4])], "G7"),
        (cut_short(reason="error", error={"code": "upstream-cut-off"}), [asked_of_backend()], "G7"),
        (journal()[:-1], [asked_of_backend()], "G7"),
        ([*journal(), record(10, "chunk", data=DELTAS[0])], [asked_of_backend()], "G7"),
        ([*journal(), record(10, "turn-end", reason="complete")], [asked_of_backend()], "G7"),
        (journal(), [asked_of_backend([*WRITTEN[:2], DELTAS[1], DELTAS[0]], finished_at=9.8)], "G6"),
        (journal(), [asked_of_backend([*WRITTEN[:4], *WRITTEN[3:]], finished_at=9.8)], "G6"),
    ],
    ids=[
        "complete-without-finish", "complete-without-all", "cancelled-by-nobody", "interrupted-by-nothing",
        "an-error-nobody-planned", "no-end", "a-chunk-after-the-end", "two-ends", "another-order",
        "a-chunk-missing",
    ],
)  # fmt: skip
def test_a_turn_that_is_not_as_it_was_written_is_found(
    lines: list[str], requests: list[Request], rule: str
) -> None:
    """One writer, one end, and the right one."""
    assert rule in rules_of(history(lines, requests=requests))


def test_a_cancel_answered_too_early_is_found() -> None:
    """The kernel says that the connection is open, or the request comes after the answer."""
    short = cut_short(reason="cancelled")
    early = cancelled()
    early.open_upstreams = ["t1"]
    assert "G4" in rules_of(history(short, asks=[sent(), early], requests=[asked_of_backend(WRITTEN[:4])]))
    late = asked_of_backend(WRITTEN[:4], arrived_at=12.0)
    assert "G4" in rules_of(history(short, asks=[sent(), cancelled()], requests=[late]))
    late.open_at_arrival = False  # it was closed before it was looked at
    assert rules_of(history(short, asks=[sent(), cancelled()], requests=[late])) == set()


def test_a_cancel_that_says_what_did_not_happen_is_found() -> None:
    """The reply and the `turn-end` tell the same; a cancel before its send is not forgotten."""
    assert "G4" in rules_of(history(asks=[sent(), cancelled()]))
    forgotten = [cancelled("unknown", at=8.0), sent()]
    assert "G4" in rules_of(history(asks=forgotten))
    assert "G4" not in rules_of(history(asks=forgotten, faults=[Befallen("failover", None, 8.6, 8.7)]))


def test_a_fault_explains_an_end_only_of_its_own_node_and_time() -> None:
    """Otherwise any kill would excuse every turn."""
    lost = cut_short(reason="interrupted", error={"code": "node-lost"})
    requests = [asked_of_backend(WRITTEN[:4])]
    for fault in (
        Befallen("kill", 1, 9.5, 12.0),
        Befallen("kill", 0, 1.0, 2.0),
        Befallen("stop-short", 0, 9.5, 9.6),
        Befallen("freeze", None, 9.5, 9.9),
        Befallen("drain", 0, 9.5, 12.0, "ended with status 0 after 2.5 s"),
    ):
        assert rules_of(history(lost, faults=[fault], requests=requests)) == {"G7"}, fault
    drained = Befallen("drain", 0, -5.0, 12.0, "ended with status 0 after 17.0 s")
    assert rules_of(history(lost, faults=[drained], requests=requests)) == set()
    unanswered = [ask({"type": "send", "turn": "t1"}, None)]
    outage = Befallen("freeze", None, 9.5, 9.9)
    assert rules_of(history(lost, asks=unanswered, faults=[outage], requests=requests)) == set()
    assert rules_of(history(lost, asks=unanswered, requests=requests)) == {"G7"}


def test_a_node_that_does_not_stop_is_found() -> None:
    """Told to stop, it ends as it should, or somebody waits for it for ever."""
    for note in ("never ended after 24.0 s", "ended with status 1 after 2.0 s"):
        assert rules_of(history(faults=[Befallen("drain", 1, 9.5, 12.0, note)])) == {"drain"}


def test_after_a_loss_an_epoch_may_change_and_what_is_left_must_be_whole() -> None:
    """What two nodes lost together may be gone; nothing else."""
    failover = Befallen("failover", None, 9.5, 9.6)
    renewed = [reading(journal("f"), at=20, cursor="f.0.", node=node) for node in ("0.1", "1.1")]
    assert rules_of(history(finals=renewed, faults=[failover])) == set()
    again = [reading(journal("e")[:4], reason="epoch-changed", ending="resync")]
    assert rules_of(history(readings=again, finals=renewed, faults=[failover])) == set()
    empty = [reading([], at=20, cursor=".0.", node=node) for node in ("0.1", "1.1")]
    assert rules_of(history(finals=empty, faults=[failover])) == {"G7"}
    assert rules_of(history(finals=empty, faults=[failover, Befallen("kill", 0, 9.6, 12.0)])) == set()


def test_two_histories_of_one_epoch_are_told_apart() -> None:
    """A failover may fork an epoch: nobody may be led from one branch to the other."""
    lost = [record(index, "chunk", data={"x": index}).replace(".tag", ".lost") for index in (5, 6)]
    failover = [Befallen("failover", None, 9.5, 9.6)]
    forked = history(faults=failover)
    forked.readings.append(reading(lost, begin=4, at=9.0, asked="e.4.tag", connection=7))
    assert rules_of(forked) == set()
    forked.faults = []
    assert "G1" in rules_of(forked)
    forked.faults = failover
    forked.readings.append(reading(journal()[6:], begin=6, asked="e.6.lost", connection=8))
    assert rules_of(forked) == {"G2"}


def test_two_contents_at_one_cursor_are_found_also_after_a_loss() -> None:
    """A cursor names its history: whatever was lost, it stands for one content."""
    twice = history(faults=[Befallen("failover", None, 9.5, 9.6)])
    twice.readings.append(reading([record(5, "chunk", data="other")], begin=4, at=9.0, asked="e.4.tag"))
    assert "G1" in rules_of(twice)


def test_a_saved_history_is_a_line_for_each_thing(tmp_path: Any) -> None:
    """What is kept for whoever looks for the bug."""
    judged = history()
    judged.save(tmp_path / "history.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [next(iter(line)) for line in lines[1:]] == ["readings"] * 2 + ["asks", "requests"] + [
        "finals"
    ] * 2


def test_an_end_that_the_store_and_its_node_lost_together_may_be_another() -> None:
    """Told at the failover, and its node was frozen before it could write it again: others seal the turn."""
    whole = reading(journal())  # its end is told at 10.09
    sealed = journal(epoch="f", chunks=4, reason="interrupted", error={"code": "node-lost"})
    finals = [reading(sealed, at=20, node=node, asked="start", cursor="f.0.tag") for node in ("0.1", "1.1")]
    failover = Befallen("failover", None, 10.0, 10.2)

    def rules(*faults: Befallen) -> set[str]:
        return rules_of(history(readings=[whole], finals=finals, faults=[failover, *faults]))

    assert "G7" not in rules(Befallen("stop-long", 0, 10.15, 18.0))
    assert "G7" in rules()
    assert "G7" in rules(Befallen("stop-long", 1, 10.15, 18.0))  # of another node
    assert "G7" in rules(Befallen("stop-long", 0, 40.0, 48.0))  # long after what is kept
