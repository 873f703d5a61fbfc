"""Sampling options of a request: the options, what each may be, and their message.

A new option is a field of the message SamplingParams and a field here under the same name, with its rule. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from switchyard.v1 import generation_pb2

from grammars.grammar import Grammar
from router.errors import InvalidRequest

MAX_STOP_TEXTS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGPROBS = 20
MAX_SPECULATIVE_TOKENS = 64
MAX_BIASED_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BANNED_SEQUENCES = 1024
MAX_SEQUENCE_TOKENS = 32
LARGEST_FLOAT32 = 3.4028234663852886e38  # what the wire carries
SMALLEST_FLOAT32 = 1.1754943508222875e-38  # smaller ones become 0 on the wire or on a GPU


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """None means that the client left an option open. The fields' meaning stands in the message."""

    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None  # 0 means no limit
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id
    allowed_token_ids: tuple[int, ...] = ()  # empty means all
    banned_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    banned_sequences: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None  # None: of no token
    prompt_logprobs: int | None = None  # of the prompt's tokens; None: of none
    num_speculative_tokens: int | None = None  # most draft tokens in a step; None: as the worker likes
    grammar: Grammar | None = None  # the form of the completion; compiled apart


NO_COMPLETION = SamplingParams(temperature=0.0, max_tokens=1)
"""Of a request that only asks for its prompt's embedding: a prompt has to leave space for one token in any case."""


def _within(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: low <= value <= high


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda value: math.isfinite(value) and 0 <= value <= LARGEST_FLOAT32,
        "must be >= 0 and a finite 32-bit number",
    ),
    "top_p": (lambda value: 0 < value <= 1, "must be in (0, 1]"),
    "top_k": (lambda value: 0 <= value < 2**32, "must be >= 0 (0 means no limit)"),
    "min_p": (_within(0, 1), "must be in [0, 1]"),
    "typical_p": (lambda value: 0 < value <= 1, "must be in (0, 1]"),
    # The wire carries 32 bits, in which 0.01 is a little less.
    "repetition_penalty": (lambda value: 0.009999 <= value <= 10, "must be in [0.01, 10]"),
    "presence_penalty": (_within(-2, 2), "must be in [-2, 2]"),
    "frequency_penalty": (_within(-2, 2), "must be in [-2, 2]"),
    "max_tokens": (lambda value: 0 < value < 2**63, "must be > 0 and < 2^63"),
    "min_tokens": (lambda value: 0 <= value < 2**31, "must be >= 0 and < 2^31"),
    "logprobs": (lambda value: 0 <= value <= MAX_LOGPROBS, f"must be in [0, {MAX_LOGPROBS}]"),
    "prompt_logprobs": (lambda value: 0 <= value <= MAX_LOGPROBS, f"must be in [0, {MAX_LOGPROBS}]"),
    "num_speculative_tokens": (
        _within(0, MAX_SPECULATIVE_TOKENS),
        f"must be in [0, {MAX_SPECULATIVE_TOKENS}] (0 means none)",
    ),
    "seed": (lambda value: 0 <= value < 2**64, "must be in [0, 2^64)"),
}


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for the first field that cannot be meant; what is left open is well."""
    for name, (is_valid, wanted) in _RULES.items():
        value = getattr(sampling, name)
        if value is not None and not is_valid(value):
            raise invalid(name, f"{wanted}, not {value}")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise invalid("min_tokens", f"{sampling.min_tokens} is more than max_tokens={sampling.max_tokens}")
    if sampling.grammar is not None:
        for name in ("ignore_eos", "min_tokens"):
            if getattr(sampling, name):
                raise invalid(name, "is not possible with a grammar, which says itself where the completion ends")
    _check_texts("stop", sampling.stop, MAX_STOP_TEXTS)
    _check_texts("bad_words", sampling.bad_words, MAX_BAD_WORDS)
    check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)
    _check_token_rules(sampling, vocab_size)


def _check_texts(param: str, texts: Sequence[str], most: int) -> None:
    if len(texts) > most:
        raise invalid(param, f"at most {most} texts, not {len(texts)}")
    for text in texts:
        check_text(param, text)
        if len(text) > MAX_STOP_CHARACTERS:
            raise invalid(param, f"a text has at most {MAX_STOP_CHARACTERS} characters, not {len(text)}")


def _check_token_rules(sampling: SamplingParams, vocab_size: int) -> None:
    """Biased and banned tokens; something must be left to choose."""
    bias = sampling.logit_bias
    if len(bias) > MAX_BIASED_IDS:
        raise invalid("logit_bias", f"at most {MAX_BIASED_IDS} ids, not {len(bias)}")
    check_token_ids("logit_bias", tuple(bias), vocab_size)
    if not all(-100 <= value <= 100 for value in bias.values()):
        raise invalid("logit_bias", "values must be in [-100, 100]")
    for name in ("allowed_token_ids", "banned_token_ids"):
        ids: Sequence[int] = getattr(sampling, name)
        if len(ids) > vocab_size:
            raise invalid(name, f"at most {vocab_size} ids, the vocabulary, not {len(ids)}")
        check_token_ids(name, ids, vocab_size)
    if len(sampling.banned_sequences) > MAX_BANNED_SEQUENCES:
        raise invalid("banned_sequences", f"at most {MAX_BANNED_SEQUENCES}, not {len(sampling.banned_sequences)}")
    for sequence in sampling.banned_sequences:
        if not 0 < len(sequence) <= MAX_SEQUENCE_TOKENS:
            raise invalid("banned_sequences", f"must have 1 to {MAX_SEQUENCE_TOKENS} ids, not {len(sequence)}")
        check_token_ids("banned_sequences", sequence, vocab_size)


def check_choice_is_left(sampling: SamplingParams, end_token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest when at some position no token may be left to choose. Bad words are spelled already."""
    if not (sampling.allowed_token_ids or sampling.banned_token_ids or sampling.banned_sequences):
        return
    lost = {*sampling.banned_token_ids, *(sequence[-1] for sequence in sampling.banned_sequences)}
    if sampling.min_tokens:
        lost.update(sampling.stop_token_ids, () if sampling.ignore_eos else end_token_ids)
    if sampling.allowed_token_ids and lost.issuperset(sampling.allowed_token_ids):
        raise invalid("allowed_token_ids", "all of them are banned, or stop tokens held off by min_tokens")
    if len(lost) >= vocab_size:
        raise invalid("banned_token_ids", "no token is left to choose")


