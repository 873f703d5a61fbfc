"""What a detokenizer shows of a completion, against decoding all ids at once, for several kinds of vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from router.service.text import TextCodec

WORDS = ["the", "cat", "is", "Paris", "s", "é", "a", "'", ".", "\u4f60"]
STYLES = ("byte_level", "llama", "metaspace", "gemma", "word_piece", "suffixes")


def pieces_with_bytes() -> dict[str, int]:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["\u2581", *("\u2581" + word for word in WORDS), *WORDS]:
        vocabulary[piece] = len(vocabulary)
    return vocabulary


def piece_tokenizer() -> Tokenizer:
    return Tokenizer(models.BPE(vocab=pieces_with_bytes(), merges=[], byte_fallback=True, unk_token="<unk>"))


def make(style: str) -> Tokenizer:
    """A tokenizer with the decoder that real ones of its kind have."""
    if style == "byte_level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif style == "llama":
        tokenizer = piece_tokenizer()
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    elif style == "metaspace":
        tokenizer = piece_tokenizer()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    elif style == "gemma":
        tokenizer = piece_tokenizer()
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    elif style == "word_piece":
        names = ["[UNK]", *WORDS, *("##" + word for word in WORDS)]
        tokenizer = Tokenizer(models.WordPiece(vocab={c: i for i, c in enumerate(names)}, unk_token="[UNK]"))
        tokenizer.decoder = decoders.WordPiece()
    else:
        names = ["<unk>", *WORDS, *(word + "</w>" for word in WORDS)]
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(names)}, merges=[], unk_token="<unk>"))
        tokenizer.decoder = decoders.BPEDecoder()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|im_start|>", special=True)])
    return tokenizer


@pytest.fixture(scope="module")
def codecs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextCodec]:
    made = {}
    for style in STYLES:
        path = tmp_path_factory.mktemp(style) / "tokenizer.json"
        make(style).save(str(path))
        made[style] = TextCodec(path)
    return made


def shown(codec: TextCodec, prompt: list[int], completion: list[int], step: int = 1) -> str:
    detokenizer = codec.detokenizer(tuple(prompt))
    text = "".join(detokenizer.push(completion[at : at + step]) for at in range(0, len(completion), step))
    return text + detokenizer.finish()


def together(codec: TextCodec, prompt: list[int], completion: list[int]) -> str:
    """The oracle: everything at once, less the prompt's text up to the last character that is complete."""
    heads = (codec.decode(prompt[: len(prompt) - num_pending]) for num_pending in range(4))
    return codec.decode(prompt + completion)[len(next(head for head in heads if "\ufffd" not in head)) :]


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_show_where_they_are_asked_for(codecs: dict[str, TextCodec], style: str) -> None:
    codec = codecs[style]
    marker = codec.id_of("<|im_start|>")
    ids = [codec.encode(letter, False)[0] for letter in "aa"] if style == "byte_level" else usable_ids(codec)[-2:]
    prompt = usable_ids(codec)[-1:] if style != "byte_level" else ids[:1]
    plain = shown(codec, prompt, ids)
    detokenizer = codec.detokenizer(prompt, codec.special_markers(["<|im_start|>", "no token"]))
    pieces = [
        detokenizer.push((token_id,)) for token_id in (marker, ids[0], marker, marker, codec.id_of("<s>"), ids[1])
    ]
    text = "".join(pieces) + detokenizer.finish()
    assert text.count("<|im_start|>") == 3
    assert text.startswith("<|im_start|>")
    assert "<s>" not in text
    assert text.replace("<|im_start|>", "") == plain


def usable_ids(codec: TextCodec) -> list[int]:
    """All that have text, but for bytes: those only make sense in the order in which a text has them."""
    ids = sorted(json.loads(codec._tokenizer.to_str())["model"]["vocab"].values())
    special = {codec.id_of(name) for name in ("<s>", "</s>", "<unk>", "[UNK]", "<|im_start|>")}
    return [token_id for token_id in ids if codec.fallback_byte(token_id) is None and token_id not in special]


