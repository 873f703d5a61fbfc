"""GET /v1/models, POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes: the model and its adapters.

Knows HTTP; knows nothing of what an adapter is.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from kvstore.control.adapter_registry import AdapterRecord
from router.api.http_body import read_json
from router.api.openai.schema import Integer, validated
from router.errors import InvalidRequest
from router.service.generation import Generation

_PARAMS = ("lora_name", "lora_path")


class _LoadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    pin: bool = False  # stays on the devices of the workers that its requests go to
    base_model_name: str | None = None  # of older clients: the model it is loaded for
    is_3d_lora_weight: bool | None = None  # of the adapter's layout, which its files show


class _UnloadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    lora_name: str
    lora_int_id: Integer | None = None  # vLLM's own number; here the name is enough


class ModelsApi:
    """The endpoints of one router."""

    def __init__(self, generation: Generation, max_body_bytes: int) -> None:
        self._generation = generation
        self._max_body_bytes = max_body_bytes

    def routes(self) -> Sequence[Route]:
        """For the HTTP application."""
        return [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.model),
            Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        """The model, then its adapters."""
        adapters = self._generation.adapters.served
        return JSONResponse({"object": "list", "data": [self._card(), *map(self._adapter_card, adapters)]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        ref = await self._generation.preparation.check_model(request.path_params["name"])
        if ref is None:
            return JSONResponse(self._card())
        record = AdapterRecord(ref.name, ref.path, ref.digest.hex(), self._generation.files.name)
        return JSONResponse(self._adapter_card(record))

    async def load(self, request: Request) -> Response:
        """Serve an adapter as a model."""
        body = validated(_LoadRequest, await read_json(request, self._max_body_bytes))
        base = self._generation.files.name
        if body.base_model_name not in (None, "", base):
            message = f"base_model_name: {body.base_model_name!r} is not served here; {base!r} is"
            raise InvalidRequest(message, param="base_model_name")
        await self._generation.adapters.load(body.lora_name, body.lora_path, body.load_inplace, body.pin, _PARAMS)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """Serve it no longer."""
        body = validated(_UnloadRequest, await read_json(request, self._max_body_bytes))
        await self._generation.adapters.unload(body.lora_name, _PARAMS[0])
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    def _card(self) -> dict[str, object]:
        return {
            "id": self._generation.files.name,
            "object": "model",
            "created": 0,
            "owned_by": "switchyard",
            "root": self._generation.files.name,
            "parent": None,
            "max_model_len": self._generation.preparation.context_tokens,
        }

    def _adapter_card(self, record: AdapterRecord) -> dict[str, object]:
        return {**self._card(), "id": record.name, "root": record.path, "parent": record.parent}
