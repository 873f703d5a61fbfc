"""A request as one engine sees it. Knows nothing of text, routers or tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from kvstore.blocks.block_pools import BlockTable
from workers.engine.adapters.ref import AdapterRef
from workers.sampling.params import SamplingParams, TokenLogprobs


class RequestRole(Enum):
    """What this worker does with the request."""

    MIXED = "mixed"  # prefill and decode
    PREFILL = "prefill"  # compute the prompt, publish its blocks, choose one token
    DECODE = "decode"  # take the prompt's blocks from the tiers, then decode
    EMBED = "embed"  # compute the prompt, and pool its hidden states


class Pooling(Enum):
    """Which hidden states an embedding is made of."""

    LAST = "last"  # that of the prompt's last token
    MEAN = "mean"  # the mean of all


class RequestStatus(Enum):
    """Where the request is in the engine."""

    WAITING = "waiting"
    WAITING_FOR_KV = "waiting_for_kv"  # holds blocks, which fill from the tiers
    RUNNING = "running"
    STORING = "storing"  # all is computed; its token is sent when the tiers have its blocks (PREFILL)
    PREEMPTED = "preempted"  # lost its blocks; waits again
    FINISHED = "finished"


class FinishReason(Enum):
    """Why a request ended on this worker."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    PREFILLED = "prefilled"
    FAILED = "failed"  # its logits were no finite numbers
    STEP_FAILED = "step_failed"  # a step that it was part of raised
    EMBEDDED = "embedded"
    NO_CHOICE = "no_choice"  # its bans, bad words or grammar left no token
    ADAPTER_FAILED = "adapter_failed"  # its adapter is not what it should be here; elsewhere it may be
    ADAPTER_UNFIT = "adapter_unfit"  # its adapter can be served by no worker of this model


@dataclass(eq=False, slots=True)
class Request:
    """One stream on one worker. Mutable; owned by the scheduler."""

    request_id: str
    token_ids: list[int]  # the prompt, then whatever was generated, here or before
    num_prompt_tokens: int  # the client's prompt; positions of the completion count from here
    sampling: SamplingParams
    role: RequestRole = RequestRole.MIXED
    tenant_salt: bytes = b""  # of the names of its blocks
    tenant: bytes = b""  # whose share of the engine it uses
    priority: int = 0  # the smaller, the sooner
    pooling: Pooling | None = None  # of an embedding
    adapter: AdapterRef | None = None  # what is added to the model's weights
    epoch: int = 0
    arrival_time_s: float = 0.0
    deadline_s: float = float("inf")  # on the engine's clock
    window_tokens: int = 1 << 62  # how many more tokens may be sent before credit comes

    status: RequestStatus = RequestStatus.WAITING
    row: int = -1  # of the ranks' state; -1: none
    adapter_slot: int = -1  # of the device, held from admission on; -1: none
    had_adapter: bool = False  # it had its adapter's slot once
    error: str = ""  # one line: why its adapter failed
    block_tables: list[BlockTable] = field(default_factory=list)  # per cache group; empty: holds no blocks
    block_names: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids known so far
    draft_token_ids: list[int] = field(default_factory=list)  # proposed to follow; scheduled, and kept if chosen
    awaits_drafts: bool = False  # they follow known tokens: no step runs ahead of the one that chooses its next
    num_computed_tokens: int = 0  # once all steps that are planned are through
    num_pending_tokens: int = 0  # being chosen by a step that is not through
    pending_in_plan: int = 0  # number of the plan that chooses the last of them; see pipeline.py
    num_kv_tokens: int = 0  # tokens whose KV is in the block tables then; > num_computed_tokens after a full prefix hit
    drafts_in_flight: list[int] = field(default_factory=list)  # scheduled, not judged yet
    is_checked: bool = False  # it can be served here, and its blocks are named
    max_num_tokens: int = 0  # the request ends when it has so many
    stop_ids: frozenset[int] = frozenset()  # end the request and are not sent
    num_registered_blocks: int = 0
    num_given_tokens: int = 0  # length of token_ids at submit: the prompt, and what was emitted elsewhere
    num_pull_tokens: int = 0  # whose blocks may be pulled: those it came with; after a swap, all that it had computed
    num_tier_blocks: int = 0  # full ones that went to the tiers or were found there, from the first on without a gap
    num_sends_in_flight: int = 0  # stores of its blocks, of any kind
    is_swapped: bool = False  # lost its blocks, and pulls them when the tiers have them
    num_stored_blocks: int = 0  # handed to the tiers, or found there; the next one to publish
    num_published_blocks: int = 0  # how many a tier took before the token was sent (PREFILL)
    num_stores_in_flight: int = 0  # that its token waits for (PREFILL)
    num_available_blocks: int = 0  # announced in the directory, from the first on
    num_ready_blocks: int = 0  # in the block tables: cached on the device or pulled
    max_pulled_blocks: int = 1 << 62  # what comes after them did not verify, and is not tried again
    num_loads_in_flight: int = 0
    has_window_blocks: bool = False  # pulled, where cache groups with windows need some
    is_continued: bool = False  # the prefill side is through (DECODE)
    awaits_lookup: bool = False  # the directory is being asked for its prefix; nothing is scheduled before it answered
    num_preemptions: int = 0
    was_admitted: bool = False  # got blocks once
    share_tag: float = 0.0  # what its tenant had had when it was first admitted
    pooled: npt.NDArray[np.float64] | None = None  # sum of the hidden states so far
    last_logprobs: TokenLogprobs | None = None  # of a token that is not sent before its stores have ended
    num_cached_prompt_tokens: int = 0
    num_computed_prompt_tokens: int = 0
    num_transferred_blocks: int = 0
    num_drafts: int = 0  # runs of draft tokens that were judged so far
    num_draft_tokens: int = 0  # in them
    num_accepted_tokens: int = 0  # of them
    continued_time_s: float | None = None  # when the prefill side was reported to be through (DECODE)
    first_step_time_s: float | None = None  # when the first step that computes tokens of it began
    first_token_time_s: float | None = None  # when the step that chose its first token here ended

    def __post_init__(self) -> None:
        self.num_given_tokens = self.num_pull_tokens = len(self.token_ids)
        if self.pooling is not None:
            self.sampling = SamplingParams(max_tokens=1)  # it chooses nothing

    @property
    def order(self) -> tuple[float, str]:
        """Earlier requests go first."""
        return self.arrival_time_s, self.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens known."""
        return len(self.token_ids)

    @property
    def has_load_in_flight(self) -> bool:
        """Blocks are being pulled into its block tables."""
        return self.num_loads_in_flight > 0

    @property
    def is_stalled(self) -> bool:
        """Its client has not taken what was sent; nothing is computed until credit comes."""
        return self.window_tokens <= 0 and not self.num_pending_tokens

    @property
    def is_leaving(self) -> bool:
        """Its blocks are on their way to the tiers, from which it will pull them."""
        return self.is_swapped and self.num_sends_in_flight > 0

    @property
    def is_announced(self) -> bool:
        """What can be pulled is known: no worker is computing more of its blocks."""
        return self.role is not RequestRole.DECODE or self.is_continued

    @property
    def wants_all_rows(self) -> bool:
        """Something is reported of each token of its prompt, which is computed whole, whatever caches have."""
        return self.wants_prompt_logprobs or self.pooling is Pooling.MEAN

    @property
    def wants_prompt_logprobs(self) -> bool:
        """The logits of its prompt are wanted."""
        is_wanted = self.sampling.prompt_logprobs is not None and self.role is not RequestRole.DECODE
        return is_wanted and self.num_tokens == self.num_prompt_tokens

    def pool(self, hidden: Sequence[float], is_first: bool) -> None:
        """Add the hidden states of some of its tokens; is_first: of the prompt's first, also after a preemption."""
        added = np.asarray(hidden, np.float64)
        self.pooled = added if is_first or self.pooled is None else self.pooled + added

    @property
    def embedding(self) -> Sequence[float]:
        """[hidden_size]; nothing before its prompt is computed."""
        if self.pooled is None:
            return ()
        values: list[float] = (self.pooled / (self.num_tokens if self.pooling is Pooling.MEAN else 1)).tolist()
        return values

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
    logprobs: TokenLogprobs | None = None


