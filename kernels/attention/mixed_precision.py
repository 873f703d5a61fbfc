"""Attention over keys and values that lie in several forms at once: the nearest exactly, the farther the fewer bits.

A precision level is one form of the cache: its blocks, its block table, and the distances between query and key at
which it is read (kernels.attention.precision_levels). Each level is one launch over the query tiles of prefill
attention; a key tile is a block, whose codes are unpacked in registers. The partial results of the levels are merged by
their log-sum-exp, as those of split-KV attention are.
Single tokens take the same launch as chunks. Batch-invariant mode is that of kernels.attention.prefill.
Knows nothing of schedulers or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from costs import ops as costs
from costs.packed_kv import PackedBits, channel_group
from kernels.attention.paged import Softmax
from kernels.attention.precision_levels import LevelBlocks, Reach, SeenKeys, attend_levels, define_levels
from kernels.attention.tile import LOG2_E, score_factors
from kernels.cases import Draw, PagedShape
from kernels.jit import Value, cdiv, constexpr, jit, next_power_of_2, tl
from kernels.kv.packed_blocks import pack_blocks
from kernels.op import Case, Op

_NO_END = 1 << 30  # a distance or a position behind all others


@jit
def _numbers(
    codes_ptr: Value,  # of a block and head
    scales_ptr: Value,  # its scales; the minima lie behind them. None: the codes are the numbers
    channels_ptr: Value,  # of a head and half, scales and then shifts; or None
    slots: Value,
    dims: Value,  # shaped to broadcast with slots
    mask: Value,
    HEAD_DIM: constexpr,
    BLOCK_SIZE: constexpr,
    BITS: constexpr,
    CHANNELS: constexpr,  # that share a scale per token; 0: scales are per channel of the block
) -> Value:
    if scales_ptr is None:
        numbers = tl.load(codes_ptr + slots * HEAD_DIM + dims, mask=mask, other=0.0)
    else:
        PER_BYTE: constexpr = 8 // BITS
        packed = tl.load(codes_ptr + slots * (HEAD_DIM // PER_BYTE) + dims // PER_BYTE, mask=mask, other=0)
        code = (packed.to(tl.int32) >> (dims % PER_BYTE * BITS)) & ((1 << BITS) - 1)
        NUM_SCALES: constexpr = BLOCK_SIZE * (HEAD_DIM // CHANNELS) if CHANNELS else HEAD_DIM
        at = slots * (HEAD_DIM // CHANNELS) + dims // CHANNELS if CHANNELS else slots * 0 + dims
        scale = tl.load(scales_ptr + at, mask=mask, other=0.0).to(tl.float32)
        low = tl.load(scales_ptr + NUM_SCALES + at, mask=mask, other=0.0).to(tl.float32)
        numbers = code.to(tl.float32) * scale + low
        if channels_ptr is not None:
            spread = tl.load(channels_ptr + dims, mask=dims < HEAD_DIM, other=0.0)
            numbers = numbers * spread + tl.load(channels_ptr + HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
    return numbers


@jit
def _level_kernel(
    out_ptr: Value,  # fp32 [tokens, q_heads, HEAD_DIM]
    lse_ptr: Value,  # fp32 [tokens, q_heads], log2 of the sum of weights
    q_ptr: Value,
    query_start_ptr: Value,
    seq_lens_ptr: Value,
    table_ptr: Value,
    keys_ptr: Value,
    key_scales_ptr: Value,  # or None: keys_ptr has numbers
    values_ptr: Value,
    value_scales_ptr: Value,
    channels_ptr: Value,  # fp32 [kv_heads, 2, scale | shift, HEAD_DIM], or None
    score_scale: Value,
    cap: Value,
    window: Value,
    nearest: Value,
    farthest: Value,
    first_seen: Value,
    end_seen: Value,
    stride_q: Value,
    stride_table: Value,
    stride_keys: Value,  # of a block's head; a block has one after the other
    stride_key_scales: Value,
    stride_values: Value,
    stride_value_scales: Value,
    GROUP: constexpr,
    HEAD_DIM: constexpr,
    BLOCK_SIZE: constexpr,
    KEY_BITS: constexpr,
    VALUE_BITS: constexpr,
    KEY_CHANNELS: constexpr,
    VALUE_CHANNELS: constexpr,
    CAPPED: constexpr,
    INVARIANT: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_M: constexpr,
    BLOCK_D: constexpr,
    BLOCK_N: constexpr,  # keys of a tile; divides a block
) -> None:
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head, seq, num_kv_heads = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    first_query = tl.load(query_start_ptr + seq)
    num_queries = tl.load(query_start_ptr + seq + 1) - first_query
    length = tl.load(seq_lens_ptr + seq)
    first_in_tile = tile * BLOCK_Q
    if INVARIANT:
        first_in_tile -= (length - num_queries) % BLOCK_Q
    if first_in_tile >= num_queries:
        return
    row = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_N)
    token = row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_query = (token < BLOCK_Q) & (first_in_tile + token < num_queries) & (first_in_tile + token >= 0)
    tile_mask = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    q_token = (first_query + first_in_tile + token).to(tl.int64)
    q = tl.load(q_ptr + (q_token * stride_q + head * HEAD_DIM)[:, None] + dims[None, :], mask=tile_mask, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    position = length - num_queries + first_in_tile + token

    first_position = length - num_queries + tl.maximum(first_in_tile, 0)
    last_position = length - num_queries + tl.minimum(first_in_tile + BLOCK_Q, num_queries) - 1
    first = tl.maximum(tl.maximum(first_position + 1 - tl.minimum(farthest, window), first_seen), 0)
    end = tl.minimum(last_position + 1 - nearest, end_seen)
    key_channels = channels_ptr + kv_head * (4 * HEAD_DIM) if channels_ptr is not None else None
    value_channels = key_channels + 2 * HEAD_DIM if channels_ptr is not None else None
    for start in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
        keys, slots = start + lane, start % BLOCK_SIZE + lane
        in_reach = (keys >= first) & (keys < end)
        block = tl.load(table_ptr + seq.to(tl.int64) * stride_table + start // BLOCK_SIZE).to(tl.int64)
        block = block * num_kv_heads + kv_head
        key_scales = key_scales_ptr + block * stride_key_scales if key_scales_ptr is not None else None
        k = _numbers(
            keys_ptr + block * stride_keys, key_scales, key_channels, slots[None, :], dims[:, None],
            in_reach[None, :] & (dims < HEAD_DIM)[:, None], HEAD_DIM, BLOCK_SIZE, KEY_BITS, KEY_CHANNELS,
        )  # fmt: skip
        value_scales = value_scales_ptr + block * stride_value_scales if value_scales_ptr is not None else None
        v = _numbers(
            values_ptr + block * stride_values, value_scales, value_channels, slots[:, None], dims[None, :],
            in_reach[:, None] & (dims < HEAD_DIM)[None, :], HEAD_DIM, BLOCK_SIZE, VALUE_BITS, VALUE_CHANNELS,
        )  # fmt: skip
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * score_scale
        if CAPPED:
            scores = cap - 2 * cap / (tl.exp2(scores) + 1)
        distance = position[:, None] - keys[None, :]
        is_seen = in_reach[None, :] & (distance >= nearest) & (distance < tl.minimum(farthest, window))
        scores = tl.where(is_seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak > float("-inf"), new_peak, 0.0)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(peak - base)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
        peak = new_peak

    out_row = q_token * (num_kv_heads * GROUP) + head
    sums = tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + (out_row * HEAD_DIM)[:, None] + dims[None, :], acc / sums[:, None], mask=tile_mask)
    tl.store(lse_ptr + out_row, tl.where(total > 0, peak + tl.log2(sums), float("-inf")), mask=is_query)


def _tile_rows(head_dim: int, element_size: int) -> int:
    if element_size == 4:
        return 32 if head_dim <= 64 else 16
    return 64


def launch(
    q: torch.Tensor,
    levels: Sequence[LevelBlocks],
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    batch_invariant: bool = False,
) -> torch.Tensor:
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads = levels[0].parts[0].shape[1]
    outs = torch.empty(len(levels), num_tokens, num_q_heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(len(levels), num_tokens, num_q_heads, dtype=torch.float32, device=q.device)
    group, block_d = num_q_heads // num_kv_heads, max(16, next_power_of_2(head_dim))
    most_rows = _tile_rows(block_d, q.element_size())
    rows = most_rows if batch_invariant else min(most_rows, next_power_of_2(max_query_len * group))
    block_m = max(16, next_power_of_2(group), rows)
    block_q = block_m // group
    grid = (cdiv(max_query_len, block_q) + batch_invariant, num_kv_heads, seq_lens.shape[0])
    for i, level in enumerate(levels):
        reach, bits = level.reach, level.bits
        channels = channel_group(head_dim)
        if bits is None:
            kv = level.parts[0]
            keys, key_scales, values, value_scales = kv, None, kv[:, :, 1], None
            strides = (kv.stride(1), 0, kv.stride(1), 0)
        else:
            keys, key_scales, values, value_scales = level.packed
            strides = (keys.stride(1), key_scales.stride(1), values.stride(1), value_scales.stride(1))
        _level_kernel[grid](
            outs[i], sums[i], q, query_start_loc, seq_lens, level.block_table, keys, key_scales, values, value_scales,
            level.channels, *score_factors(scale, soft_cap), window or _NO_END, reach.nearest,
            reach.farthest or _NO_END, reach.first_key, reach.end_key or _NO_END, q.stride(0),
            level.block_table.stride(0), *strides,
            GROUP=group, HEAD_DIM=head_dim, BLOCK_SIZE=level.block_size,
            KEY_BITS=8 if bits is None else bits.keys, VALUE_BITS=8 if bits is None else bits.values,
            KEY_CHANNELS=channels if bits is not None and bits.has_token_keys else 0, VALUE_CHANNELS=channels,
            CAPPED=soft_cap > 0, INVARIANT=batch_invariant, BLOCK_Q=block_q, BLOCK_M=block_m, BLOCK_D=block_d,
            # Unpacking takes registers: at 64 keys a tile of 16 rows spills.
            BLOCK_N=level.block_size if bits is None else min(level.block_size, 32),
            num_warps=8 if q.element_size() == 4 else 4, num_stages=2,
        )  # fmt: skip
    return _merge(outs, sums, sinks).to(q.dtype)


def _merge(outs: torch.Tensor, sums: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """outs [levels, tokens, heads, head_dim] and log2 of their sums of weights -> [tokens, heads, head_dim]."""
    peak = sums.amax(0)
    if sinks is not None:
        peak = torch.maximum(peak, sinks * LOG2_E)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp2(sums - peak)
    total = weights.sum(0)
    if sinks is not None:
        total = total + torch.exp2(sinks * LOG2_E - peak)
    merged: torch.Tensor = (outs * weights.unsqueeze(-1)).sum(0) / total.clamp(min=1e-30).unsqueeze(-1)
    return merged


def _of_sequences(
    q: torch.Tensor, levels: Sequence[LevelBlocks], query_start_loc: torch.Tensor, seq_lens: torch.Tensor,
    softmax: Softmax,
) -> list[tuple[slice, int, list[SeenKeys]]]:  # fmt: skip
    """The rows of each sequence that asks something, its length, and what it sees."""
    starts, found = query_start_loc.tolist(), []
    for i, length in enumerate(seq_lens.tolist()):
        first_position = length - (starts[i + 1] - starts[i])
        if length and first_position < length:
            seen = [level.seen(i, first_position, length, softmax, q.dtype) for level in levels]
            found.append((slice(starts[i], starts[i + 1]), length, [each for each in seen if each.kv.shape[2]]))
    return found


def reference(
    q: torch.Tensor,
    levels: Sequence[LevelBlocks],
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    batch_invariant: bool = False,
) -> torch.Tensor:
    softmax, out = Softmax(scale, window, sinks, soft_cap), torch.zeros_like(q)
    for rows, length, seen in _of_sequences(q, levels, query_start_loc, seq_lens, softmax):
        out[rows] = define_levels(q[rows], seen, length, softmax)
    return out


def cpu(
    q: torch.Tensor,
    levels: Sequence[LevelBlocks],
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    batch_invariant: bool = False,
) -> torch.Tensor:
    """One sequence at a time, all its levels in one call of torch's attention."""
    softmax, out = Softmax(scale, window, sinks, soft_cap), torch.zeros_like(q)
    for rows, length, seen in _of_sequences(q, levels, query_start_loc, seq_lens, softmax):
        out[rows] = attend_levels(q[rows], seen, length, softmax, batch_invariant)
    return out


