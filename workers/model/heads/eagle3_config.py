"""What the directory of an EAGLE-3 head says of it (Li et al., "EAGLE-3", arXiv 2503.01840). Without torch.

The layouts are those that the authors publish, and that vLLM, SGLang and SpecForge write. A head is one decoder layer
over the hidden states of a few of the model's layers. Knows nothing of how it is run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from checkpoint.config_keys import COMMON_KEYS
from checkpoint.errors import CheckpointError
from checkpoint.files import read_json
from checkpoint.keys import KeyTable, check_keys, harmless, refused, understood
from checkpoint.tensors import StoredTensor, WantedTensor, check_tensors, stored_tensors
from workers.errors import ModelError
from workers.model.config import ModelConfig
from workers.model.config_fields import ConfigFields
from workers.model.decoder import LayerConfig, PreNormDecoder
from workers.model.parts import AttentionConfig, MlpConfig, check_full_attention, read_attention, read_mlp
from workers.model.quant.plain import PLAIN_FORMAT
from workers.model.tensor_layout import TensorLayout
from workers.model.weight_format import Matrices

ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
_OLD_ARCHITECTURE = "LlamaForCausalLM"  # of the first published heads, which have draft_vocab_size beside it
_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
_HARMLESS = ("rotary_emb.inv_freq",)
_IDS = ("I64", "I32")
_FLAGS = ("BOOL", "U8", "I64", "I32")

HEAD_KEYS: KeyTable = {
    **COMMON_KEYS,
    "draft_vocab_size": understood("tokens that the head proposes; d2t says which"),
    "target_hidden_size": understood("of the served model, where it is not the head's own"),
    "norm_before_residual": understood("whether the residual stream begins with normed hidden states"),
    _LAYER_IDS: understood("layers of the served model before which its hidden states are taken"),
    "eagle_config": understood("layers whose outputs are taken"),
    "tie_word_embeddings": refused("a head has an lm_head of its own", False),
    "quantization_config": refused("a head's weights are stored as they are"),
    "compression_config": refused("a head's weights are stored as they are"),
    "bias": refused("projections have no bias", False),
    "sliding_window": refused("attention sees the whole context"),
    "use_sliding_window": refused("attention sees the whole context", False),
    "max_window_layers": harmless("used with sliding windows only"),
    "target_model_type": harmless("a note of the tool that wrote the file"),
}
EAGLE_CONFIG_KEYS: KeyTable = {
    _LAYER_IDS: understood("layers whose outputs are taken"),
    "use_aux_hidden_state": refused("a head without them is no EAGLE-3 head", True),
}


class HeadAttention(AttentionConfig):
    """As AttentionConfig, but the projections read the embedding and the hidden state, one behind the other."""

    __slots__ = ()

    def qkv(self, prefix: str, hidden: int) -> Matrices:
        """As in AttentionConfig."""
        return AttentionConfig.qkv(self, prefix, 2 * hidden)


@dataclass(frozen=True, slots=True)
class HeadNames:
    """Where the tensors of a head stand in its checkpoint."""

    root: str  # before fc, norm and the embedding
    layer: str  # before the layer's

    @staticmethod
    def of(stored: Mapping[str, StoredTensor]) -> HeadNames:
        root = "model." if "model.fc.weight" in stored else ""
        is_numbered = any(name.startswith(f"{root}layers.0.") for name in stored)
        return HeadNames(root, root + ("layers.0." if is_numbered else "midlayer."))

    @property
    def fusion(self) -> str:
        """Of the matrix that makes one hidden state of several layers'."""
        return self.root + "fc"

    @property
    def embedding(self) -> str:
        """Of the embedding; not there where it is the served model's."""
        return self.root + "embed_tokens"

    @property
    def norm(self) -> str:
        """Of the final norm's weight."""
        return self.root + "norm.weight"


