"""The seam of speculative decoding: what proposes tokens. Knows nothing of how they are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from workers.engine.request import Request
from workers.engine.step import SchedulerOutput


@dataclass(frozen=True, slots=True)
class DraftWanted:
    """Tokens that may follow those of a request are wanted."""

    request: Request
    num_tokens: int  # at most; > 0


class Drafter(Protocol):
    """Proposes tokens. A wrong proposal costs time, and changes no stream. One thread uses a drafter."""

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """For each request the tokens that may follow, at most as many as are wanted; none where it knows of none."""
        ...

    def prepare(self, requests: Sequence[Request]) -> None:
        """These wait for their KV; what proposing tokens for them needs may be worked out meanwhile."""
        ...

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """Drafts of these requests are being judged, and a device or a core is free meanwhile: propose so many more
        tokens of each, as if all those drafts were right. What is right of them may be the next proposal."""
        ...

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """Hidden states of a step's tokens, once its requests have the tokens that it chose. Only where the drafter
        asked the model for some; others are never called."""
        ...

    def forget(self, request: Request) -> None:
        """The request has left the engine. What it has may be used to propose tokens for its tenant's next ones."""
        ...

    @property
    def is_costly(self) -> bool:
        """Whether the time that proposing takes is worth counting."""
        ...

    def draft_s(self, lengths: Sequence[int]) -> float:
        """How long it takes to propose so many tokens for each of some requests; 0 where is_costly is false."""
        ...
