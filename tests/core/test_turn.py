from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.core.model import By, EndCode, EndReason, TurnError
from gateway.core.sse import ServerSentEvent
from gateway.core.turn import AbortUpstream, Append, End, Turn, TurnState

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.core.turn import Effect

START = b'{"type":"start","messageId":"m1"}'
OPEN = b'{"type":"text-start","id":"a"}'
DELTA = b'{"type":"text-delta","id":"a","delta":"hi"}'
CLOSE = b'{"type":"text-end","id":"a"}'
THINK = b'{"type":"reasoning-start","id":"a"}'
FINISH_STEP = b'{"type":"finish-step"}'
FINISH = b'{"type":"finish"}'
ERROR = b'{"type":"error","errorText":"no model"}'
ERROR_AGAIN = b'{"type":"error","errorText":"again"}'
ABORT = b'{"type":"abort","reason":"user stop"}'
DATA = b'{"type":"data-x","data":1}'
PLAIN = b"hello"
JSON = b'{"choices":[]}'
DONE = b"[DONE]"

CUT = TurnError(EndCode.UPSTREAM_CUT_OFF, "the connection broke")
LOST = TurnError(EndCode.NODE_LOST, "the gateway was stopped")
ANNA = By(client="anna")
BERT = By(client="bert")

Step = bytes | str
"""An event of the backend, or the name of another input."""


def play(turn: Turn, steps: list[Step]) -> list[Effect]:
    inputs: dict[str, Callable[[], list[Effect]]] = {
        "ended": turn.body_ended,
        "failed": lambda: turn.failed(CUT),
        "cancel": lambda: turn.cancel(ANNA),
        "cancel again": lambda: turn.cancel(BERT),
        "aborted": turn.aborted,
        "interrupted": lambda: turn.interrupted(LOST),
    }
    effects: list[Effect] = []
    for step in steps:
        if step == "opened":
            turn.opened(ai_sdk=True)
        elif step == "opened plain":
            turn.opened(ai_sdk=False)
        elif isinstance(step, bytes):
            effects += turn.events([ServerSentEvent(step)])
        else:
            effects += inputs[step]()
    return effects


def payloads(effects: list[Effect]) -> list[bytes]:
    return [draft.payload for effect in effects if isinstance(effect, Append) for draft in effect.drafts]


OK, ERR, CAN, INT = EndReason.COMPLETE, EndReason.ERROR, EndReason.CANCELLED, EndReason.INTERRUPTED