@dataclass(frozen=True, slots=True)
class Eagle3Config:
    """A head, under the names of its config.json where it has some."""

    directory: Path
    model: ModelConfig  # its own sizes; vocab_size and embedding are those of the served model
    draft_vocab_size: int
    target_hidden_size: int
    feature_layers: tuple[int, ...]  # of the served model: its hidden states before these go in
    norm_before_residual: bool
    names: HeadNames
    has_embedding: bool

    @property
    def layer(self) -> LayerConfig:
        """Its only one."""
        decoder = self.model.decoder
        assert isinstance(decoder, PreNormDecoder)
        return decoder.layers[0]

    @property
    def feature_width(self) -> int:
        """Numbers of a token that come from the served model."""
        return len(self.feature_layers) * self.target_hidden_size


def read_eagle3(directory: Path, target: ModelConfig, ignore_keys: Sequence[str] = ()) -> Eagle3Config:
    """The head of a directory, all of whose tensors fit it and the served model. Raises ModelError."""
    try:
        return _read(directory, target, ignore_keys)
    except CheckpointError as error:
        raise ModelError(str(error)) from None


def _read(directory: Path, target: ModelConfig, ignore_keys: Sequence[str]) -> Eagle3Config:
    path = directory / "config.json"
    raw = {key: value for key, value in read_json(path).items() if key not in ignore_keys}
    _check_architecture(raw, path)
    check_keys(raw, HEAD_KEYS, path)
    fields = ConfigFields(raw, path, ARCHITECTURES[0], {"max_position_embeddings": 2048}, (), PLAIN_FORMAT)
    if fields.size("num_hidden_layers", 1) != 1:
        raise fields.unsupported(f"num_hidden_layers={raw['num_hidden_layers']}: heads of one layer are supported")
    check_full_attention(fields)
    sizes = read_attention(fields)
    attention = HeadAttention(sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim, sizes.rope)
    # What is longer than the head's own context is only drafted worse.
    raw = {**raw, "num_hidden_layers": 1, "max_position_embeddings": target.max_position_embeddings}
    fields = ConfigFields(raw, path, ARCHITECTURES[0], {}, (), PLAIN_FORMAT)
    if fields.size("vocab_size") != target.vocab_size:
        raise ModelError(f"{path}: vocab_size={raw['vocab_size']}, and the served model has {target.vocab_size}")
    hidden = fields.size("target_hidden_size", fields.size("hidden_size"))
    if hidden != target.hidden_size:
        key = "target_hidden_size" if raw.get("target_hidden_size") else "hidden_size"
        raise ModelError(f"{path}: {key}={hidden}, and the served model's hidden_size is {target.hidden_size}")
    if (pickle := directory / "pytorch_model.bin").exists() and not list(directory.glob("*.safetensors*")):
        raise ModelError(f"{pickle}: a pickle, which is never read; convert it to model.safetensors")
    stored = stored_tensors(directory)
    names = HeadNames.of(stored)
    head = Eagle3Config(
        directory=directory,
        model=fields.model(PreNormDecoder((LayerConfig(attention, read_mlp(fields)),))),
        draft_vocab_size=fields.size("draft_vocab_size", target.vocab_size),
        target_hidden_size=hidden,
        feature_layers=_feature_layers(fields, target.num_hidden_layers),
        norm_before_residual=fields.flag("norm_before_residual"),
        names=names,
        has_embedding=names.embedding + ".weight" in stored,
    )
    _check_stored(head, stored)
    return head


def _check_architecture(raw: Mapping[str, Any], path: Path) -> None:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else "(none named)"
    if architecture not in ARCHITECTURES and not (architecture == _OLD_ARCHITECTURE and raw.get("draft_vocab_size")):
        supported = ", ".join(ARCHITECTURES)
        raise ModelError(f"{path}: architecture {architecture} is no EAGLE-3 head (supported: {supported})")


