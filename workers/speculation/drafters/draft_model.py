"""A smaller model with the same tokenizer proposes tokens.

Its steps follow each other without waiting for tokens: each takes the last one's choice where it lies. Penalties,
grammars and bad words are left to the model, which judges.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from workers.engine.request import Request
from workers.engine.step import ModelRunner, SchedulerOutput
from workers.speculation.drafters.draft_plan import (
    DraftLimits,
    PlanNumbers,
    Wait,
    append,
    chain_s,
    drafts_of,
    take_row,
    until_failed,
)
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.drafters.sequences import DraftSequence, DraftSequences
from workers.speculation.step_costs import StepCosts

_PREPARED_TOKENS = 128  # of prompts in a step, while their requests wait


@dataclass(slots=True)
class _Turn:
    """A request in a run of draft steps."""

    request: Request
    sequence: DraftSequence
    num_tokens: int  # to propose; 0: its tokens are only computed
    end: int = 0  # of its tokens that are computed


class DraftModel:
    """runner: of the draft, with async scheduling. costs: of its steps; None: not measured, and then not counted.
    on_stream: what its steps are started in, so that they do not wait for those of the model."""

    def __init__(
        self,
        runner: ModelRunner,
        sequences: DraftSequences,
        limits: DraftLimits,
        costs: StepCosts | None,
        temperature_scale: float = 1.0,
        on_stream: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._runner = runner
        self._sequences = sequences
        self._limits = limits
        self._costs = costs
        self._temperature_scale = temperature_scale
        self._on_stream = on_stream
        self._plans = PlanNumbers()

    # ---------------------------------------------------------------------------------------------------------- drafts
    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter. Of a request whose prompt the draft has not read it proposes nothing yet."""
        names = {one.request.request_id for one in wanted}
        turns = self._turns([(one.request, one.num_tokens) for one in wanted], names)
        ready = {
            turn.request.request_id: turn.sequence.proposed[: turn.num_tokens]
            for turn in turns
            # Drafted ahead, and all before them was right. A few are not worth a step of the model.
            if 0 < turn.num_tokens <= 2 * len(turn.sequence.proposed)
        }
        turns = [turn for turn in turns if turn.request.request_id not in ready]
        waits = [self._first_step(turns)] if turns else []
        drafting = [turn for turn in turns if turn.num_tokens]
        for step in range(1, max((turn.num_tokens for turn in drafting), default=0)):
            waits.append(self._next_step([turn for turn in drafting if turn.num_tokens > step], step))
        drafts = drafts_of(waits, [(turn.request.request_id, turn.num_tokens) for turn in drafting])
        self._note(turns, drafts)
        drafts |= ready
        return [until_failed(drafts.get(one.request.request_id, [])) for one in wanted]

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter: the chain goes on behind what is being judged, as if all of it were right."""
        names = {request.request_id for request in requests}
        held = [(one, self._sequences.proposing(one, num_tokens, names)) for one in requests]
        room = self._limits.max_context_tokens - num_tokens
        turns = [_Turn(one, sequence, num_tokens) for one, sequence in held if sequence and sequence.end <= room]
        if not turns:
            return
        ends = {turn.request.request_id: turn.sequence.end for turn in turns}
        waits = []
        for step in range(num_tokens):
            plan = SchedulerOutput()
            for turn in turns:
                sequence, known = turn.sequence, None if step else [turn.sequence.next_id or 0]
                if not step:
                    take_row(plan, sequence, turn.request, self._temperature_scale)
                append(plan, sequence, ends[turn.request.request_id] + step, known, 1)
            waits.append(self._start(plan))
        chosen = drafts_of(waits, [(turn.request.request_id, num_tokens) for turn in turns])
        for turn in turns:
            if choices := until_failed(chosen[turn.request.request_id]):
                turn.sequence.computed_ahead(choices)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compute a little of what the draft lacks of these requests while they wait for their KV. Running ones wait
        meanwhile. It takes space that is free, and no other request's."""
        turns = self._turns([(request, 0) for request in requests], self._sequences.names)
        if turns:
            self._first_step(turns, _PREPARED_TOKENS)()
            self._note(turns, {})

    def _turns(self, wanted: Sequence[tuple[Request, int]], used: Collection[str]) -> list[_Turn]:
        """Those that have space in the draft's cache, and something to do there; those that lack least come first.

        used: the ids of requests that give no space.
        """
        turns = []
        for request, count in wanted[: self._limits.max_num_seqs]:
            count = min(count, self._limits.max_context_tokens - request.num_tokens)
            if count < 0:
                continue
            sequence = self._sequences.of(request, request.num_tokens + max(0, count - 1), used)
            if sequence is not None and (count or sequence.num_computed < request.num_tokens):
                turns.append(_Turn(request, sequence, count))
        return sorted(turns, key=lambda turn: turn.request.num_tokens - turn.sequence.num_computed)

    def _first_step(self, turns: list[_Turn], most: int = 1 << 31) -> Wait:
        """What the draft lacks of each request, and its first proposal where it has all. Turns for which there is no
        space in the step are taken out."""
        plan, left = SchedulerOutput(), min(most, self._limits.max_num_batched_tokens)
        planned = []
        for turn in turns:
            request, sequence = turn.request, turn.sequence
            start = min(sequence.num_computed, request.num_tokens - 1)  # of the last token the logits are wanted
            turn.end = min(request.num_tokens, start + left)
            if turn.end == start:
                break
            left -= turn.end - start
            if turn.end < request.num_tokens:
                turn.num_tokens = 0
            take_row(plan, sequence, request, self._temperature_scale)
            append(plan, sequence, start, request.token_ids[start : turn.end], int(turn.num_tokens > 0))
            planned.append(turn)
        turns[:] = planned
        return self._start(plan)

    def _next_step(self, turns: Sequence[_Turn], step: int) -> Wait:
        """One more token of each, after the one that the last step chooses."""
        plan = SchedulerOutput()
        for turn in turns:
            append(plan, turn.sequence, turn.request.num_tokens + step - 1, None, 1)
        return self._start(plan)

    def _start(self, plan: SchedulerOutput) -> Wait:
        with self._on_stream():
            return self._runner.start(self._plans.sent(plan))

    def _note(self, turns: Sequence[_Turn], drafts: dict[str, list[int]]) -> None:
        for turn in turns:
            chosen = until_failed(drafts.get(turn.request.request_id, []))
            turn.sequence.computed(turn.end, chosen[:-1], chosen[-1] if chosen else None)
            self._sequences.note_full_blocks(turn.sequence, turn.request.token_ids)

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter: it asks for none."""

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._sequences.forget(request.request_id)

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return self._costs is not None

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return chain_s(self._costs, lengths)
