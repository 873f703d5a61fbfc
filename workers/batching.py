"""Turns a plan's requests into the tensors of one forward pass, at fixed addresses on the device.

All inputs of a step lie in one buffer, which is filled in page-locked host memory and travels in one copy that nobody
waits for. A step of the same padded shape has its inputs at the same places, so that a captured graph finds them.
Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.model.batch import Batch, GroupInputs
from workers.step import SampleSpec, ScheduledRequest, pending_place

_NUM_HOST_BUFFERS = 2  # one is filled while the copy of the other may still be under way
_WIDTH_STEP = 16  # of block tables: kernels are compiled once for strides that are multiples of it


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A batch, and how its sampled rows map back to the plan."""

    batch: Batch
    num_tokens: int  # of the requests; the batch may have more rows, which stand for nothing
    samples: list[SampleSpec]  # one per sampled row; the batch may have more sample_rows
    order: list[int]  # place of each sampled row among the plan's requests that sample
    has_pending_tokens: bool  # some token_ids are -1 - i: what the step before chooses in its sampled row i


@dataclass(frozen=True, slots=True)
class Padding:
    """The shape that a batch is filled up to; 0: as it is. Padding writes no slot and attends to nothing."""

    num_tokens: int = 0
    num_sequences: int = 0
    table_width: int = 0


