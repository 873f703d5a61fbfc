"""How many draft tokens a step takes: as many as pay, and none when none do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.speculation.acceptance import AcceptanceEstimates
from workers.speculation.goodput import GainBias, draft_budget
from workers.speculation.quiet import QuietRequests
from workers.speculation.step_costs import StepCosts, lengths_of, sizes_to_measure

MIN_GAIN = 1.02
SHARES = st.lists(st.floats(0.01, 0.99), max_size=4)


def falling(shares: Sequence[float]) -> list[float]:
    return list(itertools.accumulate(shares, lambda a, b: a * b))


@settings(max_examples=200, deadline=None)
@given(
    shares=st.lists(SHARES, min_size=1, max_size=3),
    others=st.integers(0, 2),
    most=st.integers(0, 9),
    base_s=st.floats(0.1, 10),
    per_seq_s=st.floats(0, 1),
    per_draft_s=st.floats(0.001, 1),
)
def test_the_best_lengths_of_all_are_found(shares, others, most, base_s, per_seq_s, per_draft_s) -> None:
    """With few requests every number is looked at; brute force finds nothing better."""
    survival = [falling(one) for one in shares]
    num_seqs = len(survival) + others

    def step_s(lengths: Sequence[int], num_drafts: int) -> float:
        return base_s + per_seq_s * num_seqs + per_draft_s * num_drafts

    def rate(lengths: Sequence[int]) -> float:
        expected = num_seqs + sum(sum(one[:k]) for one, k in zip(survival, lengths, strict=True))
        return expected / step_s(lengths, sum(lengths))

    found = draft_budget(survival, num_seqs, most, step_s, MIN_GAIN).lengths
    choices = itertools.product(*(range(len(one) + 1) for one in survival))
    best = max((lengths for lengths in choices if sum(lengths) <= most), key=rate)
    plain = rate([0] * len(survival))
    if rate(best) > MIN_GAIN * plain * (1 + 1e-9):
        assert rate(found) == pytest.approx(rate(best), rel=1e-6)
        assert sum(found) <= most
    else:
        assert rate(found) >= plain * (1 - 1e-9)


def test_drafts_end_where_they_cost_more_than_they_bring() -> None:
    survival = [falling([0.7] * 8)] * 16

    def steps_of(per_draft_s: float) -> Sequence[int]:
        return draft_budget(survival, 16, 500, lambda lengths, n: 1 + per_draft_s * n, MIN_GAIN).lengths

    cheap, dear, ruinous = steps_of(0.001), steps_of(0.03), steps_of(1.0)
    assert sum(cheap) > sum(dear) > sum(ruinous) == 0


def test_a_request_that_agrees_gets_longer_drafts_than_one_that_does_not() -> None:
    estimates = AcceptanceEstimates(4)
    for _ in range(20):
        estimates.note("good", 4, 4)
        estimates.note("bad", 4, 0)
    survival = [estimates.survival(name, 4) for name in ("good", "bad", "new")]
    assert survival[0][3] > 0.7
    assert survival[1][0] < 0.2
    assert survival[1][0] < survival[2][0] < survival[0][0]
    lengths = draft_budget(survival, 3, 12, lambda lengths, n: 1 + 0.1 * n, MIN_GAIN).lengths
    assert lengths[0] == 4
    assert lengths[1] == 0


def test_positions_that_were_not_reached_are_not_judged() -> None:
    estimates = AcceptanceEstimates(3)
    for _ in range(50):
        estimates.note("a", 3, 1)
    first, second, _ = estimates.survival("a", 3)
    assert first > 0.9
    assert second / first < 0.1
    estimates.forget("a")
    assert estimates.survival("a", 3)[0] > 0.9  # what the worker's requests had lately


def law(num_seqs: float, num_drafts: float) -> float:
    """The first draft token costs more than a later one."""
    return 0.004 + 0.0002 * num_seqs + (0.003 + 0.001 * num_drafts if num_drafts else 0)


def test_step_times_are_those_that_were_measured_and_between_them() -> None:
    sizes = sizes_to_measure(24, 128)
    assert {(24, 0), (24, 1), (24, 24)} <= set(sizes)
    assert all(batch + drafts <= 128 for batch, drafts in sizes)
    costs = StepCosts({size: law(*size) for size in sizes})
    for batch, drafts in sizes:
        assert costs.step_s(batch, drafts) == pytest.approx(law(batch, drafts))
    for batch, drafts in ((2, 0), (2, 3), (3, 7), (10, 1), (10, 15), (24, 2), (24, 30)):
        assert costs.step_s(batch, drafts) == pytest.approx(law(batch, drafts), rel=0.05)
    assert costs.step_s(48, 0) > costs.step_s(24, 0)


def test_measured_steps_have_the_drafts_that_they_are_for() -> None:
    for batch, drafts in sizes_to_measure(16, 400):
        lengths = lengths_of(batch, drafts)
        assert len(lengths) == batch
        assert sum(lengths) == batch + drafts
        assert min(lengths) >= 1


def test_steps_that_take_longer_than_measured_are_learnt() -> None:
    costs = StepCosts({(batch, drafts): law(batch, drafts) for batch in (1, 8) for drafts in (0, 1, 8, 16, 32)})
    costs.observe(8, 0, 100.0)
    assert costs.step_s(8, 0) < 1.1 * law(8, 0)  # one hiccup teaches little
    for _ in range(300):
        costs.observe(8, 0, 2 * law(8, 0))
        costs.observe(8, 1, 3 * law(8, 1))
    assert costs.step_s(8, 0) == pytest.approx(2 * law(8, 0), rel=0.01)
    assert costs.step_s(8, 1) == pytest.approx(3 * law(8, 1), rel=0.01)
    assert costs.step_s(1, 0) == pytest.approx(law(1, 0))
    for duration_s in (0.0, -1.0, float("inf"), float("nan")):
        costs.observe(8, 0, duration_s)
    assert costs.step_s(8, 0) == pytest.approx(2 * law(8, 0), rel=0.01)


def test_a_machine_that_gets_slower_does_so_with_drafts_and_without() -> None:
    """What pays is not changed by it, though only steps with drafts are seen."""
    costs = StepCosts({(batch, drafts): law(batch, drafts) for batch in (1, 8) for drafts in (0, 1, 8, 16, 32)})
    for _ in range(300):
        costs.observe(8, 8, 2 * law(8, 8))
    assert costs.step_s(8, 8) == pytest.approx(2 * law(8, 8), rel=0.01)
    assert 1.1 * law(8, 0) < costs.step_s(8, 0) < 1.5 * law(8, 0)
    for _ in range(15):
        costs.observe(8, 0, 2 * law(8, 0))
    assert costs.step_s(8, 0) == pytest.approx(2 * law(8, 0), rel=0.05)


def test_one_measured_size_is_enough() -> None:
    costs = StepCosts({(4, 0): 0.01})
    assert costs.step_s(4, 0) == pytest.approx(0.01)
    assert costs.step_s(4, 8) == pytest.approx(0.03)


def test_drafts_that_bring_less_than_expected_must_promise_more() -> None:
    bias = GainBias()
    assert bias.ratio == 1.0
    for _ in range(100):
        bias.note(1.5, 1.0)
    assert bias.ratio == pytest.approx(1.5, rel=0.01)
    for _ in range(20):
        bias.relax()
    assert bias.ratio == pytest.approx(1.0, abs=0.01)
    for _ in range(200):
        bias.note(1.1, 1.4)
    assert bias.ratio == 1.0


def test_requests_without_drafts_are_looked_at_ever_more_rarely() -> None:
    quiet, looks = QuietRequests(), []
    for step in range(80):
        if not quiet.passes_over("r"):
            looks.append(step)
            quiet.note("r", has_drafts=False)
    gaps = [b - a for a, b in itertools.pairwise(looks)]
    assert gaps[:5] == [2, 3, 5, 9, 17]
    assert max(gaps) == 17
    quiet.note("r", has_drafts=True)
    assert not quiet.passes_over("r")
