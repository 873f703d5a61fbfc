"""Tokens that a request's grammar leaves no choice about.

A form of JSON has long runs of them. They are drafts like others: the model judges them, so that text becomes the
tokens that it would become without. What other drafters propose is cut where the grammar does not go on.
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
    """compiler: of the model's tokenizer."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._positions: dict[str, _Position] = {}

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter."""
        return [self._forced(one.request)[: one.num_tokens] for one in wanted]

    def allowed(self, request: Request, drafts: Sequence[int]) -> Sequence[int]:
        """Drafts of another drafter, up to the first that the request's grammar does not allow."""
        matcher = self._matcher(request)
        return drafts if matcher is None else drafts[: matcher.validate_tokens(list(drafts))]

    def _forced(self, request: Request) -> Sequence[int]:
        matcher = self._matcher(request)
        if matcher is None:
            return ()
        token_ids: Sequence[int] = matcher.compute_ff_tokens()
        return token_ids

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
        """As in Drafter: nothing needs to be."""

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter: its proposals take no time."""

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter: it asks for none."""

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._positions.pop(request.request_id, None)

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return False

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return 0.0


class WithinGrammar:
    """Another drafter, whose drafts are cut where a request's grammar does not go on."""

    def __init__(self, drafter: Drafter, forced: ForcedTokens) -> None:
        self._drafter = drafter
        self._forced = forced

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter."""
        found = self._drafter.propose(wanted)
        return [self._forced.allowed(one.request, drafts) for one, drafts in zip(wanted, found, strict=True)]

    def prepare(self, requests: Sequence[Request]) -> None:
        """As in Drafter."""
        self._drafter.prepare(requests)

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter."""
        self._drafter.ahead(requests, num_tokens)

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter."""
        self._drafter.computed(plan, features)

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._drafter.forget(request)

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return self._drafter.is_costly

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return self._drafter.draft_s(lengths)
