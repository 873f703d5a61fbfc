"""POST /v1/embeddings: vectors of texts or of token ids, from the hidden states of the served model.

Knows HTTP; knows nothing of workers.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from router.api import sse
from router.api.http_body import read_json
from router.api.openai.schema import Integer, Prompt, check_deadline, check_salt_text, prompts_of, validated
from router.api.renaming import renaming
from router.api.tenancy import tenant_salt
from router.events import Embedding, GenerationRequest, Pooling
from router.sampling import NO_COMPLETION, invalid
from router.service.generation import Generation


class EmbeddingRequest(BaseModel):
    """OpenAI's fields; those from `pooling` on are extensions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Integer | None = None
    user: str | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: bool = True
    cache_salt: str | None = None
    priority: Integer = 0
    deadline_s: float | None = None


class EmbeddingsApi:
    """The endpoint of one router."""

    def __init__(self, generation: Generation, max_body_bytes: int) -> None:
        self._generation = generation
        self._max_body_bytes = max_body_bytes

    def routes(self) -> Sequence[Route]:
        """For the HTTP application."""
        return [Route("/v1/embeddings", self.embeddings, methods=["POST"])]

    async def embeddings(self, request: Request) -> Response:
        """One vector for each input, in their order."""
        body = validated(EmbeddingRequest, await read_json(request, self._max_body_bytes))
        await self._generation.preparation.check_model(body.model)
        if body.dimensions is not None:
            raise invalid("dimensions", "vectors have the size of the model's hidden states, and are not cut")
        check_deadline(body.deadline_s)
        check_salt_text(body.cache_salt)
        salt = tenant_salt(request.headers.get("authorization", ""))
        orders = [_order(prompt, body, salt) for prompt in prompts_of("input", body.input)]
        pooling = Pooling(body.pooling)
        return _EmbeddingsAnswer(body, [self._embed(order, pooling) for order in orders])

    async def _embed(self, order: GenerationRequest, pooling: Pooling) -> Embedding:
        with renaming({"prompt": "input"}):
            return await self._generation.embed(order, pooling)


class _EmbeddingsAnswer(Response):
    """Waits for the vectors, unless the client goes away first. A RouterError is the caller's."""

    def __init__(self, body: EmbeddingRequest, embedding: Sequence[Coroutine[Any, Any, Embedding]]) -> None:
        super().__init__()
        self._body, self._embedding = body, embedding

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await sse.until_disconnect(self._answer(scope, receive, send), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.create_task(one) for one in self._embedding]
        try:
            found = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await JSONResponse(_answer(self._body, found))(scope, receive, send)


def _order(prompt: Prompt, body: EmbeddingRequest, salt: bytes) -> GenerationRequest:
    return GenerationRequest(
        prompt,
        NO_COMPLETION,
        body.model,
        deadline_s=body.deadline_s,
        tenant_salt=salt,
        cache_salt=(body.cache_salt or "").encode(errors="surrogatepass"),
        priority=body.priority,
    )


def _answer(body: EmbeddingRequest, found: Sequence[Embedding]) -> dict[str, object]:
    num_tokens = sum(one.num_prompt_tokens for one in found)
    return {
        "object": "list",
        "model": body.model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _shown(one, body)} for index, one in enumerate(found)
        ],
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _shown(embedding: Embedding, body: EmbeddingRequest) -> object:
    values = np.asarray(embedding.normalized() if body.normalize else embedding.values, "<f4")
    if body.encoding_format == "base64":
        return base64.b64encode(values.tobytes()).decode()
    return values.tolist()
