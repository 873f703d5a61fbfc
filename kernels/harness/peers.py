"""Other people's implementations of our operations, as far as they are installed: what a row of figures stands beside.

A peer gets our arguments and returns the call to be timed, with its inputs rearranged beforehand, or None where
it does not do this case. Knows nothing of how anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from kernels.attention.mla import gather_latents
from kernels.attention.paged import gather_sequence
from kernels.gemm.codes4 import Table, unpack
from kernels.kv.kv_copy import gather_cpu, scatter_cpu

Peer = Callable[..., Callable[[], object] | None]


def _is_plain(options: tuple[object, ...]) -> bool:
    """Neither window, sinks, cap nor scales: the last option, batch invariance, asks for the same numbers."""
    return not any(isinstance(option, torch.Tensor) or option for option in options[:-1])


def _sdpa_decode(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    *options: object,
) -> Callable[[], object] | None:
    lengths = seq_lens.tolist()
    if not _is_plain(options) or len(set(lengths)) > 1:
        return None
    keys, values = zip(*(gather_sequence(kv_cache, row, lengths[0]).unbind(1) for row in block_table), strict=True)
    k, v = torch.stack(keys), torch.stack(values)
    rows = q.reshape(q.shape[0], kv_cache.shape[1], -1, q.shape[2])
    return lambda: F.scaled_dot_product_attention(rows, k, v, scale=scale)


def _sdpa_prefill(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    max_query_len: int,
    scale: float,
    *options: object,
) -> Callable[[], object] | None:
    lengths = seq_lens.tolist()
    queries = query_start_loc.diff().tolist()
    if not _is_plain(options) or len(lengths) > 1 or queries != lengths:
        return None  # torch's causal mask begins at the first key: only a whole prompt is the same question
    k, v = gather_sequence(kv_cache, block_table[0], lengths[0]).unbind(1)
    rows = q.transpose(0, 1).unsqueeze(0).contiguous()
    return lambda: F.scaled_dot_product_attention(
        rows, k.unsqueeze(0), v.unsqueeze(0), is_causal=True, scale=scale, enable_gqa=True
    )


def _sdpa_mla_decode(
    q: torch.Tensor,
    latent_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    rope_dim: int,
    batch_invariant: bool,
) -> Callable[[], object] | None:
    lengths = seq_lens.tolist()
    if len(set(lengths)) > 1:
        return None
    keys = torch.stack([gather_latents(latent_cache, row, lengths[0]) for row in block_table]).unsqueeze(1)
    rows, values = q.unsqueeze(1), keys[..., :-rope_dim]
    return lambda: F.scaled_dot_product_attention(rows, keys, values, scale=scale)


def _sdpa_mla_prefill(
    q: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    query_start_loc: torch.Tensor,
    kv_start_loc: torch.Tensor,
    max_query_len: int,
    scale: float,
) -> Callable[[], object] | None:
    if len(query_start_loc) > 2 or len(q) != len(kv):
        return None
    nope_dim = q.shape[2] - k_rope.shape[1]
    k = torch.cat((kv[..., :nope_dim], k_rope[:, None].expand(-1, q.shape[1], -1)), dim=-1)
    rows, keys, values = (x.transpose(0, 1).unsqueeze(0).contiguous() for x in (q, k, kv[..., nope_dim:]))
    return lambda: F.scaled_dot_product_attention(rows, keys, values, is_causal=True, scale=scale)


def _torch_gather(
    kv_cache: torch.Tensor, block_ids: torch.Tensor, layers_per_fragment: int, num_tokens: int
) -> Callable[[], object]:
    return lambda: gather_cpu(kv_cache, block_ids, layers_per_fragment, num_tokens)


def _torch_scatter(buffer: torch.Tensor, block_ids: torch.Tensor, kv_cache: torch.Tensor) -> Callable[[], object]:
    return lambda: scatter_cpu(buffer, block_ids, kv_cache)


def _torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Callable[[], object]:
    return lambda: F.rms_norm(x, (x.shape[-1],), weight, eps)


def _torch_swiglu(gate_up: torch.Tensor) -> Callable[[], object]:
    gate, up = gate_up.chunk(2, dim=-1)
    return lambda: F.silu(gate) * up


def _liger_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> Callable[[], object] | None:
    try:
        from liger_kernel.transformers.functional import liger_rms_norm
    except ImportError:
        return None
    return (lambda: liger_rms_norm(x, weight, eps)) if x.is_cuda else None


def _scaled_mm(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor
) -> Callable[[], object] | None:
    if not x.is_cuda:
        return None
    return lambda: torch._scaled_mm(
        x, weight.T, x_scales[:, None], weight_scales[None, :], out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _int_mm(
    x: torch.Tensor, weight: torch.Tensor, x_scales: torch.Tensor, weight_scales: torch.Tensor
) -> Callable[[], object] | None:
    return (lambda: torch._int_mm(x, weight.T)) if x.shape[0] > 16 else None  # fewer rows it does not do


def _torch_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[], object]:
    return lambda: F.linear(x, weight, bias)


def _torch_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> Callable[[], object]:
    def call() -> object:
        total = x + residual
        return F.rms_norm(total, (x.shape[-1],), weight, eps), total

    return call


def _torch_argmax(logits: torch.Tensor, first_id: int) -> Callable[[], object] | None:
    return (lambda: logits.max(dim=-1)) if first_id == 0 else None


def _torch_sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    first_id: int,
) -> Callable[[], object] | None:
    """The usual way, by a sort; with noise of its own, so that only its time can be compared."""
    if not logits.is_cuda or first_id:
        return None

    def call() -> object:
        scaled, order = (logits.float() / temperature.clamp(min=1e-5)[:, None]).sort(dim=-1, descending=True)
        ranks = torch.arange(logits.shape[1], device=logits.device)
        scaled = scaled.masked_fill((top_k > 0)[:, None] & (ranks >= top_k[:, None]), float("-inf"))
        shares = torch.softmax(scaled, dim=-1)
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= top_p[:, None], 0.0)
        shares = shares.masked_fill(shares < min_p[:, None] * shares[:, :1], 0.0)
        return order.gather(1, (shares / torch.empty_like(shares).exponential_()).argmax(dim=-1, keepdim=True))

    return call


def _torch_embedding(weight: torch.Tensor, token_ids: torch.Tensor, first_id: int) -> Callable[[], object] | None:
    return (lambda: F.embedding(token_ids, weight)) if first_id == 0 else None


def _int4pack_mm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    table: Table | None = None,
    offsets: torch.Tensor | None = None,
) -> Callable[[], object] | None:
    group = x.shape[1] // scales.shape[0]
    has_peer = table is None and offsets is None and group >= 32
    if not x.is_cuda or x.dtype != torch.bfloat16 or not has_peer:
        return None
    codes = unpack(packed)
    tiles = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    shift = scales * (8 - zeros.to(scales.dtype)) if zeros is not None else torch.zeros_like(scales)
    scales_and_shifts = torch.stack([scales, shift], dim=-1).contiguous()
    return lambda: torch._weight_int4pack_mm(x, tiles, group, scales_and_shifts)


def _grouped_mm(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
) -> Callable[[], object] | None:
    """The two products alone, of rows that are in order already: neither grouping nor the weighted sum is timed."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or bool((expert_ids < 0).any()):
        return None
    flat = expert_ids.view(-1)
    rows = x[flat.argsort() // expert_ids.shape[1]]
    ends = torch.bincount(flat, minlength=len(down)).cumsum(0).int()
    first, second = gate_up.transpose(1, 2), down.transpose(1, 2)

    def call() -> object:
        gate, up = torch._grouped_mm(rows, first, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(F.silu(gate) * up, second, offs=ends)

    return call


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "decode_attention": {"torch sdpa, contiguous": _sdpa_decode},
    "prefill_attention": {"torch sdpa, contiguous": _sdpa_prefill},
    "mla_decode_attention": {"torch sdpa, contiguous": _sdpa_mla_decode},
    "mla_prefill_attention": {"torch sdpa, contiguous": _sdpa_mla_prefill},
    "gather_kv_blocks": {"torch": _torch_gather},
    "scatter_kv_blocks": {"torch": _torch_scatter},
    "fixed_order_linear": {"torch, in any order": _torch_linear},
    "fp8_gemm": {"torch._scaled_mm": _scaled_mm},
    "int8_gemm": {"torch._int_mm, unscaled": _int_mm},
    "add_rms_norm": {"torch, two kernels": _torch_add_rms_norm},
    "vocab_argmax": {"torch": _torch_argmax},
    "sample": {"torch, by sorting": _torch_sample},
    "vocab_embedding": {"torch": _torch_embedding},
    "w4a16_gemm": {"torch._weight_int4pack_mm": _int4pack_mm},
    "moe_experts": {"torch._grouped_mm, grouped beforehand": _grouped_mm},
    "rms_norm": {"torch": _torch_rms_norm, "liger": _liger_rms_norm},
    "swiglu": {"torch, two kernels": _torch_swiglu},
}
