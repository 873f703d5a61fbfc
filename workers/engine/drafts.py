"""How many of a request's proposed draft tokens go into a plan. Knows nothing of where they come from."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore.blocks.block_pools import BlockPools
from workers.engine.request import Request, RequestRole


def take_drafts(request: Request, end: int, budget: int, pool: BlockPools) -> Sequence[int]:
    """As many as may be sent, and fit into the budget and behind `end`, while none of its own tokens is being chosen.

    They take blocks that are free and no others': nobody is preempted for tokens that may be wrong.
    """
    proposed, request.draft_token_ids = request.draft_token_ids, []
    if request.num_pending_tokens or request.row < 0 or request.role is RequestRole.PREFILL:
        return ()  # without a row it was admitted just now, and later requests are planned already
    most = min(budget, request.window_tokens - 1, request.max_num_tokens - 1 - request.num_tokens)
    num_drafts = max(0, min(most, len(proposed)))
    num_blocks = -(-(end + num_drafts) // pool.block_size)
    if not pool.can_extend(request.block_tables, num_blocks, range(pool.num_groups)):
        num_slots = pool.num_entries(request.block_tables) * pool.block_size
        num_drafts = max(0, min(num_drafts, num_slots - end))
    request.drafts_in_flight = proposed[:num_drafts]
    return request.drafts_in_flight
