"""Drafters that know what will come, or what will not, and propose by a rule."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from workers.engine.request import Request
from workers.engine.step import SchedulerOutput
from workers.speculation.drafters.drafter import DraftWanted

RULES = ("perfect", "wrong", "random", "too_long", "often_right", "sometimes")


@dataclass
class Scripted:
    """rule: one of RULES. completions: by request, what it gets without drafts."""

    rule: str
    completions: Mapping[str, Sequence[int]]
    vocab_size: int
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter."""
        return [self._of(one) for one in wanted]

    def _of(self, one: DraftWanted) -> Sequence[int]:
        coming = list(self.completions[one.request.request_id][one.request.num_output_tokens :])
        most = one.num_tokens
        match self.rule:
            case "perfect":
                return coming[:most]
            case "wrong":
                return [(token_id + 1) % self.vocab_size for token_id in coming[:most]]
            case "random":
                return [self.chance.randrange(self.vocab_size) for _ in range(most)]
            case "too_long":  # past the end of the completion, and of what may be asked for
                return [*coming, *([0] * 40)]
            case "often_right":
                return [t if self.chance.random() < 0.8 else self._any() for t in coming[:most]]
            case "sometimes":
                return coming[: self.chance.randrange(4)] if self.chance.random() < 0.5 else []
        raise AssertionError(self.rule)

    def _any(self) -> int:
        return self.chance.randrange(self.vocab_size)

    def prepare(self, requests: Sequence[Request]) -> None:
        """As in Drafter."""

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter."""

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter."""

    def forget(self, request: Request) -> None:
        """As in Drafter."""

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return False

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return 0.0
