"""What the attention operations should give, by loops over tokens: slow, and nothing like the code under test."""

import torch


def token_kv(kv_cache, kv_scales, block, slot):
    """[kv_heads, 2, head_dim] of one cached token."""
    kv = kv_cache[block, :, :, slot].double()
    if kv_scales is None:
        return kv
    scales = kv_scales if kv_scales.dim() == 2 else kv_scales[block, :, :, slot]
    return kv * scales.double()[..., None]


def torch_decode(q, kv_cache, block_table, seq_lens, scale, *options):
    return torch_prefill(q, kv_cache, block_table, torch.arange(len(seq_lens) + 1), seq_lens, 1, scale, *options)


def torch_prefill(
    q, kv_cache, block_table, query_start_loc, seq_lens, max_query_len, scale,
    window=0, sinks=None, soft_cap=0.0, kv_scales=None, batch_invariant=False,
):  # fmt: skip
    """Each token by itself: exp of its scores over their sum, with nothing subtracted first but the largest."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    block_size, group = kv_cache.shape[3], q.shape[1] // kv_cache.shape[1]
    for i, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[i].item(), query_start_loc[i + 1].item()
        assert end - begin <= max_query_len
        table = block_table[i].tolist()
        cached = [token_kv(kv_cache, kv_scales, table[t // block_size], t % block_size) for t in range(length)]
        for row in range(begin, end if length else begin):
            position = length - (end - row)
            seen = cached[max(0, position - window + 1) if window else 0 : position + 1]
            k, v = torch.stack(seen).repeat_interleave(group, dim=1).unbind(2)
            scores = (q[row].double() * k).sum(-1) * scale
            if soft_cap:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            peak = scores.amax(0)
            total = torch.exp(scores - peak).sum(0)
            if sinks is not None:
                total += torch.exp(sinks.double() - peak)
            out[row] = (torch.exp(scores - peak)[..., None] * v).sum(0) / total[:, None]
    return out


TORCH = {"decode_attention": torch_decode, "prefill_attention": torch_prefill}
