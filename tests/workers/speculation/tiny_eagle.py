"""Tiny random EAGLE-3 heads in the published layouts, and what plain torch makes of them, a whole sequence at once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, VOCAB, HEADS, KV_HEADS, INNER = 32, 97, 4, 2, 40
CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
    "intermediate_size": INNER, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "num_hidden_layers": 1,
    "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": VOCAB,
    "draft_vocab_size": 70, "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
}  # fmt: skip


def make_head(
    directory: Path,
    layer: str = "midlayer.",
    root: str = "",
    has_embedding: bool = False,
    tensors: dict[str, Tensor | None] | None = None,
    **changes: object,
) -> Path:
    """tensors: in place of those of these names; None: left out."""
    config = {**CONFIG, **changes}
    torch.manual_seed(11)
    drafts = int(config["draft_vocab_size"] or VOCAB)
    target = int(config.get("target_hidden_size") or HIDDEN)
    size, kv = HIDDEN // HEADS * HEADS, HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (size, 2 * HIDDEN), "self_attn.k_proj": (kv, 2 * HIDDEN),
        "self_attn.v_proj": (kv, 2 * HIDDEN), "self_attn.o_proj": (HIDDEN, size), "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }  # fmt: skip
    made = {f"{root}{layer}{name}.weight": 0.2 * torch.randn(shape) for name, shape in shapes.items()}
    for name in (f"{layer}hidden_norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "norm"):
        made[f"{root}{name}.weight"] = 1 + 0.2 * torch.randn(HIDDEN)
    made[f"{root}fc.weight"] = 0.2 * torch.randn(HIDDEN, 3 * target)
    made["lm_head.weight"] = 0.2 * torch.randn(drafts, HIDDEN)
    if has_embedding:
        made[f"{root}embed_tokens.weight"] = torch.randn(VOCAB, HIDDEN)
    if drafts < VOCAB:
        ids = torch.randperm(VOCAB)[:drafts].sort().values
        made["d2t"] = ids - torch.arange(drafts)
        made["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
    made = {name: tensor for name, tensor in {**made, **(tensors or {})}.items() if tensor is not None}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(made, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return directory


@dataclass(frozen=True)
class PlainHead:
    """Weights by their published names, without the layer's prefix; fp64."""

    weights: dict[str, Tensor]
    embedding: Tensor
    norm_before_residual: bool = False

    @staticmethod
    def of(directory: Path, embedding: Tensor, **options: bool) -> PlainHead:
        stored = load_file(directory / "model.safetensors")
        short = {
            name.removeprefix("model.").removeprefix("midlayer.").removeprefix("layers.0."): tensor
            for name, tensor in stored.items()
        }
        weights = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in short.items()}
        return PlainHead(weights, weights.get("embed_tokens.weight", embedding.double()), **options)

    def fused(self, features: Tensor) -> Tensor:
        """[n, 3 * hidden] -> [n, hidden]."""
        return features.double() @ self.weights["fc.weight"].T

    def outputs(self, hidden: Tensor, token_ids: list[int], positions: list[int]) -> Tensor:
        """[n, hidden] of entries, all at once: hidden states, and the tokens that follow them."""
        embedded = self._norm(self.embedding[token_ids], "input_layernorm")
        normed = self._norm(hidden, "hidden_norm")
        x = torch.cat((embedded, normed), -1)
        q, k, v = (x @ self.weights[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        dim, n = HIDDEN // HEADS, len(token_ids)
        q = self._turned(q.view(n, HEADS, dim), positions)
        k = self._turned(k.view(n, KV_HEADS, dim), positions).repeat_interleave(HEADS // KV_HEADS, 1)
        v = v.view(n, KV_HEADS, dim).repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)
        residual = normed if self.norm_before_residual else hidden
        residual = residual + mixed.reshape(n, -1) @ self.weights["self_attn.o_proj.weight"].T
        y = self._norm(residual, "post_attention_layernorm")
        gate, up = (y @ self.weights[f"mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        return residual + (F.silu(gate) * up) @ self.weights["mlp.down_proj.weight"].T

    def logits(self, outputs: Tensor) -> Tensor:
        """[rows, vocabulary of the model]."""
        found = self._norm(outputs, "norm") @ self.weights["lm_head.weight"].T
        if "d2t" not in self.weights:
            return found
        whole = torch.full((len(found), VOCAB), float("-inf"), dtype=torch.float64)
        whole[:, self.weights["d2t"] + torch.arange(found.shape[1])] = found
        return whole

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weights[name + ".weight"]

    @staticmethod
    def _turned(x: Tensor, positions: list[int]) -> Tensor:
        half = x.shape[-1] // 2
        angles = torch.tensor(positions).double()[:, None] / 10000 ** (torch.arange(half).double() / half)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
