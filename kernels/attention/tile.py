"""Pieces that the attention kernels share: where a cached token lies, and one step of the online softmax.

A layer's cache is [block, kv_head, 2, slot, head_dim]; the 2 is K and V. All scores are in units of log2, so that
exp2 serves. Knows nothing of launches.
"""

from __future__ import annotations

from kernels.jit import Value, constexpr, jit, tl


@jit
def attend(
    q: Value,  # [ROWS, BLOCK_D], zero beyond HEAD_DIM
    acc: Value,  # [ROWS, BLOCK_D] fp32, the running output before division
    peak: Value,  # [ROWS] fp32, the running maximum score
    total: Value,  # [ROWS] fp32, the running sum of weights
    kv_ptr: Value,  # the layer's cache, advanced to this KV head
    table_ptr: Value,  # this sequence's row of the block table
    start: Value,  # position of the tile's first key, a multiple of BLOCK_N
    num_keys: Value,  # keys from here on are not read
    last_key: Value,  # [ROWS], the last position that each row sees
    score_scale: Value,  # softmax scale times log2(e)
    stride_block: Value,
    HEAD_DIM: constexpr,
    BLOCK_D: constexpr,  # HEAD_DIM rounded up to a power of two
    BLOCK_SIZE: constexpr,
    BLOCK_N: constexpr,
    MASKED: constexpr,  # False: every row sees every key of this tile
) -> Value:
    """Attend to keys start .. start + BLOCK_N - 1 and return the new (acc, peak, total)."""
    lane = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    keys = start + lane
    in_reach = keys < num_keys
    if BLOCK_SIZE % BLOCK_N == 0:  # the whole tile lies in one block: one look-up, contiguous rows
        block = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
        rows = block * stride_block + (start % BLOCK_SIZE + lane) * HEAD_DIM
    else:
        blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=in_reach, other=0).to(tl.int64)
        rows = blocks * stride_block + (keys % BLOCK_SIZE) * HEAD_DIM
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
    scores = tl.dot(q, k, input_precision="ieee") * score_scale
    if MASKED:
        scores = tl.where(keys[None, :] <= last_key[:, None], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - new_peak[:, None])
    decay = tl.exp2(peak - new_peak)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_peak, total
