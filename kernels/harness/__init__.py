"""Ways to run the operations' cases: in Triton's interpreter, compiled on paper for Hopper, or on a GPU.

For tests and benchmarks; the engine never imports it.
"""

from typing import Any

from kernels.attention.decode import decode_attention
from kernels.attention.prefill import prefill_attention
from kernels.embedding import vocab_embedding
from kernels.gated import swiglu, swiglu_quantised
from kernels.norm import add_rms_norm, add_rms_norm_quantised, rms_norm, rms_norm_quantised
from kernels.op import Op
from kernels.penalties import apply_penalties
from kernels.rope_kv import rope_and_write_kv, rope_and_write_kv_fp8, rope_and_write_kv_int8
from kernels.sampling import sample, vocab_argmax

OPS: tuple[Op[..., Any], ...] = (
    decode_attention,
    prefill_attention,
    rms_norm,
    add_rms_norm,
    rope_and_write_kv,
    swiglu,
    rms_norm_quantised,
    add_rms_norm_quantised,
    swiglu_quantised,
    rope_and_write_kv_fp8,
    rope_and_write_kv_int8,
    vocab_argmax,
    sample,
    vocab_embedding,
    apply_penalties,
)
