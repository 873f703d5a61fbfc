"""Changes the logits of the rows that ask for it, before tokens are chosen: bias, bans, min_tokens, penalties.

Keeps for each row of the ranks' state what that takes: the bias of each id, which tokens were seen how often, and the
last tokens of the completion. A row's state is built from the tokens that are known when a request takes it, so a
preemption, a hand-off and a failover leave it as it was; afterwards each rank adds the tokens as they are chosen, and
waits for nobody. Each rank holds its own share of the vocabulary. Rows that use none of it cost nothing; the state is
allocated when the first row does. Knows nothing of requests.

Order: logit_bias, allowed and banned ids; banned sequences; min_tokens; penalties. The sampler then divides by the
temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kernels
from workers.sampling.params import SamplingParams

MAX_SEQUENCE_TOKENS = 32  # of a banned sequence
_NUM_RECENT = MAX_SEQUENCE_TOKENS - 1  # tokens before its last
_ANY = -1  # in a banned sequence: any token, or none
_NO_ID = -2  # in the recent tokens: before the first of the completion

Longs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class ChosenRows:
    """Which row of the state each row of logits belongs to, and what came before its token."""

    rows: Longs  # of the state
    positions: Longs  # in the completion: of the tokens that are chosen
    num_drafts: Longs  # of the tokens just before: proposed, and not judged yet
    batch_rows: Tensor  # int64: of the last token before, in token_ids
    token_ids: Tensor  # int64: the batch's


@dataclass(slots=True)
class _Lists:
    """What a row may ban beside its bias."""

    sequences: Tensor | None  # int64 [n, MAX_SEQUENCE_TOKENS], filled up from the left with _ANY
    stop_ids: Tensor  # int64, of this rank's share, counted from its first id; held off by min_tokens


class LogitRules:
    """The state of rows 0 .. max_num_seqs - 1 for one rank's share of the vocabulary."""

    def __init__(self, max_num_seqs: int, first_id: int, num_ids: int, device: torch.device) -> None:
        """num_ids: of the share, which begins with first_id."""
        self._max_num_seqs, self._first_id, self._num_ids, self._device = max_num_seqs, first_id, num_ids, device
        self._counts: Tensor | None = None  # int32 [rows, num_ids], as in kernels.penalties
        self._bias: Tensor | None = None  # fp32 [rows, num_ids]
        self._recent: Tensor | None = None  # int64 [rows, _NUM_RECENT], the last one last
        self._penalties = np.zeros((3, max_num_seqs), np.float32)  # repetition, presence, frequency
        self._has_penalties = np.zeros(max_num_seqs, np.bool_)
        self._has_bias = np.zeros(max_num_seqs, np.bool_)
        self._has_sequences = np.zeros(max_num_seqs, np.bool_)
        self._min_tokens = np.zeros(max_num_seqs, np.int64)
        self._lists: dict[int, _Lists] = {}

    # ---------------------------------------------------------------------------------------------------------- rows
    def take(
        self,
        row: int,
        sampling: SamplingParams,
        num_prompt_tokens: int,
        history: Sequence[int],
        stop_ids: Sequence[int],
    ) -> None:
        """A request that has rules takes a row. history: its tokens; stop_ids: those that min_tokens holds off."""
        self._has_penalties[row] = sampling.has_penalties
        self._has_bias[row] = sampling.has_bias
        self._has_sequences[row] = bool(sampling.banned_sequences)
        self._min_tokens[row] = sampling.min_tokens if stop_ids else 0
        if sampling.has_penalties:
            self._penalties[:, row] = (
                sampling.repetition_penalty,
                sampling.presence_penalty,
                sampling.frequency_penalty,
            )
            self._count_history(row, history, num_prompt_tokens)
        if sampling.has_bias:
            self._set_bias(row, sampling)
        if sampling.banned_sequences:
            self._set_recent(row, history[num_prompt_tokens:])
        self._lists[row] = _Lists(
            self._sequences(sampling.banned_sequences), self._put(self._local(np.asarray(stop_ids, np.int64)))
        )

    def _local(self, ids: Longs) -> Longs:
        """Those of this share, counted from its first."""
        local = ids - self._first_id
        return local[(local >= 0) & (local < self._num_ids)]

    def _put(self, values: npt.NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _table(self, width: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(self._max_num_seqs, width, dtype=dtype, device=self._device)

    def _count_history(self, row: int, history: Sequence[int], num_prompt_tokens: int) -> None:
        if self._counts is None:
            self._counts = self._table(self._num_ids, torch.int32)
        ids = np.asarray(history, np.int64)
        counts = 2 * np.bincount(self._local(ids[num_prompt_tokens:]), minlength=self._num_ids).astype(np.int32)
        counts[self._local(ids[:num_prompt_tokens])] |= 1
        self._counts[row] = self._put(counts)

    def _set_bias(self, row: int, sampling: SamplingParams) -> None:
        if self._bias is None:
            self._bias = self._table(self._num_ids, torch.float32)
        start = -np.inf if sampling.allowed_token_ids else 0.0
        bias = np.full(self._num_ids, start, np.float32)
        bias[self._local(np.asarray(sampling.allowed_token_ids, np.int64))] = 0.0
        for token_id, value in sampling.logit_bias.items():
            if 0 <= token_id - self._first_id < self._num_ids:
                bias[token_id - self._first_id] += value
        bias[self._local(np.asarray(sampling.banned_token_ids, np.int64))] = -np.inf
        self._bias[row] = self._put(bias)

    def _set_recent(self, row: int, completion: Sequence[int]) -> None:
        if self._recent is None:
            self._recent = self._table(_NUM_RECENT, torch.int64)
        recent = np.full(_NUM_RECENT, _NO_ID, np.int64)
        last = completion[-_NUM_RECENT:]
        if last:
            recent[-len(last) :] = last
        self._recent[row] = self._put(recent)

    def _sequences(self, sequences: Sequence[Sequence[int]]) -> Tensor | None:
        if not sequences:
            return None
        table = np.full((len(sequences), MAX_SEQUENCE_TOKENS), _ANY, np.int64)
        for entry, sequence in zip(table, sequences, strict=True):
            entry[-len(sequence) :] = sequence
        return self._put(table)

    # ------------------------------------------------------------------------------------------------------- one step
    def apply(self, logits: Tensor, has_rules: npt.NDArray[np.bool_], chosen: ChosenRows) -> Tensor:
        """fp32 [rows, num_ids]: the logits with the rules applied, in place."""
        at = np.flatnonzero(has_rules)
        rows = chosen.rows[at]
        if (with_bias := at[self._has_bias[rows]]).size:
            assert self._bias is not None
            bias = self._bias[self._put(chosen.rows[with_bias])]
            logits.index_add_(0, self._put(with_bias), bias)
        if self._has_sequences[rows].any():
            self._ban_sequences(logits, at[self._has_sequences[rows]], chosen)
        for index in at[chosen.positions[at] < self._min_tokens[rows]].tolist():
            logits[index].index_fill_(0, self._lists[int(chosen.rows[index])].stop_ids, float("-inf"))
        if (with_penalties := at[self._has_penalties[rows]]).size:
            self._penalise(logits, with_penalties, chosen)
        return logits

    def _penalise(self, logits: Tensor, at: Longs, chosen: ChosenRows) -> None:
        assert self._counts is not None
        counts, rows = self._counts, chosen.rows
        count_rows = np.full(len(rows), -1, np.int64)
        if chosen.num_drafts[at].any():
            counts = self._counts[self._put(rows[at])]  # a copy: drafts may turn out wrong
            for column, index in enumerate(at.tolist()):
                self._add(counts[column], self._drafts(index, chosen))
            count_rows[at] = np.arange(len(at))
        else:
            count_rows[at] = rows[at]
        penalties = [self._put(np.ascontiguousarray(column[rows])) for column in self._penalties]
        kernels.apply_penalties(logits, counts, self._put(count_rows), *penalties)

    def _drafts(self, index: int, chosen: ChosenRows) -> Tensor:
        """int64: the tokens before a row of logits that are not counted yet."""
        end = chosen.batch_rows[index] + 1
        offsets = torch.arange(-int(chosen.num_drafts[index]), 0, device=chosen.token_ids.device)
        return chosen.token_ids[end + offsets]

    def _add(self, counts: Tensor, token_ids: Tensor) -> None:
        """Count tokens of the completion in one row."""
        local = token_ids - self._first_id
        is_here = (local >= 0) & (local < self._num_ids)
        counts.index_add_(0, local.clamp(0, self._num_ids - 1), 2 * is_here.to(torch.int32))

    def _ban_sequences(self, logits: Tensor, at: Longs, chosen: ChosenRows) -> None:
        assert self._recent is not None
        for index in at.tolist():
            row = int(chosen.rows[index])
            sequences, recent = self._lists[row].sequences, self._recent[row]
            assert sequences is not None
            if chosen.num_drafts[index]:
                recent = torch.cat((recent, self._drafts(index, chosen)))[-_NUM_RECENT:]
            before = sequences[:, :-1]
            matches = ((before == recent) | (before == _ANY)).all(dim=1)
            local = sequences[:, -1] - self._first_id
            matches &= (local >= 0) & (local < self._num_ids)
            penalty = torch.where(matches, float("-inf"), 0.0)
            logits[index].index_add_(0, local.clamp(0, self._num_ids - 1), penalty)

    def note(self, token_ids: Tensor, has_rules: npt.NDArray[np.bool_], chosen: ChosenRows) -> None:
        """Tokens were chosen, one for each row of logits; what follows a draft that was not chosen does not count."""
        rows, drafts = chosen.rows, chosen.num_drafts
        needs = has_rules & (self._has_penalties[rows] | self._has_sequences[rows])
        is_single = np.append(drafts[1:] == 0, True) & (drafts == 0)
        self._note_single(np.flatnonzero(needs & is_single), token_ids, chosen)
        for index in np.flatnonzero(needs & ~is_single & (drafts == 0)).tolist():
            end = index + 1
            while end < len(rows) and drafts[end] > 0:
                end += 1
            self._note_run(int(rows[index]), token_ids[index:end], end - 1, chosen)

    def _note_single(self, at: Longs, token_ids: Tensor, chosen: ChosenRows) -> None:
        """One token for each of these rows of logits."""
        rows = chosen.rows[at]
        if (counted := self._has_penalties[rows]).any():
            assert self._counts is not None
            local = token_ids[self._put(at[counted])] - self._first_id
            is_here = (local >= 0) & (local < self._num_ids)
            indices = self._put(rows[counted] * self._num_ids) + local.clamp(0, self._num_ids - 1)
            self._counts.view(-1).index_add_(0, indices, 2 * is_here.to(torch.int32))
        if (watched := self._has_sequences[rows]).any():
            assert self._recent is not None
            where, chosen_ids = self._put(rows[watched]), token_ids[self._put(at[watched])]
            self._recent[where] = torch.cat((self._recent[where][:, 1:], chosen_ids[:, None]), dim=1)

    def _note_run(self, row: int, choices: Tensor, last: int, chosen: ChosenRows) -> None:
        """A row's choices after its last token and after each draft. last: the row of logits after the last draft."""
        is_kept = torch.ones(len(choices), dtype=torch.bool, device=choices.device)
        if len(choices) > 1:
            is_kept[1:] = (choices[:-1] == self._drafts(last, chosen)).cumprod(0).bool()
        if self._has_penalties[row]:
            assert self._counts is not None
            self._add(self._counts[row], torch.where(is_kept, choices, _NO_ID))
        if self._has_sequences[row]:
            assert self._recent is not None
            recent = torch.cat((self._recent[row], choices))
            # What was not kept is shifted out to the right.
            first = is_kept.sum() + torch.arange(_NUM_RECENT, device=choices.device)
            self._recent[row] = recent[first]
