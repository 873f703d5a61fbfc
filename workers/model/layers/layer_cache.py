"""What attention asks of the cached keys and values of a layer. Knows nothing of how they are kept.

workers.kv.schemes has the ways to keep them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from workers.model.batch import Batch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionTerms:
    """What is the same in all passes of a layer; see kernels for each."""

    scale: float
    head_scales: Tensor  # fp32 [kv_heads, 2]: where the cache has a fixed scale per head, a cached number times it
    channel_scales: Tensor | None = None  # fp32 [kv_heads, 2, scale | shift, head_dim]; see kernels.kv.packed_blocks
    window: int = 0
    sinks: Tensor | None = None
    soft_cap: float = 0.0
    batch_invariant: bool = False


class LayerCache(Protocol):
    """One layer's keys and values on one rank."""

    def write(self, q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """Rotate q and k [tokens, heads, head_dim]; keep k and v where the batch says. Returns the rotated q."""

    def attend_decodes(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """The batch's first sequences, one token each: q [num_decodes, heads, head_dim] -> the same shape."""

    def attend_prefills(self, q: Tensor, batch: Batch, terms: AttentionTerms) -> Tensor:
        """Those behind: q [their tokens, heads, head_dim] -> the same shape."""
