"""The operations the engine calls: tensors in, tensors out.

CUDA tensors go to Triton kernels, CPU tensors to a fast torch path; each lives in one file beside the plain
definition that both are tested against. Importing touches no GPU.

    q, k, v          [num_tokens, heads, head_dim]
    kv_cache         one layer's, [num_blocks, num_kv_heads, 2, block_size, head_dim]; the 2 is K and V; contiguous
    block_table      [batch, max_blocks] int32; entries behind a sequence's end are not read
    seq_lens         [batch] int32, tokens in the cache, those of this step included
    query_start_loc  [batch + 1] int32, the running sum of this step's query tokens
    positions        [num_tokens] int64
    slot_mapping     [num_tokens] int64, block * block_size + offset; -1 writes nothing

    decode_attention(q, kv_cache, block_table, seq_lens, scale) -> [batch, q_heads, head_dim]
    prefill_attention(q, kv_cache, block_table, query_start_loc, seq_lens, max_query_len, scale) -> shaped as q
    rope_and_write_kv(q, k, v, cos_sin, positions, kv_cache, slot_mapping) -> rotated q
    rms_norm(x, weight, eps) -> normed
    add_rms_norm(x, residual, weight, eps) -> (normed, new_residual)
    swiglu(gate_up) -> silu(first half) * second half

Quantised results come with their fp32 scales, [num_tokens, 1] or, in groups of 128, [num_tokens, groups]; scheme is
"fp8", "fp8 groups" or "int8".

    rms_norm_quantised(x, weight, eps, scheme) -> (normed, scales)
    add_rms_norm_quantised(x, residual, weight, eps, scheme) -> (normed, scales, new_residual)
    swiglu_quantised(gate_up, scheme) -> (silu(first half) * second half, scales)
"""

from kernels.attention.decode import decode_attention
from kernels.attention.prefill import prefill_attention
from kernels.embedding import vocab_embedding
from kernels.gated import swiglu, swiglu_quantised
from kernels.norm import add_rms_norm, add_rms_norm_quantised, rms_norm, rms_norm_quantised
from kernels.penalties import apply_penalties
from kernels.rope_kv import rope_and_write_kv, rope_and_write_kv_fp8, rope_and_write_kv_int8
from kernels.sampling import sample, vocab_argmax

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quantised",
    "apply_penalties",
    "decode_attention",
    "prefill_attention",
    "rms_norm",
    "rms_norm_quantised",
    "rope_and_write_kv",
    "rope_and_write_kv_fp8",
    "rope_and_write_kv_int8",
    "sample",
    "swiglu",
    "swiglu_quantised",
    "vocab_argmax",
    "vocab_embedding",
]
