"""Chooses the tokens of a step from its rows of logits: rules and grammars of rows that have some, then the sampler.

Every rank of the last stage has one, for its share of the vocabulary. Knows nothing of requests beyond the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from grammars.compiler import GrammarCompiler
from workers.engine.step import RowState, StepPlan
from workers.parallel import ParallelGroups
from workers.runtime.batching import PreparedBatch
from workers.runtime.host_copy import read_later
from workers.sampling.grammar_masks import GrammarMasks, MaskedRun
from workers.sampling.logit_rules import ChosenRows, LogitRules
from workers.sampling.row_reports import Reported, numbers_of
from workers.sampling.sampler import sample


class TokenChooser:
    """Keeps the rules of all rows of the ranks' state."""

    def __init__(
        self,
        groups: ParallelGroups,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        grammars: GrammarCompiler,
    ) -> None:
        self._groups = groups
        self._vocab_size = vocab_size
        share = -(-vocab_size // groups.shard.tp)
        first_id = groups.shard.tp_rank * share
        self._has_grammar = np.zeros(max_num_seqs, np.bool_)
        self._rules: LogitRules | None = None
        self._masks: GrammarMasks | None = None
        if groups.shard.is_last_stage:
            self._rules = LogitRules(max_num_seqs, first_id, share, device)
            self._masks = GrammarMasks(grammars, first_id, share, device)

    def take_rows(self, states: Sequence[RowState]) -> None:
        """Requests take rows."""
        if self._rules is None or self._masks is None:
            return
        for state in states:
            sampling = state.sampling
            if sampling.has_rules:
                self._rules.take(state.row, sampling, state.num_prompt_tokens, state.history, state.stop_ids)
            self._has_grammar[state.row] = sampling.grammar is not None
            if sampling.grammar is None:
                self._masks.leave(state.row)
            else:
                completion = state.history[state.num_prompt_tokens :]
                self._masks.take(state.row, sampling.grammar, completion, state.stop_ids)

    def begin(self, plan: StepPlan, prepared: PreparedBatch) -> None:
        """The forward pass is about to run: what can be worked out beside it begins."""
        if self._masks is not None:
            has_grammar = self._has_grammar[plan.rows]
            self._masks.begin(list(self._masked_runs(plan, prepared)) if has_grammar.any() else ())

    def _masked_runs(self, plan: StepPlan, prepared: PreparedBatch) -> Iterator[MaskedRun]:
        known_ends = np.cumsum(plan.num_known)
        num_choosing = plan.num_logits - plan.num_prompt_logits
        for index in np.flatnonzero(self._has_grammar[plan.rows] & (num_choosing > 0)).tolist():
            row, end, count = int(plan.rows[index]), int(known_ends[index]), int(num_choosing[index])
            drafts = plan.token_ids[end - count + 1 : end].tolist()
            yield MaskedRun(row, np.flatnonzero(prepared.rows == row)[-count:].tolist(), drafts)

    def choose(
        self, logits: Tensor, hidden: Tensor | None, prepared: PreparedBatch, reported: Reported
    ) -> tuple[Tensor, Tensor | None]:
        """int64 [rows], as sampler.sample gives; and what numbers_of gives, where a row reports something.

        hidden: [rows, hidden_size], normed, where rows are pooled.
        """
        token_ids = self._choose(logits, prepared)
        if prepared.prompt_targets is not None:
            targets = torch.from_numpy(prepared.prompt_targets).to(token_ids.device)
            token_ids = torch.where(targets >= 0, targets, token_ids)
        if reported.is_empty:
            return token_ids, None
        return token_ids, numbers_of(logits, hidden, token_ids, reported, self._groups, self._vocab_size)

    def _choose(self, logits: Tensor, prepared: PreparedBatch) -> Tensor:
        sampling = prepared.sampling
        if not sampling.has_rules.any():
            return sample(logits, sampling, prepared.positions, self._groups, self._vocab_size)
        assert self._rules is not None, "only the last stage chooses tokens"
        assert self._masks is not None, "only the last stage chooses tokens"
        batch = prepared.batch
        chosen = ChosenRows(prepared.rows, prepared.positions, prepared.num_drafts, batch.logit_rows, batch.token_ids)
        # In a copy: logprobs are those of the model.
        logits = self._rules.apply(logits.to(torch.float32, copy=True), sampling.has_rules, chosen)
        self._masks.apply(logits)
        token_ids = sample(logits, sampling, prepared.positions, self._groups, self._vocab_size)
        self._rules.note(token_ids, sampling.has_rules, chosen)
        if self._masks.is_due:
            self._masks.note(read_later(token_ids))
        return token_ids

    def close(self) -> None:
        """End what runs beside the steps."""
        if self._masks is not None:
            self._masks.close()
