"""How keys and values are written into fragments: as they lie in the cache, or as 8-bit numbers with a scale per row.

A row is the head_dim numbers of one (layer, K or V, slot). Raw, a fragment is its rows. In 8 bits it is one fp32 scale
per row, all of them, then the rows: int8 or fp8 (e4m3), rounded as kernels.quantise says. 8 bits lose something, so
blocks that travel so have names of their own (workers.runtime.build.kv_fingerprint). Knows nothing of tiers and keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quantise import Scheme, quantise, scheme_dtype
from workers.config import KV_SCALE_BYTES


@dataclass(frozen=True, slots=True)
class RowErrors:
    """What rows lost on their way into 8 bits and back."""

    largest: float
    """Of all rows: the norm of what changed over the row's norm."""
    mean: float


def _scheme(encoding: str) -> Scheme:
    assert encoding in ("int8", "fp8"), encoding
    return "int8" if encoding == "int8" else "fp8"


def encode(rows: Tensor, encoding: str) -> Tensor:
    """[fragments, ..., head_dim] -> [fragments, bytes], contiguous, on the same device."""
    num_fragments, head_dim = rows.shape[0], rows.shape[-1]
    if encoding == "none":
        return rows.contiguous().view(torch.uint8).reshape(num_fragments, -1)
    rounded, scales = quantise(rows.reshape(-1, head_dim).float(), _scheme(encoding))
    return torch.cat(
        [scales.view(torch.uint8).reshape(num_fragments, -1), rounded.view(torch.uint8).reshape(num_fragments, -1)], 1
    )


def decode(encoded: Tensor, head_dim: int, dtype: torch.dtype, encoding: str) -> Tensor:
    """[fragments, bytes], on any device -> [fragments, rows, head_dim]."""
    if encoding == "none":
        return encoded.view(dtype).view(len(encoded), -1, head_dim)
    scale_bytes = encoded.shape[1] // (KV_SCALE_BYTES + head_dim) * KV_SCALE_BYTES
    scales = encoded[:, :scale_bytes].contiguous().view(torch.float32)
    rounded = encoded[:, scale_bytes:].view(scheme_dtype(_scheme(encoding))).view(*scales.shape, head_dim)
    return (rounded.float() * scales[..., None]).to(dtype)


def row_errors(rows: Tensor, encoding: str) -> RowErrors:
    """Of rows [..., head_dim] that go into a fragment and come out of it."""
    flat = rows.reshape(1, -1, rows.shape[-1])
    before, after = flat.double(), decode(encode(flat, encoding), rows.shape[-1], rows.dtype, encoding).double()
    errors = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)
    return RowErrors(float(errors.max()), float(errors.mean()))
