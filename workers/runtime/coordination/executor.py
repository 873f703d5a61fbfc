"""How a plan reaches all ranks of a worker, and how they come together again after a step that raised.

The leader (rank 0) broadcasts each plan as int32 words and carries out its own share; the others follow. Each rank gets
plans in one thread and carries them out in another, so that the next plan is there when a step is through, and no rank
waits for one that still computes. Knows nothing of scheduling.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.step import ModelRunner, ModelRunnerOutput, SchedulerOutput, StepPlan, TransferDone
from workers.errors import RankLost, StepFailed
from workers.parallel import ParallelGroups, PeerLeft
from workers.runtime.coordination.progress import StepProgress

log = logging.getLogger(__name__)

FIXED_WORDS = 4096  # most decode steps fit; a longer plan takes a second message
_STOP, _RECOVER = -1, -2  # in place of a plan's sequence number
_MAX_SEQUENCE = (1 << 31) - 1


class RankSteps:
    """One rank's steps: carries them out in order, and refuses them after one that raised until it has recovered."""

    def __init__(self, runner: ModelRunner, groups: ParallelGroups, progress: StepProgress | None) -> None:
        self._runner = runner
        self._groups = groups
        self._progress = progress or StepProgress()
        self._error = ""  # of the first step that raised since all was well

    def start(self, plan: StepPlan, ended: Sequence[TransferDone]) -> Callable[[], ModelRunnerOutput]:
        """As ModelRunner.start. When a step raises, the other ranks do not wait for this one."""
        if self._error:
            raise PeerLeft("a step before this one was given up")
        try:
            with self._progress.step(plan.sequence):
                result = self._runner.start(plan, ended)
        except Exception as error:
            self._give_up(error)
            raise
        return lambda: self._wait_for(plan.sequence, result)

    def _wait_for(self, sequence: int, result: Callable[[], ModelRunnerOutput]) -> ModelRunnerOutput:
        try:
            with self._progress.step(sequence):
                return result()
        except Exception as error:
            self._give_up(error)
            raise

    def _give_up(self, error: Exception) -> None:
        if not self._error or not isinstance(error, PeerLeft):
            first_line = (str(error).splitlines() or [""])[0]
            self._error = _LEFT if isinstance(error, PeerLeft) else f"{type(error).__name__}: {first_line}"
        if self._groups.can_rejoin:
            self._groups.leave()

    def recover(self) -> list[str]:
        """On all ranks at once: be ready for the next full plan. What was raised on each rank, "" where nothing was but
        that another rank left."""
        self._groups.leave()
        self._runner.recover()
        error, self._error = self._error, ""
        if self._groups.world_size > 1:
            self._groups.rejoin()
        return self._groups.exchange_texts("" if error == _LEFT else error)


_LEFT = "another rank left"


class GroupExecutor:
    """The leader's side.

    num_threads: with it, steps are started in a thread of their own, as on a device that computes while the host
    launches, and that thread computes with so many. One thread, so that steps and the messages of all ranks keep their
    order. None: steps are started in the caller's thread. progress: counts what this rank does.
    """

    def __init__(
        self,
        runner: ModelRunner,
        groups: ParallelGroups,
        num_threads: int | None = None,
        progress: StepProgress | None = None,
    ) -> None:
        self._runner = runner
        self._groups = groups
        self._steps = RankSteps(runner, groups, progress)
        self._sequence = 0
        self._is_full = True  # no rank has seen a plan of this executor
        self._thread: ThreadPoolExecutor | None = None
        if num_threads is not None:
            self._thread = ThreadPoolExecutor(1, "step", torch.set_num_threads, (num_threads,))

    def start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        """Send the plan to all ranks, and begin this rank's part; the returned call waits for its end."""
        self._sequence = self._sequence % _MAX_SEQUENCE + 1
        polls = self._runner.ended_transfers() if self._groups.world_size > 1 else ()
        words = encode_plan(plan, self._sequence, self._is_full, polls)
        self._is_full = False
        self._broadcast(torch.from_numpy(words))
        sent = decode_plan(words)
        ended = self._runner.poll(sent.polls)
        if self._thread is None:
            return self._steps.start(sent, ended)
        started = self._thread.submit(self._steps.start, sent, ended)
        return lambda: started.result()()

    def _broadcast(self, words: torch.Tensor) -> None:
        try:
            self._groups.broadcast_words(words, FIXED_WORDS)
        except RuntimeError as error:
            raise RankLost(f"a rank is gone: {error}") from error

    @property
    def has_ended_transfers(self) -> bool:
        """As in Executor."""
        return bool(self._runner.ended_transfers())

    def resend(self) -> None:
        """A rank has lost its rows: the next plan is full. The scheduler must resend its rows too."""
        self._is_full = True

    def recover(self) -> str:
        """As in Executor."""
        if not self._groups.can_rejoin:
            raise StepFailed("a step failed, and ranks on CUDA are not joined anew")
        self._groups.leave()
        if self._groups.world_size > 1:
            self._broadcast(torch.tensor([_RECOVER], dtype=torch.int32))
        if self._thread is not None:
            self._thread.submit(int).result()  # what was started before has raised by now
        self._is_full = True
        errors = [(rank, error) for rank, error in enumerate(self._steps.recover()) if error]
        if self._groups.world_size == 1:
            return ""
        return "; ".join(f"{self._groups.name_of(rank)}: {error}" for rank, error in errors)

    def stop(self) -> None:
        """End the followers' loops."""
        if self._thread is not None:
            self._thread.shutdown()
        if self._groups.world_size > 1:
            self._groups.broadcast_words(torch.tensor([_STOP], dtype=torch.int32), FIXED_WORDS)


@dataclass(frozen=True, slots=True)
class _Step:
    plan: StepPlan
    ended: Sequence[TransferDone]


class _Recover:
    """Leave the step in progress, and join the other ranks anew."""


_Orders = queue.SimpleQueue[_Step | _Recover | BaseException | None]


def follow(runner: ModelRunner, groups: ParallelGroups, progress: StepProgress | None = None) -> None:
    """The other ranks' side: carry out plans until the leader says stop; RuntimeError when the leader is lost.

    Raises what a step raises where the ranks cannot go on after that.
    """
    orders: _Orders = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(runner, groups, orders), name="plans", daemon=True).start()
    steps = RankSteps(runner, groups, progress)
    while (order := orders.get()) is not None:
        if isinstance(order, BaseException):
            raise order
        if isinstance(order, _Recover):
            steps.recover()
            continue
        try:
            steps.start(order.plan, order.ended)
        except PeerLeft:
            pass  # the leader knows, and says when to go on
        except Exception:
            if not groups.can_rejoin:
                raise
            log.exception("%s: a step failed", groups.name_of(groups.shard.rank))


def _receive(runner: ModelRunner, groups: ParallelGroups, orders: _Orders) -> None:
    try:
        while True:
            words = groups.broadcast_words(None, FIXED_WORDS)
            if words[0] == _STOP:
                orders.put(None)
                return
            if words[0] == _RECOVER:
                groups.leave()
                orders.put(_Recover())
                continue
            plan = decode_plan(np.ascontiguousarray(words.numpy()))
            orders.put(_Step(plan, runner.poll(plan.polls)))
    except BaseException as error:
        orders.put(error)
