"""A smaller model with the same tokenizer proposes tokens.

It chooses with the noise that the model's own choice at that position will be made with (Daliri et al., "Coupling
without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978), so that both agree as often as
their distributions allow. Its steps follow each other without waiting for tokens: each takes the last one's choice
where it lies. Penalties, grammars and bad words are left to the model, which judges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.request import Request
from workers.engine.step import ModelRunner, ModelRunnerOutput, RowState, SchedulerOutput
from workers.sampling.params import SamplingParams
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.drafters.sequences import DraftSequence, DraftSequences
from workers.speculation.step_costs import StepCosts

_MAX_SEQUENCE = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Of the draft model."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_context_tokens: int


@dataclass(slots=True)
class _Turn:
    """A request in a run of draft steps."""

    request: Request
    sequence: DraftSequence
    num_tokens: int  # to propose; 0: its tokens are only computed
    end: int = 0  # of its tokens that are computed


class DraftModel:
    """runner: of the draft, with async scheduling. costs: of its steps; None: not measured, and then not counted."""

    def __init__(
        self,
        runner: ModelRunner,
        sequences: DraftSequences,
        limits: DraftLimits,
        costs: StepCosts | None,
        temperature_scale: float = 1.0,
    ) -> None:
        self._runner = runner
        self._sequences = sequences
        self._limits = limits
        self._costs = costs
        self._temperature_scale = temperature_scale
        self._number = 0  # of the last plan

    # ---------------------------------------------------------------------------------------------------------- drafts
    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter. Of a request whose prompt the draft has not read it proposes nothing yet."""
        turns = self._turns([(one.request, one.num_tokens) for one in wanted])
        waits = [self._first_step(turns)] if turns else []
        drafting = [turn for turn in turns if turn.num_tokens]
        for step in range(1, max((turn.num_tokens for turn in drafting), default=0)):
            waits.append(self._next_step([turn for turn in drafting if turn.num_tokens > step], step))
        drafts: dict[str, list[int]] = {turn.request.request_id: [] for turn in drafting}
        for step, wait in enumerate(waits):
            chosen = iter(wait().sampled_token_ids)
            for turn in drafting:
                if turn.num_tokens > step:
                    drafts[turn.request.request_id].append(next(chosen))
        self._note(turns, drafts)
        return [_until_failed(drafts.get(one.request.request_id, [])) for one in wanted]

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compute what the draft lacks of these requests, as much as one step takes, while they wait for their KV."""
        turns = self._turns([(request, 0) for request in requests])
        if turns:
            self._first_step(turns)()
            self._note(turns, {})

    def _turns(self, wanted: Sequence[tuple[Request, int]]) -> list[_Turn]:
        """Those that have space in the draft's cache, and something to do there; those that lack least come first."""
        names = {request.request_id for request, _ in wanted}
        turns = []
        for request, count in wanted[: self._limits.max_num_seqs]:
            count = min(count, self._limits.max_context_tokens - request.num_tokens)
            if count < 0:
                continue
            sequence = self._sequences.of(request, request.num_tokens + max(0, count - 1), names)
            if sequence is not None and (count or sequence.num_computed < request.num_tokens):
                turns.append(_Turn(request, sequence, count))
        return sorted(turns, key=lambda turn: turn.request.num_tokens - turn.sequence.num_computed)

    def _first_step(self, turns: list[_Turn]) -> Callable[[], ModelRunnerOutput]:
        """What the draft lacks of each request, and its first proposal where it has all. Turns for which there is no
        space in the step are taken out."""
        plan, left = SchedulerOutput(), self._limits.max_num_batched_tokens
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
            self._take_row(plan, turn)
            self._append(plan, sequence, start, request.token_ids[start : turn.end], int(turn.num_tokens > 0))
            planned.append(turn)
        turns[:] = planned
        return self._start(plan)

    def _next_step(self, turns: Sequence[_Turn], step: int) -> Callable[[], ModelRunnerOutput]:
        """One more token of each, after the one that the last step chooses."""
        plan = SchedulerOutput()
        for turn in turns:
            self._append(plan, turn.sequence, turn.request.num_tokens + step - 1, None, 1)
        return self._start(plan)

    def _take_row(self, plan: SchedulerOutput, turn: _Turn) -> None:
        sequence, request = turn.sequence, turn.request
        tables = sequence.block_tables
        if sequence.is_new:
            sequence.is_new = False
            block_ids = [table.block_ids for table in tables]
            plan.new_rows.append(
                RowState(sequence.row, request.num_prompt_tokens, self._sampling(request.sampling), block_ids)
            )
        else:
            for group, table in enumerate(tables):
                for index in range(sequence.num_sent_blocks, len(table.block_ids)):
                    plan.new_blocks += (group, sequence.row, index, table.block_ids[index])
        sequence.num_sent_blocks = len(tables[0].block_ids)

    def _sampling(self, asked: SamplingParams) -> SamplingParams:
        """How the draft chooses for a request: with its seed, its filters, and what changes logits at all positions."""
        neutral = {
            name: getattr(_NEUTRAL, name)
            for name in (
                "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "banned_sequences",
                "prompt_logprobs", "logprobs", "grammar",
            )
        }  # fmt: skip
        return replace(asked, temperature=asked.temperature * self._temperature_scale, **neutral)

    @staticmethod
    def _append(
        plan: SchedulerOutput, sequence: DraftSequence, start: int, token_ids: Sequence[int] | None, num_logits: int
    ) -> None:
        """token_ids: None means one token that the last step chooses."""
        count = 1 if token_ids is None else len(token_ids)
        plan.rows.append(sequence.row)
        plan.start_positions.append(start)
        plan.num_tokens.append(count)
        plan.write_from.append(sequence.num_kv if token_ids is not None else start)
        plan.num_logits.append(num_logits)
        plan.num_prompt_logits.append(0)
        plan.num_known.append(0 if token_ids is None else count)
        plan.token_ids += token_ids or ()

    def _start(self, plan: SchedulerOutput) -> Callable[[], ModelRunnerOutput]:
        self._number = self._number % _MAX_SEQUENCE + 1
        return self._runner.start(decode_plan(encode_plan(plan, self._number, self._number == 1)))

    def _note(self, turns: Sequence[_Turn], drafts: dict[str, list[int]]) -> None:
        for turn in turns:
            computed = drafts.get(turn.request.request_id, [])[:-1]  # the last one was only chosen
            turn.sequence.computed(turn.end, computed)
            self._sequences.note_full_blocks(turn.sequence, turn.request.token_ids)

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter: it asks for none."""

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._sequences.forget(request.request_id)

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        if self._costs is None:
            return 0.0
        counts = [sum(length > step for length in lengths) for step in range(max(lengths, default=0))]
        return sum(self._costs.step_s(count, count if step == 0 else 0) for step, count in enumerate(counts))


_NEUTRAL = SamplingParams()


def _until_failed(drafts: Sequence[int]) -> Sequence[int]:
    """Without what follows a position at which the draft's logits were no numbers."""
    failed = next((index for index, token_id in enumerate(drafts) if token_id < 0), len(drafts))
    return drafts[:failed]
