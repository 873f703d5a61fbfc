"""How keys and values are written into fragments: as they lie in the cache, or as 8-bit numbers with a scale per row.

A row is the head_dim numbers of one (layer, K or V, slot). Raw, a fragment is its rows. In 8 bits it is one fp32 scale
per row, all of them, then the rows: int8 or fp8 (e4m3), rounded as kernels.quantise says. 8 bits lose something, so
blocks that travel so have names of their own (see workers.rank.kv_fingerprint). Knows nothing of tiers and keys.
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


def decode_into(target: Tensor, payload: memoryview, encoding: str) -> None:
    """Writes a fragment's rows [..., head_dim] to where they belong; the payload has the right length."""
    if encoding == "none":
        target.copy_(torch.frombuffer(payload, dtype=target.dtype).view(target.shape))
        return
    num_scales = target.numel() // target.shape[-1]
    raw = torch.frombuffer(payload, dtype=torch.uint8).to(target.device)
    scales = raw[: num_scales * KV_SCALE_BYTES].view(torch.float32).view(*target.shape[:-1], 1)
    rounded = raw[num_scales * KV_SCALE_BYTES :].view(scheme_dtype(_scheme(encoding))).view(target.shape)
    target.copy_(rounded.float() * scales)


def row_errors(rows: Tensor, encoding: str) -> RowErrors:
    """Of rows [..., head_dim] that go into a fragment and come out of it."""
    flat = rows.reshape(1, -1, rows.shape[-1])
    got = torch.empty_like(flat[0])
    decode_into(got, encode(flat, encoding)[0].cpu().numpy().data, encoding)
    before, after = flat[0].double(), got.double()
    errors = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-30)
    return RowErrors(float(errors.max()), float(errors.mean()))
