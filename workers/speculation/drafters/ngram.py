"""Prompt lookup: what followed the same tokens earlier in the request may follow again.

Saxena, "Prompt Lookup Decoding", 2023. Edits, quotations and loops are proposed nearly for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.engine.request import Request
from workers.engine.step import SchedulerOutput
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.drafters.past_tokens import PastTokens, match_length


class NgramDrafter:
    """shortest, longest: how many of the last tokens are compared. Of several places the one with the longest match
    counts, and of equal ones the latest."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._past: dict[str, PastTokens] = {}

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter."""
        return [self._of(one.request, one.num_tokens) for one in wanted]

    def _of(self, request: Request, num_tokens: int) -> Sequence[int]:
        token_ids = request.token_ids
        past = self._past.get(request.request_id)
        if past is None:
            past = self._past[request.request_id] = PastTokens(self._shortest)
        best, best_length = 0, 0
        for end in past.places(token_ids):
            length = match_length(token_ids, token_ids, end, self._longest)
            if length > best_length:
                best, best_length = end, length
            if length == self._longest:
                break
        return continued(token_ids, best, num_tokens) if best_length else ()

    def prepare(self, requests: Sequence[Request]) -> None:
        """As in Drafter: nothing needs to be."""

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter: its proposals take no time."""

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter: it asks for none."""

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._past.pop(request.request_id, None)

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return False

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return 0.0


def continued(token_ids: Sequence[int], start: int, count: int) -> list[int]:
    """The tokens from `start` on; past the last one they repeat, as a loop does."""
    period = len(token_ids) - start
    return [token_ids[start + i % period] for i in range(count)]