@pytest.mark.parametrize("style", ["llama", "metaspace"])
def test_the_first_leading_space_is_kept(codecs: dict[str, TextCodec], style: str) -> None:
    codec = codecs[style]
    prompt = [codec.id_of("\u2581" + word) for word in ("the", "cat", "is")]
    assert shown(codec, prompt, [codec.id_of("\u2581Paris")]) == " Paris"
    assert shown(codec, prompt, [codec.id_of("s")]) == "s"
    special = [codec.id_of("<s>")]
    assert shown(codec, special, [codec.id_of("\u2581Paris")]) == "Paris"  # as at the beginning of any text


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_split_of_any_ids_shows_what_decoding_at_once_shows(
    codecs: dict[str, TextCodec], style: str, data: st.DataObject
) -> None:
    codec = codecs[style]
    usable = usable_ids(codec)
    if style == "byte_level":  # ids that are no text at all are in test_text.py
        usable = [codec.encode(character, False)[0] for character in "abc .\n"]
    ids = data.draw(st.lists(st.sampled_from([*usable, codec.id_of("<|im_start|>")]), max_size=60))
    cut = data.draw(st.integers(0, len(ids)))
    step = data.draw(st.integers(1, 4))
    assert shown(codec, ids[:cut], ids[cut:], step) == together(codec, ids[:cut], ids[cut:])


@pytest.mark.parametrize("style", ["byte_level", "llama", "metaspace", "gemma"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_split_inside_a_character_shows_it_whole(
    codecs: dict[str, TextCodec], style: str, data: st.DataObject
) -> None:
    codec = codecs[style]
    if style == "metaspace":  # it has no byte fallback in its decoder
        alphabet = st.sampled_from(["the", " ", "cat", "\u4f60"])
    else:
        alphabet = st.sampled_from(["the", " ", "cat", "\u4f60", "\u597d", "\U0001f469\u200d\U0001f467", "\u00e9", "x"])
    text = "".join(data.draw(st.lists(alphabet, min_size=1, max_size=40)))
    ids = codec.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    assert shown(codec, ids[:cut], ids[cut:]) == together(codec, ids[:cut], ids[cut:])


@pytest.mark.parametrize("style", ["byte_level", "llama"])
def test_a_prompt_that_ends_with_a_replacement_character_of_its_own(codecs: dict[str, TextCodec], style: str) -> None:
    codec = codecs[style]
    prompt, more = codec.encode("a \ufffd", False), codec.encode("the", False)[-1:]
    assert shown(codec, prompt, more) == codec.decode(prompt + more)[len(codec.decode(prompt)) :]


@pytest.mark.parametrize("style", STYLES)
def test_a_long_prompt_costs_as_much_as_a_short_one(codecs: dict[str, TextCodec], style: str) -> None:
    codec = codecs[style]

    class Counted(list):  # type: ignore[type-arg]
        num_read = 0

        def __reversed__(self):  # type: ignore[no-untyped-def]
            for item in super().__reversed__():
                Counted.num_read += 1
                yield item

    codec.detokenizer(Counted([usable_ids(codec)[0]] * 100_000))
    assert Counted.num_read <= 256
    codec.detokenizer(Counted([codec.id_of("<s>")] * 100_000))
    assert Counted.num_read <= 600


def test_a_transformers_tokenizer_decodes_the_same(codecs: dict[str, TextCodec], tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    for style in STYLES:
        oracle = PreTrainedTokenizerFast(tokenizer_object=make(style), clean_up_tokenization_spaces=False)
        ids = usable_ids(codecs[style])[:12] * 2
        prompt, completion = ids[:7], ids[7:]
        whole = oracle.decode(ids, skip_special_tokens=True)
        head = oracle.decode(prompt, skip_special_tokens=True).rstrip("\ufffd")
        assert head + shown(codecs[style], prompt, completion) == whole, style
