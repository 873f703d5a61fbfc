"""The wire form of a step's plan: one flat array of int32 words, never pickled Python.

The leader, too, carries out what it has encoded, so that a worker of one rank takes the same way as one of many.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from switchyard.v1 import generation_pb2

from checkpoint.adapters.directory import DIGEST_BYTES
from grammars.grammar import Grammar
from workers.engine.adapters.ref import AdapterAction, AdapterOrder
from workers.engine.step import BlockTransfer, Ints, RowState, SchedulerOutput, StepPlan
from workers.sampling.params import SamplingParams

NAME_WORDS = 4  # a block name is 16 bytes
_HEADER_WORDS = 12
_SAMPLING_FIELDS = (
    "temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "top_k", "min_tokens", "seed",
)  # fmt: skip
_SAMPLING = struct.Struct("<7diiQ")
_SAMPLING_WORDS = _SAMPLING.size // 4


def encode_plan(plan: SchedulerOutput, sequence: int, is_full: bool = False, polls: Sequence[int] = ()) -> Ints:
    """What the ranks are sent of a plan."""
    words = [
        sequence, int(is_full), len(plan.rows), len(plan.token_ids), len(plan.new_rows), len(plan.new_blocks) // 4,
        len(plan.loads), len(plan.stores), int(plan.ends_prompts), len(polls), len(plan.prompt_targets),
        len(plan.adapter_orders),
        *plan.rows, *plan.start_positions, *plan.num_tokens, *plan.write_from, *plan.num_logits,
        *plan.num_prompt_logits, *plan.num_known, *plan.token_ids, *plan.prompt_targets, *plan.new_blocks, *polls,
    ]  # fmt: skip
    for state in plan.new_rows:
        words += _encode_row(state)
    for transfer in (*plan.loads, *plan.stores):
        words += _encode_transfer(transfer)
    for order in plan.adapter_orders:
        words += _encode_order(order)
    return np.frombuffer(array("i", words), np.int32)


def decode_plan(words: Ints) -> StepPlan:
    """The inverse; the columns are views of the words."""
    reader = _Reader(words)
    (sequence, is_full, num_requests, num_known, num_rows, num_blocks, num_loads, num_stores, ends_prompts, num_polls,
     num_targets, num_orders) = reader.take(_HEADER_WORDS)  # fmt: skip
    rows, start_positions, num_tokens, write_from, num_logits, num_prompt_logits, num_known_of = (
        reader.array(num_requests) for _ in range(7)
    )
    return StepPlan(
        sequence=sequence,
        is_full=bool(is_full),
        rows=rows,
        start_positions=start_positions,
        num_tokens=num_tokens,
        write_from=write_from,
        num_logits=num_logits,
        num_prompt_logits=num_prompt_logits,
        num_known=num_known_of,
        token_ids=reader.array(num_known),
        prompt_targets=reader.array(num_targets),
        new_blocks=reader.array(4 * num_blocks).reshape(-1, 4),
        ends_prompts=bool(ends_prompts),
        polls=reader.take(num_polls),
        new_rows=[_decode_row(reader) for _ in range(num_rows)],
        loads=[_decode_transfer(reader) for _ in range(num_loads)],
        stores=[_decode_transfer(reader) for _ in range(num_stores)],
        adapter_orders=[_decode_order(reader) for _ in range(num_orders)],
    )


class _Reader:
    def __init__(self, words: Ints) -> None:
        self._words = words
        self._at = 0

    def array(self, count: int) -> Ints:
        self._at += count
        return self._words[self._at - count : self._at]

    def take(self, count: int) -> list[int]:
        values: list[int] = self.array(count).tolist()
        return values

    def counted(self) -> list[int]:
        """A list with its length before it."""
        return self.take(*self.take(1))

    def bytes(self) -> bytes:
        """Bytes with their number before them."""
        (num_bytes,) = self.take(1)
        return self.array(-(-num_bytes // 4)).tobytes()[:num_bytes]


def _encode_row(state: RowState) -> Iterator[int]:
    s = state.sampling
    yield from (state.row, state.num_prompt_tokens, len(state.block_tables), int(s.has_rules), int(state.pools))
    yield from (int(s.has_logprobs), s.num_top_logprobs, int(s.prompt_logprobs is not None), s.num_top_prompt_logprobs)
    yield state.adapter_slot
    values = _SAMPLING.pack(*(getattr(s, name) for name in _SAMPLING_FIELDS))
    yield from struct.unpack(f"<{_SAMPLING_WORDS}i", values)
    for block_ids in state.block_tables:
        yield from _counted(block_ids)
    if s.has_rules:
        yield from _encode_rules(state)


def _encode_rules(state: RowState) -> Iterator[int]:
    s = state.sampling
    for ids in (state.history, state.stop_ids, s.allowed_token_ids, s.banned_token_ids, tuple(s.logit_bias)):
        yield from _counted(ids)
    yield from np.fromiter(s.logit_bias.values(), np.float32, len(s.logit_bias)).view(np.int32).tolist()
    yield len(s.banned_sequences)
    for ids in s.banned_sequences:
        yield from _counted(ids)
    yield from _encode_bytes(b"" if s.grammar is None else s.grammar.message().SerializeToString())


def _encode_bytes(content: bytes) -> Iterator[int]:
    yield len(content)
    yield from np.frombuffer(content.ljust(-(-len(content) // 4) * 4, b"\0"), np.int32).tolist()


def _counted(values: Sequence[int]) -> Iterator[int]:
    yield len(values)
    yield from values


def _decode_row(reader: _Reader) -> RowState:
    row, num_prompt_tokens, num_groups, has_rules, pools = reader.take(5)
    has_logprobs, num_top, of_prompt, num_top_of_prompt, slot = reader.take(5)
    values = _SAMPLING.unpack(reader.array(_SAMPLING_WORDS).tobytes())
    sampling = SamplingParams(
        logprobs=num_top if has_logprobs else None,
        prompt_logprobs=num_top_of_prompt if of_prompt else None,
        **dict(zip(_SAMPLING_FIELDS, values, strict=True)),
    )
    block_tables = [reader.counted() for _ in range(num_groups)]
    if not has_rules:
        return RowState(row, num_prompt_tokens, sampling, block_tables, pools=bool(pools), adapter_slot=slot)
    history, stop_ids, allowed, banned, biased = (reader.counted() for _ in range(5))
    bias = reader.array(len(biased)).view(np.float32).tolist()
    sampling = replace(
        sampling,
        allowed_token_ids=allowed,
        banned_token_ids=banned,
        logit_bias=dict(zip(biased, bias, strict=True)),
        banned_sequences=[reader.counted() for _ in range(*reader.take(1))],
        grammar=Grammar.of(generation_pb2.Grammar.FromString(reader.bytes())),
    )
    return RowState(row, num_prompt_tokens, sampling, block_tables, history, stop_ids, bool(pools), slot)


def _encode_order(order: AdapterOrder) -> Iterator[int]:
    yield from (order.action, order.number)
    yield from np.frombuffer(order.digest, np.int32).tolist()
    yield from _encode_bytes(order.path.encode())


def _decode_order(reader: _Reader) -> AdapterOrder:
    action, number = reader.take(2)
    digest = reader.array(DIGEST_BYTES // 4).tobytes()
    return AdapterOrder(AdapterAction(action), digest, number, reader.bytes().decode())


def _encode_transfer(transfer: BlockTransfer) -> Iterator[int]:
    yield from (transfer.transfer_id, transfer.group, int(transfer.is_copied), len(transfer.block_names))
    yield from np.frombuffer(b"".join(transfer.block_names), np.int32).tolist()
    yield from transfer.block_ids
    yield from transfer.num_tokens


def _decode_transfer(reader: _Reader) -> BlockTransfer:
    transfer_id, group, is_copied, count = reader.take(4)
    joined = reader.array(count * NAME_WORDS).tobytes()
    names = [joined[i : i + 4 * NAME_WORDS] for i in range(0, len(joined), 4 * NAME_WORDS)]
    return BlockTransfer(transfer_id, group, names, reader.take(count), reader.take(count), bool(is_copied))
