"""The ends of KV transfers, as a rank's steps find them out. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.step import BlockTransfer, StepPlan, TransferDone
from workers.kv.connector import PENDING, KVConnector
from workers.parallel import ParallelGroups

# How long a step that computes the last tokens of a prompt waits for its blocks to be stored. A tier in memory is
# through by then, and the first token goes out with this step, not the next; a slow one holds up nobody for longer.
STORE_GRACE_S = 0.005


def ended_of(transfer_ids: Sequence[int], counts: Sequence[int]) -> list[TransferDone]:
    """Those whose counts are no PENDING."""
    pairs = zip(transfer_ids, counts, strict=True)
    return [TransferDone(transfer_id, count) for transfer_id, count in pairs if count != PENDING]


def poll_in_step(transfer_ids: Sequence[int], connector: KVConnector, groups: ParallelGroups) -> list[TransferDone]:
    """Those that have ended on every rank of the stage; their blocks are in the cache then. On all of them at once."""
    ended = ended_of(transfer_ids, groups.min_in_stage([connector.poll(transfer_id) for transfer_id in transfer_ids]))
    for done in ended:
        connector.finish(done)
    return ended


def awaited(plan: StepPlan) -> list[BlockTransfer]:
    """The stores that tokens of the plan wait for."""
    return [store for store in plan.stores if not store.is_copied]


def finish_ended(plan: StepPlan, connector: KVConnector) -> list[TransferDone]:
    """The same for a worker of one rank, after a step: all that have ended, and that could be soon."""
    if plan.ends_prompts:
        connector.wait(awaited(plan), STORE_GRACE_S)
    ended = [TransferDone(transfer_id, connector.poll(transfer_id)) for transfer_id in connector.ended()]
    for done in ended:
        connector.finish(done)
    return ended
