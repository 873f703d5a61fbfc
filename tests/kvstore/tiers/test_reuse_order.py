"""Which fragments are evicted first, and which a burst of fragments used once cannot evict."""

from kvstore.tiers.host.reuse_order import ReuseOrder

SOON_S, LATER_S = 1.0, 60.0


def key(i: int) -> bytes:
    return i.to_bytes(22, "big")


def transferred(order: ReuseOrder, now_s: float, *numbers: int) -> None:
    """Put there, looked for by a prefetch and pulled."""
    for i in numbers:
        order.add(key(i), now_s)
    for _ in range(2):
        for i in numbers:
            order.use(key(i), now_s + SOON_S)


def test_of_those_transferred_the_longest_unused_goes_first() -> None:
    order = ReuseOrder(10)
    for i in range(4):
        order.add(key(i), 0.0)
    order.use(key(1), SOON_S)
    assert list(order) == [key(0), key(2), key(3), key(1)]


def test_what_was_used_again_goes_after_whatever_was_not() -> None:
    order = ReuseOrder(10)
    transferred(order, 0.0, 0, 1)
    order.use(key(0), LATER_S)
    transferred(order, LATER_S, 2, 3)
    assert list(order) == [key(1), key(2), key(3), key(0)]


def test_a_burst_does_not_push_out_a_shared_prefix() -> None:
    order = ReuseOrder(20)
    transferred(order, 0.0, *range(5))
    for i in range(5):
        order.use(key(i), LATER_S)
    for i in range(100, 300):  # ten times as many as there are slots for
        if len(list(order)) == 20:
            order.discard(next(iter(order)))
        transferred(order, LATER_S, i)
    assert set(order) >= {key(i) for i in range(5)}


def test_half_of_the_slots_are_for_what_comes() -> None:
    """However much was used again: a KV transfer of half the arena pushes out nothing of its own."""
    order = ReuseOrder(20)
    transferred(order, 0.0, *range(20))
    for i in range(20):
        order.use(key(i), LATER_S)
    for i in range(100, 110):
        order.discard(next(iter(order)))
        order.add(key(i), LATER_S)
    assert set(order) >= {key(i) for i in range(100, 110)}


def test_what_was_reused_long_ago_makes_way_for_what_is_reused_now() -> None:
    order = ReuseOrder(10)
    transferred(order, 0.0, *range(6))
    for i in range(6):  # one more than may be kept apart
        order.use(key(i), LATER_S)
    order.add(key(50), LATER_S)
    assert list(order) == [key(0), key(50), *map(key, range(1, 6))]  # it begins anew, like one that just came


def test_what_is_gone_is_not_in_the_order() -> None:
    order = ReuseOrder(10)
    transferred(order, 0.0, 0, 1)
    order.use(key(1), LATER_S)
    order.discard(key(0))
    order.discard(key(1))
    order.discard(key(2))
    assert list(order) == []


def test_an_arena_of_one_slot_has_an_order_too() -> None:
    order = ReuseOrder(1)
    transferred(order, 0.0, 0)
    order.use(key(0), LATER_S)
    assert list(order) == [key(0)]
