"""Packed blocks and attention to them, number by number, in numpy's order of things: independent of kernels."""

import numpy as np
import torch


def _group(head_dim):
    return 32 if head_dim % 32 == 0 else head_dim


def _pack_rows(lines, bits):
    """lines [n, numbers that share a scale], fp32 -> codes, scale and minimum of each."""
    levels = np.float32(2**bits - 1)
    low, high = lines.min(1), lines.max(1)
    scale = ((high - low) * (np.float32(1) / levels)).clip(2.0**-24, 65504).astype(np.float16)
    low = low.clip(-65504, 65504).astype(np.float16)
    codes = np.rint((lines - low.astype(np.float32)[:, None]) / scale.astype(np.float32)[:, None])
    return codes.clip(0, levels).astype(np.uint8), scale, low


def _bytes(codes, bits):
    per_byte = 8 // bits
    out = np.zeros((codes.shape[0], codes.shape[1] // per_byte), np.uint8)
    for dim in range(codes.shape[1]):
        out[:, dim // per_byte] |= codes[:, dim] << (dim % per_byte * bits)
    return out


def pack_full_blocks(kv_cache, slots, target_slots, packed, bits, channels=None):
    _, num_heads, _, block_size, head_dim = kv_cache.shape
    group = _group(head_dim)
    for slot, target in zip(slots.tolist(), target_slots.tolist(), strict=True):
        if slot < 0 or (slot + 1) % block_size:
            continue
        for head in range(num_heads):
            for half, num_bits in ((0, bits.keys), (1, bits.values)):
                x = kv_cache[slot // block_size, head, half].float().numpy()
                if channels is not None:
                    spread, shift = channels[head, half].numpy()
                    x = (x - shift) / spread
                codes_out = packed[2 * half][target // block_size, head, 0]
                scales_out = packed[2 * half + 1][target // block_size, head]
                if half == 0 and not bits.has_token_keys:
                    codes, scale, low = _pack_rows(x.T.copy(), num_bits)
                    codes, scale, low = codes.T, scale[None], low[None]
                else:
                    codes, scale, low = _pack_rows(x.reshape(-1, group), num_bits)
                    codes = codes.reshape(block_size, head_dim)
                    scale, low = (each.reshape(block_size, -1) for each in (scale, low))
                codes_out[:] = torch.from_numpy(_bytes(codes, num_bits))
                scales_out[0], scales_out[1] = torch.from_numpy(scale), torch.from_numpy(low)
    return packed


def _number(level, half, block, head, slot, dtype):
    """A key (half 0) or value of a token, fp32 rounded to dtype."""
    if level.bits is None:
        return level.parts[0][block, head, half, slot]
    codes, scales = level.parts[2 * half][block, head, 0, slot], level.parts[2 * half + 1][block, head]
    num_bits = (level.bits.keys, level.bits.values)[half]
    per_byte = 8 // num_bits
    head_dim = codes.shape[0] * per_byte
    unpacked = [(int(codes[d // per_byte]) >> (d % per_byte * num_bits)) % 2**num_bits for d in range(head_dim)]
    if half == 0 and not level.bits.has_token_keys:
        scale, low = scales[:, 0].float()
    else:
        scale, low = scales[:, slot].float().repeat_interleave(_group(head_dim), 1)
    number = torch.tensor(unpacked).float() * scale + low
    if level.channels is not None:
        spread, shift = level.channels[head, half]
        number = number * spread + shift
    return number.to(dtype)


def mixed_precision_attention(
    q,
    levels,
    query_start_loc,
    seq_lens,
    max_query_len,
    scale,
    window=0,
    sinks=None,
    soft_cap=0.0,
    batch_invariant=False,
):
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // levels[0].parts[0].shape[1]
    for i, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[i : i + 2].tolist()
        cached = {}
        for row in range(begin, end):
            position = length - (end - row)
            for head in range(q.shape[1]):
                scores, values = [], []
                for key in range(max(0, position + 1 - window) if window else 0, position + 1):
                    level = _of(levels, position - key, key)
                    block = int(level.block_table[i, key // level.block_size])
                    at = (id(level), key, head // group)
                    if at not in cached:
                        slot = key % level.block_size
                        numbers = [
                            _number(level, half, block, head // group, slot, q.dtype).double() for half in (0, 1)
                        ]
                        cached[at] = numbers
                    k, v = cached[at]
                    score = (q[row, head].double() * k).sum() * scale
                    scores.append(torch.tanh(score / soft_cap) * soft_cap if soft_cap else score)
                    values.append(v)
                if scores:
                    more = [] if sinks is None else [sinks[head].double()]
                    weights = torch.softmax(torch.stack(scores + more), 0)[: len(values)]
                    out[row, head] = (weights[:, None] * torch.stack(values)).sum(0)
    return out


def _of(levels, distance, key):
    """The one form in which a key is seen."""
    (found,) = (
        level
        for level in levels
        if level.reach.nearest <= distance < (level.reach.farthest or 1 << 30)
        and level.reach.first_key <= key < (level.reach.end_key or 1 << 30)
    )
    return found


def copy_full_blocks(kv_cache, slots, target_slots, out):
    size = kv_cache.shape[3]
    for slot, target in zip(slots.tolist(), target_slots.tolist(), strict=True):
        if (slot + 1) % size == 0 and slot > 0:
            out[target // size] = kv_cache[slot // size].clone()
    return out


TORCH = {
    "copy_full_blocks": copy_full_blocks,
    "mixed_precision_attention": mixed_precision_attention,
    "pack_full_blocks": pack_full_blocks,
}
