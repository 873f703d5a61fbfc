"""Encoding, decoding as tokens come, stop texts and chat templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from router.errors import InvalidRequest, ModelFilesError
from router.model_files import ModelFiles
from router.sampling import SamplingParams
from router.service.chat import ChatTemplate
from router.service.text import StopTexts, TextCodec
from router.service.text_out import TextOut

ACCENTS = "naïve café, 你好 👩‍👩‍👧 \x00 end"


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """Every byte a token, a few merges across characters, and two added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    merges = [("a", "b"), ("ab", "c"), ("Ã", "©"), ("Ġ", "d")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(["<think over>"])
    tokenizer.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=[("<|end|>", 260)])
    return saved(tokenizer, tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """As Llama 2's: words begin with U+2581, what is unknown falls back to bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1}
    vocabulary |= {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    for piece in ["\u2581", "\u2581the", "\u2581cat", "s", "t", "h", "e", "é", "\u2581th", "\u2581t"]:
        vocabulary[piece] = len(vocabulary)
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return saved(tokenizer, tmp_path_factory.mktemp("pieces"))


def saved(tokenizer: Tokenizer, directory: Path) -> TextCodec:
    tokenizer.save(str(directory / "tokenizer.json"))
    return TextCodec(directory / "tokenizer.json")


def shown(codec: TextCodec, ids: list[int]) -> list[str]:
    """What is shown after each id, and at the end."""
    detokenizer = codec.detokenizer()
    return [*(detokenizer.push((token_id,)) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_half_characters_are_never_shown(kind: str, request: pytest.FixtureRequest) -> None:
    codec: TextCodec = request.getfixturevalue(kind)
    ids = codec.encode(ACCENTS, add_special_tokens=False)
    pieces = shown(codec, ids)
    assert "".join(pieces) == codec.decode(ids) == ACCENTS
    assert not any("\ufffd" in piece for piece in pieces)
    assert "你" in pieces
    assert len(pieces) > len(ACCENTS)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 262)), cuts=st.integers(1, 5))
def test_all_that_is_shown_is_the_whole_text(byte_level: TextCodec, ids: list[int], cuts: int) -> None:
    detokenizer = byte_level.detokenizer()
    text = "".join(detokenizer.push(ids[start : start + cuts]) for start in range(0, len(ids), cuts))
    assert text + detokenizer.finish() == byte_level.decode(ids)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\ufffd")))
def test_words_and_fallback_bytes_join_to_the_whole_text(sentence_piece: TextCodec, text: str) -> None:
    ids = sentence_piece.encode(text, add_special_tokens=False)
    assert "".join(shown(sentence_piece, ids)) == sentence_piece.decode(ids)


def test_an_incomplete_end_shows_as_a_replacement_character(byte_level: TextCodec) -> None:
    ids = byte_level.encode("a你", add_special_tokens=False)[:-1]
    assert "".join(shown(byte_level, ids)) == "a\ufffd" == byte_level.decode(ids)


def test_special_tokens_are_not_shown_and_added_ones_are(byte_level: TextCodec) -> None:
    ids = byte_level.encode("ab<|end|>c<think over>", add_special_tokens=True)
    assert ids[0] == 260
    assert "".join(shown(byte_level, ids)) == "abc<think over>" == byte_level.decode(ids)


def test_no_text_has_fewer_tokens_than_the_bound(byte_level: TextCodec, sentence_piece: TextCodec) -> None:
    for text in ("abc" * 100, ACCENTS, "<think over>" * 20):
        assert 1 <= byte_level.min_tokens(len(text.encode())) <= len(byte_level.encode(text, False))
    assert sentence_piece.min_tokens(10**9) == 0  # its normalizer may do anything to a text


def test_a_file_that_is_no_tokenizer_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"tokenizer.json: not a tokenizer"):
        TextCodec(tmp_path / "tokenizer.json")


def test_a_tokenizer_that_draws_lots_is_refused(tmp_path: Path) -> None:
    """BPE dropout, left over from training: the same text had other ids each time."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")], dropout=0.5))
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json: model\.dropout must be null, not 0\.5"):
        saved(tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "is_hit"),
    [
        (["END"], ["one E", "N", "D two"], "one ", True),
        (["END"], ["one E", "N", "Dtwo"], "one ", True),
        (["END"], ["one EN", "x"], "one ENx", False),
        (["END"], ["one EN"], "one EN", False),
        (["b", "ab"], ["a", "b"], "", True),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb", True),
        (["aab"], ["a", "a", "a", "b"], "a", True),
        (["x", "y"], ["..y..x"], "..", True),
    ],
)
def test_stop_texts(stops: list[str], pieces: list[str], text: str, is_hit: bool) -> None:
    watch = StopTexts(stops)
    assert "".join(watch.push(piece) for piece in pieces) + watch.finish() == text
    assert watch.is_hit is is_hit


def test_a_stop_text_can_be_shown_and_held_off() -> None:
    watch = StopTexts(["END", "EN"], shows_stop=True)
    assert [watch.push(piece) for piece in ("one ", "E", "N", "D")] == ["one ", "", "EN", ""]
    out = TextOut(Spelled(), SamplingParams(stop=("bb",), min_tokens=3))
    assert [out.push(i, (ord(letter),)).text for i, letter in enumerate("bbbcbb")] == ["b", "b", "", "bc", "", ""]
    assert out.is_stopped


