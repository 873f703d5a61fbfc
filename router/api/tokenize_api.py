"""POST /tokenize and /detokenize, in vLLM's shape: what a prompt or a chat is in tokens, and the text of tokens.

Knows HTTP; knows nothing of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from router.api.chat.messages import checked_messages
from router.api.chat.tools import IN_FUNCTION, ToolUse, checked_tools
from router.api.http_body import read_json
from router.api.openai.schema import Integer, template_options, validated
from router.errors import InvalidRequest
from router.service.generation import Generation


class _TokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    prompt: str | None = None
    messages: Any = None
    add_special_tokens: bool | None = None  # default: for a prompt; a chat template writes its own
    return_token_strs: bool = False
    add_generation_prompt: bool = True
    tools: Any = None
    chat_template_kwargs: dict[str, Any] | None = None


class _DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = ""
    tokens: list[Integer]


class TokenizeApi:
    """The two endpoints of one router."""

    def __init__(self, generation: Generation, max_body_bytes: int) -> None:
        self._generation = generation
        self._max_body_bytes = max_body_bytes

    def routes(self) -> Sequence[Route]:
        """For the HTTP application."""
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        """The ids of a prompt, or of the prompt that the chat template makes of messages."""
        body = validated(_TokenizeRequest, await read_json(request, self._max_body_bytes))
        await self._generation.preparation.check_model(body.model)
        text, is_chat, param = self._text(body)
        adds = not is_chat if body.add_special_tokens is None else body.add_special_tokens
        ids = await self._generation.tokenize(body.model, text, adds, param)
        answer: dict[str, object] = {
            "count": len(ids),
            "max_model_len": self._generation.preparation.context_tokens,
            "tokens": list(ids),
        }
        if body.return_token_strs:
            answer["token_strs"] = [self._generation.codec.token_of(token_id) for token_id in ids]
        return JSONResponse(answer)

    def _text(self, body: _TokenizeRequest) -> tuple[str, bool, str]:
        """The text, whether a chat template made it, and the field that it came in."""
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequest("prompt: either this or messages must be given", param="prompt")
        if body.prompt is not None:
            return body.prompt, False, "prompt"
        options = {"add_generation_prompt": body.add_generation_prompt, **template_options(body.chat_template_kwargs)}
        calls = ToolUse(checked_tools(body.tools, IN_FUNCTION)).calls()
        return self._generation.chat.prompt(checked_messages(body.messages), options, calls).text, True, "messages"

    async def detokenize(self, request: Request) -> Response:
        """The text of ids, special tokens as they are spelled."""
        body = validated(_DetokenizeRequest, await read_json(request, self._max_body_bytes))
        await self._generation.preparation.check_model(body.model)
        return JSONResponse({"prompt": await self._generation.preparation.detokenize(body.tokens)})
