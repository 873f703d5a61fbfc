"""What becomes of each field of OpenAI's Responses API: served, ignored or refused. Data, and its page.

The served ones are the fields of router.api.responses.request.

    python -m router.api.responses.options > docs/responses-options.md
"""

from __future__ import annotations

from router.api.openai.options import Api, Option, Use

_STATELESS = "nothing is kept between requests: send the whole conversation as input"

_SERVED: tuple[tuple[str, str], ...] = (
    ("model", "the served name"),
    ("input", "a text, or items: message, function_call, function_call_output, reasoning"),
    ("instructions", "come first, as a developer's message"),
    ("tools", "of type function; strict ones are held to their schema"),
    ("tool_choice", "none, auto, required, a function by name (one call of it), or allowed_tools"),
    ("parallel_tool_calls", "false: the answer ends after its first call"),
    ("text", "format: text, json_object or json_schema, always held to; verbosity: medium"),
    ("reasoning", "effort, as reasoning_effort of chats; there are no summaries"),
    ("max_output_tokens", "> 0; else to the end of the context"),
    ("temperature", ">= 0; 0 is greedy"),
    ("top_p", "in (0, 1]"),
    ("top_k", "an extension; 0 and -1 mean no limit"),
    ("seed", "an extension; the same tokens where logits are the same: always with model.batch_invariant"),
    ("num_speculative_tokens", "an extension; as of chats"),
    ("stream", "server-sent events, typed and numbered"),
    ("store", "false, which is what it is when it is left out, too"),
    ("chat_template_kwargs", "an extension; given to the chat template; not messages, tools or add_generation_prompt"),
    ("cache_salt", "an extension; KV blocks are shared only between requests with the same salt and credential"),
    ("deadline_s", "an extension; seconds from now after which the request is given up"),
    ("priority", "an extension; as of chats"),
)
_IGNORED: tuple[tuple[str, str], ...] = (
    ("user", "changes no answer"),
    ("metadata", "nothing is kept"),
    ("service_tier", "there is one"),
    ("safety_identifier", "changes no answer"),
    ("prompt_cache_key", "routing finds the cached prefix without it"),
    ("prompt_cache_options", "prefixes are cached anyway"),
    ("prompt_cache_retention", "prefixes are cached anyway"),
    ("max_tool_calls", "bounds hosted tools, of which there are none"),
    ("stream_options", "nothing is obfuscated"),
)
_REFUSED: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("previous_response_id", _STATELESS, ()),
    ("conversation", _STATELESS, ()),
    ("prompt", "no prompts are kept", ()),
    ("background", "a response is answered while its client waits", ("false",)),
    ("context_management", "a conversation that is too long is refused, not cut", ("[]",)),
    ("truncation", "a conversation that is too long is refused, not cut", ('"disabled"',)),
    ("include", "the reasoning is in the answer in plain text, and nothing else can be added",
     ("[]", '["reasoning.encrypted_content"]')),
    ("moderation", "nothing is moderated", ()),
    ("top_logprobs", "chats have logprobs", ("0",)),
)  # fmt: skip

OPTIONS = (
    *(Option(name, Api.RESPONSES, Use.SERVED, note) for name, note in _SERVED),
    *(Option(name, Api.RESPONSES, Use.IGNORED, note) for name, note in _IGNORED),
    *(Option(name, Api.RESPONSES, Use.REFUSED, note, neutral) for name, note, neutral in _REFUSED),
)
NOT_SERVED = {option.name: option for option in OPTIONS if option.use is not Use.SERVED}

_HEAD = """# Fields of /v1/responses

Made by `python -m router.api.responses.options`; a test compares. The part of OpenAI's Responses API that keeps nothing
between two requests. Ignored fields change no answer. Refused ones give status 400 and name the field, unless their
value asks for nothing: null, or one of those in brackets. Any other field is refused as unknown.
"""


def render() -> str:
    """The page."""
    lines = [_HEAD, "| field | use | note |", "| --- | --- | --- |"]
    for option in OPTIONS:
        neutral = f" (accepted: {', '.join(f'`{value}`' for value in option.neutral)})" if option.neutral else ""
        lines.append(f"| `{option.name}` | {option.use.value} | {option.note}{neutral} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
