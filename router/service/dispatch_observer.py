"""Who counts what happens to streams between placement and end."""

from __future__ import annotations

from typing import Protocol

from router.placement.policy import Placement
from router.placement.streams import KVTransfer


class DispatchObserver(Protocol):
    """Who counts."""

    def placed(self, placement: Placement, queue_s: float) -> None: ...

    def replaced(self) -> None: ...

    def first_token(self, ttft_s: float, predicted_s: float) -> None: ...

    def closed(self, num_dropped_frames: int, kv_transfer: KVTransfer | None) -> None: ...

    def block_snapshot(self) -> None: ...

    def block_gap(self) -> None: ...
