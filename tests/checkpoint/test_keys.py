"""No key of a model's files is passed over in silence: each is used, harmless for a reason, or refused by name."""

from __future__ import annotations

import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig, Qwen3Config, Qwen3MoeConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from checkpoint.config_keys import ROPE_KEYS
from checkpoint.errors import CheckpointError
from checkpoint.generation_keys import GENERATION_KEYS
from checkpoint.keys import Key, KeyTable, check_keys
from checkpoint.tokenizer_keys import TOKENIZER_CONFIG_KEYS, check_tokenizer_files
from workers.errors import ModelError
from workers.model import key_tables
from workers.model.config import ModelConfig
from workers.model.decoder import PreNormDecoder
from workers.model.registry import load_config, load_registry

FAMILIES = load_registry().families
CONFIG_KEYS = {architecture: family.keys for architecture, family in FAMILIES.items()}
CLASSES: dict[str, type[PretrainedConfig]] = {
    "LlamaForCausalLM": LlamaConfig,
    "Qwen3ForCausalLM": Qwen3Config,
    "Qwen3MoeForCausalLM": Qwen3MoeConfig,
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VALUES = st.one_of(st.booleans(), st.integers(), st.text(), st.lists(st.integers(), max_size=2))
ALL_TABLES: dict[str, KeyTable] = {
    **CONFIG_KEYS,
    **{f"rope {kind}": keys for kind, keys in ROPE_KEYS.items()},
    "generation": GENERATION_KEYS,
    "tokenizer": TOKENIZER_CONFIG_KEYS,
}


def config_of(architecture: str) -> dict[str, Any]:
    own = EXPERTS if architecture == "Qwen3MoeForCausalLM" else {}
    return {"architectures": [architecture], "model_type": FAMILIES[architecture].model_type, **SIZES, **own}


def parse(tmp_path: Path, raw: dict[str, Any]) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return load_config(tmp_path)


def parse_or_refuse(tmp_path: Path, raw: dict[str, Any], name: str) -> ModelConfig | None:
    """None when it is refused, which must name the key."""
    try:
        return parse(tmp_path, raw)
    except ModelError as error:
        refusal = str(error)
    assert name.removesuffix("s") in refusal
    return None


@pytest.mark.parametrize("architecture", CONFIG_KEYS)
def test_every_key_of_transformers_classes_is_in_the_table(architecture: str) -> None:
    kind = CLASSES[architecture]
    made = kind()
    names = set(made.to_dict()) | set(vars(made)) | {field.name for field in fields(kind)}
    names |= set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
    assert names - set(CONFIG_KEYS[architecture]) == set()


def test_every_key_of_transformers_generation_config_is_in_the_table() -> None:
    assert set(vars(GenerationConfig())) - set(GENERATION_KEYS) == set()


def test_every_key_that_transformers_tokenizers_take_is_in_the_table() -> None:
    source = inspect.getsource(PreTrainedTokenizerBase.__init__)
    popped = {part.split('"')[1] for part in source.split("kwargs.pop(")[1:] if part.startswith('"')}
    assert len(popped) > 10
    assert popped - set(TOKENIZER_CONFIG_KEYS) == set()


def test_the_document_is_fresh() -> None:
    path = Path(__file__).resolve().parents[2] / "docs" / "checkpoint-keys.md"
    assert path.read_text() == key_tables.render(), "python -m workers.model.key_tables > docs/checkpoint-keys.md"


def _not_neutral(key: Key) -> st.SearchStrategy[Any]:
    return VALUES.filter(
        lambda value: all(value != n or isinstance(value, bool) != isinstance(n, bool) for n in key.neutral)
    )


@pytest.mark.parametrize("name", ALL_TABLES)
@pytest.mark.parametrize("num_examples", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_a_refused_key_is_named_whatever_its_value(name: str, num_examples: int) -> None:
    keys = ALL_TABLES[name]

    @settings(max_examples=num_examples)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        for refused in [key for key, entry in keys.items() if entry.treatment == "refused"]:
            value = data.draw(_not_neutral(keys[refused]), label=refused)
            with pytest.raises(CheckpointError, match=rf"^file\.json: {refused}=.* is not supported: "):
                check_keys({refused: value}, keys, Path("file.json"))
            for neutral in (None, *keys[refused].neutral):
                check_keys({refused: neutral}, keys, Path("file.json"))

    check()


@pytest.mark.parametrize("name", ALL_TABLES)
@given(key=st.text(min_size=1), value=VALUES)
def test_an_unknown_key_is_named_whatever_its_value(name: str, key: str, value: object) -> None:
    if key in ALL_TABLES[name]:
        return
    with pytest.raises(CheckpointError) as refused:
        check_keys({key: value}, ALL_TABLES[name], Path("file.json"))
    shown = key if key.isprintable() else ascii(key)  # an error is one line, whatever a file has
    assert str(refused.value).startswith(f"file.json: {shown}: unknown key")
    check_keys({key: None}, ALL_TABLES[name], Path("file.json"))


OTHER_VALUES: dict[str, object] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "hidden_act": "gelu",
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "tie_word_embeddings": True,
    "eos_token_id": [1, 2],
    "rms_norm_eps": 1e-3,
    "rope_theta": 123.0,
    "rope_scaling": LLAMA3_ROPE,
    "rope_parameters": LLAMA3_ROPE,
    "norm_topk_prob": False,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 11,
    "quantization_config": {"quant_method": "foo"},
    "num_local_experts": 7,  # another name of num_experts, which is 6
}


@pytest.mark.parametrize("architecture", CONFIG_KEYS)
def test_an_understood_key_changes_the_model_or_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    raw = config_of(architecture)
    before = parse(tmp_path, raw)
    understood = [name for name, key in CONFIG_KEYS[architecture].items() if key.treatment == "understood"]
    for name in understood:
        value = OTHER_VALUES.get(name, SIZES.get(name, EXPERTS.get(name, 0)))
        changed = {**raw, name: value * 2 if isinstance(value, int) and value > 1 else value}
        assert parse_or_refuse(tmp_path, changed, name) != before, name


@pytest.mark.parametrize("architecture", CONFIG_KEYS)
def test_a_key_that_is_not_there_means_what_it_means_to_transformers(architecture: str, tmp_path: Path) -> None:
    raw = config_of(architecture)
    for name in [*raw, "rms_norm_eps", "max_position_embeddings", "rope_theta", "tie_word_embeddings"]:
        rest = {key: value for key, value in raw.items() if key != name}
        ours = parse_or_refuse(tmp_path, rest, name)
        if ours is None:
            continue
        theirs = CLASSES[architecture](**{key: value for key, value in rest.items() if key != "architectures"})
        for field in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
            assert getattr(ours, field) == getattr(theirs, field), (name, field)
        assert isinstance(ours.decoder, PreNormDecoder)
        attention = ours.decoder.layers[0].attention
        assert attention.num_key_value_heads == theirs.num_key_value_heads, name
        derived = theirs.hidden_size // theirs.num_attention_heads
        assert attention.head_dim == (getattr(theirs, "head_dim", None) or derived), name
        assert attention.rope.rope_theta == theirs.rope_parameters["rope_theta"], name


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("sliding_window", 16, None),
        ("use_sliding_window", True, "use_sliding_window=true is not supported: attention sees the whole context"),
        (
            "quantization_config",
            {"quant_method": "foo"},
            r"quantization_config\.quant_method='foo' is not served",
        ),
        ("rope_scaling", {"rope_type": "llama3", "factor": 2}, "rope scaling llama3 lacks low_freq_factor"),
        ("rope_scaling", {"rope_type": "default", "mrope_section": [1]}, "rope_scaling: mrope_section: unknown key"),
        ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false, not 'false'"),
        ("eos_token_id", True, "eos_token_id must be a token id or a list of them"),
        ("rms_norm_eps", "1e-5", "rms_norm_eps must be a positive number"),
    ],
)
def test_values_of_a_qwen3(tmp_path: Path, key: str, value: object, complaint: str | None) -> None:
    raw = {**config_of("Qwen3ForCausalLM"), key: value}
    if complaint is None:
        parse(tmp_path, raw)
        return
    with pytest.raises(ModelError, match=complaint):
        parse(tmp_path, raw)


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [{"id": 1, "content": "<end>", "special": True, "lstrip": False, "rstrip": False}],
    "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
}


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"eos_token": "<end>", "image_token": "<i>", "tokenizer_class": "X"}, None),
        ({"added_tokens_decoder": {"1": {"content": "<end>", "special": True}}}, None),
        ({"eos_token": "<stop>"}, r"eos_token: '<stop>' is not in tokenizer\.json"),
        ({"added_tokens_decoder": {"1": {"content": "<other>"}}}, r"added_tokens_decoder\.1: not the same"),
        ({"added_tokens_decoder": {"2": {"content": "<new>"}}}, r"added_tokens_decoder\.2: not the same"),
        ({"added_tokens_decoder": {"1": {"content": "<end>"}}}, r"added_tokens_decoder\.1\.special: not the same"),
        ({"additional_special_tokens": ["<end>"], "extra_special_tokens": {"image_token": "<end>"}}, None),
        (
            {"additional_special_tokens": ["a"]},
            r"additional_special_tokens: 'a' is no special token of tokenizer\.json",
        ),
        ({"split_special_tokens": True}, "split_special_tokens=true is not supported"),
        ({"a_new_thing": 1}, "a_new_thing: unknown key"),
    ],
)
def test_the_tokenizers_files_must_agree(tmp_path: Path, config: dict[str, object], complaint: str | None) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if complaint is None:
        check_tokenizer_files(tmp_path)
        return
    with pytest.raises(CheckpointError, match=complaint):
        check_tokenizer_files(tmp_path)
    check_tokenizer_files(tmp_path, ignored=list(config))


def test_a_key_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps(config_of("LlamaForCausalLM"))
    (tmp_path / "config.json").write_text(text[:-1] + ', "rope_theta": 5e5, "rope_theta": 1e4}')
    with pytest.raises(ModelError, match=r"config\.json: not readable as JSON \(rope_theta is given twice\)"):
        load_config(tmp_path)
