"""A dense model of the engine's families as torch trains an adapter on it: whole sequences, gradients for the adapter.

Sizes and options are those that the engine reads from config.json; what is not Llama's or Qwen 3's layer is refused.
Knows nothing of data or optimisers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.qlora.adapter import LoraOptions, LoraPair
from training.qlora.nf4 import quantized
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.decoder import PreNormDecoder
from workers.model.layers.rope import rope_table
from workers.model.loader import Checkpoint
from workers.model.parts import AttentionConfig, MlpConfig
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.quant.weights import DenseWeight, QuantWeight
from workers.model.registry import load_config
from workers.model.tensor_layout import EMBEDDING, FINAL_NORM, HEAD, check_checkpoint

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines [length, head_dim / 2]."""


class AdaptedLinear(nn.Module):
    """A frozen matrix, and perhaps an adapter's two beside it."""

    def __init__(self, weight: QuantWeight, pair: LoraPair | None) -> None:
        super().__init__()
        self.weight = weight
        self.pair = pair

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.dense(torch.float32))
        return y if self.pair is None else y + self.pair(x)

    @torch.no_grad()
    def merge(self) -> None:
        """Make one matrix of the three."""
        if self.pair is not None:
            self.weight = DenseWeight(self.weight.dense(torch.float32) + self.pair.added())
            self.pair = None


Linears = Callable[[str, int, int], AdaptedLinear]
"""Makes the matrix of a name with so many outputs and inputs."""


class Norm(nn.Module):
    """Root-mean-square norm, frozen."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self._weight, self._eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


def _turn(x: Tensor, rotation: Rotation) -> Tensor:
    """[batch, heads, length, head_dim], halves one behind the other."""
    (first, second), (cos, sin) = x.chunk(2, dim=-1), rotation
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal over whole sequences."""

    def __init__(self, config: AttentionConfig, hidden: int, prefix: str, make: Linears, norms: list[Norm]) -> None:
        super().__init__()
        self._config, self._norms = config, norms
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj, self.k_proj = make(f"{prefix}q_proj", queries, hidden), make(f"{prefix}k_proj", keys, hidden)
        self.v_proj, self.o_proj = make(f"{prefix}v_proj", keys, hidden), make(f"{prefix}o_proj", hidden, queries)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (-1, self._config.head_dim)) for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self._norms:
            q, k = self._norms[0](q), self._norms[1](k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = F.scaled_dot_product_attention(
            _turn(q, rotation), _turn(k, rotation), v, is_causal=True, scale=self._config.scale or None, enable_gqa=True
        )
        found: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return found


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MlpConfig, hidden: int, prefix: str, make: Linears) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_proj, self.up_proj = (
            make(f"{prefix}gate_proj", inner, hidden),
            make(f"{prefix}up_proj", inner, hidden),
        )
        self.down_proj = make(f"{prefix}down_proj", hidden, inner)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, norms: tuple[Norm, Norm], attention: Attention, mlp: Mlp) -> None:
        super().__init__()
        self._input_norm, self._post_norm = norms
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        x = x + self.attention(self._input_norm(x), rotation)
        out: Tensor = x + self.mlp(self._post_norm(x))
        return out


