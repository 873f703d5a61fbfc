"""A layer's keys and values on a ladder of forms; see workers.kv.schemes.ladder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from costs.packed_kv import PackedBits
from kernels.attention.paged import Softmax
from kernels.attention.rungs import Reach, SeenKeys, attend_rungs
from kernels.packed_blocks import pack_blocks, unpack_blocks
from workers.kv.schemes.ladder import LadderScheme, PackedForm
from workers.kv.schemes.scheme import LayerBlocks
from workers.model.batch import Batch
from workers.model.layers.layer_cache import AttentionTerms


@dataclass(frozen=True, slots=True, eq=False)
class _Rung:
    """One form of the layer's blocks, and the keys that it stands for."""

    group: int
    parts: tuple[Tensor, ...]
    bits: PackedBits | None  # None: exact
    reach: Reach
    num_tokens: int = 0  # of each sequence, that are kept; 0: all

    def write(self, kv: Tensor, block_ids: Tensor) -> None:
        """kv [n, kv_heads, 2, block_size, head_dim]: blocks that are full."""
        packed = (kv,) if self.bits is None else pack_blocks(kv, self.bits)
        for part, rows in zip(self.parts, packed, strict=True):
            part[block_ids] = rows.to(part.dtype)

    def read(self, block_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """[kv_heads, 2, tokens, head_dim] of a sequence's blocks."""
        picked = tuple(part[block_ids] for part in self.parts)
        if self.bits is None:
            kv = picked[0]
        else:
            key_codes, key_scales, value_codes, value_scales = picked
            kv = unpack_blocks((key_codes, key_scales, value_codes, value_scales), self.bits, dtype)
        return kv.permute(1, 2, 0, 3, 4).flatten(2, 3)


class LadderLayer:
    """As LayerCache."""

    def __init__(self, blocks: Sequence[LayerBlocks], scheme: LadderScheme) -> None:
        """blocks: in the order of the scheme's groups."""
        (exact,) = (each for each in blocks if not each.group.takes_full_blocks)
        self._block_size = exact.parts[0].shape[3]
        self._exact = _Rung(exact.group.index, exact.parts, None, Reach(farthest=scheme.window_tokens))
        self._packed = list(_packed_rungs(blocks, scheme))

    def write(self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        slots = batch.groups[self._exact.group].slot_mapping
        kv_cache = self._exact.parts[0]
        rotated = kernels.rope_and_write_kv(q, k, v, cos_sin, batch.positions, kv_cache, slots)
        is_last = (slots >= 0) & (slots % self._block_size == self._block_size - 1)
        if bool(is_last.any()):
            self._pack(batch, is_last)
        return rotated

    def _pack(self, batch: Batch, is_last: Tensor) -> None:
        """Write the blocks that became full to the other rungs. is_last: tokens that end one."""
        for rung in self._packed:
            ends = is_last & (batch.positions < rung.num_tokens) if rung.num_tokens else is_last
            source, target = (
                batch.groups[group].slot_mapping[ends] // self._block_size for group in (self._exact.group, rung.group)
            )
            if len(source):
                rung.write(self._exact.parts[0][source], target)

    def attend_decodes(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        lengths = batch.seq_lens[: batch.num_decodes].tolist()
        return self._attend(q, batch, terms, 0, lengths, list(range(len(lengths) + 1)))

    def attend_prefills(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """As in LayerCache."""
        lengths = batch.seq_lens[batch.num_decodes :].tolist()
        return self._attend(q, batch, terms, batch.num_decodes, lengths, batch.query_start_loc.tolist())

    def _attend(
        self, q: Tensor, batch: Batch, terms: AttentionTerms, first: int, lengths: list[int], starts: list[int]
    ) -> Tensor:
        """first: the sequence that the lengths begin with. starts: of each one's rows."""
        softmax = Softmax(terms.scale, terms.window, terms.sinks, terms.soft_cap)
        out = torch.zeros_like(q)
        for i, length in enumerate(lengths):
            rows = q[starts[i] : starts[i + 1]]
            if length and len(rows):
                seen = list(self._seen(batch, first + i, length - len(rows), length, softmax, q.dtype))
                attended = attend_rungs(rows, seen, length, softmax, terms.batch_invariant)
                out[starts[i] : starts[i + 1]] = attended
        return out

    def _seen(
        self, batch: Batch, sequence: int, first_position: int, length: int, softmax: Softmax, dtype: torch.dtype
    ) -> Iterator[SeenKeys]:
        """What tokens from a position on see of their sequence, in each form that they see something of."""
        for rung in (*self._packed, self._exact):
            keys = rung.reach.keys_of(first_position, length)
            first_block = max(keys.start, softmax.first_key(first_position)) // self._block_size
            last_block = -(-keys.stop // self._block_size)
            if last_block > first_block:
                block_ids = batch.groups[rung.group].block_table[sequence, first_block:last_block].long()
                first_key = first_block * self._block_size
                kv = rung.read(block_ids, dtype)[:, :, : keys.stop - first_key]
                yield SeenKeys(kv, first_key, rung.reach)


def _packed_rungs(blocks: Sequence[LayerBlocks], scheme: LadderScheme) -> Iterator[_Rung]:
    windows = [rung.window_tokens for rung in scheme.rungs] + [scheme.window_tokens]
    ladder = [each for each in blocks if not each.group.first_tokens][:-1]
    for index, each in enumerate(ladder):
        form = each.group.form
        assert isinstance(form, PackedForm)
        reach = Reach(windows[index + 1], windows[index], first_key=scheme.sink_tokens)
        yield _Rung(each.group.index, each.parts, form.bits, reach)
    for each in blocks:
        if each.group.first_tokens:
            reach = Reach(scheme.window_tokens, end_key=scheme.sink_tokens)
            num_tokens = each.group.limit(each.parts[0].shape[3]) * each.parts[0].shape[3]
            yield _Rung(each.group.index, each.parts, None, reach, num_tokens)
