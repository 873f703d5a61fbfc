"""An EAGLE-3 head for training: whole sequences, several tokens ahead, parameter names as heads are published.

The serving head is in `workers/model/heads/`; this one exists for gradients. Knows nothing of data or optimisers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.llama import MLP, RMS_NORM_EPS, ROPE_THETA, Llama, Shape, rope_tables, rotate

_FIRST_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Sizes of a head. layer: of its only layer; its vocab_size and hidden_size are the teacher's."""

    layer: Shape
    draft_vocab_size: int
    feature_layers: tuple[int, ...]  # of the teacher: hidden states before these go in; its number of layers: after all

    def config_json(self) -> dict[str, object]:
        """The config.json of such a head."""
        same = self.layer.config_json()
        return {
            **same,
            "architectures": ["LlamaForCausalLMEagle3"],
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": False,
            "draft_vocab_size": self.draft_vocab_size,
            "eagle_aux_hidden_state_layer_ids": list(self.feature_layers),
        }


class HeadAttention(nn.Module):
    """Over entries that have the teacher's hidden states, and those that a chain has behind each of them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.group = shape.num_attention_heads // shape.num_key_value_heads
        query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(2 * shape.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(2 * shape.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(2 * shape.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], passes: list[tuple[Tensor, Tensor]]) -> Tensor:
        """x: [batch, length, 2 * hidden] of the entries of pass len(passes). passes: keys and values of those before,
        to which this one's are added.

        In pass s the entry at position p ends a chain of s drafts: it sees entries of pass 0 up to p - s, and of
        pass t > 0 the one at p - s + t.
        """
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *tables), rotate(k, *tables)
        passes.append(tuple(t.repeat_interleave(self.group, dim=1) for t in (k, v)))  # type: ignore[arg-type]
        behind = len(passes) - 1
        mask = torch.ones(length, length, dtype=torch.bool).tril(-behind)
        scores = [(q @ passes[0][0].transpose(-1, -2)).masked_fill(~mask, float("-inf"))]
        values = [passes[0][1]]
        for number, (keys, found) in enumerate(passes[1:], start=1):
            shift = behind - number
            scores.append((q * keys.roll(shift, dims=2)).sum(-1, keepdim=True))
            values.append(found.roll(shift, dims=2))
        weights = (torch.cat(scores, -1).float() / self.head_dim**0.5).softmax(-1).to(v.dtype)
        mixed = weights[..., :length] @ values[0]
        for number, found in enumerate(values[1:]):
            mixed = mixed + weights[..., length + number, None] * found
        projected: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return projected


class HeadLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn = HeadAttention(shape)
        self.mlp = MLP(shape)
        self.hidden_norm = nn.RMSNorm(shape.hidden_size, eps=RMS_NORM_EPS)
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=RMS_NORM_EPS)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=RMS_NORM_EPS)

    def forward(
        self, embedded: Tensor, x: Tensor, tables: tuple[Tensor, Tensor], passes: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        both = torch.cat((self.input_layernorm(embedded), self.hidden_norm(x)), -1)
        x = x + self.self_attn(both, tables, passes)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Head(nn.Module):
    """Begins with a little of the teacher's last hidden state: the residual stream must not drown the layer."""

    def __init__(self, shape: HeadShape, teacher: Llama, draft_ids: Tensor) -> None:
        """draft_ids: int64 [draft_vocab_size], rising: the teacher's id of each token that the head proposes."""
        super().__init__()
        hidden = shape.layer.hidden_size
        self.shape = shape
        self.embedding = teacher.embed_tokens.weight.detach()
        self.fc = nn.Linear(hidden * len(shape.feature_layers), hidden, bias=False)
        self.midlayer = HeadLayer(shape.layer)
        self.norm = nn.RMSNorm(hidden, eps=RMS_NORM_EPS)
        self.lm_head = nn.Linear(hidden, shape.draft_vocab_size, bias=False)
        self.register_buffer("draft_ids", draft_ids)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.fc.weight.zero_()[:, -hidden:] = _FIRST_SHARE * torch.eye(hidden)
            self.norm.weight.copy_(teacher.norm.weight)
            self.lm_head.weight.copy_(self.embedding[draft_ids])

    def forward(self, features: Tensor, token_ids: Tensor, depth: int) -> list[Tensor]:
        """features: [batch, length, layers * hidden]; token_ids: int64 [batch, length], each the token that follows.

        Logits [batch, length, draft_vocab_size] of the token after that: of `depth` passes, each of which has one more
        hidden state of its own in place of the teacher's. The first s entries of pass s mean nothing.
        """
        tables = rope_tables(self.shape.layer, token_ids.shape[1])
        embedded = F.embedding(token_ids, self.embedding)
        x: Tensor = self.fc(features)
        passes: list[tuple[Tensor, Tensor]] = []
        found = []
        for _ in range(depth):
            x = self.midlayer(embedded, x, tables, passes)
            found.append(self.lm_head(self.norm(x)))
            x = x.roll(1, dims=1)
        return found

    def checkpoint(self) -> dict[str, Tensor]:
        """Tensors as they are published, in bf16."""
        ids = self.get_buffer("draft_ids")
        proposed = torch.zeros(len(self.embedding), dtype=torch.bool).index_fill_(0, ids, True)
        weights = {name: p.detach().to(torch.bfloat16).contiguous() for name, p in self.named_parameters()}
        return {**weights, "d2t": ids - torch.arange(len(ids)), "t2d": proposed}


@torch.no_grad()
def taught(teacher: Llama, token_ids: Tensor, feature_layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What the teacher thinks of [batch, length]: its hidden states before some layers, behind each other, and its
    logits [batch, length, vocab_size]."""
    tables = rope_tables(teacher.shape, token_ids.shape[1])
    x = teacher.embed_tokens(token_ids)
    states = [x]
    for layer in teacher.layers:
        x = layer(x, *tables)
        states.append(x)
    logits = F.linear(teacher.norm(x), teacher.embed_tokens.weight)
    return torch.cat([states[layer] for layer in feature_layers], -1), logits
