"""What a user of OpenAI's hosted API expects, asked of a Switchyard cluster with the stock client (openai 2 or 3).

    make serve                                    # in another terminal
    pip install 'openai>=2'
    python examples/openai_tour.py http://127.0.0.1:8000/v1

Prints one line for each feature, and ends with 1 if one of them did not do what it should. What is refused, and why,
stands in docs/request-options.md and docs/responses-options.md.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

import openai
import pydantic

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
READ: Any = {"type": "function", "function": {"name": "read", "parameters": PERSON}}
HELLO: list[Any] = [{"role": "user", "content": "Open a file and read its lines."}]
FEATURES: dict[str, Callable[[openai.OpenAI, str], str]] = {}


def feature(name: str) -> Callable[[Callable[[openai.OpenAI, str], str]], None]:
    """Adds one; it returns what it shows, and raises when something is wrong."""

    def add(function: Callable[[openai.OpenAI, str], str]) -> None:
        FEATURES[name] = function

    return add


def chat(client: openai.OpenAI, model: str, **options: Any) -> Any:
    """One chat, short unless it says otherwise."""
    return client.chat.completions.create(**{"model": model, "messages": HELLO, "max_tokens": 24, "seed": 3, **options})


def compared(text: str, again: str) -> str:
    """The same request twice gives the same text where its logits have the same bits: see model.batch_invariant."""
    return "the same text" if text == again else "another text, of logits with other bits"


@feature("models")
def models(client: openai.OpenAI, model: str) -> str:
    assert client.models.retrieve(model).id == model
    return ", ".join(one.id for one in client.models.list())


@feature("completion")
def completion(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt="def add(a, b):", max_tokens=16, temperature=0)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 16
    return repr(answer.choices[0].text)


@feature("batch of prompts, n, echo, logprobs")
def batch(client: openai.OpenAI, model: str) -> str:
    prompts = ["import os", "class A:"]
    answer = client.completions.create(model=model, prompt=prompts, n=2, echo=True, logprobs=2, max_tokens=4, seed=1)
    assert len(answer.choices) == 4
    assert all(choice.text.startswith(prompts[i // 2]) for i, choice in enumerate(answer.choices))
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    return f"{len(logprobs.token_logprobs)} logprobs, the first {logprobs.token_logprobs[0]}"


@feature("completions of two prompts, streamed")
def streamed_completions(client: openai.OpenAI, model: str) -> str:
    texts = ["", ""]
    prompts = ["import os", "class A:"]
    for chunk in client.completions.create(model=model, prompt=prompts, max_tokens=8, temperature=0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    alone = client.completions.create(model=model, prompt=prompts[1], max_tokens=8, temperature=0).choices[0].text
    return f"{texts[0]!r}, {compared(texts[1], alone)}"


@feature("best_of")
def best_of(client: openai.OpenAI, model: str) -> str:
    answer = client.completions.create(model=model, prompt="x = ", best_of=3, max_tokens=4, seed=1)
    assert len(answer.choices) == 1
    return repr(answer.choices[0].text)


@feature("chat")
def plain_chat(client: openai.OpenAI, model: str) -> str:
    answer = chat(client, model)
    assert answer.choices[0].message.role == "assistant"
    return repr(answer.choices[0].message.content)


@feature("three choices of a chat, streamed")
def choices(client: openai.OpenAI, model: str) -> str:
    whole = [choice.message.content for choice in chat(client, model, n=3, temperature=1.0).choices]
    texts = [""] * 3
    for chunk in chat(client, model, n=3, temperature=1.0, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert len(set(whole)) > 1
    return compared("\n".join(texts), "\n".join(whole))


@feature("the same seed, the same text")
def seed(client: openai.OpenAI, model: str) -> str:
    texts = [chat(client, model, temperature=1.2, seed=seed).choices[0].message.content for seed in (7, 7, 8)]
    assert texts[0] != texts[2]
    return compared(texts[0], texts[1])


@feature("stream, with usage")
def stream(client: openai.OpenAI, model: str) -> str:
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert chunks[-1].usage.completion_tokens > 0
    return f"{len(chunks)} chunks, {compared(text, chat(client, model).choices[0].message.content)}"


@feature("roles and forms of content")
def content(client: openai.OpenAI, model: str) -> str:
    call = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path": "a"}'}}
    messages = [
        {"role": "developer", "content": "Write Python."},
        {"role": "user", "content": [{"type": "text", "text": "Read a"}, {"type": "text", "text": " file."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "hello"},
        {"role": "user", "content": "And now?"},
    ]
    return repr(chat(client, model, messages=messages).choices[0].message.content)


@feature("stop, logit_bias, penalties, top_p")
def sampling(client: openai.OpenAI, model: str) -> str:
    whole = chat(client, model, temperature=0).choices[0].message.content
    cut = chat(client, model, temperature=0, stop=[whole[5:8]]).choices[0]
    assert cut.finish_reason == "stop"
    assert whole[5:8] not in cut.message.content
    options = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "top_p": 0.9, "logit_bias": {"300": -100}}
    return repr(chat(client, model, **options).choices[0].message.content)


@feature("logprobs of a chat")
def chat_logprobs(client: openai.OpenAI, model: str) -> str:
    logprobs = chat(client, model, logprobs=True, top_logprobs=3, max_tokens=3).choices[0].logprobs.content
    assert len(logprobs[0].top_logprobs) == 3
    return ", ".join(f"{one.token!r} {one.logprob:.2f}" for one in logprobs)


@feature("JSON mode")
def json_mode(client: openai.OpenAI, model: str) -> str:
    choice = chat(client, model, max_tokens=300, response_format={"type": "json_object"}).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    return f"{choice.finish_reason}: {choice.message.content[:40]!r}"


@feature("structured output by a JSON schema, streamed")
def json_schema(client: openai.OpenAI, model: str) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}
    chunks = chat(client, model, max_tokens=100, response_format=form, stream=True)
    person = json.loads("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices))
    assert set(person) == {"name", "age"}
    return str(person)


class Review(pydantic.BaseModel):
    """What the model fills in."""

    language: Literal["Python", "C"]
    stars: int = pydantic.Field(ge=0, le=5)


@feature("structured output by a class, read by the client")
def parsed(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.parse(model=model, messages=HELLO, response_format=Review, max_tokens=200, seed=3)
    review = answer.choices[0].message.parsed
    assert isinstance(review, Review)
    return repr(review)


@feature("a schema that cannot be held to is refused by name")
def bad_schema(client: openai.OpenAI, model: str) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "null"}}}}
    try:
        chat(client, model, response_format=form)
    except openai.BadRequestError as error:
        assert error.param == "response_format"
        return str(error.body["message"]) if isinstance(error.body, dict) else str(error)
    raise AssertionError("it was accepted")


@feature("tools")
def tools(client: openai.OpenAI, model: str) -> str:
    try:
        answer = chat(client, model, tools=[READ], tool_choice="required", max_tokens=200)
    except openai.BadRequestError as error:  # the model's template does not show tools; the demo's does
        assert error.param in ("tools", "tool_choice")
        return f"refused: {error.body['message']}" if isinstance(error.body, dict) else str(error)
    call = answer.choices[0].message.tool_calls[0]
    assert set(json.loads(call.function.arguments)) == {"name", "age"}
    return f"{call.function.name}({call.function.arguments})"


@feature("a call, streamed, and its result handed back")
def called(client: openai.OpenAI, model: str) -> str:
    name = arguments = call_id = ""
    one_call = {"tools": [READ], "tool_choice": "required", "parallel_tool_calls": False}
    try:
        for chunk in chat(client, model, **one_call, max_tokens=200, stream=True):
            for choice in chunk.choices:
                for part in choice.delta.tool_calls or []:
                    call_id = part.id or call_id
                    name += part.function.name or ""
                    arguments += part.function.arguments or ""
    except openai.BadRequestError as error:
        assert error.param in ("tools", "tool_choice")
        return f"refused: {error.param}"
    assert name == "read"
    assert set(json.loads(arguments)) == {"name", "age"}
    call = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": call_id, "content": "two lines"}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    return repr(chat(client, model, messages=messages, tools=[READ]).choices[0].message.content)


@feature("an image is refused by name")
def image(client: openai.OpenAI, model: str) -> str:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    try:
        chat(client, model, messages=[{"role": "user", "content": [part]}])
    except openai.BadRequestError as error:
        assert "messages" in str(error.param)
        return str(error.param)
    raise AssertionError("it was accepted")


@feature("responses")
def responses(client: openai.OpenAI, model: str) -> str:
    answer = client.responses.create(model=model, input="Open a file.", max_output_tokens=16, temperature=0)
    events = list(
        client.responses.create(model=model, input="Open a file.", max_output_tokens=16, temperature=0, stream=True)
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[0].type == "response.created"
    return f"{len(events)} events, {compared(text, answer.output_text)}"


@feature("responses with a tool, and with a class")
def forms_of_responses(client: openai.OpenAI, model: str) -> str:
    review = client.responses.parse(
        model=model, input="Review.", text_format=Review, max_output_tokens=200, temperature=0
    )
    assert isinstance(review.output_parsed, Review)
    tool: Any = {"type": "function", "strict": True, **READ["function"]}
    try:
        answer = client.responses.create(
            model=model, input="Read.", tools=[tool], tool_choice="required", max_output_tokens=200, temperature=0
        )
    except openai.BadRequestError as error:
        assert error.param in ("tools", "tool_choice")
        return f"{review.output_parsed!r}, tools are refused"
    call = next(item for item in answer.output if item.type == "function_call")
    assert set(json.loads(call.arguments)) == {"name", "age"}
    return f"{review.output_parsed!r}, {call.name}({call.arguments})"


@feature("a request's id comes with its answer")
def request_id(client: openai.OpenAI, model: str) -> str:
    answer = client.with_options(default_headers={"X-Request-Id": "tour-1"}).completions.with_raw_response.create(
        model=model, prompt="x", max_tokens=1
    )
    assert answer.headers["x-request-id"] == "tour-1"
    assert answer.parse().choices
    return str(answer.headers["x-request-id"])


@feature("embeddings")
def embeddings(client: openai.OpenAI, model: str) -> str:
    answer = client.embeddings.create(model=model, input=["import os", "import sys"])
    first, second = (one.embedding for one in answer.data)
    return f"{len(first)} numbers, cosine {sum(a * b for a, b in zip(first, second, strict=True)):.3f}"


@feature("an unknown model is not found, a wrong value is named")
def errors(client: openai.OpenAI, model: str) -> str:
    try:
        chat(client, "no-such-model")
    except openai.NotFoundError:
        pass
    else:
        raise AssertionError("it was found")
    try:
        chat(client, model, temperature=-1)
    except openai.BadRequestError as error:
        assert error.param == "temperature"
        return str(error.param)
    raise AssertionError("it was accepted")


@feature("32 streams at once, by the asynchronous client")
def many(client: openai.OpenAI, model: str) -> str:
    async def one(asking: openai.AsyncOpenAI, number: int) -> str:
        chunks = await asking.chat.completions.create(
            model=model, messages=HELLO, max_tokens=16, seed=number, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as asking:
            return await asyncio.gather(*(one(asking, number) for number in range(32)))

    texts = asyncio.run(ask())
    alone = chat(client, model, max_tokens=16, seed=5).choices[0].message.content
    return f"{sum(map(len, texts))} characters, {compared(texts[5], alone)}"


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    num_failed = 0
    with openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        print(f"openai {openai.__version__}, model {model}")
        for name, function in FEATURES.items():
            try:
                print(f"{name}: {' '.join(function(client, model).split())}")
            except Exception as error:
                num_failed += 1
                print(f"{name}: FAILED: {type(error).__name__}: {error}")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
