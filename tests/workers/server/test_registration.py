"""A worker's way out of the cluster and back: drains, roles and epochs, while the directory hangs or fails."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest
from switchyard.v1 import worker_pb2 as pb
from switchyard.v1 import worker_pb2_grpc

from kvstore.control.directory import RETIRED, DirectoryUnavailable, MemoryDirectory, WorkerRecord
from workers.server.registration import NotDrained, Phase, Registration
from workers.server.registration_servicer import RegistrationServicer

RECORD = WorkerRecord("w", "127.0.0.1:7", "prefill", "prefill", "n1")
PATIENCE_S = 20.0


class FaultyDirectory(MemoryDirectory):
    """Hangs while `may_answer` is not set, and fails while `is_away`."""

    def __init__(self) -> None:
        super().__init__(time.monotonic, first_epoch=10)
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.asked = threading.Event()
        self.is_away = False

    def keep_alive(self, record: WorkerRecord, ttl_s: float, held_epoch: int = 0) -> int:
        self._fault()
        return super().keep_alive(record, ttl_s, held_epoch)

    def withdraw(self, worker_id: str) -> None:
        self._fault()
        super().withdraw(worker_id)

    def _fault(self) -> None:
        self.asked.set()
        assert self.may_answer.wait(PATIENCE_S)
        if self.is_away:
            raise DirectoryUnavailable("nobody there")

    def entry(self) -> tuple[str, str, int] | None:
        """Pool, role and epoch of the worker."""
        return next(((w.record.pool, w.record.role, w.epoch) for w in self.workers()), None)


class Routers:
    """Routers that acknowledge a retirement at once."""

    def __init__(self) -> None:
        self.num_requests = 0
        self.is_quiet = False
        self.epochs: list[tuple[int, bool]] = []
        self.roles: list[str] = []

    def lease(self, epoch: int, is_new: bool) -> None:
        self.epochs.append((epoch, is_new))

    def take_role(self, record: WorkerRecord) -> None:
        self.roles.append(record.role)

    def retire(self) -> None:
        self.is_quiet = True

    def move_streams(self) -> None:
        self.num_requests = 0


class World:
    """A worker's registration, its directory and its routers."""

    def __init__(self) -> None:
        self.directory = FaultyDirectory()
        self.routers = Routers()
        self.registration = Registration(self.directory, RECORD, self.routers)

    async def until(self, phase: Phase) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.registration.phase is not phase:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def announced() -> AsyncIterator[World]:
    world = World()
    await world.registration.announce()
    try:
        yield world
    finally:
        world.directory.may_answer.set()
        await asyncio.to_thread(world.registration.withdraw)


async def entry_is(world: World, wanted: tuple[str, str, int] | None) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while world.directory.entry() != wanted:
            await asyncio.sleep(0.01)


async def test_every_way_back_is_a_new_registration() -> None:
    async with announced() as world:
        assert world.directory.entry() == ("prefill", "prefill", 10)
        await world.registration.drain(60.0)
        await entry_is(world, ("prefill", RETIRED, 10))
        assert world.registration.phase is Phase.DRAINED
        await world.registration.switch("decode", "decode")
        assert (world.registration.phase, world.routers.roles) == (Phase.SWITCHED, ["decode"])
        assert world.directory.entry() == ("prefill", RETIRED, 10), "routers do not know yet"
        await world.registration.announce()
        assert (world.registration.phase, world.directory.entry()) == (Phase.READY, ("decode", "decode", 11))
        await asyncio.sleep(0)
        assert world.routers.epochs[-1] == (11, False)
    assert world.directory.entry() is None


async def test_only_a_drained_worker_changes_roles() -> None:
    async with announced() as world:
        world.routers.num_requests = 1
        with pytest.raises(NotDrained, match="w is ready"):
            await world.registration.switch("decode", "decode")
        await world.registration.drain(60.0)
        with pytest.raises(NotDrained, match="w is draining"):
            await world.registration.switch("decode", "decode")
        await world.registration.switch("prefill", "prefill")  # what it has
        world.routers.num_requests = 0
        assert world.registration.phase is Phase.DRAINED


async def test_what_runs_after_the_timeout_is_moved() -> None:
    async with announced() as world:
        world.routers.num_requests = 3
        await world.registration.drain(60.0)
        await asyncio.sleep(0.2)
        assert world.registration.phase is Phase.DRAINING
        await world.registration.drain(0.0)  # the operator has changed their mind
        await world.until(Phase.DRAINED)


async def test_routers_are_told_of_a_drain_while_the_directory_hangs() -> None:
    async with announced() as world:
        world.routers.num_requests = 3
        world.directory.may_answer.clear()
        async with asyncio.timeout(PATIENCE_S):
            await world.registration.drain(0.0)
        assert world.routers.is_quiet
        await world.until(Phase.DRAINED)
        world.directory.may_answer.set()
        await entry_is(world, ("prefill", RETIRED, 10))


