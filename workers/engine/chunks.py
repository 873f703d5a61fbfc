"""How long the next chunk of a request is, as far as the request itself decides it. Pure; knows nothing of others."""

from __future__ import annotations

from workers.engine.request import Request, RequestRole

# A prefill request ends with a chunk of this size when its prompt is many times as long: what its decode worker still
# has to pull after the last chunk is then a few blocks, and all else has travelled while the prompt was computed.
LAST_CHUNK_TOKENS = 64
MIN_CHUNKS_FOR_A_SHORT_LAST_ONE = 16
MAX_WANTED_ROWS = 128  # of one request's prompt in a step, where something is reported of each


def chunk_tokens(request: Request, num_computed: int, most: int, block_size: int) -> int:
    """Tokens to compute after the first num_computed ones; at most so many."""
    num_tokens = request.num_tokens
    count = min(num_tokens + request.num_pending_tokens - num_computed, most)
    if request.wants_all_rows:
        return min(count, MAX_WANTED_ROWS)
    if request.role is RequestRole.PREFILL and num_tokens >= MIN_CHUNKS_FOR_A_SHORT_LAST_ONE * LAST_CHUNK_TOKENS:
        # On a block's border, so that everything before the last chunk is published before it.
        before_last = (num_tokens - LAST_CHUNK_TOKENS) // block_size * block_size
        if num_computed < before_last:
            count = min(count, before_last - num_computed)
    return count
