"""What drafts brought lately in batches of like size, and when they are looked at again while they do not pay. Pure."""

from __future__ import annotations

from workers.speculation.goodput import GainBias

_LONGEST_PAUSE = 128  # steps between two probes


class DraftStanding:
    """Of one engine's batches of like size."""

    def __init__(self) -> None:
        self._bias = GainBias()
        self._pause = 0  # steps to come without a look at drafts
        self._next_pause = 1

    @property
    def bias(self) -> float:
        """How many times more was expected than came: the bar for drafts is so much higher."""
        return self._bias.ratio

    def passes(self) -> bool:
        """Whether the next step is made without a look at drafts; each call is a step."""
        if not self._pause:
            return False
        self._pause -= 1
        return True

    def pause(self) -> None:
        """No drafts pay now: steps go without a look, twice as many each time until some have paid."""
        self._bias.relax()
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)

    def note(self, expected: float, brought: float) -> None:
        """A step with drafts is through; both are times as many tokens a second as without."""
        self._bias.note(expected, brought)
        if self._bias.brought > 1:
            self._next_pause = 1


class DraftStandings:
    """Of one engine."""

    def __init__(self) -> None:
        self._of: dict[int, DraftStanding] = {}

    def of(self, num_seqs: int) -> DraftStanding:
        """Of batches of about so many sequences."""
        return self._of.setdefault(num_seqs.bit_length(), DraftStanding())
