"""Other people's implementations of our operations, as far as they are installed: what a row of figures stands beside.

A peer gets our arguments and returns the call to be timed, with whatever it wants rearranged beforehand, or None where
it does not do this case. Knows nothing of how anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from kernels.attention.paged import gather_sequence

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


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "decode_attention": {"torch sdpa, contiguous": _sdpa_decode},
    "prefill_attention": {"torch sdpa, contiguous": _sdpa_prefill},
    "rms_norm": {"torch": _torch_rms_norm, "liger": _liger_rms_norm},
    "swiglu": {"torch, two kernels": _torch_swiglu},
}
