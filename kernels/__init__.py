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

    decode_attention(q, kv_cache, block_table, seq_lens, scale, ...) -> [batch, q_heads, head_dim]
    prefill_attention(q, kv_cache, block_table, query_start_loc, seq_lens, max_query_len, scale, ...) -> shaped as q
        window=0               how many positions a token sees, its own included; 0 is all before it
        sinks=None             [q_heads] fp32, a logit of each head that takes weight and brings no value
        soft_cap=0.0           scores become soft_cap * tanh(score / soft_cap); 0 leaves them
        kv_scales=None         fp32; of a float8_e4m3fn cache [kv_heads, 2], of an int8 one [blocks, kv_heads, 2,
                               block_size]: a cached number times its scale is meant
        batch_invariant=False  a token's bits then depend on its own sequence only (kernels/attention/ says how far)
    rope_and_write_kv(q, k, v, cos_sin, positions, kv_cache, slot_mapping) -> rotated q
    rms_norm(x, weight, eps) -> normed
    add_rms_norm(x, residual, weight, eps) -> (normed, new_residual)
    swiglu(gate_up) -> silu(first half) * second half
    fixed_order_linear(x, weight, bias) -> x @ weight.T + bias, each row's bits the same in every batch
"""

from kernels.attention.decode import decode_attention
from kernels.attention.prefill import prefill_attention
from kernels.gated import swiglu
from kernels.gemm.linear import fixed_order_linear
from kernels.norm import add_rms_norm, rms_norm
from kernels.rope_kv import rope_and_write_kv

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "fixed_order_linear",
    "prefill_attention",
    "rms_norm",
    "rope_and_write_kv",
    "swiglu",
]
