"""A stored fragment gives back exactly what was sealed, or says what is wrong with it."""

import random

import pytest
import xxhash

from kvstore.format.fragment import Rejected
from kvstore.format.sealing import HEADER_BYTES, reserve_at, seal, seal_into, unseal, unseal_into
from tests.kvstore.fragments import make_fragments

FRAGMENT = make_fragments(1, payload_bytes=100)[0]
STORED = seal(FRAGMENT.key, FRAGMENT.payload, 7) + FRAGMENT.payload


def unsealed(stored: bytes, key: bytes = FRAGMENT.key, generation: int = 7) -> memoryview | Rejected:
    return unseal(memoryview(bytearray(stored)), key, generation)


def test_what_was_sealed_comes_back() -> None:
    assert unsealed(STORED) == FRAGMENT.payload


def test_the_checksum_is_xxh3_over_payload_and_key() -> None:
    expected = xxhash.xxh3_64_intdigest(bytes(FRAGMENT.payload) + FRAGMENT.key)
    assert expected.to_bytes(8, "little") == STORED[24:32]


@pytest.mark.parametrize("offset", range(len(STORED)))
def test_any_flipped_byte_is_noticed(offset: int) -> None:
    damaged = bytearray(STORED)
    damaged[offset] ^= 1 << offset % 8
    result = unsealed(bytes(damaged))
    assert isinstance(result, Rejected)
    if offset >= HEADER_BYTES:
        assert result.reason == "checksum"


@pytest.mark.parametrize("num_bytes", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, len(STORED) - 1])
def test_any_missing_end_is_noticed(num_bytes: int) -> None:
    assert unsealed(STORED[:num_bytes]) == Rejected("truncated")


def test_surplus_bytes_are_noticed() -> None:
    assert unsealed(STORED + b"x") == Rejected("truncated")


def test_another_fragment_in_its_slot_is_stale() -> None:
    other = make_fragments(1)[0]
    assert unsealed(STORED, key=other.key) == Rejected("stale")
    assert unsealed(STORED, generation=8) == Rejected("stale")


def test_a_payload_under_another_key_does_not_verify() -> None:
    other = make_fragments(1)[0]
    swapped = STORED[: HEADER_BYTES - 22] + other.key + STORED[HEADER_BYTES:]
    assert unsealed(swapped, key=other.key) == Rejected("checksum")


def test_a_reserved_slot_holds_nothing() -> None:
    empty = bytearray(random.randbytes(HEADER_BYTES))
    reserve_at(memoryview(empty), 0, 7)
    assert not any(empty[16:])
    empty[HEADER_BYTES - 22 :] = FRAGMENT.key
    assert unsealed(bytes(empty)) == Rejected("layout")


def test_a_payload_of_another_format_is_the_same_bytes() -> None:
    wide = FRAGMENT.payload.cast("H")
    assert seal(FRAGMENT.key, wide, 7) == STORED[:HEADER_BYTES]
    target = bytearray(len(STORED))
    seal_into(memoryview(target), wide, FRAGMENT.key, 7)
    assert target == STORED


def test_header_and_payload_written_as_one_are_the_same() -> None:
    sealed = bytearray(len(STORED))
    seal_into(memoryview(sealed), FRAGMENT.payload, FRAGMENT.key, 7)
    assert sealed == STORED


def unsealed_into(stored: bytes, num_bytes: int = 100) -> tuple[bytes, Rejected | None]:
    buffer = bytearray(num_bytes)
    (rejected,) = unseal_into([memoryview(buffer)], [memoryview(bytearray(stored))], [FRAGMENT.key], [7])
    return bytes(buffer), rejected


def test_what_was_sealed_comes_into_the_buffer() -> None:
    assert unsealed_into(STORED) == (FRAGMENT.payload, None)


@pytest.mark.parametrize("offset", range(len(STORED)))
def test_any_flipped_byte_is_noticed_on_the_way_into_the_buffer(offset: int) -> None:
    damaged = bytearray(STORED)
    damaged[offset] ^= 1 << offset % 8
    _, rejected = unsealed_into(bytes(damaged))
    assert rejected == unsealed(bytes(damaged)) or (16 <= offset < 24 and rejected == Rejected("layout"))


def test_a_buffer_of_another_size_is_not_filled() -> None:
    assert unsealed_into(STORED[:-1], 99)[1] == Rejected("layout")
    assert unsealed_into(STORED + b"x", 101)[1] == Rejected("layout")
