"""What each drafter proposes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from grammars.compiler import GrammarCompiler
from grammars.grammar import Grammar, GrammarKind
from tests.workers.tiny_llama import END_ID, write_tokenizer
from workers.config import SpeculativeOptions
from workers.engine.request import Request
from workers.sampling.params import SamplingParams
from workers.speculation.drafters.drafter import Drafter, DraftWanted
from workers.speculation.drafters.forced import ForcedTokens, WithinGrammar
from workers.speculation.drafters.ngram import NgramDrafter
from workers.speculation.drafters.suffix import SuffixDrafter


def request(token_ids: Sequence[int], num_prompt: int | None = None, **fields: object) -> Request:
    length = len(token_ids) if num_prompt is None else num_prompt
    values = {"request_id": "r", "sampling": SamplingParams(), **fields}
    return Request(token_ids=list(token_ids), num_prompt_tokens=length, **values)


def proposed(drafter: Drafter, one: Request, num_tokens: int = 4) -> list[int]:
    return list(drafter.propose([DraftWanted(one, num_tokens)])[0])


@pytest.mark.parametrize(
    ("token_ids", "drafts"),
    [
        ([1, 2, 3, 4, 5, 6, 1, 2], [3, 4, 5, 6]),
        ([1, 2, 3, 9, 1, 2, 7, 1, 2], [7, 1, 2, 7]),  # of equal matches the latest, which goes on repeating
        ([5, 1, 2, 3, 9, 1, 2, 7, 5, 1, 2], [3, 9, 1, 2]),  # the longest match counts
        ([8, 8, 8], [8, 8, 8, 8]),  # a loop goes on
        ([1, 2, 3], []),
        ([7], []),
    ],
)
def test_ngrams_go_on_as_they_did_before(token_ids: list[int], drafts: list[int]) -> None:
    assert proposed(NgramDrafter(2, 5), request(token_ids)) == drafts


def test_ngrams_of_a_growing_request_are_those_of_a_new_one() -> None:
    chance, drafter = random.Random(3), NgramDrafter(1, 4)
    growing = request([1])
    for _ in range(300):
        growing.token_ids += [chance.randrange(6) for _ in range(chance.randrange(1, 4))]
        assert proposed(drafter, growing) == proposed(NgramDrafter(1, 4), request(growing.token_ids))


def test_fewer_tokens_than_prompt_lookup_min_do_not_count() -> None:
    assert proposed(NgramDrafter(3, 5), request([1, 2, 3, 4, 9, 2, 3])) == []
    assert proposed(NgramDrafter(3, 5), request([1, 2, 3, 4, 1, 2, 3]))[:1] == [4]


def suffix(**options: object) -> SuffixDrafter:
    return SuffixDrafter(SpeculativeOptions(method="suffix", **options))


def test_finished_requests_of_the_same_tenant_are_remembered() -> None:
    drafter = suffix(suffix_decoding_max_spec_factor=4.0)
    drafter.forget(request([1, 2, 3, 4, 5, 6], 2, tenant_salt=b"a"))
    assert proposed(drafter, request([9, 2, 3], tenant_salt=b"a")) == [4, 5, 6]
    assert proposed(drafter, request([9, 2, 3], tenant_salt=b"b")) == []
    drafter.forget(request([2, 3, 7, 7, 7, 7], tenant_salt=b"a"))  # it generated nothing
    assert proposed(drafter, request([9, 2, 3], tenant_salt=b"a")) == [4, 5, 6]


def test_what_most_went_on_with_is_proposed_and_as_long_as_the_match() -> None:
    drafter = suffix()
    for last in (7, 8, 8):
        drafter.forget(request([1, 2, 3, last, last + 10, 30], 1))
    assert proposed(drafter, request([1, 2, 3])) == [8, 18, 30]
    assert proposed(drafter, request([5, 2, 3])) == [8, 18]
    assert proposed(suffix(suffix_decoding_min_token_prob=0.9), request([1, 2, 4, 1, 2, 5, 1, 2])) == []


def test_fewer_tokens_than_the_least_do_not_count() -> None:
    drafter = SuffixDrafter(SpeculativeOptions(method="suffix"), least=4)
    assert proposed(drafter, request([1, 2, 3, 9, 1, 2, 3])) == []
    assert proposed(drafter, request([8, 1, 2, 3, 9, 8, 1, 2, 3], request_id="q"))[:1] == [9]


def test_memory_is_bounded_in_requests_and_tokens() -> None:
    for bounds in ({"suffix_decoding_max_cached_requests": 2}, {"suffix_decoding_max_cached_tokens": 8}):
        drafter = suffix(suffix_decoding_max_spec_factor=4.0, **bounds)
        for first in (10, 20, 30):
            drafter.forget(request([first, first + 1, first + 2, first + 3], 1))
        assert proposed(drafter, request([10, 11])) == []
        assert proposed(drafter, request([20, 21])) == [22, 23]
        assert proposed(drafter, request([30, 31])) == [32, 33]
        memory = drafter._remembered
        assert sum(map(len, memory._ends.values())) == 2 * 2
    off = suffix(suffix_decoding_max_cached_requests=0)
    off.forget(request([1, 2, 3, 4], 1))
    assert proposed(off, request([1, 2])) == []


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(file)
    return GrammarCompiler(file, 97, (END_ID,))


def ids(text: str) -> list[int]:
    return [ord(character) - 32 for character in text]


def test_what_the_grammar_leaves_no_choice_about_is_proposed(compiler: GrammarCompiler) -> None:
    form = Grammar(GrammarKind.REGEX, '\\{"name": "[a-z]+", "ok": true\\}')
    drafter = ForcedTokens(compiler)
    one = request(ids("say"), sampling=SamplingParams(grammar=form))
    assert proposed(drafter, one, 40) == ids('{"name": "')
    assert proposed(drafter, one, 4) == ids('{"na')
    one.token_ids += ids('{"name": "bc')
    assert proposed(drafter, one, 40) == []  # any letter may follow
    one.token_ids += ids('ab"')
    assert proposed(drafter, one, 40) == ids(', "ok": true}')
    drafter.forget(one)
    assert proposed(drafter, request([1, 2, 1]), 2) == []  # it has no grammar


def test_drafts_that_the_grammar_does_not_allow_are_cut(compiler: GrammarCompiler) -> None:
    drafter = WithinGrammar(NgramDrafter(1, 4), ForcedTokens(compiler))
    form = Grammar(GrammarKind.REGEX, "[ab]+c?")
    one = request(ids("abxabx"), sampling=SamplingParams(grammar=form))
    one.token_ids += ids("a")
    assert proposed(drafter, one) == ids("b")  # and no x
