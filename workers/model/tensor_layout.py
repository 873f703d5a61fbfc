"""Which tensors a model's checkpoint has, and in what shapes: those of all ranks. Without torch.

A family lists its layers' tensors part by part, as its layers read them. Knows nothing of shards or families.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from checkpoint.errors import CheckpointError
from checkpoint.tensors import WantedTensor, check_tensors, have_same_bytes, stored_tensors
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.parts import AttentionConfig, ExpertsConfig, MlpConfig, kv_channel_names, kv_scale_names
from workers.model.weight_format import Matrices, WeightFormat

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens", "lm_head", "model.norm"
_MOST_TENSORS = 2**20  # several times those of the largest models, which list each expert's
_HARMLESS = ("rotary_emb.inv_freq",)  # computed from config.json; old checkpoints store it


class TensorLayout:
    """The tensors of a checkpoint, and the matrices among them, which the weight format says the tensors of."""

    def __init__(self, weight_format: WeightFormat) -> None:
        self.wanted: dict[str, WantedTensor] = {}
        self.matrices: list[Matrices] = []
        self._weight_format = weight_format

    def tensor(self, name: str, shape: tuple[int, ...]) -> None:
        """One that is a floating-point number each, as a norm's weight."""
        self.wanted[name] = WantedTensor(shape)

    def linear(self, matrices: Matrices) -> None:
        """What stands for some matrices."""
        self.matrices.append(matrices)
        for name, size in matrices.tensors():
            self.wanted.update(self._weight_format.tensors(name, size, matrices.inputs))
            if matrices.has_bias:
                self.tensor(name + ".bias", (size,))

    def vocab_table(self, name: str, vocab: int, hidden: int) -> None:
        """The embedding or the head."""
        self.wanted.update(self._weight_format.table_tensors(name, (vocab, hidden)))

    def attention(self, prefix: str, attention: AttentionConfig, hidden: int) -> None:
        """As workers.model.layers.attention reads it."""
        self.linear(attention.qkv(prefix, hidden))
        self.linear(attention.output(prefix, hidden))
        if attention.has_qk_norm:
            self.tensor(prefix + "q_norm.weight", (attention.head_dim,))
            self.tensor(prefix + "k_norm.weight", (attention.head_dim,))
        if attention.has_sinks:
            self.tensor(prefix + "sinks", (attention.num_attention_heads,))
        heads = attention.num_key_value_heads
        for name in itertools.chain(*kv_scale_names(prefix)):  # used where the cache is fp8
            self.wanted[name] = WantedTensor((1,), other_shapes=((), (heads,), (heads, 1, 1)), is_optional=True)
        for name in kv_channel_names(prefix):
            self.wanted[name] = WantedTensor((heads, attention.head_dim), is_optional=True)

    def mlp(self, prefix: str, mlp: MlpConfig | ExpertsConfig, hidden: int) -> None:
        """As workers.model.layers.mlp or .moe reads it."""
        if isinstance(mlp, MlpConfig):
            self.linear(mlp.gate_up(prefix, hidden))
            self.linear(mlp.down(prefix, hidden))
            return
        self.tensor(prefix + "gate.weight", (mlp.num_experts, hidden))
        for matrices in mlp.matrices(prefix, hidden).as_matrices():
            self.linear(matrices)


def tensor_layout(model: ModelConfig) -> TensorLayout:
    """That of the whole model. Raises ModelError where it is absurd: layers times experts that no checkpoint has."""
    layout = TensorLayout(model.weight_format)
    hidden, vocab = model.hidden_size, model.vocab_size
    layout.vocab_table(EMBEDDING, vocab, hidden)
    layout.tensor(FINAL_NORM + ".weight", (hidden,))
    if not model.tie_word_embeddings:
        layout.vocab_table(HEAD, vocab, hidden)
    for index in range(model.num_hidden_layers):
        model.decoder.add_tensors(layout, model.hidden_size, index)
        if len(layout.wanted) > _MOST_TENSORS:
            layers = f"num_hidden_layers={model.num_hidden_layers}"
            raise ModelError(f"config.json: {layers}: the first {index + 1} have more than {_MOST_TENSORS} tensors")
    return layout


def check_checkpoint(directory: Path, model: ModelConfig) -> None:
    """Raise ModelError unless each tensor of the directory's weight files is used as it is, and none is missing."""
    head_name, embedding_name = HEAD + ".weight", EMBEDDING + ".weight"
    wanted: Mapping[str, WantedTensor] = tensor_layout(model).wanted
    try:
        stored = stored_tensors(directory)
        head = stored.pop(head_name, None) if model.tie_word_embeddings else None
        check_tensors(stored, wanted, _HARMLESS)
        # transformers ties only what is the same, and else takes the stored head.
        if head is not None and not have_same_bytes(head, stored[embedding_name], (head_name, embedding_name)):
            raise CheckpointError(
                f"{head.path}: {head_name} is not {embedding_name}, though config.json says tie_word_embeddings"
            )
    except CheckpointError as error:
        raise ModelError(str(error)) from None


def check_split(model: ModelConfig, tp: int, pp: int) -> None:
    """Raise ModelError unless the model can be cut into tp x pp shards."""
    model.decoder.check_split(tp)
    if pp > model.num_hidden_layers:
        raise ModelError(f"pp={pp} is more than num_hidden_layers={model.num_hidden_layers}")
    for matrices in tensor_layout(model).matrices:
        model.weight_format.check_split(matrices, tp)
