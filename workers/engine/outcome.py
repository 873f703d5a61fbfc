"""What a finished step means for the requests: their tokens, their blocks, and their ends. Pure.

A plan may have been overtaken: its requests may be gone, or preempted, when it is through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from kvstore.blocks.block_pools import BlockPools
from workers.engine.kv.block_naming import RequestNames
from workers.engine.kv.pulls import Pulls
from workers.engine.kv.transfers import Transfer, TransferKind, Transfers
from workers.engine.queues import RequestQueues
from workers.engine.request import FinishReason, PromptLogprobs, Request, RequestRole, RequestStatus, TokenOutputs
from workers.engine.step import ModelRunnerOutput, SchedulerOutput, TransferDone
from workers.sampling.params import NO_CHOICE, NO_TOKEN, PooledHidden, RowReport, TokenLogprobs

_REASONS = {NO_TOKEN: FinishReason.FAILED, NO_CHOICE: FinishReason.NO_CHOICE}


@dataclass(frozen=True, slots=True)
class JudgedDrafts:
    """Draft tokens of a request that a step computed."""

    request: Request
    num_draft_tokens: int
    num_right: int  # those that the model chose, too, up to the first that it did not


@dataclass(slots=True)
class UpdateResult:
    """What a finished step means for requests."""

    tokens: TokenOutputs = field(default_factory=TokenOutputs)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    finished: list[tuple[Request, FinishReason]] = field(default_factory=list)
    published_names: list[bytes] = field(default_factory=list)
    judged: list[JudgedDrafts] = field(default_factory=list)
    num_transferred_blocks: int = 0
    num_computed_prompt_tokens: int = 0


class StepOutcomes:
    """Takes outcomes into the books of one engine, in the order of the plans."""

    def __init__(
        self,
        queues: RequestQueues,
        pool: BlockPools,
        names: RequestNames,
        transfers: Transfers,
        pulls: Pulls,
        max_model_len: int,
    ) -> None:
        self._queues = queues
        self._pool = pool
        self._names = names
        self._transfers = transfers
        self._pulls = pulls
        self._max_model_len = max_model_len
        self.num_recomputed_prompt_tokens = 0

    def update(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> UpdateResult:
        """Apply a step's outcome to the requests. A plan's requests may be gone, or preempted, meanwhile."""
        result = UpdateResult()
        self._transfers.release_copied(plan.stores)
        for done in output.transfers:
            if (transfer := self._transfers.end(done)) is not None:
                self._end_transfer(transfer, result)
        size, running, at = self._pool.block_size, RequestStatus.RUNNING, 0
        columns = zip(
            plan.requests,
            plan.generations,
            plan.start_positions,
            plan.num_tokens,
            plan.num_logits,
            plan.num_prompt_logits,
            strict=True,
        )
        for request, generation, start, count, num_logits, num_prompt in columns:
            choices, reports = output.sampled_token_ids[at : at + num_logits], output.reports[at : at + num_logits]
            at += num_logits
            if request.num_preemptions != generation or request.status is not running:
                continue
            end = start + count
            if start < request.num_given_tokens:
                result.num_computed_prompt_tokens += self._count_computed(request, start, end)
            if request.pooling is not None:
                self._add_hidden(request, start, end, reports, result)
                num_logits = num_prompt = 0  # nothing was chosen
            if num_prompt:
                found = _logprobs(reports[:num_prompt])
                result.prompt_logprobs.append(PromptLogprobs(request, start + 1, [one for one in found if one]))
                choices, reports = choices[num_prompt:], reports[num_prompt:]
            if num_logits > num_prompt:
                request.num_pending_tokens -= 1
                if request.drafts_in_flight:
                    choices = self._judge_drafts(request, choices, result)
                    end = request.num_computed_tokens
                self._append_tokens(request, choices, _logprobs(reports), result)
            if end >= (request.num_registered_blocks + 1) * size:
                self._note_full_blocks(request, end)
        return result

    def _add_hidden(
        self, request: Request, start: int, end: int, reports: Sequence[RowReport | None], result: UpdateResult
    ) -> None:
        """Hidden states of some of an embedding's tokens have come; of its last one the embedding is complete."""
        if reports and isinstance(pooled := reports[-1], PooledHidden):
            request.pool(pooled.values, is_first=start == 0)
        if end == request.num_tokens:
            request.num_pending_tokens -= 1
            is_finite = all(map(math.isfinite, request.embedding))
            result.finished.append((request, FinishReason.EMBEDDED if is_finite else FinishReason.FAILED))

    def abandon(self, plans: Sequence[SchedulerOutput]) -> UpdateResult:
        """The ranks gave up these plans and forgot all transfers: whatever moved counts as not moved."""
        result = UpdateResult()
        for plan in plans:
            self._transfers.release_copied(plan.stores)
        for transfer_id in self._transfers.part_ids():
            if (transfer := self._transfers.end(TransferDone(transfer_id, 0))) is not None:
                self._end_transfer(transfer, result)
        return result

    def _judge_drafts(self, request: Request, choices: Sequence[int], result: UpdateResult) -> Sequence[int]:
        """The choices after the last known token and after each draft that the model had chosen too."""
        drafts, request.drafts_in_flight = request.drafts_in_flight, []
        num_right = 0
        while num_right < len(drafts) and choices[num_right] == drafts[num_right]:
            num_right += 1
        result.judged.append(JudgedDrafts(request, len(drafts), num_right))
        request.num_drafts += 1
        request.num_draft_tokens += len(drafts)
        request.num_accepted_tokens += num_right
        request.num_computed_tokens -= len(drafts) - num_right
        request.num_kv_tokens = min(request.num_kv_tokens, request.num_computed_tokens)
        request.window_tokens -= num_right
        return choices[: num_right + 1]

    def _append_tokens(
        self,
        request: Request,
        token_ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs | None],
        result: UpdateResult,
    ) -> None:
        """Tokens that were chosen, up to one that ends the request."""
        known = request.token_ids
        for token_id, token_logprobs in zip_longest(token_ids, logprobs[: len(token_ids)]):
            if token_id < 0 or token_id in request.stop_ids:
                result.finished.append((request, _REASONS.get(token_id, FinishReason.STOP)))
                return
            known.append(token_id)
            if len(known) >= request.max_num_tokens:
                request.last_logprobs = token_logprobs
                if request.num_stores_in_flight:
                    self._queues.running.remove(request)
                    self._queues.storing.append(request)
                    request.status = RequestStatus.STORING
                else:
                    self._send_last(request, result)
                return
            result.tokens.append(request, len(known) - 1 - request.num_prompt_tokens, token_id, token_logprobs)
        if len(known) >= (len(request.block_names) + 1) * self._pool.block_size:
            self._names.extend(request)

    def _send_last(self, request: Request, result: UpdateResult) -> None:
        """The request has all its tokens; the last is sent now."""
        last = request.token_ids[-1]
        result.tokens.append(request, request.num_output_tokens - 1, last, request.last_logprobs)
        is_prefilled = (
            request.role is RequestRole.PREFILL
            and request.num_output_tokens < request.sampling.max_tokens
            and request.num_tokens < self._max_model_len
        )
        result.finished.append((request, FinishReason.PREFILLED if is_prefilled else FinishReason.LENGTH))

    def _end_transfer(self, transfer: Transfer, result: UpdateResult) -> None:
        request = transfer.request
        if transfer.kind is TransferKind.LOAD:
            result.num_transferred_blocks += self._pulls.end(transfer)
            return
        result.published_names.extend(transfer.block_names[: transfer.num_blocks])
        if transfer.kind is TransferKind.STORE:
            request.num_published_blocks += transfer.num_blocks
            request.num_stores_in_flight -= 1
            if request.status is RequestStatus.STORING and not request.num_stores_in_flight:
                self._send_last(request, result)

    def _count_computed(self, request: Request, start: int, end: int) -> int:
        prompt_tokens = min(end, request.num_given_tokens) - start
        request.num_computed_prompt_tokens += prompt_tokens
        if request.role is RequestRole.DECODE:
            self.num_recomputed_prompt_tokens += prompt_tokens
        return prompt_tokens

    def _note_full_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Name the blocks that are full now, so that other requests find them; give back what left the windows."""
        full = min(num_computed_tokens // self._pool.block_size, len(request.block_names))
        for index in range(request.num_registered_blocks, full):
            self._pool.register(request.block_tables, index, request.block_names[index])
            request.num_registered_blocks = index + 1
        if self._pool.has_windows:
            self._pool.release_behind_windows(request.block_tables, num_computed_tokens)


def _logprobs(reports: Sequence[RowReport | None]) -> Sequence[TokenLogprobs | None]:
    return [one if isinstance(one, TokenLogprobs) else None for one in reports]
