"""What becomes of each option that OpenAI's servers and vLLM's accept: served, ignored or refused. Data, and its page.

The served ones are the fields of router.api.openai.schema. A refused option may have values that ask for nothing, such
as an empty list of tools: those are accepted, since clients send them. An option that is not here is refused as
unknown.

    python -m router.api.openai.options > docs/request-options.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum


class Api(Enum):
    """Which requests have the option."""

    BOTH = "both"
    COMPLETIONS = "completions"
    CHAT = "chat"
    RESPONSES = "responses"  # see router.api.responses.options


class Use(Enum):
    """What becomes of it."""

    SERVED = "served"
    IGNORED = "ignored"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Option:
    """One option."""

    name: str
    api: Api
    use: Use
    note: str
    neutral: tuple[str, ...] = ()  # of a refused one: values that ask for nothing, as JSON writes them

    def asks_for_nothing(self, value: object) -> bool:
        """Whether the value changes no answer."""
        return value is None or self.use is Use.IGNORED or json.dumps(value) in self.neutral


_B, _C, _M = Api.BOTH, Api.COMPLETIONS, Api.CHAT
_NO_BEAMS = "beam search is not served"
_TEXT_ONLY = "answers are text"

_SERVED: tuple[tuple[str, Api, str], ...] = (
    ("model", _B, "the served name"),
    ("prompt", _C, "a text, a list of texts, a list of ids, or a list of lists of ids"),
    ("messages", _M, "rendered by the model's chat template; content is text, text and refusal parts, or null"),
    ("max_tokens", _B, "> 0"),
    ("max_completion_tokens", _M, "the same; it wins over max_tokens"),
    ("temperature", _B, ">= 0; 0 is greedy"),
    ("top_p", _B, "in (0, 1]"),
    ("top_k", _B, "0 and -1 mean no limit"),
    ("min_p", _B, "in [0, 1]; after top_k and top_p"),
    ("typical_p", _B, "in (0, 1]; before top_k, top_p and min_p"),
    ("repetition_penalty", _B, "in [0.01, 10]; on tokens of prompt and completion"),
    ("presence_penalty", _B, "in [-2, 2]; on tokens of the completion"),
    ("frequency_penalty", _B, "in [-2, 2]; once for each time that the completion has the token"),
    ("logit_bias", _B, "by token id, in [-100, 100]; added to the logits before penalties"),
    ("allowed_token_ids", _B, "only these are chosen; an end token must be among them to be chosen"),
    ("banned_token_ids", _B, "these are not chosen"),
    ("bad_words", _B, "texts, banned as the tokenizer spells them at the start of a text and after a space"),
    ("banned_sequences", _B, "lists of ids; the last one is not chosen after the others"),
    ("min_tokens", _B, "no end token, stop token or stop text before"),
    ("stop", _B, "a text, or at most 16; also ends structured output, which may then be incomplete"),
    ("include_stop_str_in_output", _B, "the stop text is shown"),
    ("stop_token_ids", _B, "end the answer, and are not shown"),
    ("ignore_eos", _B, "the model's end tokens do not end the answer"),
    (
        "seed",
        _B,
        "gives the same tokens where logits are the same: always with model.batch_invariant; choice i has seed + i",
    ),
    (
        "num_speculative_tokens",
        _B,
        "most draft tokens in a step, at most 64, where `speculative` is configured; the tokens stay the same",
    ),
    ("n", _B, "choices of each prompt, at most 128 in one call"),
    ("best_of", _C, "candidates, of which the n with the greatest mean logprob are shown; not in a stream"),
    ("logprobs", _B, "completions: how many most likely tokens, at most 20; chats: true or false"),
    ("top_logprobs", _M, "at most 20"),
    ("prompt_logprobs", _B, "of each token of the prompt, at most 20 most likely ones; not in a stream"),
    ("echo", _C, "the prompt's text comes first; with logprobs, its tokens' too"),
    ("response_format", _B, "text, json_object or json_schema; always held to, strict or not"),
    ("structured_outputs", _B, "one of json, json_object, regex, choice, grammar (Lark, or GBNF where it has ::=)"),
    ("guided_json", _B, "a JSON schema: structured_outputs.json's older name"),
    ("guided_regex", _B, "structured_outputs.regex's older name"),
    ("guided_choice", _B, "structured_outputs.choice's older name"),
    ("guided_grammar", _B, "structured_outputs.grammar's older name"),
    ("stream", _B, "server-sent events"),
    ("stream_options", _B, "include_usage"),
    (
        "tools",
        _M,
        "functions; strict ones are held to their schema; the model's chat template must show tools",
    ),
    ("tool_choice", _M, "none, auto, required, a function by name (one call of it), or allowed_tools"),
    ("parallel_tool_calls", _M, "false: the answer ends after its first call"),
    ("functions", _M, "deprecated: as tools; the answer has one function_call"),
    ("function_call", _M, "deprecated: none, auto, or a function by name"),
    (
        "reasoning_effort",
        _M,
        "where the chat template looks at reasoning_effort, or at enable_thinking: off with none, else on",
    ),
    ("include_reasoning", _M, "false leaves out reasoning_content and reasoning, where the model reasons"),
    ("chat_template_kwargs", _M, "given to the chat template; not messages, tools or add_generation_prompt"),
    ("return_token_ids", _B, "each choice has its token_ids"),
    ("cache_salt", _B, "KV blocks are shared only between requests with the same salt and credential"),
    ("deadline_s", _B, "seconds from now after which the request is given up"),
    (
        "priority",
        _B,
        "in [-1000, 1000]; smaller ones come earlier where pools.NAME.scheduler.policy is priority",
    ),
)
_IGNORED: tuple[tuple[str, Api, str], ...] = (
    ("user", _B, "changes no answer"),
    ("metadata", _B, "nothing is kept"),
    ("store", _B, "nothing is kept"),
    ("service_tier", _B, "there is one"),
    ("safety_identifier", _B, "changes no answer"),
    ("prompt_cache_key", _B, "routing finds the cached prefix without it"),
    ("prompt_cache_options", _M, "prefixes are cached anyway"),
    ("prompt_cache_retention", _M, "prefixes are cached anyway"),
    ("prediction", _M, "the answer is the same without it"),
    ("request_id", _B, "the header X-Request-Id names a request"),
    ("return_tokens_as_token_ids", _B, "return_token_ids has the ids"),
)
_REFUSED: tuple[tuple[str, Api, str, tuple[str, ...]], ...] = (
    ("suffix", _C, "models that fill in the middle are not served", ('""',)),
    ("modalities", _M, _TEXT_ONLY, ('["text"]',)),
    ("audio", _M, _TEXT_ONLY, ()),
    ("verbosity", _M, "a template's option goes into chat_template_kwargs", ('"medium"',)),
    ("web_search_options", _M, "there is no search", ()),
    ("moderation", _M, "nothing is moderated", ()),
    ("use_beam_search", _B, _NO_BEAMS, ("false",)),
    ("length_penalty", _B, _NO_BEAMS, ("1", "1.0")),
    ("early_stopping", _B, _NO_BEAMS, ("false",)),
    ("skip_special_tokens", _B, "special tokens are never shown", ("true",)),
    ("spaces_between_special_tokens", _B, "special tokens are never shown", ("true",)),
    ("truncate_prompt_tokens", _B, "a prompt that is too long is refused, not cut", ()),
    ("add_special_tokens", _B, "texts are encoded with them, chats as their template writes them", ()),
    ("add_generation_prompt", _M, "an answer follows the messages", ("true",)),
    ("continue_final_message", _M, "an answer follows the messages", ("false",)),
    ("chat_template", _M, "the model's own is used", ()),
    ("documents", _M, "pass them in chat_template_kwargs", ("[]",)),
    ("logits_processors", _B, "no code comes with a request", ("[]",)),
    ("mm_processor_kwargs", _B, _TEXT_ONLY, ("{}",)),
    ("kv_transfer_params", _B, "the router decides where a request runs", ("{}",)),
    ("vllm_xargs", _B, "extensions of another engine", ("{}",)),
    ("thinking_token_budget", _M, "reasoning is not bounded", ()),
)

OPTIONS = (
    *(Option(name, api, Use.SERVED, note) for name, api, note in _SERVED),
    *(Option(name, api, Use.IGNORED, note) for name, api, note in _IGNORED),
    *(Option(name, api, Use.REFUSED, note, neutral) for name, api, note, neutral in _REFUSED),
)
NOT_SERVED = {option.name: option for option in OPTIONS if option.use is not Use.SERVED}

_HEAD = """# Request options over HTTP

