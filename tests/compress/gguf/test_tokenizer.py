"""A tokenizer.json goes into a GGUF's metadata and comes back as the same tokenizer, for all forms that have a name,
and for those that have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from checkpoint.gguf.directory import open_gguf
from checkpoint.tokenizer_keys import check_tokenizer_files
from compress.errors import CompressError
from compress.gguf.tokenizer import TokenizerMetadata, tokenizer_metadata
from tests.checkpoint.gguf.gguf_files import stored_tensors, weights_of, write_gguf
from tests.checkpoint.gguf.own_tokenizers import TEXTS, gpt2, llama3, qwen2, sentencepiece, smollm, trained

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"
OWN: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "gpt-2": (lambda: trained(gpt2), "gpt-2"),
    "smollm": (lambda: trained(smollm), "smollm"),
    "qwen2": (lambda: trained(qwen2), "qwen2"),
    "llama-bpe": (lambda: trained(llama3), "llama-bpe"),
    "sentencepiece": (sentencepiece, "default"),
}
PADDING = 3  # rows of the embedding beyond the tokens


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _written(
    folder: Path, content: str, config: dict[str, Any] | None = None, end_ids: tuple[int, ...] = ()
) -> TokenizerMetadata:
    """What is written of a model directory with this tokenizer.json and tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return tokenizer_metadata(folder, Tokenizer.from_str(content).get_vocab_size() + PADDING, end_ids)


def _opened(folder: Path, made: TokenizerMetadata) -> Path:
    texts = {key.removeprefix("tokenizer."): value for key, value in made.values.items()}
    weights = stored_tensors("llama", weights_of("llama", len(texts["ggml.tokens"])))
    directory = open_gguf(write_gguf(folder / "x.gguf", "llama", weights, tokenizer=texts))
    check_tokenizer_files(directory)
    return directory


@pytest.mark.parametrize("name", OWN)
def test_it_gives_the_same_tokens(name: str, tmp_path: Path) -> None:
    make, pre = OWN[name]
    original = make()
    made = _written(tmp_path, original.to_str())
    assert made.warning == ""
    assert made.values["tokenizer.ggml.pre"] == pre
    opened = Tokenizer.from_file(str(_opened(tmp_path, made) / "tokenizer.json"))
    for text in TEXTS:
        ids = original.encode(text).ids
        assert opened.encode(text).ids == ids, text
        assert opened.decode(ids) == original.decode(ids)
        assert opened.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_one_without_a_name_is_carried_whole(tmp_path: Path) -> None:
    content = (DEMO / "tokenizer.json").read_text()
    made = _written(tmp_path, content, json.loads((DEMO / "tokenizer_config.json").read_text()))
    assert "llama.cpp has no name for how it splits a text, and will split as gpt-2 does" in made.warning
    opened = Tokenizer.from_file(str(_opened(tmp_path, made) / "tokenizer.json"))
    original = Tokenizer.from_str(content)
    assert [opened.encode(text).ids for text in TEXTS] == [original.encode(text).ids for text in TEXTS]


def test_special_tokens_keep_their_parts(tmp_path: Path) -> None:
    original = trained(llama3)
    begin, end = original.token_to_id("<|begin|>"), original.token_to_id("<|end|>")
    config = {
        "bos_token": {"content": "<|begin|>", "special": True},
        "eos_token": "<|end|>",
        "chat_template": [{"name": "tool", "template": "no"}, {"name": "default", "template": "{{ messages }}"}],
    }
    made = _written(tmp_path, original.to_str(), config, (begin, end, 5))
    ids = {key: made.values.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom")}
    assert ids == {"bos": begin, "eos": end, "eot": begin, "eom": 5}
    assert made.values["tokenizer.ggml.add_bos_token"] is False
    types = made.values["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    assert (types[begin], types[original.token_to_id("<think>")], types[-PADDING:]) == (3, 4, [5] * PADDING)
    directory = _opened(tmp_path, made)
    assert (directory / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == [end, begin, 5]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"model": {"type": "Unigram", "vocab": []}}', "a tokenizer of type 'Unigram' is not supported"),
        ('{"model": {"type": "BPE", "vocab": 7, "merges": []}}', "not a tokenizer as the library tokenizers writes it"),
        ('{"model": {"type": "BPE", "vocab": {"a": 99}, "merges": []}}', "has the token id 99, and the embedding 9"),
        ('{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}', "not a tokenizer"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}', "not a tokenizer"),
        ("{}", "a tokenizer of type None is not supported"),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "post_processor": {"type": '
            '"TemplateProcessing", "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "b"}}]}}',
            "one token is put before a prompt, and no more",
        ),
    ],
)
def test_what_cannot_be_said_is_named(content: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CompressError) as raised:
        tokenizer_metadata(tmp_path, 9, ())
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("change", ["other tokens", "no JSON"])
def test_a_whole_tokenizer_that_contradicts_the_file_is_refused(change: str, tmp_path: Path) -> None:
    from checkpoint.errors import CheckpointError

    made = _written(tmp_path, (DEMO / "tokenizer.json").read_text())
    key = "tokenizer.huggingface.json"
    whole = json.loads(str(made.values[key]))
    whole["model"]["vocab"]["unheard"] = whole["model"]["vocab"].pop("def")
    values = made.values | {key: json.dumps(whole) if change == "other tokens" else "{"}
    with pytest.raises(CheckpointError, match=r"tokenizer\.huggingface\.json (has other tokens|is not a tokenizer)"):
        _opened(tmp_path, TokenizerMetadata(values))
