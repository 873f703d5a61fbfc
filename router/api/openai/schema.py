"""The OpenAI requests that this router understands, and how a request is refused that it does not.

The fields here are served. router.api.openai.options has what else is known: options that change no answer are passed
over, the others are refused by name, and so are unknown ones. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from router.api.openai.grammar import StructuredOutputFields
from router.api.openai.options import NOT_SERVED, Api
from router.errors import InvalidRequest
from router.sampling import MAX_LOGPROBS, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI's; a chat goes on to the end of the context
MAX_PROMPTS = 64
MAX_SALT_CHARACTERS = 256
_SHOWN_CHARACTERS = 100  # of a refused value

Prompt = str | tuple[int, ...]


def _integral(value: object) -> object:
    """An integer that JSON wrote as 16.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Integer = Annotated[int, BeforeValidator(_integral)]


class StreamOptions(BaseModel):
    """What a stream carries besides its chunks."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


class _Request(StructuredOutputFields):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Integer | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: Integer | None = None
    n: Integer | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Extensions.
    top_k: Integer | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Integer | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Integer | None = None
    num_speculative_tokens: Integer | None = None
    stop_token_ids: list[Integer] | None = None
    allowed_token_ids: list[Integer] | None = None
    banned_token_ids: list[Integer] | None = None
    bad_words: list[str] | None = None
    banned_sequences: list[list[Integer]] | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    deadline_s: float | None = None
    priority: Integer | None = None

    def sampling(self, default_max_tokens: int | None) -> SamplingParams:
        """The options that this request asks for; what it leaves open stays open, but for the limit."""
        form = self.form()
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        values: dict[str, Any] = {name: getattr(self, name) for name in _AS_THEY_ARE}
        values |= {name: tuple(getattr(self, name) or ()) for name in _LISTS}
        return SamplingParams(
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's "no limit"
            max_tokens=default_max_tokens if self.limit is None else self.limit,
            min_tokens=self.min_tokens or 0,
            stop=tuple(stops),
            include_stop_str_in_output=bool(self.include_stop_str_in_output),
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.num_logprobs,
            prompt_logprobs=self.num_prompt_logprobs,
            grammar=None if form is None else form[1],
            logit_bias=_bias_by_id(self.logit_bias or {}),
            banned_sequences=tuple(tuple(ids) for ids in self.banned_sequences or ()),
            **values,
        )

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, where the client says it."""
        return self.max_tokens

    @property
    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Of the most likely tokens at each position; None: not of the chosen ones either."""

    @property
    def num_prompt_logprobs(self) -> int | None:
        """Likewise of the prompt."""
        return self.prompt_logprobs

    @property
    def num_candidates(self) -> int:
        """Choices that are generated for each prompt; n of them are shown."""
        return self.num_choices

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return 1 if self.n is None else self.n

    def renamed_fields(self) -> Mapping[str, str]:
        """Fields that have another name where requests are served, with the name that the client gave them."""
        form = self.form()
        return {} if form is None else {"grammar": form[0]}

    @property
    def has_usage_chunk(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Any
    logprobs: Integer | bool | None = None  # true and false as in chats: some clients send them
    echo: bool | None = None
    best_of: Integer | None = None

    @property
    def num_candidates(self) -> int:
        return self.num_choices if self.best_of is None else self.best_of

    @property
    def num_logprobs(self) -> int | None:
        if isinstance(self.logprobs, bool):
            return 0 if self.logprobs else None
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        echoed = self.num_logprobs if self.echo else None
        return max((n for n in (self.prompt_logprobs, echoed) if n is not None), default=None)

    def prompts(self) -> Sequence[Prompt]:
        """The prompts, one choice each: a text, a list of texts, a list of ids, or a list of lists of ids."""
        return prompts_of("prompt", self.prompt)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Any  # see router.api.chat.messages
    max_completion_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    tools: Any = None  # these, and the choice among them: see router.api.chat.tools
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Any = None
    function_call: Any = None
    chat_template_kwargs: dict[str, Any] | None = None  # an extension
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None  # an extension

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise _invalid("top_logprobs", "is only allowed when logprobs is true")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_LOGPROBS:
            raise _invalid("top_logprobs", f"must be in [0, {MAX_LOGPROBS}], not {self.top_logprobs}")
        return self.top_logprobs or 0 if self.logprobs else None

    def renamed_fields(self) -> Mapping[str, str]:
        limit = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {**super().renamed_fields(), **limit, "prompt": "messages"}

    def template_options(self) -> Mapping[str, object]:
        """What the chat template is given besides the messages. Raises InvalidRequest."""
        return template_options(self.chat_template_kwargs)


def prompts_of(param: str, given: object) -> Sequence[Prompt]:
    """The prompts of a field that has a text, a list of texts, a list of ids, or a list of lists of ids."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise _invalid(param, "must be a text, a list of texts, or a list of token ids; not empty")
    if all(type(entry) is int for entry in given):
        return [tuple(given)]
    if len(given) > MAX_PROMPTS:
        raise _invalid(param, f"at most {MAX_PROMPTS} prompts in one request, not {len(given)}")
    if all(isinstance(entry, str) for entry in given):
        return given
    if all(isinstance(entry, list) and all(type(token) is int for token in entry) for entry in given):
        return [tuple(entry) for entry in given]
    raise _invalid(param, "must be a text, a list of texts, or a list of token ids")


