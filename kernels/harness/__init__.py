"""Ways to run the operations' cases: in Triton's interpreter, compiled on paper for Hopper, or on a GPU.

For tests and benchmarks; the engine never imports it.
"""

from typing import Any

from kernels.attention.decode import decode_attention
from kernels.attention.mixed_precision import mixed_precision_attention
from kernels.attention.mla import mla_decode_attention
from kernels.attention.mla_prefill import mla_prefill_attention
from kernels.attention.prefill import prefill_attention
from kernels.attention.tree import tree_attention
from kernels.embedding import vocab_embedding
from kernels.experts.grouping import group_by_expert
from kernels.experts.moe import moe_experts
from kernels.experts.moe_fp8 import moe_experts_fp8
from kernels.experts.moe_weight_only import moe_experts_weight_only
from kernels.gated import swiglu, swiglu_quantised
from kernels.gemm.fp8_block import fp8_block_gemm
from kernels.gemm.linear import fixed_order_linear
from kernels.gemm.low_rank import add_low_rank
from kernels.gemm.outliers import add_outliers, split_outliers
from kernels.gemm.sparse24 import sparse24_gemm
from kernels.gemm.w2a8 import w2a8_gemm
from kernels.gemm.w4a8 import w4a8_gemm
from kernels.gemm.w4a16 import w4a16_gemm
from kernels.gemm.w8a8 import fp8_gemm, int8_gemm
from kernels.gemm.w8a16 import w8a16_gemm
from kernels.kv.compact import compact_kv
from kernels.kv.copy_blocks import copy_full_blocks
from kernels.kv.kv_copy import gather_kv_blocks, scatter_kv_blocks
from kernels.kv.pack_kv import pack_full_blocks
from kernels.kv.rope_kv import rope_and_write_kv
from kernels.kv.rope_kv_quantised import rope_and_write_kv_fp8, rope_and_write_kv_int8
from kernels.lora import add_lora
from kernels.norm import add_rms_norm, add_rms_norm_quantised, rms_norm, rms_norm_quantised
from kernels.op import Op
from kernels.penalties import apply_penalties
from kernels.sampling import sample
from kernels.vocab_argmax import vocab_argmax

OPS: tuple[Op[..., Any], ...] = (
    decode_attention,
    prefill_attention,
    rms_norm,
    add_rms_norm,
    rope_and_write_kv,
    swiglu,
    gather_kv_blocks,
    scatter_kv_blocks,
    mla_decode_attention,
    mla_prefill_attention,
    fixed_order_linear,
    w4a16_gemm,
    w8a16_gemm,
    w4a8_gemm,
    w2a8_gemm,
    sparse24_gemm,
    split_outliers,
    add_outliers,
    add_low_rank,
    add_lora,
    fp8_gemm,
    int8_gemm,
    fp8_block_gemm,
    rms_norm_quantised,
    add_rms_norm_quantised,
    swiglu_quantised,
    rope_and_write_kv_fp8,
    rope_and_write_kv_int8,
    vocab_argmax,
    sample,
    vocab_embedding,
    apply_penalties,
    mixed_precision_attention,
    pack_full_blocks,
    copy_full_blocks,
    group_by_expert,
    moe_experts,
    moe_experts_fp8,
    moe_experts_weight_only,
    tree_attention,
    compact_kv,
)
