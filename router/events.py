"""A request and its results: the types that both APIs share.

Plain data. Knows neither protobuf nor JSON.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

from router.parsers.deltas import Delta
from router.parsers.families import AnswerFormat
from router.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """What is added to the model's weights for a request."""

    name: str  # as clients name it
    digest: bytes  # of its bytes: what computes the stream from its first token to its last
    path: str  # its directory, the same on all hosts


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it, not yet checked."""

    prompt: str | tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""  # or an adapter of it; empty means the model
    add_special_tokens: bool = True  # a chat template writes its own
    deadline_s: float | None = None  # seconds from now
    tenant_salt: bytes = b""  # from the caller's credential: whose KV blocks it shares
    cache_salt: bytes = b""  # the caller's: parts those of the tenant's requests that have another one
    priority: int = 0  # the smaller, the sooner, where workers serve by priority
    prompt_uses_clock: bool = False  # a chat template wrote the time into it: sent again, it may differ
    answer: AnswerFormat | None = None  # how to read a chat's answer; not written down: who resumes sends it again
    adapter: AdapterRef | None = None  # that `model` names, once it was looked up


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """A stream to go on with, from what its client has of it."""

    stream_id: str
    num_tokens: int  # that the client has
    token_ids: tuple[int, ...] = ()  # those tokens, if the client kept them
    has_rest: bool = False  # the client has the text that came without ids after the last token
    tenant_salt: bytes = b""  # from the caller's credential, which must be that of the stream
    repeated: GenerationRequest | None = None  # the whole request, from a client that sends it again; must be the same


class FinishReason(enum.Enum):
    """Why a stream ended well."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What one request cost, and where it ran; fields as in the RequestStats message."""

    ttft_s: float = 0.0
    duration_s: float = 0.0
    num_cached_prompt_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_recomputed_prompt_tokens: int = 0
    num_transferred_blocks: int = 0
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    num_replacements: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Pooling(enum.Enum):
    """Which hidden states an embedding is made of."""

    LAST = "last"  # that of the prompt's last token
    MEAN = "mean"  # the mean of all


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt as one vector."""

    values: tuple[float, ...]  # [hidden_size], as the model gives it
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    worker_id: str

    def normalized(self) -> tuple[float, ...]:
        """Of length 1."""
        length = math.sqrt(math.fsum(value * value for value in self.values)) or 1.0
        return tuple(value / length for value in self.values)


@dataclass(frozen=True, slots=True)
class Started:
    """Always first: the stream was admitted and placed."""

    stream_id: str
    model: str
    num_prompt_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at one position."""

    logprob: float  # of the chosen token
    top_ids: tuple[int, ...] = ()  # the likeliest first
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Tokens of the prompt and their logprobs; all of them come before the first Tokens, where they are asked for."""

    first_position: int  # in the prompt
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...]  # one per id; None of the first of all, which nothing comes before


@dataclass(frozen=True, slots=True)
class Tokens:
    """Newly committed tokens and the text that they completed."""

    first_position: int
    ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per id where the request asked for them, else none
    deltas: tuple[Delta, ...] | None = None  # what the text says, where the request has an answer format


@dataclass(frozen=True, slots=True)
class Finished:
    """Always last."""

    reason: FinishReason
    num_output_tokens: int
    stats: RequestStats
    num_reasoning_tokens: int = 0  # of the output tokens; 0 without an answer format
    num_calls: int = 0  # of functions, begun at least; 0 without an answer format


Event = Started | PromptTokens | Tokens | Finished