def check_deadline(deadline_s: float | None) -> None:
    """Raise InvalidRequest for one that has passed, or never does."""
    if deadline_s is not None and not 0 < deadline_s < math.inf:
        raise _invalid("deadline_s", f"must be > 0 and finite, not {deadline_s}")


def check_salt_text(cache_salt: str | None) -> None:
    """Raise InvalidRequest for one that is empty or too long."""
    if cache_salt is not None and not 0 < len(cache_salt) <= MAX_SALT_CHARACTERS:
        raise _invalid("cache_salt", f"must have 1 to {MAX_SALT_CHARACTERS} characters")


_AS_THEY_ARE = (
    "temperature", "top_p", "min_p", "typical_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "num_speculative_tokens",
)  # fmt: skip
_LISTS = ("stop_token_ids", "allowed_token_ids", "banned_token_ids", "bad_words")


def _bias_by_id(bias: Mapping[str, float]) -> Mapping[int, float]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise _invalid("logit_bias", f"{key!r} is not a token id")
    return {int(key): value for key, value in bias.items()}


def template_options(given: dict[str, Any] | None) -> Mapping[str, object]:
    """chat_template_kwargs. Raises InvalidRequest."""
    for name in ("messages", "tools", "add_generation_prompt"):
        if given and name in given:
            raise _invalid("chat_template_kwargs", f"must not have {name}: the request's other fields decide it")
    return given or {}


_M = TypeVar("_M", bound=BaseModel)
_R = TypeVar("_R", bound=_Request)


def validated(kind: type[_M], content: object) -> _M:
    """A request whose fields have the right types. Raises InvalidRequest naming the field."""
    try:
        return kind.model_validate(_object(content))
    except ValidationError as error:
        raise _refusal(error) from None


def parse(kind: type[_R], content: object) -> _R:
    """A checked request. Raises InvalidRequest naming the field."""
    request = validated(kind, _without_neutral(_object(content), kind))
    _check_together(request)
    return request


def _object(content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InvalidRequest("request body: must be a JSON object")
    return content


def _without_neutral(content: dict[str, Any], kind: type[_Request]) -> dict[str, Any]:
    """The content without options that change no answer. Raises InvalidRequest for those that are not served."""
    other = Api.CHAT if kind is CompletionRequest else Api.COMPLETIONS
    left = {}
    for name, value in content.items():
        option = NOT_SERVED.get(name)
        if option is None or option.api is other:
            left[name] = value
        elif not option.asks_for_nothing(value):
            raise _invalid(name, f"{shortened(json.dumps(value))} is not supported here: {option.note}")
    return left


def shortened(text: str) -> str:
    """As much of a refused value as is shown."""
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _check_together(request: _Request) -> None:
    """Raise InvalidRequest for options that are wrong, or exclude each other."""
    check_deadline(request.deadline_s)
    check_salt_text(request.cache_salt)
    if request.prompt_logprobs is not None and request.stream:
        raise _invalid("prompt_logprobs", "is not possible in a stream")
    if request.stream_options is not None and not request.stream:
        raise _invalid("stream_options", "is only allowed when stream is true")


def _refusal(error: ValidationError) -> InvalidRequest:
    # Of a union's errors the deepest is that of the branch that was meant.
    worst = max(error.errors(include_url=False), key=lambda entry: len(entry["loc"]))
    param = str(worst["loc"][0]) if worst["loc"] else None
    path = ".".join(str(part) for part in worst["loc"] if isinstance(part, int) or _is_field(part))
    complaint = "is not a field of this request" if worst["type"] == "extra_forbidden" else worst["msg"]
    return InvalidRequest(f"{path or 'request body'}: {complaint}", param=param)


def _is_field(part: str) -> bool:
    """Not the name of a union's branch, such as `str` or `list[str]`."""
    return part.isidentifier() and part not in ("str", "int", "float", "bool")


def _invalid(param: str, complaint: str) -> InvalidRequest:
    return InvalidRequest(f"{param}: {complaint}", param=param)
