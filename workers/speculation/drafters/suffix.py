"""Suffix decoding: what followed the same tokens in the request, or in earlier ones of its tenant, may follow again.

Oliaro et al., "SuffixDecoding", arXiv 2411.04975. Where the last tokens have come before in several places, the drafts
are what most of them went on with. The longer the match, the longer the draft. What tenants generate stays apart.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from workers.config import SpeculativeOptions
from workers.engine.request import Request
from workers.engine.step import SchedulerOutput
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.drafters.past_tokens import MAX_PLACES, PastTokens, match_length

_WIDTH = 2  # tokens that must be the same, at least


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the last tokens have come before."""

    token_ids: Sequence[int]
    end: int
    length: int  # of the match


class _Remembered:
    """Token sequences of finished requests; the oldest are given up. Bounded in requests and tokens, of all tenants."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._sequences: OrderedDict[int, tuple[bytes, Sequence[int]]] = OrderedDict()
        self._ends: dict[tuple[bytes, int, int], deque[tuple[int, int]]] = {}  # (sequence, end), the latest last
        self._num_added = 0
        self._num_tokens = 0

    def add(self, tenant: bytes, token_ids: Sequence[int]) -> None:
        if len(token_ids) > self._max_tokens or not self._max_requests:
            return
        self._num_added += 1
        self._sequences[self._num_added] = (tenant, token_ids)
        self._num_tokens += len(token_ids)
        for end in range(_WIDTH, len(token_ids)):
            self._ends.setdefault(_key(tenant, token_ids, end), deque(maxlen=MAX_PLACES)).append((self._num_added, end))
        while len(self._sequences) > self._max_requests or self._num_tokens > self._max_tokens:
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        number, (tenant, token_ids) = self._sequences.popitem(last=False)
        self._num_tokens -= len(token_ids)
        for key in {_key(tenant, token_ids, end) for end in range(_WIDTH, len(token_ids))}:
            places = self._ends[key]
            while places and places[0][0] == number:
                places.popleft()
            if not places:
                del self._ends[key]

    def places(self, tenant: bytes, token_ids: Sequence[int], depth: int) -> list[_Place]:
        """The latest places where its last tokens stand."""
        found = []
        for number, end in reversed(self._ends.get(_key(tenant, token_ids, len(token_ids)), ())):
            other = self._sequences[number][1]
            found.append(_Place(other, end, match_length(token_ids, other, end, depth)))
        return found


def _key(tenant: bytes, token_ids: Sequence[int], end: int) -> tuple[bytes, int, int]:
    return tenant, token_ids[end - 2], token_ids[end - 1]


class SuffixDrafter:
    """Of one worker. least: how many of the last tokens must have come before."""

    def __init__(self, options: SpeculativeOptions, least: int = _WIDTH) -> None:
        self._least = least
        self._depth = options.suffix_decoding_max_tree_depth
        self._factor = options.suffix_decoding_max_spec_factor
        self._least_share = options.suffix_decoding_min_token_prob
        self._past: dict[str, PastTokens] = {}
        self._remembered = _Remembered(
            options.suffix_decoding_max_cached_requests, options.suffix_decoding_max_cached_tokens
        )

    def propose(self, wanted: Sequence[DraftWanted]) -> list[Sequence[int]]:
        """As in Drafter."""
        return [self._of(one.request, one.num_tokens) for one in wanted]

    def _of(self, request: Request, num_tokens: int) -> Sequence[int]:
        token_ids = request.token_ids
        if len(token_ids) < _WIDTH:
            return ()
        past = self._past.get(request.request_id)
        if past is None:
            past = self._past[request.request_id] = PastTokens(_WIDTH)
        places = [
            _Place(token_ids, end, match_length(token_ids, token_ids, end, self._depth))
            for end in past.places(token_ids)
        ]
        places += self._remembered.places(_tenant(request), token_ids, self._depth)
        longest = max((place.length for place in places), default=0)
        if longest < self._least:
            return ()
        best: Sequence[int] = ()
        best_score = 0.0
        for least in {longest, max(_WIDTH, longest // 2)}:  # few long matches, or more that are shorter
            most = min(num_tokens, max(1, int(self._factor * least)))
            drafts, score = self._followed([place for place in places if place.length >= least], most)
            if score > best_score:
                best, best_score = drafts, score
        return best

    def _followed(self, places: list[_Place], most: int) -> tuple[list[int], float]:
        """What most of the places went on with, and how many tokens of it are expected to be right."""
        drafts: list[int] = []
        share = score = 1.0
        for offset in range(most):
            votes = Counter(p.token_ids[p.end + offset] for p in places if p.end + offset < len(p.token_ids))
            if not votes:
                break
            token_id, count = votes.most_common(1)[0]
            share *= count / len(places)
            if share < self._least_share:
                break
            drafts.append(token_id)
            score += share
            places = [
                p for p in places if p.end + offset < len(p.token_ids) and p.token_ids[p.end + offset] == token_id
            ]
        return drafts, score if drafts else 0.0

    def prepare(self, requests: Sequence[Request]) -> None:
        """As in Drafter: nothing needs to be."""

    def ahead(self, requests: Sequence[Request], num_tokens: int) -> None:
        """As in Drafter: its proposals take no time."""

    def computed(self, plan: SchedulerOutput, features: object) -> None:
        """As in Drafter: it asks for none."""

    def forget(self, request: Request) -> None:
        """As in Drafter."""
        self._past.pop(request.request_id, None)
        if request.num_output_tokens:
            self._remembered.add(_tenant(request), tuple(request.token_ids))

    @property
    def is_costly(self) -> bool:
        """As in Drafter."""
        return False

    def draft_s(self, lengths: Sequence[int]) -> float:
        """As in Drafter."""
        return 0.0


def _tenant(request: Request) -> bytes:
    """Whose requests may share drafts: those that may share blocks."""
    return request.tenant_salt + (b"" if request.adapter is None else request.adapter.digest)
