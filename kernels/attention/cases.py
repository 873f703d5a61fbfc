"""Draws the optional arguments of the attention operations' cases. Knows nothing of kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.cases import DTYPE_NAMES, Draw, PagedShape

# window, sinks, soft_cap, kv_scales, batch_invariant
OptionValues = tuple[int, torch.Tensor | None, float, torch.Tensor | None, bool]


@dataclass(frozen=True, slots=True)
class Options:
    """What a case asks for beyond plain attention."""

    window: int = 0
    sinks: bool = False
    soft_cap: float = 0.0
    kv_dtype: torch.dtype | None = None  # None: that of the activations
    batch_invariant: bool = False
    fused_qkv: bool = False  # as in the engine, q is a slice of the fused projection: rows lie further apart
    sharpness: float = 1.0  # multiplies the softmax scale: large scores, whose powers no float holds

    def name(self) -> str:
        parts = [f" kv {DTYPE_NAMES[self.kv_dtype]}" if self.kv_dtype else ""]
        parts += [f" window{self.window}" * bool(self.window), " sinks" * self.sinks, " capped" * bool(self.soft_cap)]
        parts += [" strided" * self.fused_qkv, " sharp" * (self.sharpness > 1), " invariant" * self.batch_invariant]
        return "".join(parts)

    def draw_q(self, draw: Draw, num_tokens: int, shape: PagedShape) -> torch.Tensor:
        num_heads = shape.num_q_heads + (2 * shape.num_kv_heads if self.fused_qkv else 0)
        return draw.normal(num_tokens, num_heads, shape.head_dim)[:, : shape.num_q_heads]

    def draw(self, draw: Draw, num_q_heads: int, kv_cache: torch.Tensor) -> OptionValues:
        sinks = draw.normal(num_q_heads, dtype=torch.float32) if self.sinks else None
        kv_scales = draw.kv_scales(kv_cache) if self.kv_dtype else None
        return self.window, sinks, self.soft_cap, kv_scales, self.batch_invariant


PLAIN = Options()
