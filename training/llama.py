"""A Llama for training: whole sequences, no cache, Hugging Face parameter names.

The serving model is in `workers/model/`; this one exists because training needs gradients and full sequences and
serving needs neither. Knows nothing of data or optimisers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_THETA = 10000.0
RMS_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one model; names as in a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int

    def config_json(self) -> dict[str, object]:
        """The config.json of this model (LlamaForCausalLM, tied head)."""
        sizes = {name: getattr(self, name) for name in self.__slots__}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "hidden_act": "silu",
            "rms_norm_eps": RMS_NORM_EPS,
            "rope_theta": ROPE_THETA,
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }


def rope_tables(shape: Shape, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos, sin: [num_positions, head_dim], halves repeated (the Hugging Face layout)."""
    inv_freq = ROPE_THETA ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


class KeysValues:
    """What a batch of sequences of equal length has computed: fp32 or bf16, one pair of tensors a layer."""

    def __init__(self, shape: Shape, num_sequences: int, max_tokens: int, dtype: torch.dtype) -> None:
        size = (shape.num_hidden_layers, 2, num_sequences, shape.num_key_value_heads, max_tokens, shape.head_dim)
        self.num_tokens = 0
        self._layers = torch.zeros(size, dtype=dtype)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, with new ones [sequences, heads, tokens, head_dim] behind the others."""
        both = self._layers[layer, :, :, :, : self.num_tokens + keys.shape[2]]
        both[0, :, :, self.num_tokens :] = keys
        both[1, :, :, self.num_tokens :] = values
        return both[0], both[1]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., length, head_dim] turned by its positions."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.group = shape.num_attention_heads // shape.num_key_value_heads
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def _project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: [batch, heads, length, head_dim]."""
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self._project(x, cos, sin)
        k, v = (t.repeat_interleave(self.group, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected

    def extend(self, x: Tensor, tables: tuple[Tensor, Tensor], layer: int, cache: KeysValues) -> Tensor:
        """A whole prompt [batch, length, hidden] where nothing is cached yet, or one token behind what is."""
        batch, length, _ = x.shape
        q, k, v = self._project(x, *tables)
        k, v = cache.append(layer, k, v)
        q = q.to(k.dtype)
        if length == 1:  # the heads of a group as so many queries: keys and values are not repeated
            out = F.scaled_dot_product_attention(q.view(batch, -1, self.group, self.head_dim), k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
        projected: Tensor = self.o_proj(out.reshape(batch, length, -1))
        return projected


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        down: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = Attention(shape)
        self.mlp = MLP(shape)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=RMS_NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=RMS_NORM_EPS)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out

    def extend(self, x: Tensor, tables: tuple[Tensor, Tensor], layer: int, cache: KeysValues) -> Tensor:
        """As Attention.extend."""
        x = x + self.self_attn.extend(self.input_layernorm(x), tables, layer, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """Token ids [batch, length] -> logits [batch, length, vocab_size]; the head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=RMS_NORM_EPS)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)  # each layer starts as the identity

    def forward(self, token_ids: Tensor) -> Tensor:
        cos, sin = rope_tables(self.shape, token_ids.shape[1])
        x = self.embed_tokens(token_ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)

    @torch.no_grad()
    def next_logits(self, token_ids: Tensor, cache: KeysValues) -> Tensor:
        """[batch, vocab_size] after whole prompts [batch, length], or after one more token each."""
        end = cache.num_tokens + token_ids.shape[1]
        tables = rope_tables(self.shape, end)
        tables = tables[0][cache.num_tokens :], tables[1][cache.num_tokens :]
        x = self.embed_tokens(token_ids)
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            x = layer.extend(x, tables, index, cache)
        cache.num_tokens = end
        return F.linear(self.norm(x[:, -1]), self.embed_tokens.weight)

    def checkpoint(self) -> dict[str, Tensor]:
        """Parameters under their Hugging Face names, bf16."""
        return {f"model.{name}": p.detach().to(torch.bfloat16).contiguous() for name, p in self.named_parameters()}
