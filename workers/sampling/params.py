"""Sampling parameters of one request, from the worker's admission to the sampler. Without torch.

A new option is a field of the message SamplingParams and a field of the class here under the same name. If the sampler
goes by it, it is also a column of SamplingRows and a part of a plan's row (workers.engine.plan_wire).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
from switchyard.v1 import generation_pb2

NO_TOKEN = -1
"""Chosen where the logits were no finite numbers: the request cannot go on."""

_INT32_MAX = 2**31 - 1
_WHERE_LEFT_OPEN: dict[str, Any] = {"temperature": 1.0, "max_tokens": 1 << 62}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen. `max_tokens` counts from the end of the client's prompt."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    max_tokens: int = 16
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    seed: int = 0  # 64 bits, unsigned

    @classmethod
    def of(cls, message: generation_pb2.SamplingParams) -> SamplingParams:
        """What a router sends; it leaves nothing open, another client may."""
        values = {**_WHERE_LEFT_OPEN}
        for field in fields(cls):
            value = getattr(message, field.name)
            if message.DESCRIPTOR.fields_by_name[field.name].is_repeated:
                values[field.name] = frozenset(value)
            elif not message.DESCRIPTOR.fields_by_name[field.name].has_presence or message.HasField(field.name):
                values[field.name] = value
        values["top_k"] = min(values.get("top_k", 0), _INT32_MAX)  # a plan holds int32; no vocabulary is larger
        return cls(**values)


GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRows:
    """Sampling parameters as columns, one entry per row; or, cut to some rows, per token to choose."""

    temperature: npt.NDArray[np.float64]
    top_p: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.int64]
    seed: npt.NDArray[np.uint64]

    @staticmethod
    def greedy(num_rows: int) -> SamplingRows:
        """Rows that choose the most likely token."""
        zeros = np.zeros(num_rows, np.int64)
        return SamplingRows(np.zeros(num_rows), np.ones(num_rows), zeros, zeros.astype(np.uint64))

    @property
    def are_cut(self) -> npt.NDArray[np.bool_]:
        """Rows that choose among some of the tokens only."""
        return (self.temperature > 0) & ((self.top_k > 0) | (self.top_p < 1.0))

    def put(self, row: int, params: SamplingParams) -> None:
        """A request takes the row."""
        self.temperature[row], self.top_p[row] = params.temperature, params.top_p
        self.top_k[row], self.seed[row] = params.top_k, params.seed

    def of(self, rows: npt.NDArray[np.integer]) -> SamplingRows:
        """The entries of some rows, in their order; a row may come several times."""
        return SamplingRows(self.temperature[rows], self.top_p[rows], self.top_k[rows], self.seed[rows])
