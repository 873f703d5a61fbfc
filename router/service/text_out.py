"""The text side of one stream: ids in, Tokens out, until a stop text shows up. Knows nothing of workers."""

from __future__ import annotations

from collections.abc import Sequence

from router.events import Tokens
from router.sampling import SamplingParams
from router.service.text import Detokenizer, StopTexts


class TextOut:
    """Shows what the ids of one completion complete."""

    def __init__(self, detokenizer: Detokenizer, sampling: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._min_tokens = sampling.min_tokens
        self._stops: StopTexts | None = None
        if sampling.stop:
            self._stops = StopTexts(sampling.stop, sampling.include_stop_str_in_output)

    @property
    def is_stopped(self) -> bool:
        """A stop text showed up: nothing follows."""
        return self._stops is not None and self._stops.is_hit

    def push(self, first_position: int, ids: Sequence[int]) -> Tokens:
        """The ids up to the one that completed a stop text, and the text that may be shown."""
        if self._stops is None:
            return Tokens(first_position, tuple(ids), self._detokenizer.push(ids))
        text = ""
        for count, token_id in enumerate(ids, start=1):
            shown = self._detokenizer.push((token_id,))
            # A stop text ends a completion of min_tokens tokens or more, and none of it is older than that.
            text += shown if first_position + count < self._min_tokens else self._stops.push(shown)
            if self._stops.is_hit:
                return Tokens(first_position, tuple(ids[:count]), text)
        return Tokens(first_position, tuple(ids), text)

    def finish(self) -> str:
        """No more ids will come: the text that was held back."""
        rest = self._detokenizer.finish()
        if self._stops is None:
            return rest
        return self._stops.push(rest) + self._stops.finish()
