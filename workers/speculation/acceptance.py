"""How likely drafts are to be accepted, by request and position, learnt from those that were judged.

Between streams the share ranges from nearly none to nearly all, so each request has estimates of its own. What they
start from is what the worker's requests had lately. Estimates change how much is drafted and never a token. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

_PRIOR = 2.0  # judged drafts that the worker's share counts as in a request's
_FADE = 0.9  # of what a request's judged drafts count, with each one more
_WORKER_FADE = 0.99
_START = (0.6, 2.0)  # accepted share of a position that nothing is known of, and judged drafts that it counts as


class Acceptance:
    """Of one request, or of all of a worker: of each position of a draft the share that was accepted, of the drafts
    that were accepted up to it."""

    def __init__(self, num_positions: int, fade: float) -> None:
        self._fade = fade
        self.num_right = [0.0] * num_positions
        self.num_judged = [0.0] * num_positions

    def note(self, num_drafts: int, num_right: int) -> None:
        """A draft of so many tokens was judged."""
        for position in range(min(num_drafts, num_right + 1, len(self.num_right))):
            self.num_judged[position] = self.num_judged[position] * self._fade + 1
            self.num_right[position] = self.num_right[position] * self._fade + (position < num_right)


class AcceptanceEstimates:
    """Of one worker."""

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._worker = Acceptance(num_positions, _WORKER_FADE)
        self._requests: dict[str, Acceptance] = {}
        self._priors: Sequence[float] | None = None  # None: stale; a step judges many drafts

    def note(self, request_id: str, num_drafts: int, num_right: int) -> None:
        """A draft of a request was judged."""
        own = self._requests.get(request_id)
        if own is None:
            own = self._requests[request_id] = Acceptance(self._num_positions, _FADE)
        own.note(num_drafts, num_right)
        self._worker.note(num_drafts, num_right)
        self._priors = None

    def forget(self, request_id: str) -> None:
        """The request has left."""
        self._requests.pop(request_id, None)

    def survival(self, request_id: str, num_tokens: int) -> list[float]:
        """Of each of the first so many tokens of a draft, how likely it is that it and all before it are accepted."""
        if self._priors is None:
            self._priors = self._worker_shares()
        own = self._requests.get(request_id)
        found, share = [], 1.0
        for position in range(min(num_tokens, self._num_positions)):
            prior = self._priors[position]
            if own is not None:
                right = own.num_right[position] + _PRIOR * prior
                prior = right / (own.num_judged[position] + _PRIOR)
            share *= prior
            found.append(share)
        return found

    def _worker_shares(self) -> Sequence[float]:
        shares: list[float] = []
        before, weight = _START
        for right, judged in zip(self._worker.num_right, self._worker.num_judged, strict=True):
            before = (right + weight * before) / (judged + weight)  # a position that was never reached: as that before
            shares.append(before)
        return shares
