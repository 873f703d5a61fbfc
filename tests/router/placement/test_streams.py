"""The life of a stream without a network: every loss at every token, and whatever order things come in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import Cancelled, InvalidRequest, StepFailed
from router.events import FinishReason
from router.placement.policy import CostTerms, Placement
from router.placement.streams import (
    Action,
    CancelPart,
    ContinuePart,
    KVTransfer,
    Outcome,
    Part,
    PartReport,
    PartTimes,
    Phase,
    Stream,
    SubmitPart,
)
from tests.router.fake_worker import expected_tokens, next_token

PROMPT = [1, 2, 3]
FREE = CostTerms()


def split(prefill: str = "p", decode: str = "d") -> Placement:
    return Placement(prefill, decode, 3, FREE)


def whole(worker: str = "m") -> Placement:
    return Placement(None, worker, 3, FREE)


def done(outcome: Outcome, **changes: object) -> PartReport:
    return PartReport(outcome, **changes)


def test_a_split_stream_from_start_to_end() -> None:
    stream = Stream(3, max_tokens=3)
    assert list(stream.place(split())) == [SubmitPart("p", Part.PREFILL, 1), SubmitPart("d", Part.DECODE, 1)]
    assert list(stream.on_token("p", 1, 0, 10)) == [ContinuePart("d", (10,))]
    assert not stream.on_finished("p", 1, done(Outcome.PREFILLED, num_computed_prompt_tokens=3))
    assert not stream.on_token("d", 1, 1, 11)
    assert not stream.on_token("d", 1, 2, 12)
    assert not stream.on_finished("d", 1, done(Outcome.LENGTH, num_transferred_blocks=1))
    assert (stream.phase, stream.ending, stream.emitted) == (Phase.ENDED, FinishReason.LENGTH, [10, 11, 12])
    assert (stream.num_computed_prompt_tokens, stream.num_recomputed_prompt_tokens) == (3, 0)
    assert stream.num_transferred_blocks == 1


def prefilled(max_tokens: int) -> Stream:
    """Its prefill ended at 100 s."""
    stream = Stream(3, max_tokens=max_tokens)
    stream.place(split())
    stream.on_token("p", 1, 0, 10)
    stream.on_finished("p", 1, done(Outcome.PREFILLED, times=PartTimes(first_step_s=99.0, first_token_s=100.0)))
    return stream


def test_a_kv_transfer_is_timed_by_both_workers() -> None:
    stream = prefilled(max_tokens=2)
    stream.on_token("d", 1, 1, 11)
    stream.on_finished("d", 1, done(Outcome.LENGTH, times=PartTimes(100.25, 100.5, 101.0)))
    assert stream.kv_transfer == KVTransfer(relay_s=0.25, total_s=0.5)


@pytest.mark.parametrize("times", [PartTimes(99.0, 100.5, 101.0), PartTimes(100.25, 100.2, 101.0)], ids=str)
def test_hosts_whose_clocks_differ_time_nothing(times: PartTimes) -> None:
    stream = prefilled(max_tokens=2)
    stream.on_token("d", 1, 1, 11)
    stream.on_finished("d", 1, done(Outcome.LENGTH, times=times))
    assert stream.kv_transfer is None


def test_the_kv_transfer_to_a_worker_that_failed_does_not_count() -> None:
    stream = prefilled(max_tokens=3)
    stream.on_token("d", 1, 1, 11)
    stream.on_finished("d", 1, done(Outcome.FAILED, times=PartTimes(100.25, 100.5, 101.0)))
    stream.place(whole("m"))
    stream.on_token("m", 2, 2, 12)
    stream.on_finished("m", 2, done(Outcome.LENGTH))
    assert stream.kv_transfer is None


def test_the_kv_transfer_of_a_lost_placement_does_not_count() -> None:
    stream = prefilled(max_tokens=3)
    stream.on_lost("d")
    stream.place(split("q", "e"))
    stream.on_lost("q")  # so that the end of the prefill is unknown
    stream.on_finished("e", 2, done(Outcome.LENGTH, times=PartTimes(100.25, 100.5, 101.0)))
    assert stream.kv_transfer is None


def test_one_token_is_all_the_prefill_worker_needs_to_give() -> None:
    stream = Stream(3, max_tokens=1)
    stream.place(split())
    assert not stream.on_token("p", 1, 0, 10)
    assert list(stream.on_finished("p", 1, done(Outcome.PREFILLED))) == [CancelPart("d")]
    assert (stream.ending, stream.emitted) == (FinishReason.LENGTH, [10])


@pytest.mark.parametrize("loser", ["p", "d"])
def test_a_complete_stream_needs_no_worker_any_more(loser: str) -> None:
    stream = Stream(3, max_tokens=1)
    stream.place(split())
    stream.on_token("p", 1, 0, 10)
    stream.on_lost(loser)
    assert (stream.phase, stream.ending) == (Phase.ENDED, FinishReason.LENGTH)


@pytest.mark.parametrize("outcome", [Outcome.STOP, Outcome.LENGTH])
def test_the_prefill_worker_may_end_the_stream(outcome: Outcome) -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(split())
    assert list(stream.on_finished("p", 1, done(outcome))) == [CancelPart("d")]
    assert (stream.ending, stream.emitted) == (FinishReason(outcome.value), [])


@pytest.mark.parametrize("how", ["lost", Outcome.FAILED, Outcome.CANCELLED, Outcome.PREFILLED])
def test_without_its_prefill_worker_the_decode_worker_goes_on_alone(how: str | Outcome) -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(split())
    actions = stream.on_lost("p") if how == "lost" else stream.on_finished("p", 1, done(Outcome(how)))
    assert list(actions) == [ContinuePart("d", ())]
    assert not stream.on_token("d", 1, 0, 10)
    assert stream.emitted == [10]


def test_losing_the_decode_worker_asks_for_another_placement() -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(split())
    assert list(stream.on_lost("d")) == [CancelPart("p")]
    assert (stream.phase, stream.failed_on) == (Phase.PLACING, {"d"})
    assert list(stream.place(split("p", "e"))) == [
        CancelPart("p"),  # it may still hold the first epoch's part under the same name
        SubmitPart("p", Part.PREFILL, 2),
        SubmitPart("e", Part.DECODE, 2),
    ]
    assert not stream.on_token("p", 1, 0, 99)  # of the first epoch
    assert (stream.emitted, stream.num_dropped) == ([], 1)
    assert list(stream.on_token("p", 2, 0, 10)) == [ContinuePart("e", (10,))]


def test_the_decode_worker_must_not_speak_before_it_may() -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(split())
    assert list(stream.on_token("d", 1, 0, 99)) == [CancelPart("d"), CancelPart("p")]
    assert (stream.phase, stream.emitted) == (Phase.PLACING, [])


def test_a_gap_loses_the_worker_and_a_double_is_dropped() -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(whole())
    stream.on_token("m", 1, 0, 10)
    assert not stream.on_token("m", 1, 0, 11)
    assert stream.num_dropped == 1
    assert list(stream.on_token("m", 1, 2, 12)) == [CancelPart("m")]
    assert (stream.phase, stream.emitted) == (Phase.PLACING, [10])
    assert "position 2, expected 1" in stream.last_failure


def test_more_than_max_tokens_is_never_shown() -> None:
    stream = Stream(3, max_tokens=1)
    stream.place(whole())
    stream.on_token("m", 1, 0, 10)
    assert list(stream.on_token("m", 1, 1, 11)) == [CancelPart("m")]
    assert (stream.ending, stream.emitted) == (FinishReason.LENGTH, [10])


@pytest.mark.parametrize("who", ["p", "d"])
def test_an_invalid_request_ends_at_once(who: str) -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(split())
    other = {"p": "d", "d": "p"}[who]
    report = done(Outcome.FAILED, error="prompt: no", is_invalid_request=True)
    assert list(stream.on_finished(who, 1, report)) == [CancelPart(other)]
    assert isinstance(stream.ending, InvalidRequest)


@pytest.mark.parametrize("who", ["m", "other"])
def test_a_failed_step_is_tried_once_more_and_then_ends_the_stream(who: str) -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(whole())
    stream.on_token("m", 1, 0, 10)
    report = done(Outcome.STEP_FAILED, error="MemoryError: none left")
    assert not stream.on_finished("m", 1, report)
    assert (stream.phase, stream.failed_on) == (Phase.PLACING, {"m"})
    stream.place(whole(who))
    stream.on_token(who, 2, 1, 11)
    assert not stream.on_finished(who, 2, report)
    assert isinstance(stream.ending, StepFailed)
    assert stream.ending.message == f"a step with the request failed on m and on {who}: MemoryError: none left"
    assert stream.emitted == [10, 11]


def test_a_failed_step_of_the_prefill_worker_counts_too() -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(split())
    report = done(Outcome.STEP_FAILED, error="x")
    assert list(stream.on_finished("p", 1, report)) == [ContinuePart("d", ())]
    assert not stream.on_finished("d", 1, report)
    assert isinstance(stream.ending, StepFailed)


def test_a_worker_that_is_lost_after_a_failed_step_is_replaced() -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(whole())
    stream.on_finished("m", 1, done(Outcome.STEP_FAILED, error="x"))
    stream.place(whole("n"))
    stream.on_lost("n")
    assert stream.phase is Phase.PLACING


def test_ending_it_tells_both_workers_and_only_once() -> None:
    stream = Stream(3, max_tokens=5)
    stream.place(split())
    assert list(stream.fail(Cancelled("gone"))) == [CancelPart("p"), CancelPart("d")]
    assert not stream.end(FinishReason.STOP)
    assert isinstance(stream.ending, Cancelled)
    assert not stream.on_token("p", 1, 0, 10)
    assert not stream.on_lost("d")
    assert stream.emitted == []


class Workers:
    """Plays all workers of a stream: keeps what each was given, and says what it would say next."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.parts: dict[str, SubmitPart] = {}
        self.histories: dict[str, list[int]] = {}
        self.may_send: set[str] = set()

    def do(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, SubmitPart):
                assert action.worker_id not in self.parts, "submitted twice without a cancel"
                self.parts[action.worker_id] = action
                self.histories[action.worker_id] = [*PROMPT, *self.stream.emitted]
                if action.part is not Part.DECODE:
                    self.may_send.add(action.worker_id)
            elif isinstance(action, ContinuePart):
                self.histories[action.worker_id] += action.token_ids
                self.may_send.add(action.worker_id)
            else:
                self.drop(action.worker_id)

    def drop(self, worker_id: str) -> None:
        self.parts.pop(worker_id, None)
        self.may_send.discard(worker_id)

    def send(self, worker_id: str) -> None:
        """The worker's next word: a token, or that it has ended."""
        if worker_id not in self.may_send:
            return
        part, history = self.parts[worker_id], self.histories[worker_id]
        position = len(history) - len(PROMPT)
        has_sent = part.part is Part.PREFILL and position > 0 and position == getattr(self, f"sent_{worker_id}", -1)
        if position == self.stream.max_tokens or has_sent:
            self.drop(worker_id)
            outcome = Outcome.PREFILLED if part.part is Part.PREFILL else Outcome.LENGTH
            self.do(self.stream.on_finished(worker_id, part.epoch, done(outcome)))
            return
        token = next_token(history)
        history.append(token)
        if part.part is Part.PREFILL:
            setattr(self, f"sent_{worker_id}", position + 1)
        self.do(self.stream.on_token(worker_id, part.epoch, position, token))

    def lose(self, worker_id: str) -> None:
        self.drop(worker_id)
        self.do(self.stream.on_lost(worker_id))