NO_PADDING = Padding()


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each input lies in the buffer, in 4-byte words; those of 8 bytes come first."""

    num_tokens: int
    num_sequences: int
    num_samples: int
    table_width: int

    def sizes(self) -> dict[str, int]:
        tokens, sequences = self.num_tokens, self.num_sequences
        return {
            "token_ids": 2 * tokens,
            "positions": 2 * tokens,
            "slot_mapping": 2 * tokens,
            "sample_rows": 2 * self.num_samples,
            "seq_lens": sequences,
            "query_start_loc": sequences + 1,
            "block_table": sequences * self.table_width,
        }

    @property
    def num_words(self) -> int:
        return sum(self.sizes().values())

    def spans(self) -> dict[str, slice]:
        ends = list(accumulate(self.sizes().values()))
        return {name: slice(end - size, end) for (name, size), end in zip(self.sizes().items(), ends, strict=True)}


_WIDE = frozenset(("token_ids", "positions", "slot_mapping", "sample_rows"))  # int64


def _round_up(width: int) -> int:
    return -(-width // _WIDTH_STEP) * _WIDTH_STEP


class InputBuffers:
    """The inputs of one step at a time, for steps up to a size."""

    def __init__(
        self, max_num_tokens: int, max_num_seqs: int, max_blocks: int, device: torch.device, num_groups: int = 1
    ) -> None:
        """num_groups: cache groups of the model, whose layers all have the same block table."""
        self.max_blocks = _round_up(max_blocks)  # of a sequence
        self._num_groups = num_groups
        self._is_cuda = device.type == "cuda"
        num_words = _Layout(max_num_tokens, max_num_seqs, max_num_seqs, self.max_blocks).num_words
        self._words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._hosts = [
            torch.zeros(num_words, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(_NUM_HOST_BUFFERS)
        ]
        self._copied: list[torch.cuda.Event | None] = [None] * _NUM_HOST_BUFFERS
        self._turn = 0

    def fill(
        self,
        requests: Sequence[ScheduledRequest],
        block_size: int,
        all_as_prefills: bool = False,
        padding: Padding = NO_PADDING,
        last_order: Sequence[int] = (),
    ) -> PreparedBatch:
        """Rows in the order that the attention kernels want: sequences with one token first.

        all_as_prefills: those with one token take the prefill kernel too. last_order: of the step before. The batch is
        good until the next is filled.
        """
        places = list(accumulate((r.sample is not None for r in requests), initial=0))  # among those that sample
        by_kind = sorted(range(len(requests)), key=lambda i: requests[i].num_scheduled_tokens > 1)
        rows = [requests[i] for i in by_kind]
        sampled = [i for i in by_kind if requests[i].sample is not None]
        num_tokens = sum(r.num_scheduled_tokens for r in rows)
        layout = _Layout(
            num_tokens=padding.num_tokens or num_tokens,
            num_sequences=padding.num_sequences or len(rows),
            num_samples=padding.num_sequences or len(sampled),
            table_width=padding.table_width or _round_up(max(len(r.block_table) for r in rows)),
        )
        num_decodes = 0 if all_as_prefills else sum(r.num_scheduled_tokens == 1 for r in rows)
        if num_decodes == len(rows):
            num_decodes = layout.num_sequences  # decodes are padded with decodes
        host = self._next_host(layout.num_words)
        self._write(host, layout, rows, block_size, num_decodes)
        has_pending = self._find_pending(host, layout, rows, last_order)
        batch = self._send(layout, num_decodes, max(r.num_scheduled_tokens for r in rows))
        samples = [s for i in sampled if (s := requests[i].sample)]
        return PreparedBatch(batch, num_tokens, samples, [places[i] for i in sampled], has_pending)

    def _next_host(self, num_words: int) -> npt.NDArray[np.int32]:
        assert num_words <= len(self._words), "the plan exceeds the engine's own bounds"
        self._turn = (self._turn + 1) % _NUM_HOST_BUFFERS
        copied = self._copied[self._turn]
        if copied is not None:
            copied.synchronize()  # two steps ago: long done
        host: npt.NDArray[np.int32] = self._hosts[self._turn].numpy()
        return host

    @staticmethod
    def _write(
        host: npt.NDArray[np.int32],
        layout: _Layout,
        rows: Sequence[ScheduledRequest],
        block_size: int,
        num_decodes: int,
    ) -> None:
        spans = layout.spans()
        host[: spans["query_start_loc"].stop] = 0
        fields = {name: host[span].view(np.int64) if name in _WIDE else host[span] for name, span in spans.items()}
        fields["slot_mapping"][:] = -1
        table = fields["block_table"].reshape(layout.num_sequences, layout.table_width)
        at, num_sampled = 0, 0
        starts = [0]
        for i, r in enumerate(rows):
            first, count = r.start_position, r.num_scheduled_tokens
            blocks = np.asarray(r.block_table, np.int32)
            positions = np.arange(first, first + count)
            fields["token_ids"][at : at + count] = r.token_ids
            fields["positions"][at : at + count] = positions
            slots = blocks[positions // block_size].astype(np.int64) * block_size + positions % block_size
            fields["slot_mapping"][at : at + count] = np.where(positions >= r.write_from, slots, -1)
            fields["seq_lens"][i] = first + count
            table[i, : len(blocks)] = blocks  # what is behind them is not read
            at += count
            if i >= num_decodes:
                starts.append(starts[-1] + count)
            if r.sample is not None:
                fields["sample_rows"][num_sampled] = at - 1
                num_sampled += 1
        query_start_loc = fields["query_start_loc"]
        query_start_loc[: len(starts)] = starts
        query_start_loc[len(starts) :] = starts[-1]  # sequences that ask nothing

    @staticmethod
    def _find_pending(
        host: npt.NDArray[np.int32],
        layout: _Layout,
        rows: Sequence[ScheduledRequest],
        last_order: Sequence[int],
    ) -> bool:
        """Turn places in the last plan into its sampled rows; False when there are none."""
        token_ids = host[layout.spans()["token_ids"]].view(np.int64)
        row_of_place = {place: row for row, place in enumerate(last_order)}
        has_pending = False
        at = -1
        for r in rows:
            at += r.num_scheduled_tokens
            place = pending_place(r.token_ids[-1])  # only the last token of a chunk can be one
            if place is not None:
                token_ids[at] = -1 - row_of_place[place]
                has_pending = True
        return has_pending

    def _send(self, layout: _Layout, num_decodes: int, max_query_len: int) -> Batch:
        num_words, host = layout.num_words, self._hosts[self._turn]
        self._words[:num_words].copy_(host[:num_words], non_blocking=True)
        if self._is_cuda:
            event = self._copied[self._turn] or torch.cuda.Event()
            event.record()
            self._copied[self._turn] = event
        spans = layout.spans()

        def field(name: str) -> Tensor:
            words = self._words[spans[name]]
            return words.view(torch.int64) if name in _WIDE else words

        block_table = field("block_table").view(layout.num_sequences, layout.table_width)
        return Batch(
            token_ids=field("token_ids"),
            positions=field("positions"),
            groups=(GroupInputs(block_table, field("slot_mapping")),) * self._num_groups,
            num_decodes=num_decodes,
            seq_lens=field("seq_lens"),
            query_start_loc=field("query_start_loc")[: layout.num_sequences - num_decodes + 1],
            max_query_len=max_query_len,
            logit_rows=field("sample_rows"),
        )
