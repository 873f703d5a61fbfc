"""What each scheme would cost, before anything is computed: bytes, bytes read for a step, tokens per second on a GPU.

A decode step reads each weight that any sequence needs once, and each sequence's keys and values; it lasts as long as
that or as its arithmetic, whichever is longer. So a prediction is a bound that real servers stay below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import CompressError
from compress.schemes import SCHEME_NAMES, Scheme, scheme_named
from costs.hardware import GPUS, Gpu
from workers.model.config import ModelConfig
from workers.model.decoder import PreNormDecoder
from workers.model.parts import ExpertsConfig
from workers.model.tensor_layout import tensor_layout
from workers.model.weight_format import Matrices

_PLAIN_BYTES = 2


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One scheme."""

    scheme: str
    problem: str  # why the model cannot be stored so; "": it can
    weight_bytes: int = 0
    bits_per_weight: float = 0.0  # of the matrices in layers
    step_bytes: int = 0  # read in one decode step
    tokens_per_s: float = 0.0  # of all sequences together
    fits: bool = True  # weights and this step's keys and values in the GPU's memory


@dataclass(frozen=True, slots=True)
class Workload:
    """Sequences that are decoded together, and the tokens that each has behind it."""

    num_sequences: int = 1
    context_tokens: int = 2048


def gpu_named(name: str) -> Gpu:
    """Raises CompressError."""
    if name not in GPUS:
        raise CompressError(f"--gpu {name!r} is not known (known: {', '.join(GPUS)})")
    return GPUS[name]


def plan(model: ModelConfig, gpu: Gpu, load: Workload, group_size: int) -> list[PlanRow]:
    """A row for each scheme."""
    matrices = tensor_layout(model).matrices
    schemes = [scheme_named(name, 80 if name == "low-rank" else group_size) for name in SCHEME_NAMES]
    return [_row(model, matrices, scheme, gpu, load) for scheme in schemes]


def _row(model: ModelConfig, matrices: Sequence[Matrices], scheme: Scheme, gpu: Gpu, load: Workload) -> PlanRow:
    bits = read_bits = weights = used = 0.0
    for group in matrices:
        share = _share_read(model, group, load.num_sequences)
        for name, outputs in group.tensors():
            try:
                if scheme.grid is not None:
                    scheme.grid.check(name, outputs, group.inputs)
            except CompressError as error:
                return PlanRow(scheme.label, str(error))
            size = scheme.bits_of(outputs, group.inputs)
            bits, weights = bits + size, weights + outputs * group.inputs
            read_bits += share * size
            used += _share_used(model, group) * outputs * group.inputs
    vocabulary = model.vocab_size * model.hidden_size
    ends = vocabulary * (1 if model.tie_word_embeddings else 2) * _PLAIN_BYTES
    weight_bytes, kv_bytes = int(bits / 8) + ends, load.num_sequences * load.context_tokens * _kv_token_bytes(model)
    step_bytes = int(read_bits / 8) + vocabulary * _PLAIN_BYTES + kv_bytes
    flops = 2 * load.num_sequences * (used + vocabulary)
    unit = scheme.activations.kind if scheme.activations is not None else "bf16"
    step_s = max(step_bytes / gpu.memory_bytes_per_s, flops / gpu.flops_per_s(unit))
    fits = weight_bytes + kv_bytes < gpu.memory_bytes
    return PlanRow(scheme.label, "", weight_bytes, bits / weights, step_bytes, load.num_sequences / step_s, fits)


def _kv_token_bytes(model: ModelConfig) -> int:
    return sum(spec.num_kv_heads * spec.head_dim * spec.num_planes * _PLAIN_BYTES for spec in model.cache_specs)


def _share_read(model: ModelConfig, matrices: Matrices, num_tokens: int) -> float:
    """How likely some token of a step needs these."""
    return float(1 - (1 - _share_used(model, matrices)) ** num_tokens)


def _share_used(model: ModelConfig, matrices: Matrices) -> float:
    """How likely one token needs these: not all experts are."""
    name = matrices.names[0]
    if ".experts." not in name or not isinstance(model.decoder, PreNormDecoder):
        return 1.0
    mlp = model.decoder.layers[int(name.split(".")[2])].mlp
    return mlp.num_experts_per_tok / mlp.num_experts if isinstance(mlp, ExpertsConfig) else 1.0
