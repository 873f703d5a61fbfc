"""The Python client of a Switchyard cluster: token streams as plain events, over gRPC.

A stream whose router dies goes on at another router. Needs grpcio and protobuf only.
"""

from switchyard_client._client import GenerationClient, Target
from switchyard_client._errors import GenerationError
from switchyard_client._types import (
    Embedding,
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    Grammar,
    PromptTokens,
    RequestStats,
    SamplingParams,
    ServedAdapter,
    ServedModel,
    Started,
    TokenLogprobs,
    Tokens,
)

__all__ = [
    "Embedding",
    "Event",
    "FinishReason",
    "Finished",
    "GenerationClient",
    "GenerationError",
    "GenerationRequest",
    "Grammar",
    "PromptTokens",
    "RequestStats",
    "SamplingParams",
    "ServedAdapter",
    "ServedModel",
    "Started",
    "Target",
    "TokenLogprobs",
    "Tokens",
]
