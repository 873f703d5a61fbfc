"""What a client asks for, and what comes back. Plain data: knows neither protobuf nor gRPC."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Grammar:
    """The form of a completion: one of these. The cluster refuses what it cannot hold to, with the reason."""

    json_schema: str | None = None  # as JSON; "{}" is any JSON value
    regex: str | None = None  # Rust's syntax; the whole completion matches
    choice: tuple[str, ...] | None = None  # one of these texts
    lark: str | None = None  # llguidance's dialect of Lark
    gbnf: str | None = None  # llama.cpp's GBNF


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How each next token is chosen, and when the stream ends. None leaves an option to the model's own default.

    A new option is a field of the message SamplingParams, and a field here under the same name.
    """

    temperature: float | None = None  # >= 0; 0 is greedy
    top_p: float | None = None  # in (0, 1]; 1 means no limit
    top_k: int | None = None  # tokens; 0 means no limit
    max_tokens: int | None = None  # > 0; None means up to the context length
    seed: int | None = None  # in [0, 2^64); None means that the router draws one
    stop: tuple[str, ...] = ()  # texts; the stream ends before the first of them would be shown
    stop_token_ids: tuple[int, ...] = ()  # the stream ends when one of these is chosen; it is not shown
    ignore_eos: bool = False  # whether the model's own end tokens are passed over
    min_p: float | None = None  # in [0, 1]; share of the likeliest token's probability; 0 means no limit
    typical_p: float | None = None  # in (0, 1]; locally typical sampling; 1 means no limit
    repetition_penalty: float | None = None  # in [0.01, 10]; of tokens of prompt and completion; 1 means none
    presence_penalty: float | None = None  # in [-2, 2]; of tokens of the completion; 0 means none
    frequency_penalty: float | None = None  # in [-2, 2]; for each time that the completion has a token; 0 means none
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # by token id; in [-100, 100]; added to its logit
    allowed_token_ids: tuple[int, ...] = ()  # only these are chosen; empty means all
    banned_token_ids: tuple[int, ...] = ()  # these are not chosen
    bad_words: tuple[str, ...] = ()  # texts that the completion does not have
    banned_sequences: tuple[tuple[int, ...], ...] = ()  # the last id of one does not follow the others
    min_tokens: int = 0  # the stream does not stop before it has so many tokens
    include_stop_str_in_output: bool = False  # whether the stop text that ended the stream is shown
    logprobs: int | None = None  # at most 20; of the chosen token and so many most likely ones; None means of none
    grammar: Grammar | None = None  # the form of the completion; not together with ignore_eos or min_tokens
    prompt_logprobs: int | None = None  # at most 20; of the prompt's tokens; None means of none
    num_speculative_tokens: int | None = None  # at most 64; draft tokens in a step; 0 means none; same tokens anyway


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and how to continue it."""

    prompt: str | Sequence[int]  # text, or token ids
    sampling: SamplingParams = field(default_factory=SamplingParams)
    model: str = ""  # name of the model or of an adapter; empty means the model
    deadline_s: float | None = None  # seconds from the call, resumptions included; None means none
    cache_salt: bytes = b""  # KV blocks are shared only with requests that have the same one
    priority: int = 0  # in [-1000, 1000]; smaller ones are served earlier, where workers serve by priority


class FinishReason(enum.Enum):
    """Why a stream ended well."""

    STOP = "stop"  # an end token, a stop token or a stop text
    LENGTH = "length"  # max_tokens, or the context length


@dataclass(frozen=True, slots=True)
class RequestStats:
    """What one request cost, as the cluster counted it, and where it ran; fields as in the message RequestStats."""

    ttft_s: float = 0.0  # seconds from admission to the first token
    duration_s: float = 0.0  # seconds from admission to the end
    num_cached_prompt_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_recomputed_prompt_tokens: int = 0  # by the decode worker, for want of a KV block
    num_transferred_blocks: int = 0  # KV blocks from the prefill to the decode worker
    prefill_worker_id: str = ""
    decode_worker_id: str = ""
    num_replacements: int = 0  # times that the stream was placed anew because a worker was lost
    num_draft_tokens: int = 0  # judged for this request, where workers decode speculatively
    num_accepted_tokens: int = 0  # of them, those that the model chose, too
    num_drafts: int = 0  # runs of them; a step with drafts chose 1 + num_accepted_tokens / num_drafts tokens on average


@dataclass(frozen=True, slots=True)
class Started:
    """Always first: the stream was admitted."""

    stream_id: str
    model: str
    num_prompt_tokens: int
    seed: int  # the one in use, also when the router drew it


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at one position: before bias, penalties, temperature."""

    logprob: float  # of the chosen token
    top_ids: tuple[int, ...] = ()  # the likeliest first
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Tokens of the prompt, where prompt_logprobs are asked for: all of them come before the first Tokens."""

    first_position: int  # of the first id in the prompt, from 0
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()  # one per id; None of the prompt's first, which nothing precedes


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens, and the text that they completed."""

    first_position: int  # of the first id in the completion, from 0; positions follow each other without gaps
    ids: tuple[int, ...]
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per id where the request asked for them, else none


@dataclass(frozen=True, slots=True)
class Finished:
    """Always last."""

    reason: FinishReason
    num_output_tokens: int
    stats: RequestStats


Event = Started | PromptTokens | Tokens | Finished


@dataclass(frozen=True, slots=True)
class Embedding:
    """A prompt as one vector."""

    values: tuple[float, ...]  # one for each of the model's hidden dimensions
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    worker_id: str


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that the cluster serves, or an adapter of it."""

    name: str
    context_tokens: int  # most tokens of prompt and completion together
    vocab_size: int  # token ids are below it
    parent: str = ""  # of an adapter: the model that it is an adapter of
    root: str = ""  # of an adapter: its directory


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """A LoRA adapter that the cluster serves."""

    name: str  # to use as `model` of a request
    digest: str  # of its bytes, in hex
    path: str  # its directory
    parent: str  # the model that it is an adapter of
    is_pinned: bool = False  # whether it stays on devices while nobody uses it
