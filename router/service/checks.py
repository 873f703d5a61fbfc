"""What a request must be before anything is done for it. Every refusal names the field. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from router.errors import ContextLengthExceeded
from router.events import ResumeRequest
from router.sampling import check_token_ids, invalid

MAX_SALT_BYTES = 1024
MAX_PROMPT_LOGPROBS = 1 << 17  # numbers of one request
MAX_PRIORITY = 1000  # and as far below 0


def check_prompt(num_tokens: int, context_tokens: int, is_bound: bool = False) -> None:
    """Raise InvalidRequest unless the prompt leaves space for one token of output.

    is_bound: the prompt has at least so many tokens, and they were not counted.
    """
    if num_tokens == 0:
        raise invalid("prompt", "must not be empty")
    if num_tokens >= context_tokens:
        count = f"{'at least ' if is_bound else ''}{num_tokens} tokens"
        message = (
            f"prompt: has {count}. This model's maximum context length is {context_tokens} tokens, of prompt and"
            " completion together, and no space is left for output. Please reduce the length of the prompt."
        )
        raise ContextLengthExceeded(message, param="prompt")


def check_prompt_logprobs(num_top: int | None, num_tokens: int) -> None:
    """Raise InvalidRequest when the prompt's logprobs are too many to be sent. num_top: at each position."""
    if num_top is not None and (count := num_tokens * (1 + num_top)) > MAX_PROMPT_LOGPROBS:
        raise invalid("prompt_logprobs", f"{count} numbers of {num_tokens} tokens are more than {MAX_PROMPT_LOGPROBS}")


def check_salt(cache_salt: bytes) -> None:
    """Raise InvalidRequest when a caller's salt is too long to be carried along."""
    if len(cache_salt) > MAX_SALT_BYTES:
        raise invalid("cache_salt", f"has {len(cache_salt)} bytes, more than {MAX_SALT_BYTES}")


def check_priority(priority: int) -> None:
    """Raise InvalidRequest when a priority is out of range: with ageing, each level is some seconds of waiting."""
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise invalid("priority", f"must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}], not {priority}")


def check_resumption(request: ResumeRequest, committed: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest when what a client has of a stream cannot be what was sent to it."""
    kept = request.token_ids
    check_token_ids("token_ids", kept, vocab_size)
    if kept and len(kept) != request.num_tokens:
        raise invalid("token_ids", f"must be empty or num_tokens ({request.num_tokens}) long, not {len(kept)}")
    for position, (mine, theirs) in enumerate(zip(committed, kept, strict=False)):
        if mine != theirs:
            raise invalid("token_ids", f"id {theirs} at position {position} was never sent: it was {mine}")
    if request.num_tokens > max(len(committed), len(kept)):
        known = f"only {len(committed)} tokens are written down"
        raise invalid("num_tokens", f"{request.num_tokens} cannot be resumed without their token_ids: {known}")


def check_repeated_prompt(token_ids: Sequence[int], begun: str | Sequence[int]) -> None:
    """Raise InvalidRequest when a stream is resumed with another prompt than it was begun with."""
    if list(token_ids) != list(begun):
        raise invalid("prompt", "is not the one that the stream was begun with")


def check_repeated_model(name: str, begun: str) -> None:
    """Raise InvalidRequest when a stream is resumed with another model or adapter than it was begun with."""
    if name != begun:
        raise invalid("model", f"{name!r} is not the one that the stream was begun with, {begun!r}")
