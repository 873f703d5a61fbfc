"""Turns a plan into the tensors of one forward pass, at fixed addresses on the device.

All inputs of a step but its block tables lie in one buffer. It is filled in page-locked host memory and copied to the
device once, without a wait of the host. Block tables stay on the device from step to step, one row per request; plans
bring the changes, and a step whose rows do not lie together gathers them there. A step of the same padded shape has its
inputs at the same addresses, so that a captured graph finds them. Knows nothing of weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.engine.step import Ints, StepPlan
from workers.model.batch import Batch, GroupInputs
from workers.runtime.plan_columns import Longs, PlanColumns, WantedLogits, prompt_targets_of
from workers.runtime.rank_state import RankState
from workers.sampling.params import SamplingRows

_NUM_HOST_BUFFERS = 2  # one is filled while the copy of the other may still be under way
_WIDTH_STEP = 16  # of block tables: kernels are compiled once for strides that are multiples of it
_MAX_SHAPES = 4096  # remembered
_NONE_POOLED = np.empty((0, 2), np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedBatch:
    """A batch, and how its rows of logits map back to the plan."""

    batch: Batch
    num_tokens: int  # of the requests; the batch may have more rows, which stand for nothing
    sampling: SamplingRows  # one entry per wanted row of logits; the batch may have more logit_rows
    positions: Longs  # of the tokens that the rows choose, counted from the first of the completion
    rows: Longs  # of the state, one per wanted row of logits
    num_drafts: Longs  # that precede the token that a row chooses, and are not judged yet
    order: Longs  # index of each row among the plan's wanted logits
    pooled: Longs  # [requests, 2]: first and last of the wanted rows whose hidden states are summed
    prompt_targets: Longs | None  # the prompt's next token where a row tells of it, else -1; None: no row does
    last: tuple[Tensor, Tensor] | None  # of the wanted rows those that choose a request's next token, and their rows
    pending: tuple[Tensor, Tensor] | None  # token_ids that the step before chooses: where, and of which row
    adapter_slots: Ints | None  # of each row of the batch; -1: none. None: no row has one
    writes_all: bool  # no row's keys and values are in the cache already


@dataclass(frozen=True, slots=True)
class Padding:
    """The shape that a batch is padded to; 0: as it is. Padding writes no slot and attends to nothing."""

    num_tokens: int = 0
    num_sequences: int = 0
    table_width: int = 0


NO_PADDING = Padding()


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a step's inputs, padding included."""

    num_tokens: int
    num_sequences: int
    num_logits: int
    num_pending: int
    num_last: int
    num_groups: int

    @property
    def num_words(self) -> int:
        """Of the buffer, 4 bytes each."""
        return int(_spans(self)["last_rows"].stop)


_NARROW = frozenset(("seq_lens", "query_start_loc", "alignment"))  # int32; the others are int64


@lru_cache(maxsize=_MAX_SHAPES)
def _spans(shape: _Shape) -> dict[str, slice]:
    """Offsets of the inputs in the buffer, in words. Inputs of captured graphs come first."""
    sizes = {
        "token_ids": 2 * shape.num_tokens,
        "positions": 2 * shape.num_tokens,
        **{f"slot_mapping.{group}": 2 * shape.num_tokens for group in range(shape.num_groups)},
        "logit_rows": 2 * shape.num_logits,
        "state_rows": 2 * shape.num_sequences,
        "seq_lens": shape.num_sequences,
        "query_start_loc": shape.num_sequences + 1,
        "alignment": 1,  # to 8 bytes: the two before it have an odd number of words
        "pending_at": 2 * shape.num_pending,
        "pending_rows": 2 * shape.num_pending,
        "last_at": 2 * shape.num_last,
        "last_rows": 2 * shape.num_last,
    }
    ends = list(accumulate(sizes.values()))
    return {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}


def _is_wide(name: str) -> bool:
    return name not in _NARROW


