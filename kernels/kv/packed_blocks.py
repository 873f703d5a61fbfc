"""Whole blocks of keys and values in few bits, as KIVI has them (arXiv:2402.02750): in torch.

Keys share a scale and a minimum per channel over the block's tokens, values per token over groups of channels; or both
do so per token, which costs keys more, since the same few channels are large in all tokens. A number
is code * scale + minimum, both fp16; codes are rounded to nearest with the fp16 values, so that nothing is lost twice.
With channel scales (WKVQuant, arXiv:2402.12065) a number less its channel's shift, over its channel's scale, is what is
packed; both are the model's and not the block's.
One bit tells above from below the group's mean, at the mean distance from it. A byte holds neighbouring channels, the
lowest bits first. Knows nothing of caches or attention.
"""

from __future__ import annotations

import torch

from costs.packed_kv import PackedBits, channel_group

SMALLEST_SCALE = 2.0**-24  # the smallest fp16 number above 0
LARGEST = 65504.0  # fp16

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Of n blocks: codes of keys [n, kv_heads, 1, block_size, head_dim * bits / 8] uint8; their scales and minima fp16
[n, kv_heads, 2, 1, head_dim], or with has_token_keys as the values'; codes of values; theirs [n, kv_heads, 2,
block_size, head_dim / group]."""


ChannelScales = torch.Tensor
"""fp32 [kv_heads, keys | values, scale | shift, head_dim]."""


def pack_blocks(kv: torch.Tensor, bits: PackedBits, channels: ChannelScales | None = None) -> Packed:
    """kv: [n, kv_heads, 2, block_size, head_dim] of full blocks."""
    wide = kv.float()
    if channels is not None:
        scale, shift = channels.unsqueeze(3).unbind(2)
        wide = (wide - shift) / scale
    keys, values = wide.unbind(2)
    pack_keys = _pack_by_token if bits.has_token_keys else _pack_by_channel
    return (*pack_keys(keys, bits.keys), *_pack_by_token(values, bits.values))


def unpack_blocks(
    packed: Packed, bits: PackedBits, dtype: torch.dtype, channels: ChannelScales | None = None
) -> torch.Tensor:
    """[n, kv_heads, 2, block_size, head_dim]."""
    key_codes, key_scales, value_codes, value_scales = packed
    if bits.has_token_keys:
        keys = _unpack_by_token(key_codes, key_scales, bits.keys)
    else:
        scale, minimum = key_scales.float().unbind(2)
        keys = _from_bytes(key_codes.squeeze(2), bits.keys) * scale + minimum
    kv = torch.stack((keys, _unpack_by_token(value_codes, value_scales, bits.values)), 2)
    if channels is not None:
        scale, shift = channels.unsqueeze(3).unbind(2)
        kv = kv * scale + shift
    return kv.to(dtype)


def _pack_by_channel(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    scales = _scales(x, bits, dim=2)  # [n, kv_heads, 2, 1, head_dim]
    return _to_bytes(_codes(x, scales.float(), bits), bits).unsqueeze(2), scales


def _pack_by_token(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = x.unflatten(-1, (-1, channel_group(x.shape[-1])))
    scales = _scales(grouped, bits, dim=4).squeeze(-1)  # [n, kv_heads, 2, block_size, groups]
    codes = _codes(grouped, scales.float().unsqueeze(-1), bits).flatten(-2)
    return _to_bytes(codes, bits).unsqueeze(2), scales


def _unpack_by_token(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    scale, minimum = scales.float().unsqueeze(-1).unbind(2)
    grouped = _from_bytes(codes.squeeze(2), bits).unflatten(-1, (scales.shape[-1], -1))
    unpacked: torch.Tensor = grouped * scale + minimum
    return unpacked.flatten(-2)


def _scales(x: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Scale and minimum of what lies along a dimension, stacked in front of the tokens; fp16."""
    if bits == 1:
        mean = x.mean(dim, keepdim=True)
        reach = (x - mean).abs().mean(dim, keepdim=True)
        low, scale = mean - reach, 2 * reach
    else:
        low, high = x.aminmax(dim=dim, keepdim=True)
        scale = (high - low) * (1 / (2**bits - 1))
    pair = scale.clamp(SMALLEST_SCALE, LARGEST), low.clamp(-LARGEST, LARGEST)
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