@dataclass(slots=True)
class TokenOutputs:
    """The tokens of one step as columns, in the order in which they were chosen."""

    requests: list[Request] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)  # in the completion
    token_ids: list[int] = field(default_factory=list)
    logprob_indices: list[int] = field(default_factory=list)  # of tokens whose requests asked for logprobs
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # theirs

    def append(self, request: Request, position: int, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Add one."""
        if logprobs is not None:
            self.logprob_indices.append(len(self.token_ids))
            self.logprobs.append(logprobs)
        self.requests.append(request)
        self.positions.append(position)
        self.token_ids.append(token_id)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __iter__(self) -> Iterator[TokenOutput]:
        logprobs = dict(zip(self.logprob_indices, self.logprobs, strict=True))
        columns = zip(self.requests, self.positions, self.token_ids, strict=True)
        for index, (request, position, token_id) in enumerate(columns):
            yield TokenOutput(request.request_id, request.epoch, position, token_id, logprobs.get(index))


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Of tokens of a request's prompt."""

    request: Request
    first_position: int  # in the prompt, > 0: nothing comes before the first token
    logprobs: Sequence[TokenLogprobs]


@dataclass(frozen=True, slots=True)
class RequestEnd:
    """A request left the engine."""

    request_id: str
    epoch: int
    reason: FinishReason
    num_cached_prompt_tokens: int
    num_computed_prompt_tokens: int
    num_generated_tokens: int
    num_transferred_blocks: int
    num_published_blocks: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    arrival_time_s: float  # all on the engine's clock; None for what did not happen here
    continued_time_s: float | None
    first_step_time_s: float | None
    first_token_time_s: float | None
    error: str = ""  # one line, for STEP_FAILED
    embedding: Sequence[float] = ()  # [hidden_size], for EMBEDDED

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token, if there was one."""
        return None if self.first_token_time_s is None else self.first_token_time_s - self.arrival_time_s