def _cost(
    q: torch.Tensor,
    levels: Sequence[LevelBlocks],
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    batch_invariant: bool = False,
) -> costs.OpCost:
    """As if all keys were of the first level, which stands for most of them."""
    _, num_q_heads, head_dim = q.shape
    far, num_kv_heads = levels[0], levels[0].parts[0].shape[1]
    token_bytes = sum(part[0, 0].numel() * part.element_size() for part in far.parts) // far.block_size
    return costs.prefill_attention(
        query_start_loc.diff().tolist(), seq_lens.tolist(), num_q_heads, num_kv_heads, head_dim, q.element_size(),
        window, token_bytes,
    )  # fmt: skip


_Arguments = tuple[
    torch.Tensor, tuple[LevelBlocks, ...], torch.Tensor, torch.Tensor, int, float, int, torch.Tensor | None, float, bool
]


@dataclass(frozen=True, slots=True)
class _Forms:
    """Of a case: what lies beyond each distance."""

    packed: tuple[tuple[PackedBits, int], ...]  # the farthest first, with their windows; 0: no end
    window_tokens: int
    sink_tokens: int = 0

    def name(self) -> str:
        forms = [bits.label for bits, _ in self.packed]
        return f" {' '.join(forms)} exact{self.window_tokens} first{self.sink_tokens}"

    def levels(
        self, draw: Draw, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: list[int]
    ) -> tuple[LevelBlocks, ...]:
        """Packed from the cache. What is in no full block is no number, so that nobody reads it packed."""
        full = torch.nan_to_num(kv_cache)
        windows = [window for _, window in self.packed] + [self.window_tokens]
        found = []
        for (bits, window), nearest in zip(self.packed, windows[1:], strict=True):
            channels = draw.channel_scales(full.shape[1], full.shape[4]) if bits.has_channel_scales else None
            parts = pack_blocks(full, bits, channels)
            if not kv_cache.is_meta:
                size = kv_cache.shape[3]
                is_open = kv_cache[:, 0, 0].isnan().any(-1).any(-1)
                assert int(is_open.sum()) == 1 + sum(length % size > 0 for length in seq_lens)
                parts[1][is_open], parts[3][is_open] = float("nan"), float("nan")
            found.append(LevelBlocks(parts, bits, Reach(nearest, window, self.sink_tokens), block_table, channels))
        found.append(LevelBlocks((kv_cache,), None, Reach(0, self.window_tokens), block_table))
        if self.sink_tokens:
            reach = Reach(self.window_tokens, end_key=self.sink_tokens)
            found.append(LevelBlocks((kv_cache,), None, reach, block_table))
        return tuple(found)