Made by `python -m router.api.openai.options`; a test compares. Options that OpenAI's servers or vLLM's accept, for
`/v1/completions` and `/v1/chat/completions`. Ignored options change no answer. Refused ones give status 400 and name
the field, unless their value asks for nothing: null, or one of those in brackets. Any other field is refused as
unknown.

Logprobs are the log-softmax of the model's logits, before bias, bans, penalties, temperature and filters. Options act
in this order: logit_bias and bans, penalties, temperature, typical_p, top_k, top_p, min_p.

gRPC has the served sampling options as fields of `SamplingParams` (`proto/switchyard/v1/generation.proto`) under the
same names, `cache_salt` and `priority` in `GenerateRequest`, gRPC's own deadline, and `GenerateMany` for batches of
prompts, n and best_of.

`POST /v1/embeddings` has OpenAI's `model`, `input` (at most 64 texts or lists of ids), `encoding_format` and `user`,
and as extensions `pooling` (last or mean of the normed hidden states), `normalize`, `cache_salt`, `priority` and
`deadline_s`; `dimensions` is refused. Streams of one choice can be resumed with `Last-Event-ID`; those of several, an
echo with logprobs, and `/v1/responses` cannot.

Bans and bad words hold token by token: where they and a form leave nothing, the request ends with status 400, in a
stream with an error event. Fields inside of messages that no template knows are passed to the template.
"""


def render() -> str:
    """The page."""
    lines = [_HEAD, "| option | requests | use | note |", "| --- | --- | --- | --- |"]
    for option in OPTIONS:
        neutral = f" (accepted: {', '.join(f'`{value}`' for value in option.neutral)})" if option.neutral else ""
        lines.append(f"| `{option.name}` | {option.api.value} | {option.use.value} | {option.note}{neutral} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
