"""The compressed form of a fragment: what goes in comes out, and nothing else ever does."""

import random

import pytest
import zstandard

from kvstore.format.compression import COMPRESSED, compress, decompress, is_compressed, stored_bytes_at, unseal_stored
from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import HEADER_BYTES, SEALED, seal
from tests.kvstore.fragments import make_compressible, make_fragments, sealed_copy

BOUND = 1 << 20
GENERATION = 7


def stored_form(fragment: Fragment) -> memoryview:
    stored = compress(sealed_copy(fragment, GENERATION))
    assert stored is not None
    return stored


def packed(fragment: Fragment, header: bytes, frame: bytes) -> memoryview:
    """A compressed form that is right on its outside: forged by a writer who knows the format."""
    content = memoryview(header + frame)
    outer = seal(fragment.key, content, GENERATION)
    return memoryview(bytearray(COMPRESSED + outer[len(COMPRESSED) :] + bytes(content)))


def opened(stored: memoryview, fragment: Fragment, bound: int = BOUND) -> memoryview | Rejected:
    content = unseal_stored(stored, fragment.key, GENERATION)
    return content if isinstance(content, Rejected) else decompress(stored, fragment.key, bound)


@pytest.mark.parametrize("num_bytes", [1000, 1001, 1003, 4096, 262_144])
def test_what_went_in_comes_out(num_bytes: int) -> None:
    (fragment,) = make_compressible(1, num_bytes)
    stored = stored_form(fragment)
    assert is_compressed(stored)
    assert len(stored) < 0.75 * num_bytes
    assert stored_bytes_at(bytes(stored[:HEADER_BYTES])) == len(stored)
    assert opened(stored, fragment) == sealed_copy(fragment, GENERATION)


def test_what_saves_nothing_is_left_as_it_is() -> None:
    (fragment,) = make_fragments(1, 4096)
    assert compress(sealed_copy(fragment)) is None


def test_the_generation_of_a_tier_is_that_of_what_comes_out() -> None:
    """The writer's header within says what it said at the writer's."""
    (fragment,) = make_compressible(1)
    sealed = sealed_copy(fragment, GENERATION)
    stored = packed(fragment, bytes(sealed_copy(fragment, 3)[:HEADER_BYTES]), bytes(stored_form(fragment)[128:]))
    assert opened(stored, fragment) == sealed


def test_no_changed_byte_gets_through() -> None:
    (fragment,) = make_compressible(1)
    stored = stored_form(fragment)
    for at in range(len(COMPRESSED), len(stored)):
        damaged = memoryview(bytearray(stored))
        damaged[at] ^= 1 << random.randrange(8)
        assert isinstance(opened(damaged, fragment), Rejected), at


def test_a_header_alone_is_too_short() -> None:
    (fragment,) = make_compressible(1)
    assert opened(packed(fragment, b"", b""), fragment) == Rejected("layout")
    assert opened(packed(fragment, bytes(HEADER_BYTES - 1), b""), fragment) == Rejected("layout")


def test_nothing_larger_than_the_bound_is_made() -> None:
    (fragment,) = make_compressible(1, 4096)
    stored = stored_form(fragment)
    assert opened(stored, fragment, bound=4095) == Rejected("layout")
    assert isinstance(opened(stored, fragment, bound=4096), memoryview)


def test_a_bomb_does_not_go_off() -> None:
    """A frame of a few bytes that says a gigabyte, or says nothing and has it."""
    (fragment,) = make_compressible(1)
    header = bytes(sealed_copy(fragment, GENERATION)[:HEADER_BYTES])
    huge = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    streamed = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 26))
    says_more = bytearray(zstandard.ZstdCompressor().compress(bytes(1 << 26)))
    says_more[6:10] = (1 << 30).to_bytes(4, "little")  # the content's size in the frame's header
    assert zstandard.get_frame_parameters(says_more).content_size == 1 << 30
    for frame in (huge, streamed, bytes(says_more)):
        assert len(frame) < 10_000
        assert opened(packed(fragment, header, frame), fragment) == Rejected("layout")
    of_a_gigabyte = seal(fragment.key, memoryview(bytes(1)), GENERATION)
    of_a_gigabyte = of_a_gigabyte[:16] + (1 << 30).to_bytes(8, "little") + of_a_gigabyte[24:]
    assert opened(packed(fragment, of_a_gigabyte, bytes(says_more)), fragment) == Rejected("layout")


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", "layout"),
        (b"no frame at all", "layout"),
        (zstandard.ZstdCompressor().compress(bytes(1000)) + b"more", "layout"),
        (zstandard.ZstdCompressor().compress(bytes(1000))[:-3], "layout"),
        (zstandard.ZstdCompressor().compress(bytes(999)), "layout"),
        (zstandard.ZstdCompressor().compress(bytes(1000)), "checksum"),
    ],
    ids=["empty", "none", "more", "cut off", "short", "other bytes"],
)
def test_a_frame_that_is_not_the_fragments_is_refused(frame: bytes, reason: str) -> None:
    (fragment,) = make_compressible(1)
    header = bytes(sealed_copy(fragment, GENERATION)[:HEADER_BYTES])
    assert opened(packed(fragment, header, frame), fragment) == Rejected(reason)  # type: ignore[arg-type]


def test_another_fragment_within_is_stale() -> None:
    (fragment,), (other,) = make_compressible(1), make_compressible(1)
    theirs = stored_form(other)
    stored = packed(fragment, bytes(theirs[HEADER_BYTES : 2 * HEADER_BYTES]), bytes(theirs[2 * HEADER_BYTES :]))
    assert opened(stored, fragment) == Rejected("stale")


def test_a_plain_fragment_is_opened_as_ever() -> None:
    (fragment,) = make_fragments(1)
    sealed = sealed_copy(fragment, GENERATION)
    assert bytes(sealed[:8]) == SEALED
    assert not is_compressed(sealed)
    assert unseal_stored(sealed, fragment.key, GENERATION) == fragment.payload
