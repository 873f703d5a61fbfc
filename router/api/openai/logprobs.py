"""OpenAI's two ways to show logprobs: lists for completions, objects for chats. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from router.events import PromptTokens, TokenLogprobs, Tokens

BytesOf = Callable[[int], bytes]
"""What one token says by itself."""

LEAST_LOGPROB = -9999.0
"""Of a token of probability 0, as OpenAI writes it: JSON has no infinity."""


class LogprobsOut:
    """The logprobs of one choice as its tokens come; counts the characters before them."""

    def __init__(self, bytes_of: BytesOf, is_chat: bool, num_characters: int = 0) -> None:
        self._bytes_of = bytes_of
        self._is_chat = is_chat
        self._num_characters = num_characters

    def shown(self, tokens: Sequence[Tokens]) -> dict[str, Any]:
        """The field `logprobs` of these tokens, which follow those of the last call."""
        ids = [token_id for event in tokens for token_id in event.ids]
        logprobs = [one for event in tokens for one in event.logprobs]
        pairs = list(zip(ids, logprobs, strict=True))
        if self._is_chat:
            return {"content": [self._of_chat(token_id, one) for token_id, one in pairs], "refusal": None}
        return self._lists(pairs)

    def echoed(self, prompt: Sequence[PromptTokens]) -> dict[str, Any]:
        """The field `logprobs` of a prompt's tokens that are shown before a completion."""
        return self._lists([pair for event in prompt for pair in zip(event.ids, event.logprobs, strict=True)])

    def _lists(self, pairs: Sequence[tuple[int, TokenLogprobs | None]]) -> dict[str, Any]:
        """None: nothing is known of the token."""
        offsets = []
        for token_id, _ in pairs:
            offsets.append(self._num_characters)
            self._num_characters += len(self._text(token_id))
        return {
            "tokens": [self._text(token_id) for token_id, _ in pairs],
            "token_logprobs": [None if one is None else _finite(one.logprob) for _, one in pairs],
            "top_logprobs": [None if one is None else self._of_completion(token_id, one) for token_id, one in pairs],
            "text_offset": offsets,
        }

    def _of_chat(self, token_id: int, one: TokenLogprobs) -> dict[str, Any]:
        tops = zip(one.top_ids, one.top_logprobs, strict=True)
        return {**self._entry(token_id, one.logprob), "top_logprobs": [self._entry(*top) for top in tops]}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token_id), "logprob": _finite(logprob), "bytes": list(self._bytes_of(token_id))}

    def _of_completion(self, token_id: int, one: TokenLogprobs) -> dict[str, float] | None:
        """The most likely tokens and the chosen one."""
        if not one.top_ids:
            return None
        tops = zip(one.top_ids, one.top_logprobs, strict=True)
        return {self._text(top): _finite(logprob) for top, logprob in (*tops, (token_id, one.logprob))}

    def _text(self, token_id: int) -> str:
        return _text(self._bytes_of, token_id)


def prompt_logprobs(prompt: Sequence[PromptTokens], bytes_of: BytesOf) -> list[dict[str, Any] | None]:
    """vLLM's field: for each token of the prompt the logprobs by id, of itself and of the most likely ones."""
    shown: list[dict[str, Any] | None] = []
    for token_id, one in (pair for event in prompt for pair in zip(event.ids, event.logprobs, strict=True)):
        if one is None:
            shown.append(None)
            continue
        tops = zip((*one.top_ids, token_id), (*one.top_logprobs, one.logprob), strict=True)
        shown.append({str(top): {"logprob": _finite(p), "decoded_token": _text(bytes_of, top)} for top, p in tops})
    return shown


def _text(bytes_of: BytesOf, token_id: int) -> str:
    return bytes_of(token_id).decode(errors="replace")


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
