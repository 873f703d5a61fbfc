"""Which tokens the grammars of a step's rows allow: one matcher for each row that has a grammar.

A thread of its own owns the matchers and fills the masks while the forward pass runs. `begin` gives it a step's rows
before the pass, `apply` waits for their masks after it, and `note` gives it the tokens that were chosen. A row's
matcher is built from the tokens that are known when a request takes the row, so that a preemption, a hand-off and a
failover leave it where it was. Each rank of the last stage has its own. Knows nothing of requests.

A row whose matcher has failed, or allows nothing, loses all its logits; the sampler says so with NO_CHOICE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from grammars.compiler import GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar

if TYPE_CHECKING:
    import llguidance

Ids = Callable[[], Sequence[int]]


@dataclass(frozen=True, slots=True)
class MaskedRun:
    """The wanted rows of logits of one request that has a grammar."""

    row: int  # of the ranks' state
    logits: Sequence[int]  # rows of logits: after the last known token, then after each draft
    draft_ids: Sequence[int]


@dataclass(slots=True)
class _Follower:
    """Where one row's completion is in its grammar. Touched by the thread alone."""

    matcher: llguidance.LLMatcher | None  # None: it could not be built, or has failed
    end_ids: frozenset[int]  # allowed where the completion may end; they end it, and are no part of it
    is_ended: bool = False

    def advance(self, token_ids: Sequence[int]) -> None:
        """Tokens were chosen."""
        for token_id in token_ids:
            if token_id in self.end_ids:
                self.is_ended = True
            elif self.matcher is None or token_id < 0 or not self.matcher.consume_token(token_id):
                self.matcher = None


class GrammarMasks:
    """Rows 0 .. max_num_seqs - 1 for one rank's share of the vocabulary."""

    def __init__(self, compiler: GrammarCompiler, first_id: int, num_ids: int, device: torch.device) -> None:
        """num_ids: of the share, which begins with first_id."""
        self._compiler, self._first_id, self._num_ids, self._device = compiler, first_id, num_ids, device
        self._followers: dict[int, _Follower] = {}
        self._rows: set[int] = set()  # that have one; the thread's dict may be behind
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._runs: Sequence[MaskedRun] = ()
        self._filled: Future[npt.NDArray[np.bool_]] | None = None

    # ---------------------------------------------------------------------------------------------------------- rows
    def take(self, row: int, grammar: Grammar, completion: Sequence[int], end_ids: Sequence[int]) -> None:
        """A request that has a grammar takes a row. completion: the tokens chosen so far."""
        self._rows.add(row)
        self._thread.submit(self._build, row, grammar, completion, frozenset(end_ids))

    def leave(self, row: int) -> None:
        """A request without a grammar takes a row."""
        if row in self._rows:
            self._rows.remove(row)
            self._thread.submit(self._followers.pop, row, None)

    def _build(self, row: int, grammar: Grammar, completion: Sequence[int], end_ids: frozenset[int]) -> None:
        try:
            follower = _Follower(self._compiler.matcher(grammar), end_ids)
        except GrammarError:  # the router and the leader have compiled it: this rank's files are others
            follower = _Follower(None, end_ids)
        follower.advance(completion)
        self._followers[row] = follower

    # ------------------------------------------------------------------------------------------------------- one step
    def begin(self, runs: Sequence[MaskedRun]) -> None:
        """Fill the masks of these rows, from now on."""
        self._runs = runs
        self._filled = self._thread.submit(self._fill, runs) if runs else None

    def _fill(self, runs: Sequence[MaskedRun]) -> npt.NDArray[np.bool_]:
        """Which of this share's ids are banned, one entry for each row of logits of the runs."""
        is_banned = np.ones((sum(len(run.logits) for run in runs), self._num_ids), np.bool_)
        at = 0
        for run in runs:
            self._fill_run(is_banned[at : at + len(run.logits)], self._followers[run.row], run.draft_ids)
            at += len(run.logits)
        return is_banned

    def _fill_run(self, is_banned: npt.NDArray[np.bool_], follower: _Follower, draft_ids: Sequence[int]) -> None:
        """What does not fit after a draft is left banned: the draft is not chosen, and nothing after it counts."""
        num_consumed = 0
        for index, banned in enumerate(is_banned):
            matcher = follower.matcher
            if follower.is_ended:
                banned[:] = False  # the plan was made before its end was known; nothing of it is used
                continue
            if matcher is None:
                break
            banned[:] = self._banned(matcher, follower.end_ids)
            if index == len(draft_ids) or matcher.try_consume_tokens([draft_ids[index]]) == 0:
                break
            num_consumed += 1
        if num_consumed and follower.matcher is not None:
            follower.matcher.rollback(num_consumed)

    def _banned(self, matcher: llguidance.LLMatcher, end_ids: frozenset[int]) -> npt.NDArray[np.bool_]:
        """bool [num_ids]."""
        is_accepting = matcher.is_accepting()
        words = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            return np.ones(self._num_ids, np.bool_)
        is_allowed = np.zeros(self._first_id + self._num_ids, np.uint8)
        bits = np.unpackbits(words, count=min(len(words) * 8, len(is_allowed)), bitorder="little")
        is_allowed[: len(bits)] = bits
        for token_id in self._compiler.special_end_ids:
            if token_id < len(is_allowed):
                is_allowed[token_id] = 0  # only those that end this request do
        if is_accepting:
            is_allowed[[i for i in end_ids if i < len(is_allowed)]] = 1
        banned: npt.NDArray[np.bool_] = is_allowed[self._first_id :] == 0
        return banned

    def apply(self, logits: Tensor) -> None:
        """Take the logits of what is not allowed, in the rows of the last `begin`. logits: fp32 [rows, num_ids]."""
        if self._filled is None:
            return
        is_banned = torch.from_numpy(self._filled.result())
        rows = torch.tensor([index for run in self._runs for index in run.logits])
        if self._device.type == "cuda":
            is_banned = is_banned.pin_memory().to(self._device, non_blocking=True)
            rows = rows.pin_memory().to(self._device, non_blocking=True)
        logits.index_copy_(0, rows, logits[rows].masked_fill_(is_banned, float("-inf")))

    @property
    def is_due(self) -> bool:
        """Rows of this step wait for their tokens."""
        return self._filled is not None

    def note(self, read_ids: Ids) -> None:
        """Tokens were chosen for all rows of logits of the step. read_ids: waits for them; called in the thread."""
        self._thread.submit(self._note, self._runs, read_ids)
        self._runs, self._filled = (), None

    def _note(self, runs: Sequence[MaskedRun], read_ids: Ids) -> None:
        token_ids = read_ids()
        for run in runs:
            choices = [token_ids[index] for index in run.logits]
            num_right = 0
            while num_right < len(run.draft_ids) and choices[num_right] == run.draft_ids[num_right]:
                num_right += 1
            self._followers[run.row].advance(choices[: num_right + 1])

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()
