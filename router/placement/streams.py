"""The life of one token stream, decided without I/O: what its workers say goes in, what to tell them comes out.

Theory of operation. A stream is placed (possibly several times) on a decode worker, alone or with a prefill worker;
every placement has its own epoch, and what carries another epoch is dropped. `emitted` is the stream: position i of the
completion is appended once, when i is the next one. What is appended is committed: if the workers are lost, the next
placement gets prompt + emitted as its prompt, so nothing is lost, doubled or out of order.

    PLACING --place()--> PREFILLING --first token, or the prefill worker lost--> DECODING
       |                     |     (a placement without prefill worker starts here: DECODING)
       |<---decode worker lost or failed---------------------------------------------|
       any of them --STOP, LENGTH, end(), fail()--> ENDED

Only the prefill worker may send the first token of a placement while PREFILLING; the decode worker sends tokens only
after Continue. Knows nothing of sockets, clocks, text or how many placements are allowed.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from router.errors import AdapterFailed, AdapterRefused, InvalidRequest, RouterError, StepFailed
from router.events import FinishReason
from router.placement.policy import Placement


class Part(enum.Enum):
    """What a worker does for a stream."""

    WHOLE = "whole"
    PREFILL = "prefill"
    DECODE = "decode"
    EMBED = "embed"


# Each failed step took its other requests with it: one that raises everywhere must not go from worker to worker. An
# adapter that two workers cannot load is not on the others' disks either.
MAX_SAME_FAILURES = 2


class Phase(enum.Enum):
    """Where a stream is in its life; see the module's text."""

    PLACING = "placing"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


class Outcome(enum.Enum):
    """How a worker ended its part."""

    STOP = "stop"
    LENGTH = "length"
    PREFILLED = "prefilled"
    CANCELLED = "cancelled"
    FAILED = "failed"
    STEP_FAILED = "step_failed"
    ADAPTER_FAILED = "adapter_failed"


@dataclass(frozen=True, slots=True)
class PartTimes:
    """When a part got how far, in seconds since the Unix epoch on its worker's clock; 0 for what did not happen."""

    continued_s: float = 0.0  # the decode worker's engine got Continue
    first_step_s: float = 0.0  # its first step with tokens of this part began
    first_token_s: float = 0.0  # the step that chose its first token ended


@dataclass(frozen=True, slots=True)
class KVTransfer:
    """Between the end of a prefill's last chunk and the first step of its decode worker."""

    relay_s: float  # until the decode worker's engine got Continue
    total_s: float  # until it had pulled the last blocks and began


@dataclass(frozen=True, slots=True)
class PartReport:
    """The final report of a worker about its part."""

    outcome: Outcome
    error: str = ""
    is_invalid_request: bool = False
    num_cached_prompt_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_transferred_blocks: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    times: PartTimes = PartTimes()
    embedding: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class SubmitPart:
    """Give a worker its part; the tokens are prompt + emitted."""

    worker_id: str
    part: Part
    epoch: int


@dataclass(frozen=True, slots=True)
class ContinuePart:
    """Let the decode worker go on, after these tokens (none: it computes what it lacks)."""

    worker_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CancelPart:
    """Tell a worker to drop its part."""

    worker_id: str


Action = SubmitPart | ContinuePart | CancelPart
_NOTHING: tuple[Action, ...] = ()
_FIELDS = ("grammar", "banned_token_ids")  # that a worker may find to be impossible while it decodes


