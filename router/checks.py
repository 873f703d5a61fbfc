"""What a request must be before anything is done for it. Every refusal names the field. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from router.errors import ContextLengthExceeded, InvalidRequest
from router.events import ResumeRequest, SamplingOptions

MAX_STOP_TEXTS = 16
MAX_STOP_CHARACTERS = 1024
LARGEST_FLOAT32 = 3.4028234663852886e38  # what the wire carries
SMALLEST_FLOAT32 = 1.1754943508222875e-38  # smaller ones become 0 on the wire or on a GPU


def check_sampling(sampling: SamplingOptions, vocab_size: int) -> None:
    """Raise InvalidRequest for the first field that cannot be meant; what is left open is well."""
    temperature, top_p, top_k = sampling.temperature, sampling.top_p, sampling.top_k
    if temperature is not None and not (math.isfinite(temperature) and 0 <= temperature <= LARGEST_FLOAT32):
        raise _invalid("temperature", f"must be >= 0 and a finite 32-bit number, not {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise _invalid("top_p", f"must be in (0, 1], not {top_p}")
    if top_k is not None and not 0 <= top_k < 2**32:
        raise _invalid("top_k", f"must be >= 0 (0 means no limit), not {top_k}")
    if sampling.max_tokens is not None and not 0 < sampling.max_tokens < 2**63:
        raise _invalid("max_tokens", f"must be > 0 and < 2^63, not {sampling.max_tokens}")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**64:
        raise _invalid("seed", f"must be in [0, 2^64), not {sampling.seed}")
    _check_stop(sampling.stop)
    check_token_ids("stop_token_ids", sampling.stop_token_ids, vocab_size)


def check_token_ids(param: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest for the first id outside the vocabulary."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        index, bad = next((i, t) for i, t in enumerate(token_ids) if not 0 <= t < vocab_size)
        raise _invalid(param, f"id {bad} at index {index} is outside the vocabulary [0, {vocab_size})")


def check_prompt(num_tokens: int, context_tokens: int, is_bound: bool = False) -> None:
    """Raise InvalidRequest unless the prompt leaves room for one token of output.

    is_bound: the prompt has at least so many tokens, and they were not counted.
    """
    if num_tokens == 0:
        raise _invalid("prompt", "must not be empty")
    if num_tokens >= context_tokens:
        count = f"{'at least ' if is_bound else ''}{num_tokens} tokens"
        message = (
            f"prompt: has {count}. This model's maximum context length is {context_tokens} tokens, of prompt and"
            " completion together, and no room is left for output. Please reduce the length of the prompt."
        )
        raise ContextLengthExceeded(message, param="prompt")


def check_resumption(request: ResumeRequest, committed: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest when what a client has of a stream cannot be what was sent to it."""
    kept = request.token_ids
    check_token_ids("token_ids", kept, vocab_size)
    if kept and len(kept) != request.num_tokens:
        raise _invalid("token_ids", f"must be empty or num_tokens ({request.num_tokens}) long, not {len(kept)}")
    for position, (mine, theirs) in enumerate(zip(committed, kept, strict=False)):
        if mine != theirs:
            raise _invalid("token_ids", f"id {theirs} at position {position} was never sent: it was {mine}")
    if request.num_tokens > max(len(committed), len(kept)):
        known = f"only {len(committed)} tokens are written down"
        raise _invalid("num_tokens", f"{request.num_tokens} cannot be resumed without their token_ids: {known}")


def check_repeated_prompt(token_ids: Sequence[int], begun: str | Sequence[int]) -> None:
    """Raise InvalidRequest when a stream is resumed with another prompt than it was begun with."""
    if list(token_ids) != list(begun):
        raise _invalid("prompt", "is not the one that the stream was begun with")


def check_repeated_sampling(asked: SamplingOptions, begun: SamplingOptions) -> None:
    """The same for the options that the client names; `begun` has nothing left open."""
    for name in ("temperature", "top_p", "top_k", "seed"):
        value, before = getattr(asked, name), getattr(begun, name)
        is_float = isinstance(before, float)  # of which the journal has 32 bits
        if value is not None and not (math.isclose(value, before, rel_tol=1e-6) if is_float else value == before):
            raise _invalid(name, f"is not the {before} that the stream was begun with")
    if asked.stop != begun.stop or asked.ignore_eos != begun.ignore_eos:
        name = "stop" if asked.stop != begun.stop else "ignore_eos"
        raise _invalid(name, "is not what the stream was begun with")
    if asked.max_tokens is not None and begun.max_tokens is not None and asked.max_tokens < begun.max_tokens:
        raise _invalid("max_tokens", f"is less than the {begun.max_tokens} that the stream was begun with")


def check_text(param: str, text: str) -> int:
    """The text's length in UTF-8 bytes. Raise InvalidRequest when it is empty or no Unicode text."""
    if not text:
        raise _invalid(param, "must not be empty")
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise _invalid(param, "is not valid Unicode (it has a lone surrogate)") from None


def _check_stop(stop: Sequence[str]) -> None:
    if len(stop) > MAX_STOP_TEXTS:
        raise _invalid("stop", f"at most {MAX_STOP_TEXTS} stop texts, not {len(stop)}")
    for text in stop:
        check_text("stop", text)
        if len(text) > MAX_STOP_CHARACTERS:
            raise _invalid("stop", f"a stop text has at most {MAX_STOP_CHARACTERS} characters, not {len(text)}")


def _invalid(param: str, complaint: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {complaint}", param=param)
