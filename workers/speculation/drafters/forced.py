"""Tokens that a request's grammar leaves no choice about, before those that another drafter proposes.

A form of JSON has long runs of them. They are drafts like others: the model judges them, so that text becomes the
tokens that it would become without. What another drafter proposes is cut where the grammar does not go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grammars.compiler import GrammarCompiler
from grammars.errors import GrammarError
from grammars.grammar import Grammar
from workers.engine.request import Request
from workers.engine.step import SchedulerOutput
from workers.speculation.drafters.drafter import Drafter, DraftWanted

if TYPE_CHECKING:
    import llguidance


class _Position:
    """Where one request is in its grammar. matcher: None when it could not go on."""

    def __init__(self, matcher: llguidance.LLMatcher | None) -> None:
        self.matcher = matcher
        self.num_tokens = 0  # of the completion that the matcher has seen


class ForcedTokens:
    """compiler: of the model's tokenizer. rest: what proposes tokens where nothing is forced; None: nothing does."""

    def __init__(self, compiler: GrammarCompiler, rest: Drafter | None) -> None:
        self._compiler = compiler
        self._rest = rest
        self._positions: dict[str, _Position] = {}

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter."""
        drafts = [self._forced(one.request)[: one.num_tokens] for one in wanted]
        open_ones = [index for index, found in enumerate(drafts) if not found]
        if self._rest is None or not open_ones:
            return drafts
        for index, found in zip(open_ones, self._rest.propose([wanted[i] for i in open_ones]), strict=True):
            drafts[index] = self._allowed(wanted[index].request, found)
        return drafts

    def _forced(self, request: Request) -> Sequence[int]:
        matcher = self._matcher(request)
        if matcher is None:
            return ()
        token_ids: Sequence[int] = matcher.compute_ff_tokens()
        return token_ids

    def _allowed(self, request: Request, drafts: Sequence[int]) -> Sequence[int]:
        matcher = self._matcher(request)
        return drafts if matcher is None else drafts[: matcher.validate_tokens(list(drafts))]

    def _matcher(self, request: Request) -> llguidance.LLMatcher | None:
        """The request's matcher, after the tokens known so far; None: it has no grammar, or its end is reached."""
        grammar = request.sampling.grammar
        if grammar is None:
            return None
        position = self._positions.get(request.request_id)
        if position is None:
            position = self._positions[request.request_id] = _Position(self._new(grammar))
        new = request.token_ids[request.num_prompt_tokens + position.num_tokens :]
        position.num_tokens += len(new)
        matcher = position.matcher
        if matcher is not None and (matcher.try_consume_tokens(new) < len(new) or matcher.is_stopped()):
            position.matcher = None
        return position.matcher

    def _new(self, grammar: Grammar) -> llguidance.LLMatcher | None:
        try:
            return self._compiler.matcher(grammar)
        except GrammarError:  # the engine has compiled it; without drafts it says what is wrong now
            return None

    def prepare(self, requests: Sequence[Request]) -> None:
        """As in Drafter."""
        if self._rest is not None:
            self._rest.prepare(requests)

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter."""
        if self._rest is not None:
            self._rest.computed(plan, features)

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._positions.pop(request.request_id, None)
        if self._rest is not None:
            self._rest.forget(request)

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return 0.0 if self._rest is None else self._rest.draft_s(lengths)
