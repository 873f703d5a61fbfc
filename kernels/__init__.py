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
        plan=None              on a CPU: what follows from lengths and block tables, made once for all layers of a step
    tree_attention(q, kv_cache, block_table, query_start_loc, seq_lens, ancestors, max_query_len, scale, ...)
        -> shaped as q; each sequence's query tokens are the nodes of a tree, at most 64; ancestors: [num_tokens] int64,
        bit j of a node's word is set for its ancestors and itself; options as above but the last
    compact_kv(all layers' caches, source_slots, target_slots, start_loc) -> the caches, cached tokens moved in place
    rope_and_write_kv(q, k, v, cos_sin, positions, kv_cache, slot_mapping) -> rotated q
    pack_full_blocks(kv_cache, slot_mapping, that of the packed cache, its parts, bits, channels=None) -> the parts,
        written in place; channels: kernels.kv.packed_blocks.ChannelScales
    copy_full_blocks(kv_cache, slot_mapping, that of the other cache, the other cache) -> it, written in place
    mixed_precision_attention(q, levels, query_start_loc, seq_lens, max_query_len, scale, ...) -> shaped as q
        levels: kernels.attention.precision_levels.LevelBlocks, each a form of the cache and the distances it stands for
    rms_norm(x, weight, eps) -> normed
    add_rms_norm(x, residual, weight, eps) -> (normed, new_residual)
    swiglu(gate_up) -> silu(first half) * second half
    gather_kv_blocks(all layers' caches, block_ids, layers_per_fragment, num_tokens) -> buffer of fragments
    scatter_kv_blocks(buffer, block_ids, all layers' caches) -> the caches, written in place
    mla_decode_attention(q, latent_cache, block_table, seq_lens, scale, rope_dim) -> [batch, heads, latent_dim]
        q [batch, heads, latent_dim + rope_dim], latent_cache [num_blocks, block_size, latent_dim + rope_dim]
    mla_prefill_attention(q, kv, k_rope, query_start_loc, kv_start_loc, max_query_len, scale) -> [tokens, heads, v_dim]
        kv [kv_tokens, heads, nope_dim + v_dim], k_rope [kv_tokens, rope_dim]: each sequence's context and chunk
    fixed_order_linear(x, weight, bias) -> x @ weight.T + bias, each row's bits the same in every batch
    w4a16_gemm(x, packed, scales, zeros, table, offsets) -> x @ W.T, W in 4 bits, laid out by kernels.gemm.codes4.pack
    w8a16_gemm(x, packed, scales, zeros, offsets) -> the same in 8 bits, laid out by kernels.gemm.codes8.pack
    w4a8_gemm(x, packed, x_scales, scales, zeros) -> the same of int8 rows, bf16; the layout is kernels.gemm.w4a8's
    w2a8_gemm(x, packed, x_scales, weight_scales) -> the same of weights -1, 0, 1; the layout is kernels.gemm.w2a8's
    sparse24_gemm(x, values, places) -> x @ W.T, of every four weights two; the layout is kernels.gemm.sparse24's
    split_outliers(x, threshold) -> (x in int8 without its large inputs, scales, which stretches had any)
    add_outliers(out, x, flags, weight, weight_scales, threshold) -> out plus the large inputs' product, in place
    add_low_rank(out, x, down, up) -> out + x @ down.T @ up.T, in place
    add_lora(out, x, down, up, rows, sizes) -> the same, each row with the matrices of its slot (kernels.lora.LoraRows)
    fp8_gemm, int8_gemm(x, weight, x_scales, weight_scales) -> x @ weight.T, scaled per row and per column, bf16
    fp8_block_gemm(x, weight, x_scales, weight_scales) -> the same with a scale per 128 of k and per 128x128, bf16
    group_by_expert(expert_ids, num_experts, block) -> (row of each slot, expert of each block)
    moe_experts(x, gate_up, down, expert_ids, weights) -> the weighted sum of the chosen experts' outputs
    moe_experts_fp8(x, gate_up, down, their scales, expert_ids, weights) -> the same in e4m3 with scales per block
    moe_experts_weight_only(x, gate_up, down, expert_ids, weights) -> the same in 4 or 8 bits
    vocab_argmax(logits, first_id) -> (value, id) of each row, of this rank's share of the vocabulary
    sample(logits, temperature, top_k, top_p, min_p, seeds, positions, first_id) -> (value, id), by Gumbel noise
    apply_penalties(logits, counts, count_rows, repetition, presence, frequency) -> the logits, changed in place
    vocab_embedding(weight, token_ids, first_id) -> rows; zeros for the ids of other ranks

Quantised results come with their fp32 scales, [num_tokens, 1] or, in groups of 128, [num_tokens, groups]; scheme is
"fp8", "fp8 groups" or "int8". A product takes scales per row as [num_tokens].

    rope_and_write_kv_fp8, rope_and_write_kv_int8(..., kv_scales) -> rotated q; k and v go into an 8-bit cache
    rms_norm_quantised(x, weight, eps, scheme) -> (normed, scales)
    add_rms_norm_quantised(x, residual, weight, eps, scheme) -> (normed, scales, new_residual)
    swiglu_quantised(gate_up, scheme) -> (silu(first half) * second half, scales)
"""

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
from kernels.penalties import apply_penalties
from kernels.sampling import sample
from kernels.vocab_argmax import vocab_argmax

__all__ = [
    "add_lora",
    "add_low_rank",
    "add_outliers",
    "add_rms_norm",
    "add_rms_norm_quantised",
    "apply_penalties",
    "compact_kv",
    "copy_full_blocks",
    "decode_attention",
    "fixed_order_linear",
    "fp8_block_gemm",
    "fp8_gemm",
    "gather_kv_blocks",
    "group_by_expert",
    "int8_gemm",
    "mixed_precision_attention",
    "mla_decode_attention",
    "mla_prefill_attention",
    "moe_experts",
    "moe_experts_fp8",
    "moe_experts_weight_only",
    "pack_full_blocks",
    "prefill_attention",
    "rms_norm",
    "rms_norm_quantised",
    "rope_and_write_kv",
    "rope_and_write_kv_fp8",
    "rope_and_write_kv_int8",
    "sample",
    "scatter_kv_blocks",
    "sparse24_gemm",
    "split_outliers",
    "swiglu",
    "swiglu_quantised",
    "tree_attention",
    "vocab_argmax",
    "vocab_embedding",
    "w2a8_gemm",
    "w4a8_gemm",
    "w4a16_gemm",
    "w8a16_gemm",
]
