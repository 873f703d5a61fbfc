"""What goes first, and what a burst of fragments that nobody asks for again cannot push out."""

from kvstore.reuse_order import ReuseOrder


def key(i: int) -> bytes:
    return i.to_bytes(22, "big")


def handed_off(order: ReuseOrder, *numbers: int) -> None:
    for i in numbers:
        order.add(key(i))
    for i in numbers:
        order.use(key(i))


def test_of_those_used_once_the_longest_unused_goes_first() -> None:
    order = ReuseOrder(10)
    for i in range(4):
        order.add(key(i))
    order.use(key(1))
    assert list(order) == [key(0), key(2), key(3), key(1)]


def test_what_was_used_again_goes_after_whatever_was_not() -> None:
    order = ReuseOrder(10)
    handed_off(order, 0, 1)
    order.use(key(0))
    handed_off(order, 2, 3)
    assert list(order) == [key(1), key(2), key(3), key(0)]


def test_a_burst_does_not_push_out_a_shared_prefix() -> None:
    order = ReuseOrder(20)
    handed_off(order, *range(5))
    for i in range(5):
        order.use(key(i))
    for i in range(100, 300):  # ten times as many as there is room for
        if len(list(order)) == 20:
            order.discard(next(iter(order)))
        handed_off(order, i)
    assert set(order) >= {key(i) for i in range(5)}


def test_what_was_reused_long_ago_makes_room_for_what_is_reused_now() -> None:
    order = ReuseOrder(10)
    for i in range(9):  # one more than may be kept apart
        handed_off(order, i)
        order.use(key(i))
    assert list(order) == [key(0), *map(key, range(1, 9))]
    order.add(key(50))
    assert list(order)[:2] == [key(0), key(50)]  # it begins anew, like one that just came


def test_what_is_gone_is_in_no_place() -> None:
    order = ReuseOrder(10)
    handed_off(order, 0, 1)
    order.use(key(1))
    order.discard(key(0))
    order.discard(key(1))
    order.discard(key(2))
    assert list(order) == []


def test_an_arena_of_one_slot_has_an_order_too() -> None:
    order = ReuseOrder(1)
    handed_off(order, 0)
    order.use(key(0))
    assert list(order) == [key(0)]
