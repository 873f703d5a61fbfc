"""The books of the arena's slots, in virtual time."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.tiers.host.slot_table import ABSENT, NO_SLOT, SEALED_ALREADY, SlotRef, SlotTable


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def key(number: int) -> bytes:
    return number.to_bytes(22, "big")


def fill(table: SlotTable, *numbers: int) -> list[SlotRef]:
    keys = [key(number) for number in numbers]
    refs = table.reserve(keys)
    assert table.seal(keys, refs) == len(keys)
    return refs


def test_a_fragment_is_found_once_it_is_sealed() -> None:
    table = SlotTable(2, Clock())
    (ref,) = table.reserve([key(1)])
    assert table.lookup([key(1)]) == [SlotRef(ABSENT, 0)]
    assert table.seal([key(1)], [ref]) == 1
    assert table.lookup([key(1), key(2)]) == [ref, SlotRef(ABSENT, 0)]
    assert table.num_sealed == 1


def test_what_is_there_is_not_written_again() -> None:
    table = SlotTable(2, Clock())
    fill(table, 1)
    assert table.reserve([key(1)]) == [SlotRef(SEALED_ALREADY, 0)]


def test_generations_grow_with_each_reuse() -> None:
    table = SlotTable(1, Clock(), first_generation=10)
    assert [fill(table, number)[0] for number in (1, 2, 3)] == [SlotRef(0, 10), SlotRef(0, 11), SlotRef(0, 12)]


def test_the_least_recently_used_goes_first() -> None:
    table = SlotTable(3, Clock())
    fill(table, 1, 2, 3)
    table.lookup([key(1)])
    table.reserve([key(2)])  # there already: a use, too
    fill(table, 4)
    assert [ref.slot == ABSENT for ref in table.lookup([key(1), key(2), key(3), key(4)])] == [False, False, True, False]


def test_a_batch_does_not_evict_itself() -> None:
    table = SlotTable(2, Clock())
    fill(table, 1)
    refs = table.reserve([key(1), key(2), key(3)])
    assert [ref.slot for ref in refs] == [SEALED_ALREADY, 1, NO_SLOT]
    assert table.lookup([key(1)])[0].slot >= 0


def test_slots_that_are_being_written_are_not_given_away() -> None:
    table = SlotTable(1, Clock())
    table.reserve([key(1)])
    assert table.reserve([key(2)]) == [SlotRef(NO_SLOT, 0)]


def test_a_reservation_that_is_never_sealed_is_taken_back() -> None:
    clock = Clock()
    table = SlotTable(1, clock, reservation_ttl_s=30)
    (late,) = table.reserve([key(1)])
    clock.now_s = 29.9
    assert table.reserve([key(2)])[0].slot == NO_SLOT
    clock.now_s = 30.0
    (ref,) = table.reserve([key(2)])
    assert ref.slot == late.slot
    assert ref.generation > late.generation
    assert table.seal([key(1)], [late]) == 0  # too late: the slot is another's
    assert table.seal([key(2)], [ref]) == 1
    table.check()


def test_of_two_writers_the_first_to_seal_wins() -> None:
    table = SlotTable(2, Clock())
    (first,), (second,) = table.reserve([key(1)]), table.reserve([key(1)])
    assert first.slot != second.slot
    assert table.seal([key(1)], [second]) == 1
    assert table.seal([key(1)], [first]) == 1  # readable, though not from this slot
    assert table.lookup([key(1)]) == [second]
    assert table.reserve([key(2)])[0].slot == first.slot
    table.check()


def test_a_dropped_fragment_can_be_written_again() -> None:
    table = SlotTable(1, Clock())
    (bad,) = fill(table, 1)
    assert table.drop([key(1)], [bad.generation + 1]) == 0
    assert table.drop([key(1)], [bad.generation]) == 1
    assert table.drop([key(1)], [bad.generation]) == 0
    (good,) = fill(table, 1)
    assert good.generation > bad.generation


class SlotTableMachine(RuleBasedStateMachine):
    """Random writers; a slot has one owner, and a reader is never sent to a slot that was given away."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table = SlotTable(4, self.clock)
        self.open: list[tuple[bytes, SlotRef]] = []
        self.owner: dict[int, int] = {}  # slot -> generation handed out last

    @rule(numbers=st.lists(st.integers(0, 9), min_size=1, max_size=5))
    def reserve(self, numbers: list[int]) -> None:
        keys = [key(number) for number in numbers]
        for k, ref in zip(keys, self.table.reserve(keys), strict=True):
            if ref.slot >= 0:
                assert ref.generation > self.owner.get(ref.slot, 0)
                self.owner[ref.slot] = ref.generation
                self.open.append((k, ref))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        k, ref = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.table.seal([k], [ref])

    @rule(number=st.integers(0, 9))
    def look_up_and_drop(self, number: int) -> None:
        (ref,) = self.table.lookup([key(number)])
        if ref.slot >= 0:
            assert self.owner[ref.slot] == ref.generation
            assert self.table.drop([key(number)], [ref.generation]) == 1

    @rule(number=st.integers(0, 9))
    def look_up(self, number: int) -> None:
        (ref,) = self.table.lookup([key(number)])
        assert ref.slot == ABSENT or self.owner[ref.slot] == ref.generation

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @invariant()
    def books_agree(self) -> None:
        self.table.check()


TestSlotTableMachine = SlotTableMachine.TestCase
TestSlotTableMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