class AdaptedModel(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocab]. Parameters are the adapter's alone, fp32."""

    def __init__(
        self, config: ModelConfig, weights: Checkpoint, options: LoraOptions | None, is_quantized: bool, seed: int = 0
    ) -> None:
        """options: None for the base alone. is_quantized: the layers' matrices in NF4, else as they are."""
        super().__init__()
        self.config = config
        self._weights, self._options, self._is_quantized = weights, options, is_quantized
        self._generator = torch.Generator().manual_seed(seed)
        self._pairs: dict[str, LoraPair] = {}
        size = (config.vocab_size, config.hidden_size)
        self._embedding = weights.read(f"{EMBEDDING}.weight", size)
        self._head = self._embedding if config.tie_word_embeddings else weights.read(f"{HEAD}.weight", size)
        self.layers = nn.ModuleList(self._layer(index) for index in range(config.num_hidden_layers))
        self._norm = self._norm_of(f"{FINAL_NORM}.weight", config.hidden_size)

    @property
    def pairs(self) -> dict[str, LoraPair]:
        """The adapter, by the names of the modules that it changes."""
        return dict(self._pairs)

    @property
    def options(self) -> LoraOptions | None:
        """Of the adapter; None: there is none."""
        return self._options

    @torch.no_grad()
    def round_adapter(self) -> None:
        """Make the adapter's numbers those that are stored."""
        for parameter in self.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))

    def forward(self, token_ids: Tensor) -> Tensor:
        rotation = self._rotation(token_ids.shape[1])
        x = F.embedding(token_ids, self._embedding)
        for layer in self.layers:
            x = layer(x, rotation)
        return F.linear(self._norm(x), self._head)

    def merge(self) -> None:
        """Put the adapter into the matrices; there is none afterwards."""
        for module in self.modules():
            if isinstance(module, AdaptedLinear):
                module.merge()
        self._pairs = {}

    def _rotation(self, length: int) -> Rotation:
        attention = layer_of(self.config, 0)[0]
        cos, sin = rope_table(attention.rope, attention.head_dim, length, torch.device("cpu")).chunk(2, dim=-1)
        return cos, sin

    def _norm_of(self, name: str, size: int) -> Norm:
        return Norm(self._weights.read(name, (size,)), self.config.rms_norm_eps)

    def _linear(self, name: str, outputs: int, inputs: int) -> AdaptedLinear:
        values = self._weights.read(f"{name}.weight", (outputs, inputs))
        weight = quantized(name, values) if self._is_quantized else DenseWeight(values)
        if self._options is not None and name.rpartition(".")[2] in self._options.targets:
            self._pairs[name] = LoraPair(outputs, inputs, self._options, self._generator)
        return AdaptedLinear(weight, self._pairs.get(name))

    def _layer(self, index: int) -> Layer:
        (attention, mlp), hidden, prefix = (
            layer_of(self.config, index),
            self.config.hidden_size,
            f"model.layers.{index}.",
        )
        names = ("input_layernorm", "post_attention_layernorm")
        before, behind = (self._norm_of(f"{prefix}{name}.weight", hidden) for name in names)
        heads = ("q_norm", "k_norm") if attention.has_qk_norm else ()
        of_heads = [self._norm_of(f"{prefix}self_attn.{name}.weight", attention.head_dim) for name in heads]
        return Layer(
            (before, behind),
            Attention(attention, hidden, f"{prefix}self_attn.", self._linear, of_heads),
            Mlp(mlp, hidden, f"{prefix}mlp.", self._linear),
        )


def layer_of(config: ModelConfig, index: int) -> tuple[AttentionConfig, MlpConfig]:
    """Sizes of a layer. Raises ModelError for what is not trained."""
    decoder = config.decoder
    if not isinstance(decoder, PreNormDecoder):
        raise ModelError(
            f"architecture {config.architecture}: adapters are trained for Llama's and Qwen 3's layers only"
        )
    attention, mlp = decoder.layers[index].attention, decoder.layers[index].mlp
    if not isinstance(mlp, MlpConfig):
        raise ModelError(f"architecture {config.architecture}: adapters of experts are not trained")
    usual = AttentionConfig(
        attention.num_attention_heads,
        attention.num_key_value_heads,
        attention.head_dim,
        attention.rope,
        attention.has_qk_norm,
        scale=attention.scale,
    )
    if attention != usual:
        raise ModelError(f"architecture {config.architecture}: its attention is another than Llama's and Qwen 3's")
    return attention, mlp


def open_base(directory: Path) -> tuple[ModelConfig, Checkpoint]:
    """A plain checkpoint of a dense model, in fp32. Raises ModelError naming the file, field or tensor."""
    config = load_config(directory)
    if config.weight_format != PLAIN_FORMAT:
        raise ModelError(f"{directory}: quantization_config: it is compressed already; start from its plain weights")
    for index in range(config.num_hidden_layers):
        layer_of(config, index)
    if replace(config, embedding_scale=1.0, norm_offset=0.0, logit_scale=1.0, logit_soft_cap=0.0) != config:
        raise ModelError(f"architecture {config.architecture}: it scales or caps what Llama and Qwen 3 do not")
    check_checkpoint(directory, config)
    return config, Checkpoint(directory, torch.float32, torch.device("cpu"))


def open_model(directory: Path, options: LoraOptions | None, is_quantized: bool, seed: int = 0) -> AdaptedModel:
    """As AdaptedModel; raises ModelError."""
    config, weights = open_base(directory)
    return AdaptedModel(config, weights, options, is_quantized, seed)
