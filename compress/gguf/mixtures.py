"""Which type of blocks each matrix gets, by the name of a mixture, as llama.cpp's llama_model_quantize decides it.

Where a row is not whole blocks, another type stands in. llama.cpp's mixtures of IQ types also have Q2_K, IQ2_S and
IQ3_S, which are not written here: the next larger type that is written takes their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from checkpoint.gguf.block_types import QUANTISED
from compress.errors import CompressError
from compress.gguf.metadata import parts_of
from compress.recipe import Recipe
from compress.schemes import PLAIN, Scheme
from workers.model.config import ModelConfig
from workers.model.tensor_layout import EMBEDDING, HEAD, tensor_layout

_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ2_XXS": "IQ4_NL", "IQ3_XXS": "IQ4_NL"}
"""For rows that 256 does not divide."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """What a rule may look at."""

    index: int
    num_layers: int
    queries_per_key: int

    @property
    def has_more_bits(self) -> bool:
        """The first and last eighth, and every third between."""
        eighth = self.num_layers // 8
        at_end = self.index < eighth or self.index >= 7 * self.num_layers // 8
        return at_end or (self.index - eighth) % 3 == 2


def _raised(part: str, base: str, layer: _Layer) -> str:
    return "Q6_K" if part in ("v_proj", "down_proj") and layer.has_more_bits else base


def _same(part: str, base: str, layer: _Layer) -> str:
    return base


def _iq2(part: str, base: str, layer: _Layer) -> str:
    is_early = part == "down_proj" and layer.index < layer.num_layers // 8
    return "Q4_K" if part == "v_proj" else "IQ3_XXS" if is_early else base


def _iq3(part: str, base: str, layer: _Layer) -> str:
    if part == "o_proj" or (part == "v_proj" and layer.queries_per_key >= 4):
        return "Q4_K"
    return base


@dataclass(frozen=True, slots=True)
class Mixture:
    """By name: see MIXTURES."""

    base: str
    file_type: int  # general.file_type: enum llama_ftype
    head: str  # of the head, or of the embedding where that is the head
    embedding: str  # of an embedding beside a head
    rule: Callable[[str, str, _Layer], str] = _same  # the last part of a matrix's name, base, layer -> its type
    is_by_importance: bool = False  # so coarse that without importances a model is lost


MIXTURES: dict[str, Mixture] = {
    "Q4_0": Mixture("Q4_0", 2, "Q6_K", "Q4_0"),
    "Q8_0": Mixture("Q8_0", 7, "Q8_0", "Q8_0"),
    "Q4_K_M": Mixture("Q4_K", 15, "Q6_K", "Q4_K", _raised),
    "Q5_K_M": Mixture("Q5_K", 17, "Q6_K", "Q5_K", _raised),
    "IQ2_XXS": Mixture("IQ2_XXS", 19, "Q5_K", "Q4_K", _iq2, is_by_importance=True),
    "IQ3_XXS": Mixture("IQ3_XXS", 23, "Q5_K", "Q4_K", _iq3, is_by_importance=True),
}
MIXTURE_NAMES = tuple(MIXTURES)


def mixture_named(name: str) -> Mixture:
    """Raises CompressError."""
    if name not in MIXTURES:
        raise CompressError(f"--format gguf has no scheme {name!r} (known: {', '.join(MIXTURE_NAMES)})")
    return MIXTURES[name]


def block_scheme(kind: str) -> Scheme:
    """One type of blocks, as a scheme of single matrices."""
    return Scheme(kind, None, block_type=kind)


def with_block_types(recipe: Recipe, model: ModelConfig) -> Recipe:
    """The recipe with a type for each matrix of this model, embedding and head included. Raises CompressError for an
    architecture that a GGUF has no name for."""
    mixture, attention = mixture_named(recipe.scheme.name), parts_of(model).attention
    queries_per_key = attention.num_attention_heads // attention.num_key_value_heads
    schemes: dict[str, Scheme] = {}
    for matrices in tensor_layout(model).matrices:
        for name in matrices.names:
            layer = _Layer(int(name.split(".")[2]), model.num_hidden_layers, queries_per_key)
            schemes[name] = _fitting(mixture.rule(name.rsplit(".", 1)[-1], mixture.base, layer), matrices.inputs)
    hidden = model.hidden_size
    if model.tie_word_embeddings:
        schemes[EMBEDDING] = _end(mixture.head, mixture, hidden)
    else:
        schemes |= {EMBEDDING: _fitting(mixture.embedding, hidden), HEAD: _end(mixture.head, mixture, hidden)}
    return replace(recipe, schemes=tuple(schemes.items()))


def _end(kind: str, mixture: Mixture, inputs: int) -> Scheme:
    """Of what makes the logits: bytes where the mixture's own type does not fit, as llama.cpp has it."""
    return _fitting(kind if inputs % QUANTISED[mixture.base].block_size == 0 else "Q8_0", inputs)


def _fitting(kind: str, inputs: int) -> Scheme:
    """The type, or that which stands in for it; rows that 32 does not divide stay numbers."""
    if inputs % QUANTISED[kind].block_size:
        kind = _FALLBACKS.get(kind, kind)
    return PLAIN if inputs % QUANTISED[kind].block_size else block_scheme(kind)