async def test_a_directory_that_keeps_the_old_entry_holds_an_announcement_up() -> None:
    """It would give the old epoch again, and routers would go on with what they knew of the worker before."""
    async with announced() as world:
        await world.registration.drain(0.0)
        await entry_is(world, ("prefill", RETIRED, 10))
        await world.registration.switch("decode", "decode")
        world.directory.is_away = True
        with pytest.raises(DirectoryUnavailable):
            await world.registration.announce()
        assert world.registration.phase is Phase.SWITCHED
        world.directory.is_away = False
        await world.registration.announce()
        assert world.directory.entry() == ("decode", "decode", 11)


async def test_a_failed_announcement_leaves_the_drain_as_it_was() -> None:
    async with announced() as world:
        world.routers.num_requests = 3
        await world.registration.drain(0.5)
        await entry_is(world, ("prefill", RETIRED, 10))
        world.directory.may_answer.clear()
        announcement = asyncio.create_task(world.registration.announce())
        await asyncio.sleep(0.2)
        assert world.registration.phase is Phase.READY
        world.directory.is_away = True
        world.directory.may_answer.set()
        with pytest.raises(DirectoryUnavailable):
            await announcement
        await world.until(Phase.DRAINED)
        assert world.routers.num_requests == 0, "moved at the time-out"
        world.directory.is_away = False


async def test_an_announcement_waits_until_the_directory_has_the_drain() -> None:
    """Or the entry as retired would replace the new one."""
    async with announced() as world:
        world.directory.may_answer.clear()
        await world.registration.drain(0.0)
        announcement = asyncio.create_task(world.registration.announce())
        await asyncio.sleep(0.2)
        assert world.registration.phase is not Phase.READY
        world.directory.may_answer.set()
        await announcement
        assert world.directory.entry() == ("prefill", "prefill", 11)


async def test_without_an_answer_a_worker_is_drained_a_second_after_the_directory_has_it() -> None:
    async with announced() as world:
        world.routers.retire = lambda: None  # type: ignore[method-assign]  # they do not answer
        world.directory.may_answer.clear()
        await world.registration.drain(0.0)
        await asyncio.sleep(1.2)
        assert world.registration.phase is Phase.DRAINING
        world.directory.may_answer.set()
        await world.until(Phase.DRAINED)


async def test_the_first_announcement_is_tried_again() -> None:
    world = World()
    world.directory.is_away = True
    await world.registration.announce()
    assert (world.registration.phase, world.directory.entry()) == (Phase.READY, None)
    world.directory.is_away = False
    await entry_is(world, ("prefill", "prefill", 10))
    await asyncio.to_thread(world.registration.withdraw)


async def test_who_withdraws_while_it_is_announced_does_not_come_back() -> None:
    world = World()
    world.directory.may_answer.clear()
    announcement = asyncio.create_task(world.registration.announce())
    await asyncio.to_thread(world.directory.asked.wait, PATIENCE_S)
    withdrawal = asyncio.create_task(asyncio.to_thread(world.registration.withdraw))
    await asyncio.sleep(0.1)
    world.directory.may_answer.set()
    await asyncio.gather(announcement, withdrawal)
    assert world.directory.entry() is None
    assert world.registration.phase is not Phase.READY
    await world.registration.announce()
    assert world.directory.entry() is None


async def test_a_change_goes_on_when_its_caller_has_given_up() -> None:
    async with announced() as world:
        servicer = RegistrationServicer(pb.WorkerHello(worker_id="w"), time.monotonic)
        servicer._registration = world.registration
        server = grpc.aio.server()
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = worker_pb2_grpc.WorkerServiceStub(channel)
            await stub.Drain(pb.DrainRequest(timeout_s=0.0), timeout=PATIENCE_S)
            await entry_is(world, ("prefill", RETIRED, 10))
            world.directory.may_answer.clear()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.Announce(pb.AnnounceRequest(), timeout=0.2)
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await asyncio.sleep(0.1)  # the cancellation arrives
            world.directory.may_answer.set()
            await entry_is(world, ("prefill", "prefill", 11))
            assert world.registration.phase is Phase.READY
            world.directory.is_away = True
            await stub.Drain(pb.DrainRequest(timeout_s=0.0), timeout=PATIENCE_S)
            with pytest.raises(grpc.aio.AioRpcError, match="the directory does not answer") as error:
                await stub.Announce(pb.AnnounceRequest(), timeout=PATIENCE_S)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        await server.stop(None)
        world.directory.is_away = False
