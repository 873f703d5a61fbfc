"""The OpenAI requests that this router understands, and how a request is refused that it does not.

Fields of theirs that would change the completion and are not supported are refused by name; fields that cannot change
it are accepted and ignored; unknown fields are refused. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from router.errors import InvalidRequest
from router.events import SamplingOptions

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's; a chat goes on to the end of the context
MAX_PROMPTS = 64

Prompt = str | tuple[int, ...]


class StreamOptions(BaseModel):
    """What a stream carries besides its chunks."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class _Request(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions.
    top_k: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = Field(default_factory=list)
    return_token_ids: bool = False
    # Accepted: cannot change the completion.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    # Refused when set to anything but their neutral values: they would change it.
    logprobs: Any = None
    logit_bias: Any = None
    presence_penalty: Any = None
    frequency_penalty: Any = None

    def sampling(self, default_max_tokens: int | None) -> SamplingOptions:
        """The options that this request asks for, its absent fields at OpenAI's defaults."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        # OpenAI's seed is a signed number; ours is the same 64 bits.
        seed = self.seed % 2**64 if self.seed is not None and -(2**63) <= self.seed < 0 else self.seed
        return SamplingOptions(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            max_tokens=default_max_tokens if self.max_tokens is None else self.max_tokens,
            seed=seed,
            stop=tuple(stops),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
        )

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Any
    echo: Any = None
    best_of: Any = None
    suffix: Any = None

    def prompts(self) -> Sequence[Prompt]:
        """The prompts, one choice each: a text, a list of texts, a list of ids, or a list of lists of ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise _invalid("prompt", "must be a text, a list of texts, or a list of token ids; not empty")
        if all(type(entry) is int for entry in prompt):
            return [tuple(prompt)]
        if len(prompt) > MAX_PROMPTS:
            raise _invalid("prompt", f"at most {MAX_PROMPTS} prompts in one request, not {len(prompt)}")
        if all(isinstance(entry, str) for entry in prompt):
            return prompt
        if all(isinstance(entry, list) and all(type(token) is int for token in entry) for entry in prompt):
            return [tuple(entry) for entry in prompt]
        raise _invalid("prompt", "must be a text, a list of texts, or a list of token ids")


class ChatPart(BaseModel):
    """A piece of a message; text is the only kind that this router has."""

    model_config = ConfigDict(extra="ignore", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: str
    content: str | list[ChatPart] | None = None

    def plain(self) -> Mapping[str, str]:
        """Role and text, as a chat template expects them."""
        content = self.content or ""
        return {
            "role": self.role,
            "content": content if isinstance(content, str) else "".join(part.text for part in content),
        }


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    response_format: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    top_logprobs: Any = None

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens
        return self


# Values that ask for nothing, as JSON writes them; anything else in these fields is refused.
_NEUTRAL: dict[str, tuple[str, ...]] = {
    "n": ("1",),
    "best_of": ("1",),
    "echo": ("false",),
    "suffix": ('""',),
    "logprobs": ("false",),
    "top_logprobs": ("0",),
    "logit_bias": ("{}",),
    "presence_penalty": ("0", "0.0"),
    "frequency_penalty": ("0", "0.0"),
    "tools": ("[]",),
    "tool_choice": ('"none"', '"auto"'),
    "response_format": ('{"type": "text"}',),
}

_R = TypeVar("_R", bound=_Request)


def parse(kind: type[_R], content: object) -> _R:
    """A checked request. Raises InvalidRequest naming the field."""
    if not isinstance(content, dict):
        raise InvalidRequest("request body: must be a JSON object")
    try:
        request = kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from None
    for field, neutral in _NEUTRAL.items():
        value = getattr(request, field, None)
        if value is not None and json.dumps(value) not in neutral:
            raise _invalid(field, f"{json.dumps(value)} is not supported here")
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options", "is only allowed when stream is true")
    return request


def _refusal(error: ValidationError) -> InvalidRequest:
    # Of a union's errors the deepest is that of the branch that was meant.
    worst = max(error.errors(include_url=False), key=lambda entry: len(entry["loc"]))
    param = str(worst["loc"][0]) if worst["loc"] else None
    path = ".".join(str(part) for part in worst["loc"] if isinstance(part, int) or part.isidentifier())
    complaint = "is not a field of this request" if worst["type"] == "extra_forbidden" else worst["msg"]
    return InvalidRequest(f"{path or 'request body'}: {complaint}", param=param)


def _invalid(param: str, complaint: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {complaint}", param=param)
