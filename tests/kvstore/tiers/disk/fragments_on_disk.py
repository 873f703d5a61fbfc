"""Fragments that are written to a disk tier and read back."""

from collections.abc import Sequence

from kvstore.format.fragment import Fragment, Rejected
from kvstore.format.sealing import HEADER_BYTES
from kvstore.tiers.disk.disk import DiskTier
from tests.kvstore.fragments import (
    sealed_copy,
)

SEGMENT_BYTES = 1 << 20
PAYLOAD_BYTES = 100_000  # ten to a segment


def write(disk: DiskTier, fragments: Sequence[Fragment]) -> int:
    return disk.write([sealed_copy(fragment) for fragment in fragments])


def payload_of(sealed: memoryview | Rejected | None) -> memoryview:
    assert isinstance(sealed, memoryview), sealed
    return sealed[HEADER_BYTES:]


def check_all(disk: DiskTier, fragments: Sequence[Fragment]) -> None:
    for fragment in fragments:
        assert payload_of(disk.read(fragment.key)) == fragment.payload
