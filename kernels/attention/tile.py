"""Pieces that the attention kernels share: where a cached token lies, and one step of the online softmax.

A layer's cache is [block, kv_head, 2, slot, head_dim]; the 2 is K and V. All scores are in units of log2, so that
exp2 serves. Knows nothing of launches.
"""

from __future__ import annotations

from kernels.jit import Value, constexpr, jit, tl

LOG2_E = 1.4426950408889634


def score_factors(scale: float, soft_cap: float) -> tuple[float, float]:
    """(score_scale, cap) for `attend`: what it multiplies a product of q and k with, and its soft cap.

    Without a cap that is the softmax scale in units of log2. With one, `attend` needs exp(2x) of x = scale / soft_cap
    * product: tanh(x) is 1 - 2 / (exp(2x) + 1), which needs no library and is right at both ends.
    """
    if soft_cap:
        return 2 * LOG2_E * scale / soft_cap, soft_cap * LOG2_E
    return scale * LOG2_E, 0.0


@jit
def attend(
    q: Value,  # [ROWS, BLOCK_D], zero beyond HEAD_DIM
    acc: Value,  # [ROWS, BLOCK_D] fp32, the running output before division
    peak: Value,  # [ROWS] fp32, the running maximum score
    total: Value,  # [ROWS] fp32, the running sum of weights
    kv_ptr: Value,  # the layer's cache, advanced to this KV head
    scales_ptr: Value,  # int8: the scales of the layer's slots, advanced to this KV head; else None
    table_ptr: Value,  # this sequence's row of the block table
    start: Value,  # position of the tile's first key, a multiple of BLOCK_N
    first_key: Value,  # keys before this one are not read; looked at only where WINDOWED
    num_keys: Value,  # keys from here on are not read
    last_key: Value,  # [ROWS], the last position that each row sees
    window: Value,  # how many positions each row sees, the last included
    score_scale: Value,
    cap: Value,
    stride_block: Value,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,  # HEAD_DIM rounded up to a power of two
    BLOCK_SIZE: constexpr,
    BLOCK_N: constexpr,
    MASKED: constexpr,  # False: every row sees every key of this tile
    WINDOWED: constexpr,  # False: `window` holds every position
    CAPPED: constexpr,
    words: Value = None,  # [ROWS] int64: of the keys from first_node on a row sees those of set bits; None: causal
    first_node: Value = 0,
) -> Value:
    """Attend to keys start .. start + BLOCK_N - 1 and return the new (acc, peak, total)."""
    lane = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    keys = start + lane
    in_reach = keys < num_keys
    if WINDOWED:
        in_reach = in_reach & (keys >= first_key)
    if BLOCK_SIZE % BLOCK_N == 0:  # the whole tile lies in one block: one look-up, contiguous rows
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        slots = start % BLOCK_SIZE + lane
        rows = block * stride_block + slots * HEAD_DIM
    else:
        block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=in_reach, other=0).to(tl.int64)
        slots = keys % BLOCK_SIZE
        rows = block * stride_block + slots * HEAD_DIM
    k_ptrs = kv_ptr + rows[None, :] + dims[:, None]
    v_ptrs = kv_ptr + BLOCK_SIZE * HEAD_DIM + rows[:, None] + dims[None, :]
    if MASKED:
        k = tl.load(k_ptrs, mask=in_reach[None, :] & (dims[:, None] < HEAD_DIM), other=0.0)
        v = tl.load(v_ptrs, mask=in_reach[:, None] & (dims[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM == BLOCK_D:
        k = tl.load(k_ptrs)
        v = tl.load(v_ptrs)
    else:
        k = tl.load(k_ptrs, mask=dims[:, None] < HEAD_DIM, other=0.0)
        v = tl.load(v_ptrs, mask=dims[None, :] < HEAD_DIM, other=0.0)

    # "ieee": an fp32 model is promised fp32 products, not TF32 ones. It changes nothing for 16-bit types.
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * score_scale
    if scales_ptr is not None:
        scale_ptrs = scales_ptr + block * (stride_block // HEAD_DIM) + slots
        scores *= tl.load(scale_ptrs, mask=in_reach, other=0.0)[None, :]
    if CAPPED:
        scores = cap - 2 * cap / (tl.exp2(scores) + 1)
    if MASKED:
        is_seen = keys[None, :] <= last_key[:, None]
        if WINDOWED:
            is_seen = is_seen & (keys[None, :] > last_key[:, None] - window)
        if words is not None:
            node = keys - first_node
            bits = (words[:, None] >> tl.minimum(tl.maximum(node, 0), 63)[None, :]) & 1
            is_seen = (is_seen & (node < 0)[None, :]) | ((bits != 0) & ((node >= 0) & in_reach)[None, :])
        scores = tl.where(is_seen, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # Of a tile that lies wholly outside its window, or of a run's first nodes, a row may have seen nothing yet.
    may_be_blind = MASKED and (WINDOWED or words is not None)
    base = tl.where(new_peak > float("-inf"), new_peak, 0.0) if may_be_blind else new_peak
    weights = tl.exp2(scores - base[:, None])
    decay = tl.exp2(peak - base)
    total = total * decay + tl.sum(weights, 1)
    if scales_ptr is not None:
        weights *= tl.load(scale_ptrs + BLOCK_SIZE, mask=in_reach, other=0.0)[None, :]
    acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total