class Spelled:
    """A detokenizer whose ids are characters."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    def finish(self) -> str:
        return ""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_stop_text_is_never_shown_however_it_comes(pieces: list[str], stops: list[str]) -> None:
    watch = StopTexts(stops)
    text = ""
    whole = "".join(pieces)
    for piece in pieces:
        for character in piece:  # a stop counts from the character that completes it, as tokens come
            text += watch.push(character)
            assert whole.startswith(text)
            assert not any(stop in text for stop in stops)
    text += watch.finish()
    assert not any(stop in text for stop in stops)
    assert watch.is_hit or text == whole
    assert watch.is_hit == any(stop in whole for stop in stops)


def test_chat_templates_see_what_hugging_face_gives_them() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ m['role'] }}: {{ m['content'] | tojson }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}",
        {"bos_token": "<s>"},
    )
    messages = [{"role": "user", "content": "a <b> & 'c'"}, {"role": "assistant", "content": "é"}]
    assert template.render(messages) == '<s>user: "a <b> & \'c\'"\nassistant: "é"\n>'


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content.__class__.__mro__ }}{{ raise_exception('no') }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(100000000) %}x{% endfor %}",
        "{{ messages[5].content.x }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_refuse_or_escape_become_a_refusal(source: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert caught.value.param == "messages"


def test_a_template_that_does_not_parse_is_the_models_fault() -> None:
    with pytest.raises(ModelFilesError, match=r"^m/chat_template\.jinja, line 2: Expected an expression"):
        ChatTemplate("\n{% for %}", {}, "m/chat_template.jinja")
    with pytest.raises(ModelFilesError, match=r"^m/chat_template\.jinja: too many statically nested blocks"):
        ChatTemplate("{% for a in b %}" * 50 + "{% endfor %}" * 50, {}, "m/chat_template.jinja")


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{{ 'x' * 1000000000000 }}",
        "{{ 9 ** 999999999 }}",
    ],
)
def test_a_template_without_an_end_is_found_at_load(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.service.chat_environment._MOST_STEPS", 200_000)
    with pytest.raises(ModelFilesError, match=r"^m/chat_template\.jinja: does not come to an end: "):
        ChatTemplate(source, {}, "m/chat_template.jinja")


def test_a_request_cannot_keep_the_template_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.service.chat_environment._MOST_STEPS", 1000)
    template = ChatTemplate("{% for i in range(n or 0) %}{{ i * 2 }}{% endfor %}", {})
    messages = [{"role": "user", "content": "x"}]
    for _ in range(3):  # each has its own bound
        assert template.render(messages, {"n": 900}).startswith("024")
    with pytest.raises(InvalidRequest, match="more than 1000 turns of its loops"):
        template.render(messages, {"n": 1001})


def write_model(directory: Path, config: object, tokenizer_config: object = None) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"added_tokens": [{"id": 0, "content": "<s>"}]}')
    if tokenizer_config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def test_model_files_find_the_chat_template_where_it_is(tmp_path: Path) -> None:
    config = {"max_position_embeddings": 10, "vocab_size": 5}
    write_model(tmp_path, config)
    assert ModelFiles.load(tmp_path, "m").chat_template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    write_model(tmp_path, config, {"chat_template": named, "bos_token": {"content": "<s>"}, "pad_token": None})
    files = ModelFiles.load(tmp_path, "m")
    assert (files.chat_template, files.special_tokens) == ("yes", {"bos_token": "<s>"})
    assert files.chat_template_where == f"{tmp_path}/tokenizer_config.json: chat_template"
    (tmp_path / "chat_template.jinja").write_text("file")
    files = ModelFiles.load(tmp_path, "m")
    assert (files.chat_template, files.chat_template_where) == ("file", f"{tmp_path}/chat_template.jinja")


@pytest.mark.parametrize("template", [7, ["x"], [{"name": {}, "template": "x"}], [{"name": "default"}], {"default": 1}])
def test_a_chat_template_that_is_none_is_refused(tmp_path: Path, template: object) -> None:
    write_model(tmp_path, {"max_position_embeddings": 10, "vocab_size": 5}, {"chat_template": template})
    with pytest.raises(ModelFilesError, match=r"tokenizer_config\.json: chat_template must be a text, or a list of"):
        ModelFiles.load(tmp_path, "m")


def test_an_end_token_outside_of_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, {"max_position_embeddings": 10, "vocab_size": 5, "eos_token_id": [4, 5]})
    with pytest.raises(ModelFilesError, match=r"/config\.json: eos_token_id=5 is outside of the vocabulary \[0, 5\)"):
        ModelFiles.load(tmp_path, "m")


def test_model_files_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="no such model directory"):
        ModelFiles.load(tmp_path / "nothing", "m")
    with pytest.raises(ModelFilesError, match=r"config\.json: missing"):
        ModelFiles.load(tmp_path, "m")
    write_model(tmp_path, {"max_position_embeddings": 10})
    with pytest.raises(ModelFilesError, match="vocab_size must be a positive number"):
        ModelFiles.load(tmp_path, "m")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFilesError, match="not readable as JSON"):
        ModelFiles.load(tmp_path, "m")