def _feature_layers(fields: ConfigFields, num_layers: int) -> tuple[int, ...]:
    """As the config says, else those that EAGLE-3 heads are trained with. At its top the numbers are those of the
    layers before which hidden states are taken, as vLLM reads them; in eagle_config of those after which, as SGLang
    does."""
    nested = fields.raw.get("eagle_config")
    if not isinstance(nested, dict | None):
        raise fields.wrong("eagle_config", "an object", nested)
    check_keys(nested or {}, EAGLE_CONFIG_KEYS, f"{fields.path}: eagle_config")
    for said, shift in ((fields.raw.get(_LAYER_IDS), 0), ((nested or {}).get(_LAYER_IDS), 1)):
        if said:
            is_list = isinstance(said, list) and all(type(one) is int for one in said)
            layers = [one + shift for one in said] if is_list else []
            if not layers or min(layers) < 0 or max(layers) > num_layers:
                raise fields.wrong(_LAYER_IDS, f"layers of the served model, which has {num_layers}", said)
            return tuple(layers)
    if num_layers < 3:
        raise fields.unsupported(f"{_LAYER_IDS} must be there for a model of {num_layers} layers")
    return 2, num_layers // 2, num_layers - 3


def _check_stored(head: Eagle3Config, stored: Mapping[str, StoredTensor]) -> None:
    check_tensors(stored, _wanted(head), _HARMLESS)
    own = head.model.hidden_size
    if not head.has_embedding and own != head.target_hidden_size:
        raise ModelError(
            f"{head.directory}: no tensor {head.names.embedding}.weight, and the served model's has "
            f"{head.target_hidden_size} columns, not {own}"
        )
    draft_ids(head)


def _wanted(head: Eagle3Config) -> Mapping[str, WantedTensor]:
    hidden, vocab, drafts = head.model.hidden_size, head.model.vocab_size, head.draft_vocab_size
    names, layer = head.names, head.layer
    layout = TensorLayout(PLAIN_FORMAT)
    for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
        layout.tensor(f"{names.layer}{name}.weight", (hidden,))
    layout.linear(layer.attention.qkv(names.layer + "self_attn.", hidden))
    layout.linear(layer.attention.output(names.layer + "self_attn.", hidden))
    assert isinstance(layer.mlp, MlpConfig)
    layout.mlp(names.layer + "mlp.", layer.mlp, hidden)
    layout.tensor(names.norm, (hidden,))
    layout.tensor(names.fusion + ".weight", (hidden, head.feature_width))
    layout.tensor("lm_head.weight", (drafts, hidden))
    return {
        **layout.wanted,
        names.embedding + ".weight": WantedTensor((vocab, hidden), is_optional=True),
        "d2t": WantedTensor((drafts,), _IDS, is_optional=drafts == vocab),
        "t2d": WantedTensor((vocab,), _FLAGS, is_optional=True),
    }


def draft_ids(head: Eagle3Config) -> npt.NDArray[np.int64]:
    """[draft_vocab_size]: the served model's id of each token that the head proposes. Raises ModelError."""
    stored = stored_tensors(head.directory)
    ids = np.arange(head.draft_vocab_size, dtype=np.int64)
    if "d2t" in stored:  # it has the distance of each id from its own
        ids = ids + _numbers(stored["d2t"].path, "d2t")
    vocab = head.model.vocab_size
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab))
    if wrong.size:
        at = int(wrong[0])
        raise ModelError(f"{stored['d2t'].path}: d2t[{at}] leads to token {ids[at]} of {vocab}")
    if len(np.unique(ids)) < len(ids):
        raise ModelError(f"{stored['d2t'].path}: d2t leads to the same token twice")
    if "t2d" in stored:
        is_proposed = np.zeros(vocab, np.bool_)
        is_proposed[ids] = True
        other = np.flatnonzero(_numbers(stored["t2d"].path, "t2d").astype(np.bool_) != is_proposed)
        if other.size:
            raise ModelError(f"{stored['t2d'].path}: t2d[{int(other[0])}] contradicts d2t")
    return ids


def _numbers(path: Path, name: str) -> npt.NDArray[np.int64]:
    with safe_open(path, framework="np") as file:
        numbers: npt.NDArray[np.int64] = file.get_tensor(name).astype(np.int64)
        return numbers
