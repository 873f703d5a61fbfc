"""Texts give the tokens that the model's own tokenizer gives, of which a GGUF has a part and a name.

The own tokenizers here are trained on our sources, in the forms of the models that the names stand for.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from checkpoint.errors import CheckpointError
from checkpoint.gguf.directory import open_gguf
from checkpoint.gguf.packaged import packaged_gguf
from checkpoint.tokenizer_keys import check_tokenizer_files
from tests.checkpoint.gguf.gguf_files import byte_level_tokenizer, stored_tensors, weights_of, write_gguf
from tests.checkpoint.gguf.own_tokenizers import TEXTS, gpt2, llama3, qwen2, sentencepiece, smollm, trained
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint


def _opened(path: Path, texts: dict[str, Any]) -> Tokenizer:
    weights = stored_tensors("llama", weights_of("llama", len(texts["ggml.tokens"])))
    directory = open_gguf(write_gguf(path / "model-x.gguf", "llama", weights, tokenizer=texts))
    check_tokenizer_files(directory)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("pre", "make", "adds_bos"),
    [("gpt-2", gpt2, False), ("smollm", smollm, False), ("qwen2", qwen2, False), ("llama-bpe", llama3, True)],
)
def test_bytes_give_the_tokens_of_the_original(
    pre: str, make: Callable[[], Tokenizer], adds_bos: bool, tmp_path: Path
) -> None:
    original = trained(make)
    texts = byte_level_tokenizer(json.loads(original.to_str()), pre)
    texts["ggml.token_type"][original.token_to_id("<think>")] = 4  # user-defined: found in texts, and not special
    opened = _opened(tmp_path, texts)
    begin = original.token_to_id("<|begin|>")
    texts_ids = {text: original.encode(text).ids for text in TEXTS}
    assert {text: opened.encode(text).ids for text in TEXTS} == {
        text: [begin, *ids] if adds_bos else ids for text, ids in texts_ids.items()
    }
    for text, ids in texts_ids.items():
        assert opened.encode(text, add_special_tokens=False).ids == ids
        for skip in (True, False):
            assert opened.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)
    assert opened.get_added_tokens_decoder().keys() == original.get_added_tokens_decoder().keys()


def _scored(original: Tokenizer) -> dict[str, Any]:
    """The vocabulary as a GGUF has it: a score for each token, that of its merge, and no merges."""
    model = json.loads(original.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(model["merges"])))}
    is_byte = [token.startswith("<0x") for token in tokens]
    types = [
        6 if byte else 2 if token == "<unk>" else 3 if token in ("<s>", "</s>") else 1
        for token, byte in zip(tokens, is_byte, strict=True)
    ]
    return {
        "ggml.model": "llama",
        "ggml.pre": "default",
        "ggml.tokens": tokens,
        "ggml.scores": [-float(ranks.get(token, 0)) for token in tokens],
        "ggml.token_type": types,
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }


def test_scores_give_the_tokens_of_the_original(tmp_path: Path) -> None:
    original = sentencepiece()
    opened = _opened(tmp_path, _scored(original))
    for text in [*TEXTS, "<s>a</s> b", "it is<s>so"]:
        ids = original.encode(text).ids
        assert opened.encode(text).ids == ids
        assert opened.decode(ids) == original.decode(ids)
        assert opened.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_a_text_need_not_begin_with_a_space(tmp_path: Path) -> None:
    texts = _scored(sentencepiece()) | {"ggml.add_space_prefix": False, "ggml.add_bos_token": False}
    opened = _opened(tmp_path, texts)
    assert opened.encode("is it").tokens[0] == "is"
    assert opened.decode(opened.encode(" is it").ids) == " is it"


def test_transformers_reads_the_same_from_the_file(tmp_path: Path) -> None:
    """Where its own reading knows the form: of `smollm` it splits no digits, which that model's own tokenizer does."""
    texts = byte_level_tokenizer(json.loads(trained(qwen2).to_str()), "qwen2")
    opened = _opened(tmp_path, texts)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="model-x.gguf")
    for text in TEXTS:
        if text == unicodedata.normalize("NFC", text):  # transformers leaves Qwen's normalisation out
            assert opened.encode(text).ids == theirs(text)["input_ids"], text


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"ggml.pre": "falcon"}, "tokenizer.ggml.pre='falcon' is not supported (supported: gpt-2, smollm, qwen2"),
        ({"ggml.pre": None}, "tokenizer.ggml.pre: missing"),
        ({"ggml.model": "t5"}, "tokenizer.ggml.model='t5' is not supported (supported: gpt2, llama)"),
        ({"ggml.model": "llama", "ggml.merges": None}, "tokenizer.ggml.scores: missing"),
        ({"ggml.merges": None}, "tokenizer.ggml.merges: missing"),
        ({"ggml.merges": ["a zz-not-there"]}, "tokenizer.ggml.merges: 'a zz-not-there' does not make a token of two"),
        ({"ggml.token_type": [1]}, "tokenizer.ggml.token_type must be a list of"),
        ({"ggml.bos_token_id": 2**31}, "tokenizer.ggml.bos_token_id must be the id of a token in [0, "),
        ({"ggml.add_bos_token": True, "ggml.bos_token_id": None}, "there is no tokenizer.ggml.bos_token_id"),
        ({"ggml.add_eos_token": True}, "add_eos_token=true is not supported"),
        ({"ggml.something": 1}, "ggml.something: unknown key"),
        ({"chat_template": 7}, "tokenizer.chat_template must be a text"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    texts = byte_level_tokenizer(json.loads(trained(gpt2).to_str()), "gpt-2")
    with pytest.raises(CheckpointError) as raised:
        _opened(tmp_path, texts | changes)
    assert complaint in str(raised.value)


def test_a_token_given_twice_is_named(tmp_path: Path) -> None:
    texts = byte_level_tokenizer(json.loads(trained(gpt2).to_str()), "gpt-2")
    texts["ggml.tokens"][700] = texts["ggml.tokens"][701]
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens: '.*' is given twice"):
        _opened(tmp_path, texts)


def test_a_real_model_gives_the_tokens_that_llama_cpp_gives() -> None:
    """smollm2_token_ids.json has what llama.cpp's /tokenize said of the packaged file (xllamacpp 2026.10.11549)."""
    try:
        path = packaged_gguf("smollm2")
    except CheckpointError as error:
        pytest.skip(str(error))
    assert path is not None
    directory = open_gguf(path)
    check_tokenizer_files(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    said = json.loads(Path(__file__).with_name("smollm2_token_ids.json").read_text())
    assert [[text, tokenizer.encode(text).ids] for text, _ in said] == said
    model = load_config(directory)
    check_checkpoint(directory, model)
    assert (model.num_hidden_layers, model.vocab_size, model.eos_token_ids) == (30, 49152, (2, 0))
