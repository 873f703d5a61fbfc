"""Whole blocks of keys and values in few bits, as KIVI has them (arXiv:2402.02750): in torch.

Keys share a scale and a minimum per channel over the block's tokens, values per token over groups of channels. A number
is code * scale + minimum, both fp16; codes are rounded to nearest with the fp16 values, so that nothing is lost twice.
One bit tells above from below the group's mean, at the mean distance from it. A byte holds neighbouring channels, the
lowest bits first. Knows nothing of caches or attention.
"""

from __future__ import annotations

import torch

from costs.packed_kv import PackedBits, value_group

_SMALLEST_SCALE = 2.0**-24  # the smallest fp16 number above 0
_LARGEST = 65504.0  # fp16

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of n blocks: codes of keys [n, kv_heads, 1, block_size, head_dim * bits / 8] uint8, their scales and minima
[n, kv_heads, 2, 1, head_dim] fp16; codes of values; theirs [n, kv_heads, 2, block_size, head_dim / group] fp16."""


def pack_blocks(kv: torch.Tensor, bits: PackedBits) -> Packed:
    """kv: [n, kv_heads, 2, block_size, head_dim] of full blocks."""
    keys, values = kv.float().unbind(2)
    key_scales = _scales(keys, bits.keys, dim=2)  # [n, kv_heads, 2, 1, head_dim]
    key_codes = _codes(keys, key_scales.float(), bits.keys)
    grouped = values.unflatten(-1, (-1, value_group(kv.shape[-1])))
    value_scales = _scales(grouped, bits.values, dim=4).squeeze(-1)  # [n, kv_heads, 2, block_size, groups]
    value_codes = _codes(grouped, value_scales.float().unsqueeze(-1), bits.values).flatten(-2)
    return (
        _to_bytes(key_codes, bits.keys).unsqueeze(2), key_scales,
        _to_bytes(value_codes, bits.values).unsqueeze(2), value_scales,
    )  # fmt: skip


def unpack_blocks(packed: Packed, bits: PackedBits, dtype: torch.dtype) -> torch.Tensor:
    """[n, kv_heads, 2, block_size, head_dim]."""
    key_codes, key_scales, value_codes, value_scales = packed
    scale, minimum = key_scales.float().unbind(2)
    keys = _from_bytes(key_codes.squeeze(2), bits.keys) * scale + minimum
    scale, minimum = value_scales.float().unsqueeze(-1).unbind(2)
    codes = _from_bytes(value_codes.squeeze(2), bits.values)
    values = (codes.unflatten(-1, (value_scales.shape[-1], -1)) * scale + minimum).flatten(-2)
    return torch.stack((keys, values), 2).to(dtype)


def _scales(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Scale and minimum of what lies along a dimension, stacked in front of the tokens; fp16."""
    if bits == 1:
        mean = x.mean(dim, keepdim=True)
        reach = (x - mean).abs().mean(dim, keepdim=True)
        low, scale = mean - reach, 2 * reach
    else:
        low, high = x.aminmax(dim=dim, keepdim=True)
        scale = (high - low) / (2**bits - 1)
    pair = scale.clamp(_SMALLEST_SCALE, _LARGEST), low.clamp(-_LARGEST, _LARGEST)
    return torch.stack(pair, 2).half()


def _codes(x: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    scale, low = scales.unbind(2)
    return ((x - low) / scale).round_().clamp_(0, 2**bits - 1).to(torch.uint8)


def _to_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return torch.sum(codes.unflatten(-1, (-1, 8 // bits)) << shifts, -1, dtype=torch.uint8)


def _from_bytes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32."""
    if bits == 8:
        return packed.float()
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes: torch.Tensor = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(-2).float()