def _case(
    shape: PagedShape, dtype: torch.dtype, forms: _Forms, window: int = 0, sinks: bool = False,
    soft_cap: float = 0.0, batch_invariant: bool = False,
) -> Case:  # fmt: skip
    def build(device: str) -> _Arguments:
        draw = Draw(device, dtype)
        query_lens = shape.query_lens or (1,) * len(shape.seq_lens)
        q = draw.normal(sum(query_lens), shape.num_q_heads, shape.head_dim)
        kv_cache, block_table, seq_lens = draw.paged_cache(shape)
        starts = [sum(query_lens[:i]) for i in range(len(query_lens) + 1)]
        levels = forms.levels(draw, kv_cache, block_table, list(shape.seq_lens))
        logits = draw.normal(shape.num_q_heads, dtype=torch.float32) if sinks else None
        return (
            q, levels, draw.integers(starts), seq_lens, max(query_lens), shape.head_dim**-0.5, window, logits, soft_cap,
            batch_invariant,
        )  # fmt: skip

    marks = f" window{window}" * bool(window) + " sinks" * sinks + " capped" * bool(soft_cap)
    return Case(shape.name(dtype) + forms.name() + marks + " invariant" * batch_invariant, dtype, build)


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
_KIVI2 = _Forms(((PackedBits(2, 2), 0),), 32, 16)
_WKV4 = PackedBits(4, 4, has_token_keys=True, has_channel_scales=True)
_TIERS = _Forms(((PackedBits(4, 4), 0), (PackedBits(8, 8), 64)), 32, 16)
SMALL = (
    _case(PagedShape((1, 16, 77), 4, 2, 64, 16), FP32, _Forms(((PackedBits(2, 2), 0),), 16, 4)),
    _case(PagedShape((150, 0, 33), 4, 2, 64, 32), BF16, _KIVI2),
    _case(PagedShape((130,), 6, 2, 96, 32), FP32, _Forms(((PackedBits(4, 4), 0),), 32)),
    _case(PagedShape((150, 40), 7, 1, 80, 16), FP16, _Forms(((PackedBits(4, 2), 0),), 20, 3)),
    _case(PagedShape((100, 1, 70), 4, 2, 64, 16, query_lens=(40, 1, 1)), BF16, _Forms(((PackedBits(2, 2), 0),), 16)),
    _case(PagedShape((200,), 4, 2, 64, 16, query_lens=(90,)), FP32, _TIERS),
    _case(PagedShape((90, 64), 4, 4, 32, 32, query_lens=(90, 9)), FP32,
          _Forms(((PackedBits(4, 4, has_token_keys=True), 0),), 32, 16)),
    _case(PagedShape((110, 40), 4, 2, 64, 16, query_lens=(20, 1)), FP32, _Forms(((_WKV4, 0),), 16, 4)),
    _case(PagedShape((70,), 6, 3, 80, 16), BF16, _Forms(((_WKV4, 0),), 16)),
    _case(PagedShape((140,), 4, 2, 64, 16, query_lens=(60,)), FP32, _KIVI2, window=50, sinks=True, soft_cap=5.0),
    _case(PagedShape((150, 3), 4, 2, 64, 16, query_lens=(70, 3)), FP32, _KIVI2, batch_invariant=True),
)  # fmt: skip
FULL = (
    _case(PagedShape((8192,) * 64, 32, 8, 128, 64), BF16, _Forms(((PackedBits(2, 2), 0),), 64, 16)),
    _case(PagedShape((8192,) * 64, 32, 8, 128, 32), BF16, _Forms(((PackedBits(4, 4), 0),), 32, 16)),
    _case(PagedShape((8192,) * 64, 32, 8, 128, 32), BF16, _Forms(((_WKV4, 0),), 32, 16)),
    _case(PagedShape((16384,), 32, 8, 128, 64, query_lens=(2048,)), BF16, _Forms(((PackedBits(2, 2), 0),), 64, 16)),
    _case(PagedShape((4096,) * 8, 28, 4, 128, 64), FP16, _Forms(((PackedBits(4, 4), 0), (PackedBits(8, 8), 128)), 64)),
    _case(PagedShape((2048,) * 8, 9, 3, 64, 32), FP32, _KIVI2, batch_invariant=True),
)

LIMIT = (
    "Memory in principle: 2 bits a number are a sixth of bf16's bytes. No split of long sequences yet: a few streams do"
    " not fill the device. A byte of codes is loaded by each thread that has one of its channels."
)

mixed_precision_attention = Op("mixed_precision_attention", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
