"""Sampling options of a request: the options, what each may be, and their message.

A new option is a field of the message SamplingParams and a field here under the same name, with its rule. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from switchyard.v1 import generation_pb2

from router.errors import InvalidRequest

MAX_STOP_TEXTS = 16
MAX_STOP_CHARACTERS = 1024
LARGEST_FLOAT32 = 3.4028234663852886e38  # what the wire carries
SMALLEST_FLOAT32 = 1.1754943508222875e-38  # smaller ones become 0 on the wire or on a GPU


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """None means that the client left an option open."""

    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None  # 0 means no limit
    max_tokens: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (
        lambda value: math.isfinite(value) and 0 <= value <= LARGEST_FLOAT32,
        "must be >= 0 and a finite 32-bit number",
    ),
    "top_p": (lambda value: 0 < value <= 1, "must be in (0, 1]"),
    "top_k": (lambda value: 0 <= value < 2**32, "must be >= 0 (0 means no limit)"),
    "max_tokens": (lambda value: 0 < value < 2**63, "must be > 0 and < 2^63"),
    "seed": (lambda value: 0 <= value < 2**64, "must be in [0, 2^64)"),
}


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest for the first field that cannot be meant; what is left open is well."""
    for name, (is_valid, wanted) in _RULES.items():
        value = getattr(sampling, name)
        if value is not None and not is_valid(value):
            raise invalid(name, f"{wanted}, not {value}")
    if len(sampling.stop) > MAX_STOP_TEXTS:
        raise invalid("stop", f"at most {MAX_STOP_TEXTS} stop texts, not {len(sampling.stop)}")
    for text in sampling.stop:
        check_text("stop", text)
        if len(text) > MAX_STOP_CHARACTERS:
            raise invalid("stop", f"a stop text has at most {MAX_STOP_CHARACTERS} characters, not {len(text)}")
    check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)


def check_repeated_sampling(asked: SamplingParams, begun: SamplingParams) -> None:
    """Raise InvalidRequest when a stream is resumed with other options than it was begun with; `begun` is settled."""
    if asked.max_tokens is not None and begun.max_tokens is not None and asked.max_tokens < begun.max_tokens:
        raise invalid("max_tokens", f"is less than the {begun.max_tokens} that the stream was begun with")
    for field in fields(SamplingParams):
        value, before = getattr(asked, field.name), getattr(begun, field.name)
        if value is None or field.name in ("max_tokens", "stop_token_ids"):  # settling shortens one, and extends one
            continue
        is_float = isinstance(before, float)  # of which the journal has 32 bits
        if not (math.isclose(value, before, rel_tol=1e-6) if is_float else value == before):
            raise invalid(field.name, f"is not the {before} that the stream was begun with")


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
    return generation_pb2.SamplingParams(**{field.name: getattr(sampling, field.name) for field in fields(sampling)})


def sampling_params(message: generation_pb2.SamplingParams) -> SamplingParams:
    """The inverse; an absent field is left open."""
    values: dict[str, Any] = {}
    for field in fields(SamplingParams):
        value, descriptor = getattr(message, field.name), message.DESCRIPTOR.fields_by_name[field.name]
        if descriptor.is_repeated:
            values[field.name] = tuple(value)
        elif not descriptor.has_presence or message.HasField(field.name):
            values[field.name] = value
    return SamplingParams(**values)