class Stream:
    """One stream. Every handler returns the actions to be carried out, in order."""

    def __init__(
        self, num_prompt_tokens: int, max_tokens: int, emitted: Sequence[int] = (), needs_prefill: bool = False
    ) -> None:
        """emitted: what an earlier life of the stream committed; less than max_tokens. needs_prefill: a prefill worker
        that is lost cannot be done without, since it alone tells of the prompt (until the field is set to False)."""
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.needs_prefill = needs_prefill
        self.emitted: list[int] = list(emitted)
        self.phase = Phase.PLACING
        self.epoch = 0  # of the current placement; 0 before the first
        self.ending: FinishReason | RouterError | None = None
        self.failed_on: set[str] = set()  # workers that were lost or failed it: avoided when it is placed anew
        self.last_failure = ""
        self._same_failures: dict[Outcome, list[str]] = {Outcome.STEP_FAILED: [], Outcome.ADAPTER_FAILED: []}
        self.num_dropped = 0  # frames of an old epoch, or doubled
        self.num_cached_prompt_tokens = 0
        self.num_computed_prompt_tokens = 0
        self.num_recomputed_prompt_tokens = 0
        self.num_transferred_blocks = 0
        self.num_drafts = self.num_draft_tokens = self.num_accepted_tokens = 0
        self.kv_transfer: KVTransfer | None = None  # of the last placement, once its decode worker has reported
        self._prefilled_s = 0.0  # end of its last chunk; 0 while not known
        self._prefill_id: str | None = None  # set while that worker has a part to play
        self._decode_id: str | None = None
        self._decode_part = Part.WHOLE  # what the decode worker was given
        self._submitted_to: set[str] = set()

    # -- what the dispatcher says

    def place(self, placement: Placement) -> Sequence[Action]:
        """A placement was found and reserved."""
        assert self.phase is Phase.PLACING, f"placed while {self.phase.value}"
        self.epoch += 1
        self._decode_id = placement.decode_id
        self._prefill_id = placement.prefill_id
        self._decode_part = Part.WHOLE if placement.prefill_id is None else Part.DECODE
        self._prefilled_s, self.kv_transfer = 0.0, None
        # A worker knows a stream by its name alone: what it may still hold of an earlier placement goes first.
        actions: list[Action] = [
            CancelPart(worker_id)
            for worker_id in (placement.prefill_id, placement.decode_id)
            if worker_id is not None and worker_id in self._submitted_to
        ]
        if placement.prefill_id is None:
            self.phase = Phase.DECODING
            actions.append(SubmitPart(placement.decode_id, Part.WHOLE, self.epoch))
            self._submitted_to.add(placement.decode_id)
        else:
            self.phase = Phase.PREFILLING
            actions.append(SubmitPart(placement.prefill_id, Part.PREFILL, self.epoch))
            actions.append(SubmitPart(placement.decode_id, Part.DECODE, self.epoch))
            self._submitted_to |= {placement.prefill_id, placement.decode_id}
        return actions

    def end(self, reason: FinishReason) -> Sequence[Action]:
        """The router ends it: a stop text was found."""
        return self._end(reason)

    def fail(self, error: RouterError) -> Sequence[Action]:
        """The router gives up: deadline, client gone, no worker."""
        return self._end(error)

    # -- what the workers say

    def on_token(self, worker_id: str, epoch: int, position: int, token_id: int) -> Sequence[Action]:
        """A worker chose a token."""
        next_position = len(self.emitted)
        if self.phase is Phase.ENDED or epoch != self.epoch or position < next_position:
            self.num_dropped += 1
            return _NOTHING
        if self.phase is Phase.DECODING and worker_id == self._decode_id and position == next_position:
            if next_position >= self.max_tokens:
                return self._lose(worker_id, f"sent more than {self.max_tokens} tokens")
            self.emitted.append(token_id)
            return _NOTHING
        if self.phase is Phase.PREFILLING and worker_id == self._prefill_id and position == next_position:
            return self._on_first_token(token_id)
        if worker_id in (self._prefill_id, self._decode_id):
            return self._lose(worker_id, f"sent position {position}, expected {next_position}")
        self.num_dropped += 1
        return _NOTHING

    def on_finished(self, worker_id: str, epoch: int, report: PartReport) -> Sequence[Action]:
        """A worker ended its part."""
        if self.phase is Phase.ENDED or epoch != self.epoch:
            return _NOTHING
        if worker_id == self._prefill_id:
            self._prefill_id = None
            self._count(Part.PREFILL, report)
            return self._on_prefill_finished(worker_id, report)
        if worker_id != self._decode_id:
            return _NOTHING
        self._count(self._decode_part, report)
        if report.outcome is Outcome.STOP or report.outcome is Outcome.LENGTH:
            self._decode_id = None
            return self._end(FinishReason(report.outcome.value))
        if (error := self._hopeless(worker_id, report)) is not None:
            self._decode_id = None
            return self._end(error)
        return self._on_decode_gone(worker_id, report.error or f"ended with {report.outcome.value}")

    def on_lost(self, worker_id: str) -> Sequence[Action]:
        """The connection to a worker broke."""
        if self.phase is Phase.ENDED:
            return _NOTHING
        if worker_id == self._prefill_id:
            return self._on_prefill_gone(worker_id)
        if worker_id == self._decode_id:
            return self._on_decode_gone(worker_id, "connection lost")
        return _NOTHING

    def on_stalled(self, waited_s: float) -> Sequence[Action]:
        """Workers that are up sent nothing for too long."""
        worker_id = self._prefill_id if self.phase is Phase.PREFILLING else self._decode_id
        if worker_id is None:
            return _NOTHING  # placed anew, or over, meanwhile
        return self._lose(worker_id, f"no token for {waited_s:g} s")

    # -- transitions

    def _on_first_token(self, token_id: int) -> Sequence[Action]:
        assert self._decode_id is not None, "prefilling without a decode worker"
        self.emitted.append(token_id)
        self.phase = Phase.DECODING
        if len(self.emitted) == self.max_tokens:
            return _NOTHING  # the prefill worker's final report follows and ends the stream with its counts
        return (ContinuePart(self._decode_id, (token_id,)),)

    def _on_prefill_finished(self, worker_id: str, report: PartReport) -> Sequence[Action]:
        if len(self.emitted) == self.max_tokens:
            return self._end(FinishReason.LENGTH)
        if report.outcome is Outcome.STOP or report.outcome is Outcome.LENGTH:
            return self._end(FinishReason(report.outcome.value))
        if (error := self._hopeless(worker_id, report)) is not None:
            return self._end(error)
        return self._decode_alone(worker_id, report.outcome is Outcome.PREFILLED)

    def _hopeless(self, worker_id: str, report: PartReport) -> RouterError | None:
        """Why no other worker is asked after this report; notes failures that may come once."""
        if (refusal := refusal_of(report)) is not None:
            return refusal
        workers = self._same_failures.get(report.outcome)
        if workers is None or len(self.emitted) == self.max_tokens:
            return None
        workers.append(worker_id)
        return same_failure(report, workers) if len(workers) >= MAX_SAME_FAILURES else None

    def _on_prefill_gone(self, worker_id: str) -> Sequence[Action]:
        self._prefill_id = None
        if len(self.emitted) == self.max_tokens:
            return self._end(FinishReason.LENGTH)
        return self._decode_alone(worker_id, is_well=False)

    def _decode_alone(self, worker_id: str, is_well: bool) -> Sequence[Action]:
        if not is_well:
            self.failed_on.add(worker_id)
        if self.phase is not Phase.PREFILLING:
            return _NOTHING  # it had sent its token: the decode worker is at work
        if self.needs_prefill:
            self.last_failure = f"{worker_id}: lost before the logprobs of the prompt had come"
            actions = self._cancel_parts()
            self.phase = Phase.PLACING
            return actions
        assert self._decode_id is not None, "prefilling without a decode worker"
        self.phase = Phase.DECODING
        return (ContinuePart(self._decode_id, ()),)

    def _on_decode_gone(self, worker_id: str, why: str) -> Sequence[Action]:
        self._decode_id = None
        self.failed_on.add(worker_id)
        self.last_failure = f"{worker_id}: {why}"
        if len(self.emitted) == self.max_tokens:
            return self._end(FinishReason.LENGTH)
        actions = self._cancel_parts()
        self.phase = Phase.PLACING
        return actions

    def _lose(self, worker_id: str, why: str) -> Sequence[Action]:
        # A worker that breaks the contract is treated as lost for this stream; it may still hold its part.
        cancel = (CancelPart(worker_id),)
        if worker_id == self._prefill_id:
            return (*cancel, *self._on_prefill_gone(worker_id))
        return (*cancel, *self._on_decode_gone(worker_id, why))

    def _end(self, ending: FinishReason | RouterError) -> Sequence[Action]:
        if self.phase is Phase.ENDED:
            return _NOTHING
        actions = self._cancel_parts()
        self.phase = Phase.ENDED
        self.ending = ending
        return actions

    def _cancel_parts(self) -> Sequence[Action]:
        parts = [worker_id for worker_id in (self._prefill_id, self._decode_id) if worker_id is not None]
        self._prefill_id = self._decode_id = None
        return tuple(CancelPart(worker_id) for worker_id in parts)

    def _count(self, part: Part, report: PartReport) -> None:
        self.num_computed_prompt_tokens += report.num_computed_prompt_tokens
        self.num_drafts += report.num_drafts
        self.num_draft_tokens += report.num_draft_tokens
        self.num_accepted_tokens += report.num_accepted_tokens
        times = report.times
        if part is Part.PREFILL:
            self._prefilled_s = times.first_token_s
        else:
            self.num_transferred_blocks += report.num_transferred_blocks
        if part is Part.DECODE:
            self.num_recomputed_prompt_tokens += report.num_computed_prompt_tokens
            if self._prefilled_s > 0 and times.continued_s > 0 and times.first_step_s > 0:
                relay_s, total_s = times.continued_s - self._prefilled_s, times.first_step_s - self._prefilled_s
                if 0 <= relay_s <= total_s:  # hosts whose clocks differ may tell of a start before the end
                    self.kv_transfer = KVTransfer(relay_s, total_s)
        else:
            # Of the last placement; its prompt may hold emitted tokens too.
            self.num_cached_prompt_tokens = min(report.num_cached_prompt_tokens, self.num_prompt_tokens)


def refusal_of(report: PartReport) -> InvalidRequest | None:
    """The error of a request that no worker can serve; None where another one may."""
    if not report.is_invalid_request:
        return None
    if report.outcome is Outcome.ADAPTER_FAILED:
        return AdapterRefused(report.error or "a worker refused the adapter", param="model")
    if report.outcome is not Outcome.FAILED:
        return None
    field = report.error.partition(":")[0]
    return InvalidRequest(report.error or "a worker refused the request", param=field if field in _FIELDS else None)


def same_failure(report: PartReport, worker_ids: Sequence[str]) -> RouterError:
    """The error of a request with which the same went wrong on some workers."""
    where = " and on ".join(worker_ids)
    if report.outcome is Outcome.ADAPTER_FAILED:
        return AdapterFailed(f"the adapter could not be loaded on {where}: {report.error}")
    return StepFailed(f"a step with the request failed on {where}: {report.error}")
