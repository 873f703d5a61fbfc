"""Sampling parameters of one request, from the worker's admission to the sampler. Without torch.

A new option is a field of the message SamplingParams and a field of the class here under the same name. If the sampler
goes by it, it is also a column of SamplingRows, or a list that workers.sampling.logit_rules keeps by row, and a part of
a plan's row (workers.engine.plan_wire).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from switchyard.v1 import generation_pb2

from grammars.grammar import Grammar

NO_TOKEN = -1
"""Chosen where the logits were no finite numbers: the request cannot go on."""

NO_CHOICE = -2
"""Chosen where bans, bad words or the grammar left no token: the request cannot go on."""

_INT32_MAX = 2**31 - 1
_WHERE_LEFT_OPEN: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1 << 62}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `max_tokens` counts from the end of the client's prompt."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0  # 0: no limit
    typical_p: float = 1.0  # 1: no limit
    repetition_penalty: float = 1.0  # of tokens of prompt and completion; 1: none
    presence_penalty: float = 0.0  # of tokens of the completion; 0: none
    frequency_penalty: float = 0.0
    max_tokens: int = 16
    min_tokens: int = 0  # no stop token before so many tokens of the completion
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int = 0  # 64 bits, unsigned
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these ids
    allowed_token_ids: Sequence[int] = ()  # empty: all
    banned_token_ids: Sequence[int] = ()
    banned_sequences: Sequence[Sequence[int]] = ()  # their last token does not follow the others; in the completion
    prompt_logprobs: int | None = None  # likewise of the prompt's tokens but the first; None: of none
    grammar: Grammar | None = None  # the form of the completion
    logprobs: int | None = None  # of the chosen token and so many most likely ones; None: of none
    num_speculative_tokens: int | None = None  # most draft tokens in a step; None: as many as the worker likes

    @classmethod
    def of(cls, message: generation_pb2.SamplingParams) -> SamplingParams:
        """What a router sends; it leaves nothing open, another client may."""
        values = {**_WHERE_LEFT_OPEN}
        for name, descriptor in _DESCRIPTORS.items():
            value = getattr(message, name)
            if descriptor.is_repeated:
                if value:  # most requests have none of the lists
                    values[name] = _READERS.get(name, tuple)(value)
            elif not descriptor.has_presence or message.HasField(name):
                values[name] = _READERS[name](value) if name in _READERS else value
        values["top_k"] = min(values.get("top_k", 0), _INT32_MAX)  # a plan holds int32; no vocabulary is larger
        return cls(**values)

    @property
    def has_penalties(self) -> bool:
        """Tokens that were seen are less likely, or more."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def has_bias(self) -> bool:
        """Some ids have other logits at every position."""
        return bool(self.logit_bias or self.allowed_token_ids or self.banned_token_ids)

    @property
    def needs_history(self) -> bool:
        """What is chosen depends on the tokens before it, beyond the logits."""
        return self.has_penalties or bool(self.banned_sequences) or self.grammar is not None

    @property
    def has_logprobs(self) -> bool:
        """Logprobs are wanted, be it of the chosen token alone."""
        return self.logprobs is not None

    @property
    def num_top_logprobs(self) -> int:
        """Of the most likely tokens."""
        return self.logprobs or 0

    @property
    def num_top_prompt_logprobs(self) -> int:
        """Of the most likely tokens at each of the prompt's positions."""
        return self.prompt_logprobs or 0

    @property
    def has_rules(self) -> bool:
        """The logits are changed before a token is chosen from them (workers.sampling.logit_rules)."""
        return self.needs_history or self.has_bias or self.min_tokens > 0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural logarithms of the model's own probabilities at one position: before rules, temperature and filters."""

    logprob: float  # of the chosen token
    top_ids: Sequence[int] = ()  # the likeliest first
    top_logprobs: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class PooledHidden:
    """The sum of the normed hidden states of some of a prompt's tokens."""

    values: Sequence[float]  # [hidden_size]


RowReport = TokenLogprobs | PooledHidden

GREEDY = SamplingParams()
_DESCRIPTORS = {one.name: generation_pb2.SamplingParams.DESCRIPTOR.fields_by_name[one.name] for one in fields(GREEDY)}
_READERS: dict[str, Any] = {
    "stop_token_ids": frozenset,
    "logit_bias": dict,
    "grammar": Grammar.of,
    "banned_sequences": lambda lists: tuple(tuple(one.ids) for one in lists),
}


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """Sampling parameters as columns, one entry per row; or, cut to some rows, per token to choose."""

    temperature: npt.NDArray[np.float64]
    top_p: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    min_p: npt.NDArray[np.float64]
    typical_p: npt.NDArray[np.float64]
    seed: npt.NDArray[np.uint64]
    has_rules: npt.NDArray[np.bool_]
    has_logprobs: npt.NDArray[np.bool_]
    num_top_logprobs: npt.NDArray[np.int64]
    num_top_prompt_logprobs: npt.NDArray[np.int64]

    @staticmethod
    def greedy(num_rows: int) -> SamplingRows:
        """Rows that choose the most likely token."""
        return SamplingRows(
            temperature=np.zeros(num_rows),
            top_p=np.ones(num_rows),
            top_k=np.zeros(num_rows, np.int64),
            min_p=np.zeros(num_rows),
            typical_p=np.ones(num_rows),
            seed=np.zeros(num_rows, np.uint64),
            has_rules=np.zeros(num_rows, np.bool_),
            has_logprobs=np.zeros(num_rows, np.bool_),
            num_top_logprobs=np.zeros(num_rows, np.int64),
            num_top_prompt_logprobs=np.zeros(num_rows, np.int64),
        )

    @property
    def are_cut(self) -> npt.NDArray[np.bool_]:
        """Rows that choose among some of the tokens only."""
        is_cut = (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0) | (self.typical_p < 1.0)
        cut: npt.NDArray[np.bool_] = (self.temperature > 0) & is_cut
        return cut

    def of_pooled(self, is_pooled: npt.NDArray[np.bool_]) -> SamplingRows:
        """The same, with the entries that choose nothing and report no logprobs."""
        return replace(
            self,
            temperature=np.where(is_pooled, 0.0, self.temperature),
            has_rules=self.has_rules & ~is_pooled,
            has_logprobs=self.has_logprobs & ~is_pooled,
        )

    def of_prompt(self, is_prompt: npt.NDArray[np.bool_]) -> SamplingRows:
        """The same, with the entries that choose nothing and report logprobs of the prompt."""
        if not is_prompt.any():
            return self
        return replace(
            self,
            temperature=np.where(is_prompt, 0.0, self.temperature),
            has_rules=self.has_rules & ~is_prompt,
            has_logprobs=self.has_logprobs | is_prompt,
            num_top_logprobs=np.where(is_prompt, self.num_top_prompt_logprobs, self.num_top_logprobs),
        )

    def put(self, row: int, params: SamplingParams) -> None:
        """A request takes the row."""
        for name in _COLUMNS:
            getattr(self, name)[row] = getattr(params, name)

    def of(self, rows: npt.NDArray[np.integer] | slice) -> SamplingRows:
        """The entries of some rows, in their order; a row may come several times."""
        return SamplingRows(*(getattr(self, name)[rows] for name in _COLUMNS))


_COLUMNS = tuple(column.name for column in fields(SamplingRows))
