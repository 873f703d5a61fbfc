"""What drafts brought lately in batches of like size, and when they are looked at again while they do not pay. Pure."""

from __future__ import annotations

from workers.speculation.goodput import GainBias

MIN_GAIN = 1.03  # times as many tokens a second as without drafts: less is within the error of the estimates
_LONGEST_PAUSE = 32  # steps between two probes of one sequence; a probe costs all of a batch, and tells of one of them
_PLAIN_EVERY = 64  # steps with drafts: one goes without, so that its time is known


class DraftStanding:
    """Of one engine's batches of like size. longest_pause: steps between two probes."""

    def __init__(self, longest_pause: int) -> None:
        self._longest_pause = longest_pause
        self._bias = GainBias()
        self._pause = 0  # steps to come without a look at drafts
        self._next_pause = 1
        self._num_drafted = 0  # steps with drafts since one that had to go without

    @property
    def bias(self) -> float:
        """How many times more was expected than came: the bar for drafts is so much higher."""
        return self._bias.ratio

    def passes(self) -> bool:
        """Whether the next step is made without a look at drafts; each call is a step."""
        if self._pause:
            self._pause -= 1
            return True
        if self._num_drafted < _PLAIN_EVERY:
            return False
        self._num_drafted = 0
        return True

    def pause(self) -> None:
        """No drafts pay now: steps go without a look, twice as many each time until some have paid."""
        self._bias.relax()
        self._pause = self._next_pause
        self._next_pause = min(2 * self._next_pause, self._longest_pause)

    def note(self, expected: float, brought: float) -> None:
        """A step is through for which drafts were asked, even if none came. Both are times as many tokens a second as
        without."""
        self._num_drafted += 1
        self._bias.note(expected, brought)
        if self._bias.brought > MIN_GAIN:
            self._next_pause = 1


class DraftStandings:
    """Of one engine."""

    def __init__(self) -> None:
        self._of: dict[int, DraftStanding] = {}

    def of(self, num_seqs: int) -> DraftStanding:
        """Of batches of about so many sequences."""
        size = num_seqs.bit_length()
        if size not in self._of:
            self._of[size] = DraftStanding(_LONGEST_PAUSE * max(1, size))
        return self._of[size]
