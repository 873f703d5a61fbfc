"""Other people's implementations of our operations, as far as they are installed: what a row of figures stands beside.

A peer gets our arguments and returns the call to be timed, with whatever it wants rearranged beforehand, or None where
it does not do this case. Knows nothing of how anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from kernels.attention.decode import gather_sequence
from kernels.gemm.w4a16 import unpack

Peer = Callable[..., Callable[[], object] | None]


def _sdpa_decode(
    q: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, scale: float
) -> Callable[[], object] | None:
    lengths = seq_lens.tolist()
    if len(set(lengths)) > 1:
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
) -> Callable[[], object] | None:
    lengths = seq_lens.tolist()
    queries = query_start_loc.diff().tolist()
    if len(lengths) > 1 or queries != lengths:
        return None  # torch's causal mask begins at the first key: only a whole prompt is the same question
    k, v = gather_sequence(kv_cache, block_table[0], lengths[0]).unbind(1)
    rows = q.transpose(0, 1).unsqueeze(0).contiguous()
    return lambda: F.scaled_dot_product_attention(
        rows, k.unsqueeze(0), v.unsqueeze(0), is_causal=True, scale=scale, enable_gqa=True
    )


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


def _int4pack_mm(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> Callable[[], object] | None:
    if not x.is_cuda or x.dtype != torch.bfloat16:
        return None
    codes = unpack(packed)
    tiles = torch._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    shift = scales * (8 - zeros.to(scales.dtype)) if zeros is not None else torch.zeros_like(scales)
    scales_and_shifts = torch.stack([scales, shift], dim=-1).contiguous()
    group = x.shape[1] // scales.shape[0]
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
    "fixed_order_linear": {"torch, in any order": _torch_linear},
    "fp8_gemm": {"torch._scaled_mm": _scaled_mm},
    "int8_gemm": {"torch._int_mm, unscaled": _int_mm},
    "w4a16_gemm": {"torch._weight_int4pack_mm": _int4pack_mm},
    "moe_experts": {"torch._grouped_mm, grouped beforehand": _grouped_mm},
    "rms_norm": {"torch": _torch_rms_norm, "liger": _liger_rms_norm},
    "swiglu": {"torch, two kernels": _torch_swiglu},
}
