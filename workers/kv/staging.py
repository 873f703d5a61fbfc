"""Buffers in host memory between a device's cache and the tiers, and the copies to them and back.

Copies run on a stream of their own, so that a step's tokens do not wait for them. Knows nothing of blocks or fragments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Staging:
    """Of one device. On a CPU nothing is copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def empty(self, shape: tuple[int, int]) -> Tensor:
        """A buffer of bytes that to_device takes."""
        return torch.empty(shape, dtype=torch.uint8, pin_memory=self._copies is not None)

    def ids(self, block_ids: Sequence[int]) -> Tensor:
        """int32 on the device."""
        ids = torch.tensor(block_ids, dtype=torch.int32)
        return ids if self._copies is None else ids.pin_memory().to(self._device, non_blocking=True)

    def to_host(self, gathered: Tensor) -> Tensor:
        """Begins to copy what the current stream is computing; see copied."""
        if self._copies is None:
            return gathered
        pinned = torch.empty_like(gathered, device="cpu", pin_memory=True)
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            pinned.copy_(gathered, non_blocking=True)
        gathered.record_stream(self._copies)  # not reused for another tensor before it is copied
        return pinned

    def copied(self) -> Callable[[], None]:
        """What waits until all that to_host was given so far can be read."""
        return (lambda: None) if self._copies is None else self._copies.record_event().synchronize

    def to_device(self, pinned: Tensor) -> Tensor:
        """The current stream waits for the copy."""
        if self._copies is None:
            return pinned
        with torch.cuda.stream(self._copies):
            copied = pinned.to(self._device, non_blocking=True)
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._copies)
        copied.record_stream(computing)
        return copied
