"""What waits for a router that reads slowly: tokens in their order, the newest load, and not without bound."""

from __future__ import annotations

import asyncio

from switchyard.v1 import worker_pb2 as pb

from workers.server.outbox import MAX_WAITING_MESSAGES, Outbox


def pong(nonce: int) -> pb.ConnectResponse:
    return pb.ConnectResponse(pong=pb.Pong(nonce=nonce))


async def test_messages_keep_their_order_and_loads_replace_each_other() -> None:
    """Each load was queued, every 50 ms, however slowly the router read."""
    outbox = Outbox()
    for i in range(100):
        outbox.put(pong(i))
        outbox.put_load(pb.WorkerLoad(num_steps=i))
    first = await outbox.get()
    assert first is not None
    assert first.load.num_steps == 99
    assert [(await outbox.get()).pong.nonce for _ in range(100)] == list(range(100))  # type: ignore[union-attr]


async def test_whoever_waits_gets_what_comes() -> None:
    outbox = Outbox()
    waiting = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    outbox.put(pong(1))
    assert (await waiting) == pong(1)
    waiting = asyncio.create_task(outbox.get())
    await asyncio.sleep(0)
    outbox.close()
    assert await waiting is None


async def test_a_router_that_does_not_read_loses_its_connection() -> None:
    outbox = Outbox()
    for i in range(MAX_WAITING_MESSAGES):
        outbox.put(pong(i))
    assert not outbox.is_closed
    outbox.put(pong(-1 % 2**64))
    assert outbox.is_closed
    assert await outbox.get() is None
