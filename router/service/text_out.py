"""The text side of one stream: ids in, Tokens out, until a stop text shows up. Knows nothing of workers."""

from __future__ import annotations

from collections.abc import Sequence

from router.events import Tokens
from router.parsers.deltas import AnswerParser, CallStart, Delta
from router.sampling import SamplingParams
from router.service.text import Detokenizer, StopTexts


class TextOut:
    """Shows what the ids of one completion complete; what that says, where it has a parser."""

    def __init__(self, detokenizer: Detokenizer, sampling: SamplingParams, parser: AnswerParser | None = None) -> None:
        self._detokenizer = detokenizer
        self._min_tokens = sampling.min_tokens
        self._parser = parser
        self._stops: StopTexts | None = None
        self.num_calls = 0
        self.num_reasoning_tokens = 0  # with the markers' own; stop texts may hold back text and move its end
        if sampling.stop:
            self._stops = StopTexts(sampling.stop, sampling.include_stop_str_in_output)

    @property
    def is_stopped(self) -> bool:
        """A stop text showed up, or the only call that is wanted is complete: nothing follows."""
        is_hit = self._stops is not None and self._stops.is_hit
        return is_hit or (self._parser is not None and self._parser.is_done)

    def push(self, first_position: int, ids: Sequence[int]) -> Tokens:
        """The ids up to the one that completed a stop text, and the text that may be shown."""
        if self._stops is None and self._parser is None:
            return Tokens(first_position, tuple(ids), self._detokenizer.push(ids))
        text, deltas = "", list[Delta]()
        for count, token_id in enumerate(ids, start=1):
            shown = self._detokenizer.push((token_id,))
            # A stop text ends a completion of min_tokens tokens or more, and none of it is older than that.
            if self._stops is not None and first_position + count >= self._min_tokens:
                shown = self._stops.push(shown)
            text += shown
            if self._parser is not None:
                was_reasoning = self._parser.is_reasoning
                deltas += self._counted(self._parser.push(shown))
                self.num_reasoning_tokens += was_reasoning or self._parser.is_reasoning
            if self.is_stopped:
                ids = ids[:count]
                break
        return Tokens(first_position, tuple(ids), text, deltas=None if self._parser is None else tuple(deltas))

    def finish(self, position: int) -> Tokens:
        """No more ids will come: the text that was held back. position: behind the last id."""
        rest = self._detokenizer.finish()
        if self._stops is not None:
            rest = self._stops.push(rest) + self._stops.finish()
        if self._parser is None:
            return Tokens(position, (), rest)
        return Tokens(position, (), rest, deltas=self._counted((*self._parser.push(rest), *self._parser.finish())))

    def _counted(self, deltas: Sequence[Delta]) -> tuple[Delta, ...]:
        self.num_calls += sum(isinstance(delta, CallStart) for delta in deltas)
        return tuple(deltas)
