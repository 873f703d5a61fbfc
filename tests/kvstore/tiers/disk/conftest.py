"""Fixtures of the disk tier's tests."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.tiers.disk.disk import DiskTier
from tests.kvstore.fragments import (
    SECRET,
)
from tests.kvstore.tiers.disk.fragments_on_disk import PAYLOAD_BYTES, SEGMENT_BYTES
from tests.processes import wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def open_disk(folder: Path) -> Iterator[Callable[..., DiskTier]]:
    opened: list[DiskTier] = []

    def open_disk(
        disk_bytes: int = 8 * SEGMENT_BYTES, secret: str = SECRET, where: Path = folder, compression: str = "none"
    ) -> DiskTier:
        disk = DiskTier(where, disk_bytes, PAYLOAD_BYTES, secret, time.monotonic, SEGMENT_BYTES, compression)
        opened.append(disk)
        wait_until(lambda: disk.is_up, "the disk tier is up")
        return disk

    yield open_disk
    for disk in opened:
        disk.close()