NUM_TOKENS = 5
PLACEMENTS = [split("p", "d"), split("q", "e"), whole("m"), split("p", "e"), whole("d")]


def play(script: Sequence[tuple[str, str]]) -> list[int]:
    """Run a stream through a script of events, then to its end without any more losses."""
    stream = Stream(len(PROMPT), NUM_TOKENS)
    workers = Workers(stream)
    placements = itertools.cycle(PLACEMENTS)
    for kind, worker_id in script:
        if stream.phase is Phase.PLACING:
            workers.do(stream.place(next(placements)))
        if kind == "lose":
            workers.lose(worker_id)
        elif kind == "stall":
            workers.do(stream.on_stalled(1.0))
        elif kind == "stale":
            workers.do(stream.on_token(worker_id, stream.epoch - 1, len(stream.emitted), 999))
        elif kind == "double" and stream.emitted:
            workers.do(stream.on_token(worker_id, stream.epoch, len(stream.emitted) - 1, 999))
        else:
            workers.send(worker_id)
        assert stream.emitted == expected_tokens(PROMPT, NUM_TOKENS)[: len(stream.emitted)]
    while stream.phase is not Phase.ENDED:
        if stream.phase is Phase.PLACING:
            workers.do(stream.place(next(placements)))
        assert workers.may_send, "no worker is to send next: the stream hangs"
        for worker_id in sorted(workers.may_send):
            workers.send(worker_id)
    assert stream.ending is FinishReason.LENGTH
    assert not workers.parts, "a worker still works on a stream that has ended"
    return stream.emitted


@pytest.mark.parametrize("loser", ["p", "d"])
@pytest.mark.parametrize("num_words", range(2 * NUM_TOKENS + 2))
def test_any_worker_lost_after_any_word(loser: str, num_words: int) -> None:
    script = [("send", "pd"[i % 2]) for i in range(num_words)]
    assert play([*script, ("lose", loser)]) == expected_tokens(PROMPT, NUM_TOKENS)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["send", "send", "send", "lose", "stall", "stale", "double"]),
            st.sampled_from(["p", "q", "d", "e", "m"]),
        ),
        max_size=60,
    )
)
def test_nothing_is_lost_doubled_or_out_of_order(script: list[tuple[str, str]]) -> None:
    assert play(script) == expected_tokens(PROMPT, NUM_TOKENS)