ENDS: list[tuple[str, list[Step], EndReason, EndCode | None]] = [
    ("finish and DONE", ["opened", START, FINISH, DONE], OK, None),
    ("finish and the end, no DONE", ["opened", START, FINISH, "ended"], OK, None),
    ("DONE without finish", ["opened", START, OPEN, DONE], OK, None),
    ("nothing but DONE", ["opened", DONE], OK, None),
    ("failed after finish", ["opened", START, FINISH, "failed"], OK, None),
    ("interrupted after finish", ["opened", START, FINISH, "interrupted"], OK, None),
    ("start in place of the header", ["opened plain", START, "ended"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("data before start", ["opened plain", DATA, START, "ended"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("data before start, whole", ["opened plain", DATA, START, FINISH, "ended"], OK, None),
    ("data only, plain", ["opened plain", DATA, "ended"], OK, None),
    ("text before start is no SDK", ["opened plain", DELTA, START, "ended"], OK, None),
    ("clean end without finish", ["opened", START, OPEN, DELTA, "ended"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("empty answer of an SDK", ["opened", "ended"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("a step's finish is no finish", ["opened", START, FINISH_STEP, "ended"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("broken off", ["opened", START, "failed"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("plain, whole", ["opened plain", PLAIN, JSON, "ended"], OK, None),
    ("plain and empty", ["opened plain", "ended"], OK, None),
    ("plain with DONE", ["opened plain", JSON, DONE], OK, None),
    ("plain, broken off", ["opened plain", PLAIN, "failed"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("plain finish, broken off", ["opened plain", JSON, FINISH, "failed"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("plain error is its own word", ["opened plain", JSON, ERROR, "ended"], OK, None),
    ("plain abort is its own word", ["opened plain", JSON, ABORT, "ended"], OK, None),
    ("error, then finish", ["opened", START, ERROR, FINISH, DONE], ERR, EndCode.UPSTREAM_ERROR),
    ("error after finish", ["opened", START, FINISH, ERROR, DONE], ERR, EndCode.UPSTREAM_ERROR),
    ("error, then the end", ["opened", START, ERROR, "ended"], ERR, EndCode.UPSTREAM_ERROR),
    ("error, then broken off", ["opened", START, ERROR, "failed"], ERR, EndCode.UPSTREAM_ERROR),
    ("error and abort", ["opened", START, ABORT, ERROR, DONE], ERR, EndCode.UPSTREAM_ERROR),
    ("the backend's abort", ["opened", START, ABORT, DONE], CAN, None),
    ("the backend's abort, no DONE", ["opened", START, OPEN, ABORT, "ended"], CAN, None),
    ("the backend's abort and finish", ["opened", START, ABORT, FINISH, DONE], CAN, None),
    ("the backend's abort, broken off", ["opened", START, ABORT, "failed"], CAN, None),
    ("never opened", ["failed"], ERR, EndCode.UPSTREAM_CUT_OFF),
    ("cancelled before it opened", ["cancel", "aborted"], CAN, None),
    ("cancelled", ["opened", START, "cancel", "aborted"], CAN, None),
    ("cancelled, then all the rest", ["opened", START, "cancel", FINISH, DONE, "ended", "failed", "aborted"],
     CAN, None),
    ("cancelled twice", ["opened", "cancel", "cancel again", "aborted", "aborted"], CAN, None),
    ("cancelled after finish", ["opened", START, FINISH, "cancel", "aborted"], CAN, None),
    ("interrupted before it opened", ["interrupted"], INT, EndCode.NODE_LOST),
    ("interrupted", ["opened", START, "interrupted"], INT, EndCode.NODE_LOST),
    ("interrupted while it is aborted", ["opened", "cancel", "interrupted", "aborted"], INT,
     EndCode.NODE_LOST),
    ("cancelled too late", ["opened", START, FINISH, DONE, "cancel", "aborted"], OK, None),
    ("interrupted too late", ["opened", START, FINISH, DONE, "interrupted", "failed"], OK, None),
    ("opened twice", ["opened plain", "opened", PLAIN, "ended"], OK, None),
    ("opened after a cancel", ["cancel", "opened", START, "aborted"], CAN, None),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "reason", "code"), [pytest.param(*row[1:], id=row[0]) for row in ENDS])
def test_a_turns_end_is_told_truthfully(steps: list[Step], reason: EndReason, code: EndCode | None) -> None:
    """A stream that broke off is never `complete`, and one that was whole is never anything else."""
    turn = Turn(message_id="m", max_bytes=10_000)
    ends = [effect for effect in play(turn, steps) if isinstance(effect, End)]
    assert [end.reason for end in ends] == [reason]
    assert (ends[0].error.code if ends[0].error else None) == code
    assert turn.state is TurnState.ENDED


def end_of(*steps: Step, max_bytes: int = 10_000) -> End:
    end = play(Turn(message_id="m", max_bytes=max_bytes), list(steps))[-1]
    assert isinstance(end, End)
    return end


def test_an_end_says_who_and_what() -> None:
    """Observers are told whether a person, the backend or a fault ended the answer they watched."""
    assert end_of("opened", "cancel", "cancel again", "aborted").by == ANNA
    assert end_of("opened", START, ABORT, DONE).by == By(backend=True)
    assert end_of("opened", START, FINISH, DONE).by is None
    assert end_of("opened", START, ERROR, ERROR_AGAIN, DONE).error == TurnError(
        EndCode.UPSTREAM_ERROR, "no model"
    )
    untold = end_of("opened", START, b'{"type":"error"}', DONE).error
    assert untold == TurnError(EndCode.UPSTREAM_ERROR, "the backend reported an error")
    assert end_of("opened", START, "interrupted").error == LOST
    assert end_of("failed").error == CUT


@pytest.mark.parametrize(
    ("steps", "ai_sdk", "done"),
    [
        (["opened", START, FINISH, DONE], True, True),
        (["opened", START, FINISH, "ended"], True, False),
        (["opened plain", START, FINISH, "ended"], True, False),
        (["opened plain", JSON, DONE], False, True),
        (["opened plain", JSON, "ended"], False, False),
    ],
)
def test_an_end_says_how_the_backend_ended_its_stream(steps: list[Step], *, ai_sdk: bool, done: bool) -> None:
    """Each wire writes `[DONE]` where the backend, or the SDK, would have."""
    end = end_of(*steps)
    assert (end.ai_sdk, end.done) == (ai_sdk, done)


@pytest.mark.parametrize(
    ("steps", "closed"),
    [
        (["opened", START, OPEN, THINK, DELTA], [CLOSE, b'{"type":"reasoning-end","id":"a"}']),
        (["opened plain", START, OPEN], [CLOSE]),
        (["opened", START, OPEN, CLOSE], []),
        (["opened", START, OPEN, CLOSE, FINISH_STEP, OPEN], [CLOSE]),
        (["opened plain", JSON, OPEN], []),
        ([], []),
    ],
)
def test_a_cancel_closes_what_it_left_open(steps: list[Step], closed: list[bytes]) -> None:
    """Else the part stays `streaming` on every screen; a plain backend's client knows no such chunks."""
    assert [draft.payload for draft in end_of(*steps, "cancel", "aborted").closers] == closed


@pytest.mark.parametrize("steps", [["opened", START, OPEN, "failed"], ["opened", START, OPEN, ABORT, DONE]])
def test_only_a_cancel_closes_parts(steps: list[Step]) -> None:
    """An `error` chunk ends the stream for the client at once, and the backend's own words stay its own."""
    assert end_of(*steps).closers == ()


def test_a_start_without_an_id_gets_the_turns() -> None:
    """Every device must agree on the id of the answer."""
    effects = play(Turn(message_id="m9", max_bytes=100), ["opened", b'{"type":"start"}'])
    assert payloads(effects) == [b'{"type":"start","messageId":"m9"}']


NAME = b'{"type":"start","messageId":"m-turn"}'
BARE = b'{"type":"start"}'
SECRET = b'{"type":"data-x","data":1,"transient":true}'


@pytest.mark.parametrize(
    ("steps", "journalled"),
    [
        pytest.param(["opened", DATA, DATA, BARE, OPEN], [NAME, DATA, DATA, NAME, OPEN], id="late start"),
        pytest.param(["opened", OPEN, DELTA], [NAME, OPEN, DELTA], id="no start at all"),
        pytest.param(["opened", SECRET, BARE, DATA], [SECRET, NAME, DATA], id="transient data shows nothing"),
        pytest.param(["opened", DATA, START], [NAME, DATA, START], id="a start of the backend's own stays"),
        pytest.param(["opened", START, DATA, BARE], [START, DATA, NAME], id="begun by a start"),
        pytest.param(["opened", ERROR], [ERROR], id="an error alone is no message"),
        pytest.param(["opened", FINISH], [FINISH], id="an end alone is no message"),
        pytest.param(["opened plain", DATA, BARE], [DATA, BARE], id="begun unnamed, before it was an SDK's"),
        pytest.param(["opened plain", SECRET, BARE], [SECRET, NAME], id="not begun yet"),
        pytest.param(["opened plain", PLAIN, DELTA], [b'"text":"hello"', DELTA], id="no SDK"),
    ],
)
def test_a_message_is_named_before_its_first_part(steps: list[Step], journalled: list[bytes]) -> None:
    """Named later, `useChat` makes a second message of what follows, and the first stays as an orphan."""
    turn = Turn(message_id="m-turn", max_bytes=10_000)
    assert payloads(play(turn, steps)) == journalled


def test_what_was_read_together_is_appended_together() -> None:
    """One append per read, however many chunks were in it; what follows `[DONE]` is not the answer."""
    turn = Turn(message_id="m", max_bytes=10_000)
    turn.opened(ai_sdk=True)
    assert turn.events([]) == []
    effects = turn.events([ServerSentEvent(data) for data in (START, OPEN, FINISH, DONE, DELTA)])
    assert [type(effect) for effect in effects] == [Append, End]
    assert payloads(effects) == [START, OPEN, FINISH]
    assert turn.events([ServerSentEvent(DELTA)]) == []


def test_an_answer_that_is_too_large_ends_where_the_bound_is() -> None:
    """What came before stays readable; the chunk that crossed it is not journalled."""
    turn = Turn(message_id="m", max_bytes=len(START) + len(DELTA))
    turn.opened(ai_sdk=True)
    assert payloads(turn.events([ServerSentEvent(START)])) == [START]
    effects = turn.events([ServerSentEvent(DELTA), ServerSentEvent(b"1"), ServerSentEvent(FINISH)])
    assert payloads(effects) == [DELTA]
    assert isinstance(effects[-1], End)
    assert effects[-1].error == TurnError(
        EndCode.TURN_TOO_LARGE, "the answer is larger than GATEWAY_MAX_TURN"
    )
    assert end_of("opened", START, DELTA, max_bytes=len(START) + len(DELTA) - 1).reason is EndReason.ERROR


@pytest.mark.parametrize("chunk", [ERROR, ABORT, FINISH])
def test_an_end_in_a_chunk_that_was_too_large_is_not_believed(chunk: bytes) -> None:
    """No client got that chunk, so the end must be told to them in another."""
    end = end_of("opened", START, chunk, max_bytes=len(START))
    assert end.reason is EndReason.ERROR
    assert end.error is not None
    assert end.error.code is EndCode.TURN_TOO_LARGE


def test_an_error_told_before_the_bound_stays_the_error() -> None:
    """The client stopped at the backend's own error."""
    end = end_of("opened", START, ERROR, DELTA, max_bytes=len(START) + len(ERROR))
    assert end.error == TurnError(EndCode.UPSTREAM_ERROR, "no model")


def test_finished_is_seen_as_soon_as_it_is_written() -> None:
    """From then on the rest of the body is waited for a few seconds only."""
    turn = Turn(message_id="m", max_bytes=10_000)
    play(turn, ["opened", START])
    assert not turn.finished
    play(turn, [FINISH])
    assert turn.finished
    plain = Turn(message_id="m", max_bytes=10_000)
    play(plain, ["opened plain", JSON, FINISH])
    assert not plain.finished


def test_a_cancel_aborts_first_and_ends_when_that_is_done() -> None:
    """Answered means stopped: the backend's connection is closed before anybody is told."""
    turn = Turn(message_id="m", max_bytes=10_000)
    play(turn, ["opened", START, OPEN])
    assert turn.cancel(ANNA) == [AbortUpstream()]
    assert turn.state is TurnState.CANCELLING
    assert play(turn, ["cancel again", DELTA, FINISH, "ended", "failed"]) == []
    (end,) = turn.aborted()
    assert isinstance(end, End)
    assert (end.reason, end.by, [draft.payload for draft in end.closers]) == (CAN, ANNA, [CLOSE])


def test_there_is_no_way_to_tell_a_turn_of_a_disconnect() -> None:
    """Rule 3: nothing but a cancel cancels, so the input is left out."""
    inputs = {name for name in vars(Turn) if not name.startswith("_")}
    assert inputs == {"opened", "events", "body_ended", "failed", "cancel", "aborted", "interrupted"}


def left_open(chunks: list[bytes]) -> list[tuple[str, str]]:
    """What the SDK's client would have open now."""
    opened: list[tuple[str, str]] = []
    for data in chunks:
        kind, _, edge = str(_type(data)).rpartition("-")
        if kind in {"text", "reasoning"} and edge in {"start", "end"}:
            part = (kind, json.loads(data)["id"])
            opened = [other for other in opened if other != part] + [part] * (edge == "start")
        elif _type(data) in {"finish-step", "reset-step"}:
            opened = []
    return opened


def _type(data: bytes) -> object:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value.get("type") if isinstance(value, dict) else None


NAMED = b'{"type":"start","messageId":"m"}'


class TurnLife(RuleBasedStateMachine):
    """Every order of inputs: an adversary holds the backend, the clients and the node."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn(message_id="m", max_bytes=600)
        self.journal: list[bytes] = []
        self.ends: list[End] = []
        self.aborts = 0
        self.cancels = 0
        self.ai_sdk: bool | None = None

    def perform(self, effects: list[Effect], *, may_end: bool) -> None:
        for effect in effects:
            assert not self.ends, "something came after the end"
            match effect:
                case Append(drafts):
                    assert drafts
                    assert not self.cancels, "a chunk after a cancel"
                    self.journal += [draft.payload for draft in drafts]
                case AbortUpstream():
                    self.aborts += 1
                case End():
                    assert may_end
                    self.ends.append(effect)

    @rule(ai_sdk=st.booleans())
    def opened(self, *, ai_sdk: bool) -> None:
        if self.turn.state is TurnState.WAITING:
            self.ai_sdk = ai_sdk
        self.turn.opened(ai_sdk=ai_sdk)

    @rule(
        data=st.lists(
            st.sampled_from(
                [START, OPEN, DELTA, CLOSE, THINK, FINISH_STEP, FINISH, ERROR, ABORT, DATA, PLAIN, JSON, DONE]
            ),
            max_size=4,
        )
    )
    def events(self, data: list[bytes]) -> None:
        state, had = self.turn.state, len(self.journal)
        self.perform(self.turn.events([ServerSentEvent(one) for one in data]), may_end=True)
        if state is not TurnState.READING:
            assert len(self.journal) == had
        elif not self.ends:
            assert DONE not in data
            assert sum(one != NAMED for one in self.journal[had:]) == len(data)
        assert self.journal.count(NAMED) <= bool(self.ai_sdk), "a message is named once, in an SDK's stream"

    @rule()
    def body_ended(self) -> None:
        reading = self.turn.state is TurnState.READING
        self.perform(self.turn.body_ended(), may_end=reading)

    @rule()
    def failed(self) -> None:
        self.perform(self.turn.failed(CUT), may_end=not self.cancels)

    @rule(by=st.sampled_from([ANNA, BERT]))
    def cancel(self, by: By) -> None:
        ended = bool(self.ends)
        self.perform(self.turn.cancel(by), may_end=False)
        if not ended:
            self.cancels += 1
            assert self.aborts == 1, "the backend is told once, and told at once"

    @rule()
    def aborted(self) -> None:
        asked = bool(self.cancels) and not self.ends
        self.perform(self.turn.aborted(), may_end=asked)
        if asked:
            assert self.ends[0].reason is EndReason.CANCELLED
            closed = [json.loads(draft.payload) for draft in self.ends[0].closers]
            expected = left_open(self.journal) if self.is_sdk() else []
            assert sorted((chunk["type"], chunk["id"]) for chunk in closed) == sorted(
                (f"{kind}-end", part) for kind, part in expected
            )

    @rule()
    def interrupted(self) -> None:
        self.perform(self.turn.interrupted(LOST), may_end=True)
        assert self.ends

    def is_sdk(self) -> bool:
        first = next((data for data in self.journal if data != DATA), None)
        return bool(self.ai_sdk) or first == START

    @invariant()
    def one_end_at_most_and_it_is_true(self) -> None:
        assert len(self.ends) <= 1
        assert (self.turn.state is TurnState.ENDED) is bool(self.ends)
        assert self.aborts <= 1
        for end in self.ends:
            self.check(end)

    def check(self, end: End) -> None:
        kinds = [_type(data) for data in self.journal] if self.is_sdk() else []
        assert end.ai_sdk is self.is_sdk()
        assert (end.error is not None) is (end.reason in {EndReason.ERROR, EndReason.INTERRUPTED})
        assert (end.by is not None) is (end.reason is EndReason.CANCELLED)
        match end.reason:
            case EndReason.COMPLETE:
                assert "error" not in kinds
                assert "abort" not in kinds
                assert not end.ai_sdk or end.done or "finish" in kinds
            case EndReason.CANCELLED:
                assert self.aborts or "abort" in kinds
                assert end.by is not None
                assert end.by.backend is not bool(self.aborts)
            case EndReason.ERROR:
                assert end.error is not None
                assert not self.cancels
                assert (end.error.code is EndCode.UPSTREAM_ERROR) is ("error" in kinds)
            case EndReason.INTERRUPTED:
                assert end.error == LOST
        assert not end.closers or self.aborts

    def teardown(self) -> None:
        self.perform(self.turn.cancel(ANNA), may_end=False)
        self.perform(self.turn.aborted(), may_end=True)
        assert len(self.ends) == 1, "every turn ends"


TestTurnLife = TurnLife.TestCase
TestTurnLife.settings = settings(max_examples=200, stateful_step_count=12)
