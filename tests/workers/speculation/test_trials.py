"""Whether drafts pay is seen from whole steps: a way that is slower is taken for a few steps in a thousand."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.speculation.trials import DraftTrials

Step = tuple[float, float]  # tokens, seconds


def shares(num_steps: int, drafted: Callable[[int], Step], plain: Callable[[int], Step], trials: DraftTrials) -> float:
    """Seconds that plain steps would take for the same tokens, over those that were taken."""
    took_s = tokens = 0.0
    for step in range(num_steps):
        num_tokens, seconds = (drafted if trials.has_drafts(8) else plain)(step)
        trials.note(8, num_tokens, seconds)
        took_s, tokens = took_s + seconds, tokens + num_tokens
    return tokens / took_s


@settings(max_examples=60, deadline=None)
@given(gain=st.floats(0.3, 3.0), noise=st.floats(0, 0.1), seed=st.integers(0, 1000))
def test_the_faster_way_is_kept(gain, noise, seed) -> None:
    """Plain steps bring one token a second, those with drafts `gain`; trials cost about a hundredth, and the first ones
    a few steps."""
    chance = random.Random(seed)
    noisy = lambda tokens: (tokens, 1 + noise * chance.uniform(-1, 1))  # noqa: E731
    reached = shares(4000, lambda _: noisy(gain), lambda _: noisy(1.0), DraftTrials())
    assert reached >= max(1.0, gain) * 0.97 - noise / 10


def test_hiccups_do_not_decide() -> None:
    """One step in twenty takes five times as long, either way."""
    hiccup = lambda step, tokens: (tokens, 5.0 if step % 20 == 0 else 1.0)  # noqa: E731
    trials = DraftTrials()
    shares(2000, lambda step: hiccup(step, 1.3), lambda step: hiccup(step, 1.0), trials)
    assert sum(_is_drafted_next(trials, 1.3) for _ in range(500)) > 400


def _is_drafted_next(trials: DraftTrials, gain: float) -> bool:
    is_drafted = trials.has_drafts(8)
    trials.note(8, gain if is_drafted else 1.0, 1.0)
    return is_drafted


def test_a_change_is_noticed() -> None:
    """Drafts that cost a tenth begin to pay: they are back after a few trials."""
    trials = DraftTrials()
    shares(1000, lambda _: (0.9, 1.0), lambda _: (1.0, 1.0), trials)
    assert sum(_is_drafted_next(trials, 0.9) for _ in range(500)) < 50
    shares(1000, lambda _: (1.5, 1.0), lambda _: (1.0, 1.0), trials)
    assert sum(_is_drafted_next(trials, 1.5) for _ in range(200)) > 150


def test_drafts_that_bring_nothing_are_tried_often() -> None:
    """They cost nothing, so that trials may come one after the other; but they do not stay."""
    trials = DraftTrials()
    shares(200, lambda _: (1.0, 1.0), lambda _: (1.0, 1.0), trials)
    assert 80 < sum(_is_drafted_next(trials, 1.0) for _ in range(800)) < 240


@pytest.mark.parametrize("num_seqs", [1, 4, 32])
def test_batches_of_another_size_are_judged_alone(num_seqs: int) -> None:
    trials = DraftTrials()
    shares(500, lambda _: (0.7, 1.0), lambda _: (1.0, 1.0), trials)
    assert not trials.has_drafts(8)
    assert trials.has_drafts(num_seqs)