# Settling shortens one of them, and extends the others.
_SETTLED_OTHERWISE = frozenset(("max_tokens", "stop_token_ids", "banned_sequences"))


def check_repeated_sampling(asked: SamplingParams, begun: SamplingParams) -> None:
    """Raise InvalidRequest when a stream is resumed with other options than it was begun with; `begun` is settled."""
    if asked.max_tokens is not None and begun.max_tokens is not None and asked.max_tokens < begun.max_tokens:
        raise invalid("max_tokens", f"is less than the {begun.max_tokens} that the stream was begun with")
    for one in fields(SamplingParams):
        value, before = getattr(asked, one.name), getattr(begun, one.name)
        if value is None or one.name in _SETTLED_OTHERWISE:
            continue
        if isinstance(value, Mapping):
            value, before = _float32(value), _float32(before)
        is_float = isinstance(before, float)  # of which the journal has 32 bits
        if not (math.isclose(value, before, rel_tol=1e-6) if is_float else value == before):
            raise invalid(one.name, f"is not the {before} that the stream was begun with")


def check_token_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest for the first id outside the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        index, bad = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocab_size)
        raise invalid(param, f"id {bad} at index {index} is outside the vocabulary [0, {vocab_size})")


def check_text(param: str, text: str) -> int:
    """The text's length in UTF-8 bytes. Raise InvalidRequest when it is empty or no Unicode text."""
    if not text:
        raise invalid(param, "must not be empty")
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise invalid(param, "is not valid Unicode (it has a lone surrogate)") from None


def invalid(param: str, complaint: str) -> InvalidRequest:
    """The refusal of a field."""
    return InvalidRequest(f"{param}: {complaint}", param=param)


def sampling_message(sampling: SamplingParams) -> generation_pb2.SamplingParams:
    """Stop texts are applied where text is decoded, but travel along for a router."""
    values = {one.name: getattr(sampling, one.name) for one in fields(sampling)}
    values["grammar"] = None if sampling.grammar is None else sampling.grammar.message()
    values["banned_sequences"] = [generation_pb2.TokenIds(ids=ids) for ids in sampling.banned_sequences]
    return generation_pb2.SamplingParams(**values)


def sampling_params(message: generation_pb2.SamplingParams) -> SamplingParams:
    """The inverse; an absent field is left open."""
    values: dict[str, Any] = {}
    for one in fields(SamplingParams):
        value, descriptor = getattr(message, one.name), message.DESCRIPTOR.fields_by_name[one.name]
        if descriptor.is_repeated:
            values[one.name] = _READERS.get(one.name, tuple)(value)
        elif not descriptor.has_presence or message.HasField(one.name):
            values[one.name] = _READERS[one.name](value) if one.name in _READERS else value
    return SamplingParams(**values)


_READERS: dict[str, Callable[[Any], Any]] = {
    "logit_bias": dict,
    "grammar": Grammar.of,
    "banned_sequences": lambda lists: tuple(tuple(one.ids) for one in lists),
}


def _float32(bias: Mapping[int, float]) -> dict[int, float]:
    """As the wire carries it."""
    return dict(generation_pb2.SamplingParams(logit_bias=bias).logit_bias)
