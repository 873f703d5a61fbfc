"""Is a KV block cheaper to fetch or to compute again? Pure arithmetic on what was measured when a worker started.

Knows nothing of tiers, tensors or of how anything is measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferCost:
    """How long one worker takes for KV that it does not have."""

    compute_s_per_token: float  # prefill, in a chunk of usual size
    fetch_s: float  # of a pull, whatever its size
    fetch_s_per_block: float  # verified and in the paged cache

    def compute_s(self, num_tokens: int) -> float:
        """Prefill of that many tokens. The growth of attention with the context is left out: it favours fetching."""
        return num_tokens * self.compute_s_per_token

    def pull_s(self, num_blocks: int) -> float:
        """One pull of that many blocks."""
        return self.fetch_s + num_blocks * self.fetch_s_per_block

    def fetch_pays(self, num_blocks: int, block_size: int) -> bool:
        """Whether pulling the blocks is faster than computing their tokens."""
        return self.pull_s(num_blocks) < self.compute_s(num_blocks * block_size)

    def swap_pays(self, num_stored: int, num_pulled: int, block_size: int) -> bool:
        """Whether storing blocks now and pulling some later is faster than computing the tokens of the latter.

        A block is taken to cost as much on its way out as on its way back: the same bytes go by the same checks.
        """
        return num_stored * self.fetch_s_per_block + self.pull_s(num_pulled) < self.compute_s(num_pulled * block_size)


ALWAYS_FETCH = TransferCost(compute_s_per_token=1.0, fetch_s=0.0, fetch_s_per_block=0.0)
NEVER_FETCH = TransferCost(compute_s_per_token=0.0, fetch_s=1.0, fetch_s_per_block=0.0)
