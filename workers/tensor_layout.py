"""Which tensors a checkpoint of a supported architecture has, and in what shapes: all of them, whoever reads them.

Without torch, so that a checkpoint is checked before anything is started. Knows nothing of shards.
"""

from __future__ import annotations

from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.tensors import check_tensors, have_same_bytes, stored_tensors
from workers.config import ModelConfig
from workers.errors import ModelError

Shapes = dict[str, tuple[int, ...]]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_HARMLESS = ("rotary_emb.inv_freq",)  # computed from config.json; old checkpoints store it


def tensor_shapes(config: ModelConfig) -> Shapes:
    """Shape of each tensor of the whole model, by name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: Shapes = {_EMBEDDING: (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (vocab, hidden)
    layer = _layer_shapes(config)
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def check_checkpoint(directory: Path, config: ModelConfig) -> None:
    """Raise ModelError unless each tensor of the directory's weight files is used as it is, and none is missing."""
    try:
        stored = stored_tensors(directory)
        head = stored.pop(_HEAD, None) if config.tie_word_embeddings else None
        check_tensors(stored, tensor_shapes(config), _HARMLESS)
        # transformers ties only what is the same, and else takes the stored head.
        if head is not None and not have_same_bytes(head, stored[_EMBEDDING], (_HEAD, _EMBEDDING)):
            raise CheckpointError(
                f"{head.path}: {_HEAD} is not {_EMBEDDING}, though config.json says tie_word_embeddings"
            )
    except CheckpointError as error:
        raise ModelError(str(error)) from None


def _layer_shapes(config: ModelConfig) -> Shapes:
    hidden, head_dim = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes: Shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
    }
    if config.has_qk_norm:
        shapes |= {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    if not config.num_experts:
        return shapes | _swiglu_shapes("mlp.", hidden, config.intermediate_size)
    shapes["mlp.gate"] = (config.num_experts, hidden)
    for expert in range(config.num_experts):
        shapes |= _swiglu_shapes(f"mlp.experts.{expert}.", hidden, config.moe_intermediate_size)
    return shapes


def _swiglu_shapes(prefix: str, hidden: int, width: int) -> Shapes:
    return {
        prefix + "gate_proj": (width, hidden),
        prefix + "up_proj": (width, hidden),
        prefix + "down_proj": (hidden, width),
    }
