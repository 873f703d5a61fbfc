"""Bits and groups of packed blocks of keys and values; kernels.kv.packed_blocks says what they mean."""

from __future__ import annotations

from dataclasses import dataclass

LARGEST_GROUP = 32


@dataclass(frozen=True, slots=True)
class PackedBits:
    """Of a number of each kind: 1, 2, 4 or 8."""

    keys: int
    values: int
    has_token_keys: bool = False  # keys share scales per token over groups of channels, as values do
    has_channel_scales: bool = False  # numbers are shifted and scaled by channel before they are packed

    @property
    def label(self) -> str:
        """Short, of cases: k4v4tc."""
        return f"k{self.keys}v{self.values}" + "t" * self.has_token_keys + "c" * self.has_channel_scales


def channel_group(head_dim: int) -> int:
    """Channels of a token that share a scale."""
    return LARGEST_GROUP if head_dim % LARGEST_GROUP == 0 else head_dim
