"""A request as one engine sees it. Knows nothing of text, routers or tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class RequestRole(Enum):
    """What this worker does with the request."""

    MIXED = "mixed"  # prefill and decode
    PREFILL = "prefill"  # compute the prompt, publish its blocks, choose one token
    DECODE = "decode"  # take the prompt's blocks from the tiers, then decode


class RequestStatus(Enum):
    """Where the request is in the engine."""

    WAITING = "waiting"
    WAITING_FOR_KV = "waiting_for_kv"  # holds blocks, which fill from the tiers
    RUNNING = "running"
    PREEMPTED = "preempted"  # lost its blocks; waits again
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended on this worker."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    PREFILLED = "prefilled"
    FAILED = "failed"  # its logits were no finite numbers


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `max_tokens` counts from the end of the client's prompt."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """One stream on one worker. Mutable; owned by the scheduler."""

    request_id: str
    token_ids: list[int]  # the prompt, then whatever was generated, here or before
    num_prompt_tokens: int  # the client's prompt; positions of the completion count from here
    sampling: SamplingParams
    role: RequestRole = RequestRole.MIXED
    tenant_salt: bytes = b""
    epoch: int = 0
    arrival_time_s: float = 0.0
    deadline_s: float = float("inf")  # on the engine's clock
    window_tokens: int = 1 << 62  # how many more tokens may be sent before credit comes

    status: RequestStatus = RequestStatus.WAITING
    block_table: list[int] = field(default_factory=list)
    block_names: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids known so far
    num_computed_tokens: int = 0
    num_kv_tokens: int = 0  # tokens whose KV is in the block table; > num_computed_tokens after a full prefix hit
    num_registered_blocks: int = 0
    num_given_tokens: int = 0  # length of token_ids at submit: the prompt, and what was emitted elsewhere
    num_stored_blocks: int = 0  # handed to the tiers, or found there; the next one to publish
    num_published_blocks: int = 0  # how many a tier took while the step waited for it (PREFILL)
    num_available_blocks: int = 0  # announced in the directory, from the first on
    num_ready_blocks: int = 0  # in the block table: cached on the device or pulled
    is_continued: bool = False  # the prefill side is through (DECODE)
    awaits_lookup: bool = False  # the directory is being asked for its prefix; nothing is scheduled before it answered
    num_preemptions: int = 0
    num_cached_prompt_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_transferred_blocks: int = 0
    continued_time_s: float | None = None  # when the engine heard that the prefill side is through (DECODE)
    first_step_time_s: float | None = None  # when the first step that computes tokens of it began
    first_token_time_s: float | None = None  # when the step that chose its first token here ended

    def __post_init__(self) -> None:
        self.num_given_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        return len(self.token_ids)

    @property
    def is_stalled(self) -> bool:
        """Its client has not taken what was sent; nothing is computed until credit comes."""
        return self.window_tokens <= 0

    @property
    def is_announced(self) -> bool:
        """What can be pulled is known: nobody is computing more of its blocks for it."""
        return self.role is not RequestRole.DECODE or self.is_continued

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the completion, wherever they were generated."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """A token chosen for a request."""

    request_id: str
    epoch: int
    position: int  # in the completion
    token_id: int


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """A request left the engine."""

    request_id: str
    epoch: int
    reason: FinishReason
    num_cached_prompt_tokens: int
    num_computed_prompt_tokens: int
    num_transferred_blocks: int
    num_published_blocks: int
    arrival_time_s: float  # all on the engine's clock; None for what did not happen here
    continued_time_s: float | None
    first_step_time_s: float | None
    first_token_time_s: float | None

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token, if there was one."""
        return None if self.first_token_time_s is None else self.first_token_time_s - self.arrival_time_s
