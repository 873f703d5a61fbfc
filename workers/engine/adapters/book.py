"""Which adapters are in host memory and which in a slot of the device, and who waits for which. Pure decisions.

An adapter is read from its files in a thread of each rank; when it is in host memory on all of them, a plan copies it
into a slot. A request holds its adapter's slot from its admission until it ends or is preempted. An adapter that nobody
uses stays where it is until another needs the place; the least recently used one goes first. A request whose adapter
finds no slot claims the one with the fewest users: later requests are not admitted to it, so that it falls idle. Knows
nothing of tensors, threads or clocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from workers.engine.adapters.ref import AdapterAction, AdapterLimits, AdapterOrder, AdapterRef
from workers.engine.kv.transfers import Transfers
from workers.engine.request import FinishReason, Request
from workers.engine.step import ModelRunnerOutput, TransferDone

_ELSEWHERE = "could not be read on every rank of the worker"


@dataclass(eq=False, slots=True)
class _Loaded:
    """An adapter in host memory, or on its way there."""

    ref: AdapterRef
    read_id: int  # of the transfer that reads it; 0: it is there
    slot: int = -1
    num_users: int = 0  # requests that hold its slot
    began_s: float | None = None  # the read, as far as is known


class AdapterBook:
    """Of one engine. `begin` comes before the requests of a plan; `take_orders` goes into the plan."""

    def __init__(self, limits: AdapterLimits, transfers: Transfers) -> None:
        self.limits = limits
        self._transfers = transfers
        self._loaded: dict[bytes, _Loaded] = {}  # by digest, the least recently used first
        self._slots: list[_Loaded | None] = [None] * limits.num_slots
        self._orders: list[AdapterOrder] = []
        self._claimed: set[int] = set()  # slots that requests of this plan wait for
        self._wanted: set[bytes] = set()  # adapters that requests of this plan wait for
        self._pins: dict[str, Sequence[AdapterRef]] = {}  # by owner
        self.num_waiting = 0  # requests, in this plan
        self.num_hits = self.num_copies = self.num_reads = self.num_failed = 0

    # ------------------------------------------------------------------------------------------------------ a plan
    def begin(self) -> None:
        """Forget what waited in the last plan, and bring pinned adapters closer to the device."""
        self._claimed.clear()
        self._wanted.clear()
        self.num_waiting = 0
        for ref in self._pinned():
            loaded = self._loaded.get(ref.digest) or self._read(ref)
            if loaded is not None and not loaded.read_id and loaded.slot < 0:
                self._find_slot(loaded)

    def want(self, ref: AdapterRef) -> None:
        """A request that needs it is queued: it is read while the request waits, if there is space."""
        self._touch(self._loaded.get(ref.digest) or self._read(ref))

    def acquire(self, request: Request) -> bool:
        """Give a request its adapter's slot; False when it must wait. Asked in the order of admission."""
        assert request.adapter is not None
        loaded = self._loaded.get(request.adapter.digest) or self._read(request.adapter)
        was_there = loaded is not None and loaded.slot >= 0
        is_given = loaded is not None and self._give_slot(loaded)
        if not is_given or loaded is None:
            self._wanted.add(request.adapter.digest)
            self.num_waiting += 1
            return False
        self._touch(loaded)
        self.num_hits += was_there and not request.had_adapter
        request.had_adapter = True
        loaded.num_users += 1
        request.adapter_slot = loaded.slot
        return True

    def lacks_slot(self, ref: AdapterRef) -> bool:
        """Whether it is others' use of the device that keeps an adapter from it, and not the reading of its files."""
        loaded = self._loaded.get(ref.digest)
        return loaded is None or not loaded.read_id

    def release(self, request: Request) -> None:
        """The request holds its slot no longer, if it did."""
        if request.adapter_slot < 0:
            return
        loaded = self._slots[request.adapter_slot]
        assert loaded is not None
        assert loaded.num_users > 0
        loaded.num_users -= 1
        request.adapter_slot = -1

    def take_orders(self) -> list[AdapterOrder]:
        """What the ranks are to do with the next plan."""
        orders, self._orders = self._orders, []
        return orders

    def _give_slot(self, loaded: _Loaded) -> bool:
        if loaded.read_id:
            return False
        if loaded.slot >= 0:
            return loaded.slot not in self._claimed
        if self._find_slot(loaded):
            return True
        pinned = {ref.digest for ref in self._pinned()}
        free_later = [
            (each.num_users, slot)
            for slot, each in enumerate(self._slots)
            if each is not None and slot not in self._claimed and each.ref.digest not in pinned
        ]
        if free_later:
            self._claimed.add(min(free_later)[1])
        return False

    def _find_slot(self, loaded: _Loaded) -> bool:
        """Put an adapter into a free slot, or into that of one that nobody uses."""
        pinned = {ref.digest for ref in self._pinned()}
        idle = (each.slot for each in self._loaded.values() if self._is_idle(each, pinned) and each.slot >= 0)
        free = (slot for slot, holder in enumerate(self._slots) if holder is None)
        slot = next(free, None)
        if slot is None:
            slot = next(idle, None)
        if slot is None:
            return False
        self._leave_slot(self._slots[slot])
        self._slots[slot], loaded.slot = loaded, slot
        self._orders.append(AdapterOrder(AdapterAction.COPY, loaded.ref.digest, slot))
        self.num_copies += 1
        return True

    def _leave_slot(self, loaded: _Loaded | None) -> None:
        if loaded is not None and loaded.slot >= 0:
            self._slots[loaded.slot], loaded.slot = None, -1

    def _is_idle(self, loaded: _Loaded, pinned: set[bytes]) -> bool:
        digest = loaded.ref.digest
        return not (loaded.num_users or loaded.read_id or digest in pinned or digest in self._wanted)

    def _touch(self, loaded: _Loaded | None) -> None:
        if loaded is not None:
            self._loaded[loaded.ref.digest] = self._loaded.pop(loaded.ref.digest)

    # --------------------------------------------------------------------------------------------------------- reads
    def _read(self, ref: AdapterRef) -> _Loaded | None:
        """Begin to read an adapter; None while all that are in host memory are needed."""
        if len(self._loaded) >= self.limits.max_loaded:
            pinned = {other.digest for other in self._pinned()}
            victim = next((each for each in self._loaded.values() if self._is_idle(each, pinned)), None)
            if victim is None:
                return None
            self._leave_slot(victim)
            del self._loaded[victim.ref.digest]
            self._orders.append(AdapterOrder(AdapterAction.DROP, victim.ref.digest))
        loaded = self._loaded[ref.digest] = _Loaded(ref, self._transfers.begin_read())
        self._orders.append(AdapterOrder(AdapterAction.READ, ref.digest, loaded.read_id, ref.path))
        self.num_reads += 1
        return loaded

    def end_reads(
        self, output: ModelRunnerOutput, waiting: Iterable[Request]
    ) -> tuple[ModelRunnerOutput, list[tuple[Request, FinishReason]]]:
        """Take the transfers of a step that are reads. The output without them, and the waiting requests that end
        because their adapter was not read."""
        by_id = {each.read_id: each for each in self._loaded.values() if each.read_id} if output.transfers else {}
        if not by_id:
            return output, []
        ended: list[tuple[Request, FinishReason]] = []
        for done in output.transfers:
            if (loaded := by_id.get(done.transfer_id)) is not None:
                self._transfers.end_read(done.transfer_id)
                loaded.read_id = 0
                if not done.num_blocks:
                    reason = FinishReason.ADAPTER_UNFIT if done.is_unfit else FinishReason.ADAPTER_FAILED
                    ended += [(request, reason) for request in self._fail(loaded, done, waiting)]
        others = [done for done in output.transfers if done.transfer_id not in by_id]
        return replace(output, transfers=others), ended

    def _fail(self, loaded: _Loaded, done: TransferDone, waiting: Iterable[Request]) -> list[Request]:
        del self._loaded[loaded.ref.digest]
        self.num_failed += 1
        self._pins = {
            owner: [ref for ref in refs if ref.digest != loaded.ref.digest] for owner, refs in self._pins.items()
        }
        self._orders.append(AdapterOrder(AdapterAction.DROP, loaded.ref.digest))  # some rank may have read it
        return waiting_for(loaded.ref, waiting, done.error or f"{loaded.ref.path}: {_ELSEWHERE}")

    def overdue(self, waiting: Iterable[Request], now_s: float, timeout_s: float) -> Iterator[Request]:
        """Waiting requests whose adapter is still being read so long after they came; says so in their `error`.

        Where the read began later, as after a preemption, it counts from its begin, as far as calls show.
        """
        reads = [each for each in self._loaded.values() if each.read_id]
        for loaded in reads:
            loaded.began_s = now_s if loaded.began_s is None else loaded.began_s
        by_digest = {each.ref.digest: each for each in reads}
        for request in waiting if by_digest else ():
            found = by_digest.get(request.adapter.digest) if request.adapter is not None else None
            if found is None or found.began_s is None:
                continue
            if now_s - max(found.began_s, request.arrival_time_s) >= timeout_s:
                request.error = f"{found.ref.path}: the adapter was not read within {timeout_s:g} s"
                yield request

    def start_anew(self) -> None:
        """A step raised. Reads are forgotten, and the ranks are sent with a full plan what is where."""
        self._transfers.forget_reads()
        self._loaded = {digest: each for digest, each in self._loaded.items() if not each.read_id}
        orders = [AdapterOrder(AdapterAction.KEEP, digest) for digest in self._loaded]
        orders += [
            AdapterOrder(AdapterAction.COPY, each.ref.digest, slot) for slot, each in enumerate(self._slots) if each
        ]
        self._orders = orders

    # ---------------------------------------------------------------------------------------------------------- pins
    def pin(self, owner: str, refs: Sequence[AdapterRef]) -> None:
        """Keep these on the device while nobody uses them, in place of those that the owner pinned before."""
        self._pins[owner] = tuple(refs)
        if not refs:
            del self._pins[owner]

    def _pinned(self) -> list[AdapterRef]:
        """Of all owners together; one slot stays free for others."""
        found = {ref.digest: ref for refs in self._pins.values() for ref in refs}
        return list(found.values())[: max(0, self.limits.num_slots - 1)]

    # ------------------------------------------------------------------------------------------------------ residency
    def on_device(self) -> list[bytes]:
        """Digests, the most recently used first."""
        return [each.ref.digest for each in reversed(self._loaded.values()) if each.slot >= 0]

    def in_host_memory(self) -> list[bytes]:
        """Digests of those that are not on the device, the most recently used first."""
        return [each.ref.digest for each in reversed(self._loaded.values()) if each.slot < 0 and not each.read_id]

    def check(self) -> None:
        """Assert that the books are in order."""
        assert len(self._loaded) <= self.limits.max_loaded
        for slot, holder in enumerate(self._slots):
            assert holder is None or (holder.slot == slot and self._loaded[holder.ref.digest] is holder)
        for loaded in self._loaded.values():
            assert loaded.slot < 0 or self._slots[loaded.slot] is loaded
            assert not (loaded.read_id and loaded.slot >= 0)
            assert not loaded.num_users or loaded.slot >= 0


def waiting_for(ref: AdapterRef, waiting: Iterable[Request], error: str) -> list[Request]:
    """The requests that wait for an adapter; error: what they are to end with."""
    found = [request for request in waiting if request.adapter is not None and request.adapter.is_same(ref)]
    for request in found:
        request.error = error
    return found
