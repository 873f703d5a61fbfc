"""Requests for which nothing was proposed lately. They are planned ahead of their tokens, as without speculation, and
held back for drafts ever more rarely, until there are some again. Pure."""

from __future__ import annotations

_LONGEST = 16  # steps between two looks


class QuietRequests:
    """Of one engine. Matters where steps are planned ahead; elsewhere every step looks at every request."""

    def __init__(self) -> None:
        self._left: dict[str, int] = {}  # steps in which a request is passed over
        self._next: dict[str, int] = {}

    def note(self, request_id: str, has_drafts: bool) -> None:
        """A step has looked at the request."""
        if has_drafts:
            self.forget(request_id)
            return
        self._left[request_id] = pause = self._next.get(request_id, 1)
        self._next[request_id] = min(2 * pause, _LONGEST)

    def passes_over(self, request_id: str) -> bool:
        """Whether this step does; each call is a step."""
        left = self._left.get(request_id, 0)
        if left:
            self._left[request_id] = left - 1
        return left > 0

    def forget(self, request_id: str) -> None:
        """It has drafts, or has left."""
        self._left.pop(request_id, None)
        self._next.pop(request_id, None)