def round_up_width(num_blocks: int) -> int:
    """Columns of a block table for sequences of so many blocks."""
    return -(-num_blocks // _WIDTH_STEP) * _WIDTH_STEP


class InputBuffers:
    """The inputs of one step at a time, for steps up to a size, and the block tables of all rows."""

    def __init__(
        self, max_num_tokens: int, max_num_seqs: int, max_blocks: int, device: torch.device, num_groups: int = 1
    ) -> None:
        """max_blocks: of a sequence."""
        self.max_blocks = round_up_width(max_blocks)
        self.state = RankState(max_num_seqs, self.max_blocks, num_groups)
        self._num_groups = num_groups
        self._device = device
        self._is_cuda = device.type == "cuda"
        num_words = _Shape(
            max_num_tokens, max_num_seqs, max_num_tokens, max_num_seqs, max_num_seqs, num_groups
        ).num_words
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._hosts = [
            torch.zeros(num_words, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(_NUM_HOST_BUFFERS)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * _NUM_HOST_BUFFERS
        self._turn = 0
        self._views_of: dict[_Shape, dict[str, Tensor]] = {}
        self._arrays_of: dict[tuple[_Shape, int], dict[str, npt.NDArray[np.integer]]] = {}
        # In host memory the state's own arrays are the tables.
        self._tables = [torch.from_numpy(table).to(device) for table in self.state.block_tables]
        self._gathered = [torch.zeros_like(table) for table in self._tables]

    def apply(self, plan: StepPlan) -> None:
        """Take a plan's changes of rows. Raises PlanGap."""
        self.state.apply(plan)
        if self._is_cuda and (plan.new_rows or len(plan.new_blocks)):
            self._copy_changes(plan)

    def _copy_changes(self, plan: StepPlan) -> None:
        for group, table in enumerate(self._tables):
            width, changes = self.max_blocks, plan.new_blocks[plan.new_blocks[:, 0] == group]
            indices = [changes[:, 1].astype(np.int64) * width + changes[:, 2]]
            values = [changes[:, 3]]
            for state in plan.new_rows:
                block_ids = state.block_tables[group]
                indices.append(state.row * width + np.arange(len(block_ids)))
                values.append(np.asarray(block_ids, np.int32))
            where, what = (
                torch.from_numpy(np.concatenate(parts)).pin_memory().to(self._device, non_blocking=True)
                for parts in (indices, values)
            )
            table.view(-1).index_copy_(0, where, what)

    def fill(
        self, plan: StepPlan, block_size: int, all_as_prefills: bool = False, padding: Padding = NO_PADDING
    ) -> PreparedBatch:
        """The plan's requests in the order that the attention kernels need: sequences with one token first.

        all_as_prefills: those with one token take the prefill kernel too. The batch is good until the next is filled.
        """
        columns = PlanColumns.of(plan)
        shape = _Shape(
            num_tokens=padding.num_tokens or columns.total_tokens,
            num_sequences=padding.num_sequences or plan.num_requests,
            num_logits=padding.num_sequences or columns.total_logits,
            num_pending=columns.total_tokens - len(plan.token_ids),
            num_last=columns.num_last,
            num_groups=self._num_groups,
        )
        num_decodes = 0 if all_as_prefills else columns.num_single
        if num_decodes == plan.num_requests:
            num_decodes = shape.num_sequences  # decodes are padded with decodes
        host = self._next_host(shape)
        logits = self._write(host, plan, columns, num_decodes, block_size)
        batch = self._send(shape, columns, num_decodes, padding.table_width, block_size)
        rows, field = columns.rows[logits.requests], self._views(shape)
        order, sampling = logits.order(plan, columns.order), self.state.sampling.of(rows)
        targets = prompt_targets_of(plan)
        if targets is not None:
            targets = targets[order]
            sampling = sampling.of_prompt(targets >= 0)
        is_pooled = self.state.pools[rows]
        pooled = _NONE_POOLED
        if is_pooled.any():
            sampling, pooled = sampling.of_pooled(is_pooled), logits.runs(is_pooled)
        return PreparedBatch(
            batch,
            columns.total_tokens,
            sampling,
            logits.token_positions - self.state.num_prompt_tokens[rows],
            rows.astype(np.int64),
            logits.num_drafts(columns),
            order,
            pooled,
            targets,
            (field["last_at"], field["last_rows"]) if shape.num_last else None,
            (field["pending_at"], field["pending_rows"]) if shape.num_pending else None,
            self._adapter_slots(columns),
            writes_all=bool((columns.start_positions >= columns.write_from).all()),
        )

    def _adapter_slots(self, columns: PlanColumns) -> Ints | None:
        slots = self.state.adapter_slots[columns.rows]
        return np.repeat(slots, columns.num_tokens) if (slots >= 0).any() else None

    def _next_host(self, shape: _Shape) -> dict[str, npt.NDArray[np.integer]]:
        """The host's arrays of a step's inputs."""
        assert shape.num_words <= len(self._words), "the plan exceeds the engine's own bounds"
        self._turn = (self._turn + 1) % _NUM_HOST_BUFFERS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # two steps ago: long done
        arrays = self._arrays_of.get((shape, self._turn))
        if arrays is None:
            parts = {name: self._hosts[self._turn].numpy()[span] for name, span in _spans(shape).items()}
            arrays = {name: part.view(np.int64) if _is_wide(name) else part for name, part in parts.items()}
            if len(self._arrays_of) >= _MAX_SHAPES:
                self._arrays_of.clear()  # mixed steps have any shape, decodes only a few
            self._arrays_of[shape, self._turn] = arrays
        return arrays

    def _write(
        self,
        host: dict[str, npt.NDArray[np.integer]],
        plan: StepPlan,
        columns: PlanColumns,
        num_decodes: int,
        block_size: int,
    ) -> WantedLogits:
        counts, num_requests, num_tokens = columns.num_tokens, len(columns.rows), columns.total_tokens
        ends = np.cumsum(counts, dtype=np.int64)
        if num_tokens == num_requests:
            positions, rows = columns.start_positions.astype(np.int64), columns.rows
            is_written = columns.start_positions >= columns.write_from
        else:
            within = np.arange(num_tokens) - np.repeat(ends - counts, counts)
            positions = np.repeat(columns.start_positions, counts) + within
            rows = np.repeat(columns.rows, counts)
            is_written = positions >= np.repeat(columns.write_from, counts)
        _put(host["positions"], positions, 0)
        blocks, offsets = positions // block_size, positions % block_size
        for group, table in enumerate(self.state.block_tables):
            slots = table[rows, blocks].astype(np.int64) * block_size + offsets
            _put(host[f"slot_mapping.{group}"], np.where(is_written, slots, -1), -1)
        host["token_ids"][:] = 0
        columns.write_token_ids(host["token_ids"][:num_tokens], plan, ends)
        if num_tokens > len(plan.token_ids):
            has_pending = columns.num_known < counts
            host["pending_at"][:] = ends[has_pending] - 1
            host["pending_rows"][:] = columns.rows[has_pending]
        _put(host["state_rows"], columns.rows, 0)
        _put(host["seq_lens"], columns.start_positions + counts, 0)
        starts = host["query_start_loc"]
        num_prefills = max(0, num_requests - num_decodes)
        starts[0] = 0
        if num_prefills:
            starts[1 : num_prefills + 1] = np.cumsum(counts[num_requests - num_prefills :])
        starts[num_prefills + 1 :] = starts[num_prefills]  # sequences that ask nothing
        logits = WantedLogits.of(columns, ends)
        _put(host["logit_rows"], logits.batch_rows, 0)
        is_uniform = columns.total_logits == columns.num_last == num_requests
        chooses = columns.num_logits > columns.num_prompt_logits
        lasts = (logits.behind == 0) & chooses[logits.requests]
        host["last_at"][:] = logits.requests if is_uniform else np.flatnonzero(lasts)
        host["last_rows"][:] = columns.rows if is_uniform else columns.rows[chooses]
        return logits

    def _send(self, shape: _Shape, columns: PlanColumns, num_decodes: int, table_width: int, block_size: int) -> Batch:
        num_words, host = shape.num_words, self._hosts[self._turn]
        self._words[:num_words].copy_(host[:num_words], non_blocking=True)
        if self._is_cuda:
            event = self._copied[self._turn] or torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event
        field = self._views(shape)
        width = table_width or round_up_width(
            -(-int((columns.start_positions + columns.num_tokens).max()) // block_size)
        )
        tables = self._block_tables(columns.rows, field["state_rows"], shape.num_sequences, width, bool(table_width))
        return Batch(
            token_ids=field["token_ids"],
            positions=field["positions"],
            groups=tuple(GroupInputs(t, field[f"slot_mapping.{group}"]) for group, t in enumerate(tables)),
            num_decodes=num_decodes,
            seq_lens=field["seq_lens"],
            query_start_loc=field["query_start_loc"][: shape.num_sequences - num_decodes + 1],
            max_query_len=columns.longest,
            logit_rows=field["logit_rows"],
        )

    def _views(self, shape: _Shape) -> dict[str, Tensor]:
        """The device's tensors of a step's inputs; the same ones for the same shape."""
        views = self._views_of.get(shape)
        if views is None:
            words = {name: self._words[span] for name, span in _spans(shape).items()}
            views = {name: w.view(torch.int64) if _is_wide(name) else w for name, w in words.items()}
            if len(self._views_of) >= _MAX_SHAPES:
                self._views_of.clear()
            self._views_of[shape] = views
        return views

    def _block_tables(
        self, rows: Ints, state_rows: Tensor, num_sequences: int, width: int, is_fixed: bool
    ) -> list[Tensor]:
        """int32 [sequences, width] per group; is_fixed: always at the same address."""
        first, last = int(rows[0]), int(rows[-1])
        if not is_fixed and last - first + 1 == len(rows) == num_sequences and (np.diff(rows) == 1).all():
            return [table[first : last + 1, :width] for table in self._tables]
        tables = []
        for table, gathered in zip(self._tables, self._gathered, strict=True):
            out = gathered.view(-1)[: num_sequences * width].view(num_sequences, width)
            tables.append(torch.index_select(table[:, :width], 0, state_rows, out=out))
        return tables


def _put(into: npt.NDArray[np.integer], values: npt.NDArray[np.integer], rest: int) -> None:
    into[: len(values)] = values
    into[len(values) :] = rest
