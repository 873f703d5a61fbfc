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
    fixed_order_linear(x, weight, bias) -> x @ weight.T + bias, each row's bits the same in every batch
    w4a16_gemm(x, packed, scales, zeros) -> x @ W.T, W in 4 bits; the layout is that of kernels.gemm.w4a16.pack
    fp8_gemm, int8_gemm(x, weight, x_scales, weight_scales) -> x @ weight.T, scaled per row and per column, bf16
    fp8_block_gemm(x, weight, x_scales, weight_scales) -> the same with a scale per 128 of k and per 128x128, bf16
    group_by_expert(expert_ids, num_experts, block) -> (row of each slot, expert of each block)
    moe_experts(x, gate_up, down, expert_ids, weights) -> the weighted sum of the chosen experts' outputs
    moe_experts_fp8(x, gate_up, down, their scales, expert_ids, weights) -> the same in e4m3 with scales per block
"""

from kernels.attention.decode import decode_attention
from kernels.attention.prefill import prefill_attention
from kernels.gated import swiglu
from kernels.gemm.fp8_block import fp8_block_gemm
from kernels.gemm.linear import fixed_order_linear
from kernels.gemm.w4a16 import w4a16_gemm
from kernels.gemm.w8a8 import fp8_gemm, int8_gemm
from kernels.grouping import group_by_expert
from kernels.moe import moe_experts
from kernels.moe_fp8 import moe_experts_fp8
from kernels.norm import add_rms_norm, rms_norm
from kernels.rope_kv import rope_and_write_kv

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "fixed_order_linear",
    "fp8_block_gemm",
    "fp8_gemm",
    "group_by_expert",
    "int8_gemm",
    "moe_experts",
    "moe_experts_fp8",
    "prefill_attention",
    "rms_norm",
    "rope_and_write_kv",
    "swiglu",
    "w4a16_gemm",
]
