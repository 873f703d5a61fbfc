"""The engine's thread beside a directory that is slow: what it asks, how often, and that no request waits in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pytest

from kvstore.control.directory import MemoryDirectory
from tests.processes import wait_until
from tests.workers.engine.fake_runner import make_engine
from tests.workers.paged_runner import make
from workers.engine.loop import EngineLoop, LoopEvents, Submit
from workers.engine.request import FinishReason, Request, RequestEnd, RequestRole
from workers.errors import StepFailed
from workers.sampling.params import SamplingParams


class Slow(MemoryDirectory):
    """Notes each question, and answers when it is let go."""

    def __init__(self) -> None:
        super().__init__(time.monotonic)
        self.asked: list[int] = []
        self.may_answer = threading.Event()

    def locate(self, block_names: Sequence[bytes]) -> list[frozenset[str]]:
        self.asked.append(len(block_names))
        self.may_answer.wait(30)
        return super().locate(block_names)


class Running:
    """A loop over a fake engine, and the requests that it ended."""

    def __init__(self) -> None:
        self.directory = Slow()
        engine, _ = make_engine(num_blocks=512, max_num_seqs=16, budget=64)
        self.ended: list[RequestEnd] = []
        self.failures: list[BaseException] = []
        self.loop = EngineLoop(
            engine,
            self.directory,
            lambda: ["redis"],
            lambda locations: "redis" in locations,
            self._note,
            self.failures.append,
            time.monotonic,
        )
        self.loop.start()

    def _note(self, events: LoopEvents) -> None:
        self.ended += events.step.ended

    def submit(self, name: str, num_tokens: int, role: RequestRole = RequestRole.MIXED) -> None:
        start = sum(map(ord, name))  # so that no two begin alike
        token_ids = [(start + i) % 40 for i in range(num_tokens)]
        self.loop.post(Submit(Request(name, token_ids, num_tokens, SamplingParams(max_tokens=2), role=role)))


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.directory.may_answer.set()
    made.loop.stop()
    assert made.failures == []


def test_look_ups_that_queue_up_are_one_call(running: Running) -> None:
    """Each was a call of its own, one after the other: the last of many new requests waited for all of them."""
    running.submit("first", 17)
    wait_until(lambda: running.directory.asked == [4], "the first one is looked up")
    for i in range(7):
        running.submit(f"later-{i}", 17 + 4 * i)
    wait_until(lambda: running.loop._lookups.qsize() == 7, "the others wait")
    running.directory.may_answer.set()
    wait_until(lambda: len(running.ended) == 8, "all are served")
    assert running.directory.asked == [4, sum(range(4, 11))]


def test_requests_that_wait_for_blocks_are_asked_for_in_one_call(running: Running) -> None:
    """Each was a call of its own, every 5 ms."""
    running.directory.may_answer.set()
    for i in range(8):
        running.submit(f"decode-{i}", 16, RequestRole.DECODE)
    wait_until(lambda: running.loop.load.num_waiting_for_kv == 8, "all wait for their blocks")
    running.directory.asked.clear()
    wait_until(lambda: len(running.directory.asked) >= 3, "they are watched over")
    assert running.directory.asked[1:3] == [32, 32]


def test_a_failed_step_ends_its_requests_and_three_in_a_row_the_loop() -> None:
    engine, runner = make(40, 12, False)
    ended: list[RequestEnd] = []
    failures: list[BaseException] = []
    loop = EngineLoop(
        engine,
        None,
        list,
        lambda _: False,
        lambda events: ended.extend(events.step.ended),
        failures.append,
        time.monotonic,
    )

    def submit(name: str) -> None:
        loop.post(Submit(Request(name, [1, 2, 3], 3, SamplingParams(max_tokens=4, ignore_eos=True))))

    runner.fails = lambda plan: plan.sequence == 1
    submit("first")
    loop.start()
    wait_until(lambda: len(ended) == 1, "the first one has ended")
    submit("second")
    wait_until(lambda: len(ended) == 2, "the second one has ended")
    assert [(end.request_id, end.reason) for end in ended] == [
        ("first", FinishReason.STEP_FAILED),
        ("second", FinishReason.LENGTH),
    ]
    assert failures == []
    runner.fails = lambda plan: True
    for number in range(3):
        submit(f"{number}")
        if number < 2:
            wait_until(lambda number=number: len(ended) == 3 + number, "it has ended")
    wait_until(lambda: bool(failures), "the loop has ended")
    assert isinstance(failures[0], StepFailed)
    loop.stop()
