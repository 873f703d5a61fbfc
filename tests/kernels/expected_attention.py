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
            out[row] = attend_one(q[row], seen, group, scale, sinks, soft_cap)
    return out


def attend_one(q, seen, group, scale, sinks, soft_cap):
    k, v = torch.stack(seen).repeat_interleave(group, dim=1).unbind(2)
    scores = (q.double() * k).sum(-1) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    peak = scores.amax(0)
    total = torch.exp(scores - peak).sum(0)
    if sinks is not None:
        total += torch.exp(sinks.double() - peak)
    return (torch.exp(scores - peak)[..., None] * v).sum(0) / total[:, None]


def torch_tree(
    q, kv_cache, block_table, query_start_loc, seq_lens, ancestors, max_query_len, scale,
    window=0, sinks=None, soft_cap=0.0, kv_scales=None,
):  # fmt: skip
    """Each node as the last token of a sequence of its own: what lies before the run, then its ancestors, then it."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    block_size, group = kv_cache.shape[3], q.shape[1] // kv_cache.shape[1]
    for i, length in enumerate(seq_lens.tolist()):
        begin, end = query_start_loc[i : i + 2].tolist()
        first, table = length - (end - begin), block_table[i].tolist()
        for row in range(begin, end):
            word = ancestors[row].item()
            path = [*range(first), *(first + j for j in range(end - begin) if word >> j & 1)]
            assert path[-1] == first + row - begin
            slots = path[-window:] if window else path
            seen = [token_kv(kv_cache, kv_scales, table[t // block_size], t % block_size) for t in slots]
            out[row] = attend_one(q[row], seen, group, scale, sinks, soft_cap)
    return out


def torch_compact(kv_cache, source_slots, target_slots, start_loc):
    """One sequence after the other, through a copy of its tokens."""
    out, block_size = kv_cache.double(), kv_cache.shape[4]
    for begin, end in zip(start_loc.tolist(), start_loc.tolist()[1:], strict=False):
        slots = torch.stack((source_slots, target_slots), dim=1)[begin:end].tolist()
        pairs = [(s, t) for s, t in slots if s >= 0]
        rows = [out[:, s // block_size, :, :, s % block_size].clone() for s, _ in pairs]
        for row, (_, t) in zip(rows, pairs, strict=True):
            out[:, t // block_size, :, :, t % block_size] = row
    return out


def torch_gather(kv_cache, block_ids, layers_per_fragment, num_tokens):
    """As a rank sends fragments: for each block its groups of layers, in each group its heads."""
    fragments = [
        kv_cache[first : first + layers_per_fragment, block, head, :, :num_tokens].double()
        for block in block_ids.tolist()
        for first in range(0, len(kv_cache), layers_per_fragment)
        for head in range(kv_cache.shape[2])
    ]
    shape = (len(block_ids), len(kv_cache) // layers_per_fragment, kv_cache.shape[2], *fragments[0].shape)
    return torch.stack(fragments).view(shape)


def torch_scatter(buffer, block_ids, kv_cache):
    out = kv_cache.double()
    layers_per_fragment, num_tokens = buffer.shape[3], buffer.shape[5]
    for layer in range(len(out)):
        for token in range(num_tokens):
            for i, block in enumerate(block_ids.tolist()):
                group, within = divmod(layer, layers_per_fragment)
                out[layer, block, :, :, token] = buffer[i, group, :, within, :, token].double()
    return out


def torch_mla_decode(q, latent_cache, block_table, seq_lens, scale, rope_dim, batch_invariant=False):
    out = torch.zeros(*q.shape[:2], q.shape[2] - rope_dim, dtype=torch.float64)
    for i, length in enumerate(seq_lens.tolist()):
        table, block_size = block_table[i].tolist(), latent_cache.shape[1]
        cached = [latent_cache[table[t // block_size], t % block_size].double() for t in range(length)]
        scores = [(q[i].double() * latent).sum(-1) * scale for latent in cached]
        total = torch.logsumexp(torch.stack(scores), 0) if scores else 0
        for score, latent in zip(scores, cached, strict=True):
            out[i] += torch.exp(score - total)[:, None] * latent[:-rope_dim]
    return out


def torch_mla_prefill(q, kv, k_rope, query_start_loc, kv_start_loc, max_query_len, scale):
    """As multi-head attention of each token, with its keys put together."""
    nope_dim = q.shape[2] - k_rope.shape[1]
    out = []
    for i in range(len(query_start_loc) - 1):
        begin, end = query_start_loc[i : i + 2].tolist()
        assert end - begin <= max_query_len
        for row in range(begin, end):
            keys = slice(kv_start_loc[i].item(), kv_start_loc[i + 1].item() - (end - row) + 1)
            shared = k_rope[keys].double()[:, None].repeat(1, q.shape[1], 1)
            k = torch.cat((kv[keys, :, :nope_dim].double(), shared), dim=-1)
            weights = torch.softmax((k * q[row].double()).sum(-1) * scale, dim=0)
            out.append((weights[..., None] * kv[keys, :, nope_dim:].double()).sum(0))
    return torch.stack(out)


TORCH = {
    "decode_attention": torch_decode,
    "prefill_attention": torch_prefill,
    "gather_kv_blocks": torch_gather,
    "mla_decode_attention": torch_mla_decode,
    "mla_prefill_attention": torch_mla_prefill,
    "scatter_kv_blocks": torch_scatter,
    "tree_attention": torch_tree,
    "compact_kv": torch_compact,
}
