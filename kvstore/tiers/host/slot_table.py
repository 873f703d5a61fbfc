"""The books of an arena's slots: which fragment is in which, which are being written, which goes next.

    free  --reserve-->  reserved  --seal-->  sealed  --evicted by a reserve, or dropped-->  free
                        reserved  --not sealed in time-->  free

Every reservation has a generation of its own, greater than all before it, so a reader that got (slot, generation)
finds out when the slot has been given to another fragment. Pure, clock injected; knows nothing of memory or files.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from kvstore.tiers.host.reuse_order import ReuseOrder

SEALED_ALREADY = -1
NO_SLOT = -2
ABSENT = -1

RESERVATION_S = 30.0
"""For so long a slot that was reserved is its writer's."""


class SlotRef(NamedTuple):
    """A slot and the generation that its content has; a negative slot says why there is none (constants above)."""

    slot: int
    generation: int


class _Reservation(NamedTuple):
    key: bytes
    generation: int
    deadline_s: float


class SlotTable:
    """Slots 0 .. num_slots - 1. Not thread-safe."""

    def __init__(
        self,
        num_slots: int,
        clock: Callable[[], float],
        first_generation: int = 1,
        reservation_ttl_s: float = RESERVATION_S,
    ) -> None:
        if num_slots <= 0:
            raise ValueError(f"num_slots must be > 0, not {num_slots}")
        self.num_slots = num_slots
        self._clock = clock
        self._next_generation = first_generation
        self._reservation_ttl_s = reservation_ttl_s
        self._free = list(range(num_slots - 1, -1, -1))
        self._reserved: OrderedDict[int, _Reservation] = OrderedDict()  # by slot; earliest deadline first
        self._sealed: dict[bytes, SlotRef] = {}  # by key
        self._order = ReuseOrder(num_slots)  # in which the sealed ones go

    @property
    def num_free(self) -> int:
        """Slots that can be had without evicting anything."""
        return len(self._free)

    @property
    def num_sealed(self) -> int:
        """Slots that hold a readable fragment."""
        return len(self._sealed)

    def reserve(self, keys: Sequence[bytes]) -> list[SlotRef]:
        """A slot to write each fragment to. Two writers of one fragment get a slot each; the first to seal wins.

        When no slot is free, the next in kvstore.tiers.host.reuse_order goes, but none that this very call asks for.
        """
        self._take_back_expired()
        wanted, now_s = set(keys), self._clock()
        held = wanted & self._sealed.keys()
        for key in held:
            self._order.use(key, now_s)
        self._free_slots_for(sum(key not in held for key in keys) if held else len(keys), wanted)
        deadline_s = now_s + self._reservation_ttl_s
        return [self._reserve(key, deadline_s) for key in keys]

    def seal(self, keys: Sequence[bytes], refs: Sequence[SlotRef]) -> int:
        """Makes reserved slots readable; how many of the fragments are readable now. Outdated ones are ignored."""
        num_sealed, now_s = 0, self._clock()
        for key, ref in zip(keys, refs, strict=True):
            reservation = self._reserved.get(ref.slot)
            if reservation is not None and reservation.generation == ref.generation and reservation.key == key:
                del self._reserved[ref.slot]
                if key in self._sealed:
                    self._free.append(ref.slot)
                else:
                    self._sealed[key] = ref
                    self._order.add(key, now_s)
            num_sealed += key in self._sealed
        return num_sealed

    def lookup(self, keys: Sequence[bytes]) -> list[SlotRef]:
        """Where the fragments are; counts as a use of them."""
        refs: list[SlotRef] = []
        now_s = self._clock()
        for key in keys:
            ref = self._sealed.get(key)
            if ref is None:
                refs.append(SlotRef(ABSENT, 0))
            else:
                self._order.use(key, now_s)
                refs.append(ref)
        return refs

    def oldest(self, count: int) -> list[tuple[bytes, SlotRef]]:
        """The fragments that are next to go; no use of them."""
        return [(key, self._sealed[key]) for key in islice(self._order, max(0, count))]

    def drop(self, keys: Sequence[bytes], generations: Sequence[int]) -> int:
        """Frees the slots of fragments that a reader found bad; how many. One written anew since then stays."""
        num_dropped = 0
        for key, generation in zip(keys, generations, strict=True):
            ref = self._sealed.get(key)
            if ref is not None and ref.generation == generation:
                self._forget(key)
                self._free.append(ref.slot)
                num_dropped += 1
        return num_dropped

    def check(self) -> None:
        """Re-derives the books; raises AssertionError when a slot is owned twice or not at all."""
        owned = [*self._free, *self._reserved, *(ref.slot for ref in self._sealed.values())]
        assert sorted(owned) == list(range(self.num_slots)), "a slot is owned twice or not at all"
        assert sorted(self._order) == sorted(self._sealed), "a fragment is missing from the order, or in it twice"
        deadlines = [reservation.deadline_s for reservation in self._reserved.values()]
        assert deadlines == sorted(deadlines), "reservations are out of order"

    def _free_slots_for(self, count: int, wanted: set[bytes]) -> None:
        """Frees so many slots, of fragments that are not wanted now; what is next to go, first."""
        missing = count - len(self._free)
        if missing > 0:
            going = list(islice((key for key in self._order if key not in wanted), missing))
            self._free += [self._forget(key).slot for key in reversed(going)]

    def _reserve(self, key: bytes, deadline_s: float) -> SlotRef:
        if key in self._sealed:
            return SlotRef(SEALED_ALREADY, 0)
        if not self._free:
            return SlotRef(NO_SLOT, 0)
        slot, generation = self._free.pop(), self._next_generation
        self._next_generation += 1
        self._reserved[slot] = _Reservation(key, generation, deadline_s)
        return SlotRef(slot, generation)

    def _forget(self, key: bytes) -> SlotRef:
        self._order.discard(key)
        return self._sealed.pop(key)

    def _take_back_expired(self) -> None:
        now_s = self._clock()
        while self._reserved:
            slot, reservation = next(iter(self._reserved.items()))
            if reservation.deadline_s > now_s:
                return
            del self._reserved[slot]
            self._free.append(slot)
