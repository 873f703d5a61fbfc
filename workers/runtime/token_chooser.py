"""Chooses the tokens of a step from its rows of logits: the rules of rows that have some, then the sampler.

Every rank of the last stage has one, for its share of the vocabulary. Knows nothing of requests beyond the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.engine.step import RowState
from workers.parallel import ParallelGroups
from workers.runtime.batching import PreparedBatch
from workers.sampling.logit_rules import ChosenRows, LogitRules
from workers.sampling.logprobs import of_rows
from workers.sampling.sampler import sample


class TokenChooser:
    """Keeps the rules of all rows of the ranks' state."""

    def __init__(self, groups: ParallelGroups, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._groups = groups
        self._vocab_size = vocab_size
        share = -(-vocab_size // groups.shard.tp)
        self._rules: LogitRules | None = None
        if groups.shard.is_last_stage:
            self._rules = LogitRules(max_num_seqs, groups.shard.tp_rank * share, share, device)

    def take_rows(self, states: Sequence[RowState]) -> None:
        """Requests take rows."""
        for state in states:
            if state.sampling.has_rules and self._rules is not None:
                self._rules.take(state.row, state.sampling, state.num_prompt_tokens, state.history, state.stop_ids)

    def choose(self, logits: Tensor, prepared: PreparedBatch) -> tuple[Tensor, Tensor | None]:
        """int64 [rows], as sampler.sample gives; and what logprobs.of_rows gives, where a row asks for it."""
        token_ids = self._choose(logits, prepared)
        if not prepared.sampling.has_logprobs.any():
            return token_ids, None
        return token_ids, of_rows(logits, token_ids, prepared.sampling, self._groups, self._vocab_size)

    def _choose(self, logits: Tensor, prepared: PreparedBatch) -> Tensor:
        sampling = prepared.sampling
        if not sampling.has_rules.any():
            return sample(logits, sampling, prepared.positions, self._groups, self._vocab_size)
        assert self._rules is not None, "only the last stage chooses tokens"
        batch = prepared.batch
        chosen = ChosenRows(prepared.rows, prepared.positions, prepared.num_drafts, batch.logit_rows, batch.token_ids)
        # In a copy: logprobs are those of the model.
        logits = self._rules.apply(logits.to(torch.float32, copy=True), sampling.has_rules, chosen)
        token_ids = sample(logits, sampling, prepared.positions, self._groups, self._vocab_size)
        self._rules.note(token_ids, sampling.has_rules, chosen)
        return token_ids
