"""Which segment goes next, and what is forgotten with it."""

from kvstore.tiers.disk.disk_index import DiskIndex
from kvstore.tiers.disk.segments import StoredFragment


def filled(*numbers: int) -> DiskIndex:
    index = DiskIndex()
    for number in numbers:
        index.resize(number, 100)
        index.remember(b"%d" % number, StoredFragment(number, 4096, 50))
    return index


def test_the_oldest_goes_first() -> None:
    index = filled(1, 2, 3)
    assert [index.evict() for _ in range(3)] == [1, 2, 3]
    assert (index.num_fragments, index.num_segments, index.used_bytes) == (0, 0, 0)


def test_one_that_was_read_gets_one_more_round() -> None:
    index = filled(1, 2, 3)
    assert index.use(b"1") == StoredFragment(1, 4096, 50)
    assert [index.evict() for _ in range(3)] == [2, 3, 1]


def test_when_all_were_read_the_oldest_goes() -> None:
    index = filled(1, 2)
    index.use(b"1")
    index.use(b"2")
    assert index.evict() == 1


def test_looking_is_no_use() -> None:
    index = filled(1, 2)
    assert index.has(b"1")
    assert index.evict() == 1
    assert not index.has(b"1")
    assert index.use(b"1") is None


def test_a_fragment_written_anew_stays_when_its_old_segment_goes() -> None:
    index = filled(1, 2)
    index.remember(b"1", StoredFragment(2, 8192, 50))
    assert not index.forget(b"1", StoredFragment(1, 4096, 50))
    assert index.evict() == 1
    assert index.use(b"1") == StoredFragment(2, 8192, 50)
    assert index.forget(b"1", StoredFragment(2, 8192, 50))
    assert index.use(b"1") is None
