"""The plans of a drafter's own steps: rows of its sequences, each with the sampling options of its request.

Drafts are chosen with the noise that the model's own choice at that position will be made with (Daliri et al.,
"Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978), so that both agree as
often as their distributions allow. Knows nothing of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from workers.engine.plan_wire import decode_plan, encode_plan
from workers.engine.request import Request
from workers.engine.step import ModelRunnerOutput, RowState, SchedulerOutput, StepPlan
from workers.sampling.params import SamplingParams
from workers.speculation.drafters.sequences import DraftSequence
from workers.speculation.step_costs import StepCosts

_MAX_SEQUENCE = (1 << 31) - 1
_NEUTRAL = SamplingParams()

Wait = Callable[[], ModelRunnerOutput]


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """Of a drafter's steps."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_context_tokens: int


class PlanNumbers:
    """Numbers the plans of one runner, as it wants to see them."""

    def __init__(self) -> None:
        self._number = 0

    def sent(self, plan: SchedulerOutput) -> StepPlan:
        """As the runner gets it."""
        self._number = self._number % _MAX_SEQUENCE + 1
        return decode_plan(encode_plan(plan, self._number, self._number == 1))


def take_row(
    plan: SchedulerOutput, sequence: DraftSequence, request: Request, temperature_scale: float, num_before: int = 0
) -> None:
    """What the runner does not know yet of a sequence: all of it, or blocks that it got since.

    num_before: tokens of the request before the first that has an entry in the cache.
    """
    tables = sequence.block_tables
    if sequence.is_new:
        sequence.is_new = False
        block_ids = [table.block_ids for table in tables]
        sampling = _draft_sampling(request.sampling, temperature_scale)
        plan.new_rows.append(RowState(sequence.row, request.num_prompt_tokens - num_before, sampling, block_ids))
    else:
        for group, table in enumerate(tables):
            for index in range(sequence.num_sent_blocks, len(table.block_ids)):
                plan.new_blocks += (group, sequence.row, index, table.block_ids[index])
    sequence.num_sent_blocks = len(tables[0].block_ids)


def append(
    plan: SchedulerOutput, sequence: DraftSequence, start: int, token_ids: Sequence[int] | None, num_logits: int
) -> None:
    """Compute tokens of a sequence from an entry of its cache on; None means one token that the last step chooses."""
    count = 1 if token_ids is None else len(token_ids)
    plan.rows.append(sequence.row)
    plan.start_positions.append(start)
    plan.num_tokens.append(count)
    plan.write_from.append(sequence.num_kv if token_ids is not None else start)
    plan.num_logits.append(num_logits)
    plan.num_prompt_logits.append(0)
    plan.num_known.append(0 if token_ids is None else count)
    plan.token_ids += token_ids or ()


def _draft_sampling(asked: SamplingParams, temperature_scale: float) -> SamplingParams:
    """How a drafter chooses for a request: with its seed, its filters, and what changes logits at all positions."""
    neutral = {
        name: getattr(_NEUTRAL, name)
        for name in (
            "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "banned_sequences",
            "prompt_logprobs", "logprobs", "grammar",
        )
    }  # fmt: skip
    return replace(asked, temperature=asked.temperature * temperature_scale, **neutral)


def drafts_of(waits: Sequence[Wait], turns: Sequence[tuple[str, int]]) -> dict[str, list[int]]:
    """What the steps have chosen. waits: of steps that follow each other; the first has one choice for each of the
    turns (name, tokens wanted), later ones for those that want so many."""
    drafts: dict[str, list[int]] = {name: [] for name, _ in turns}
    for step, wait in enumerate(waits):
        chosen = iter(wait().sampled_token_ids)
        for name, num_tokens in turns:
            if num_tokens > step:
                drafts[name].append(next(chosen))
    return drafts


def until_failed(drafts: Sequence[int]) -> Sequence[int]:
    """Without what follows a position at which the drafter's logits were no numbers, or none was left."""
    failed = next((index for index, token_id in enumerate(drafts) if token_id < 0), len(drafts))
    return drafts[:failed]


def chain_s(costs: StepCosts | None, lengths: Sequence[int]) -> float:
    """How long it takes to propose so many tokens for each of some requests, one after the other; None: nothing was
    measured, and it is not counted."""
    if costs is None:
        return 0.0
    counts = [sum(length > step for length in lengths) for step in range(max(lengths, default=0))]
    return sum(costs.step_s(count, count if step == 0 else 0) for step, count in enumerate(counts))
