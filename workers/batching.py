"""Turns a plan's requests into the tensors of one forward pass. Knows nothing of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from workers.models.llama import Batch
from workers.step import SampleSpec, ScheduledRequest


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """A batch, and how its sampled rows map back to the plan."""

    batch: Batch
    samples: list[SampleSpec]  # one per sampled row
    order: list[int]  # place of each sampled row among the plan's requests that sample


def prepare_batch(requests: Sequence[ScheduledRequest], block_size: int, device: torch.device) -> PreparedBatch:
    """Rows in the order that the attention kernels want: sequences with one token first."""
    places = list(accumulate((r.sample is not None for r in requests), initial=0))  # among those that sample
    by_kind = sorted(range(len(requests)), key=lambda i: requests[i].num_scheduled_tokens > 1)
    rows = [requests[i] for i in by_kind]
    num_decodes = sum(r.num_scheduled_tokens == 1 for r in rows)

    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    sample_rows: list[int] = []
    query_starts = [0]
    for r in rows:
        first = r.start_position
        token_ids += r.token_ids
        positions += range(first, first + r.num_scheduled_tokens)
        slots += (
            r.block_table[p // block_size] * block_size + p % block_size if p >= r.write_from else -1
            for p in range(first, first + r.num_scheduled_tokens)
        )
        if r.num_scheduled_tokens > 1:
            query_starts.append(query_starts[-1] + r.num_scheduled_tokens)
        if r.sample is not None:
            sample_rows.append(len(token_ids) - 1)

    def ints(values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    width = max(len(r.block_table) for r in rows)
    batch = Batch(
        token_ids=ints(token_ids, torch.int64),
        positions=ints(positions, torch.int64),
        slot_mapping=ints(slots, torch.int64),
        num_decodes=num_decodes,
        block_table=torch.tensor(
            [[*r.block_table, *([0] * (width - len(r.block_table)))] for r in rows], dtype=torch.int32, device=device
        ),
        seq_lens=ints([r.start_position + r.num_scheduled_tokens for r in rows], torch.int32),
        query_start_loc=ints(query_starts, torch.int32),
        max_query_len=max(r.num_scheduled_tokens for r in rows),
        sample_rows=ints(sample_rows, torch.int64),
    )
    sampled = [i for i in by_kind if requests[i].sample is not None]
    return PreparedBatch(batch, [s for i in sampled if (s := requests[i].sample)], [places[i] for i in sampled])
