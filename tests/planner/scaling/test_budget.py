"""All pools together: the budget, flips before starts, no move against what a pool wanted."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.scaling.budget import Arrangement, Move, Starts, arrange, given_up_at_least


def move(pool: str, current: int, target: int, **changes: object) -> Move:
    floor = min(current, target)
    base = Move(
        pool=pool,
        current=current,
        num_ready=current,
        target=target,
        goal=target,
        flip_floor=floor,
        pressure_floor=floor,
        minimum=1,
        gpus_per_worker=1,
        step=8,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def arranged(moves: Sequence[Move], max_gpus: int, flips: bool = True) -> Arrangement:
    return arrange(moves, lambda a, b: flips and a != b, lambda a, b: False, max_gpus)


def test_within_the_budget_all_get_what_they_want() -> None:
    assert arranged([move("p", 2, 4), move("d", 3, 5)], 9).targets == {"p": 4, "d": 5}


def test_a_worker_that_would_retire_serves_where_one_would_start() -> None:
    got = arranged([move("p", 4, 2), move("d", 2, 4)], 16)
    assert got.flips == {("p", "d"): 2}
    assert got.targets == {"p": 2, "d": 4}


def test_a_worker_to_spare_flips_though_its_pool_may_not_shrink_yet() -> None:
    """Damping still keeps 4 in p, but 3 have been enough for the shorter flip window."""
    got = arranged([move("p", 4, 4, flip_floor=3), move("d", 2, 4)], 16)
    assert got.flips == {("p", "d"): 1}
    assert got.targets == {"p": 3, "d": 4}


def test_another_shape_does_not_flip() -> None:
    got = arranged([move("p", 4, 2), move("d", 2, 4)], 16, flips=False)
    assert got.flips == {}


def test_starting_workers_do_not_flip() -> None:
    assert arranged([move("p", 4, 2, num_ready=1), move("d", 2, 4)], 16).flips == {("p", "d"): 1}


def test_a_short_budget_goes_to_the_pool_that_is_served_worst() -> None:
    got = arranged([move("p", 2, 8), move("d", 6, 8)], 12, flips=False)
    assert got.targets == {"p": 6, "d": 6}
    assert got.limited == {"p", "d"}


def test_a_smaller_budget_shrinks_what_is_served_best_down_to_its_minimum() -> None:
    got = arranged([move("p", 4, 4), move("d", 4, 4, goal=8)], 6)
    assert got.targets == {"p": 2, "d": 4}
    assert arranged([move("p", 2, 2), move("d", 2, 2)], 1).targets == {"p": 1, "d": 1}


def test_both_or_neither() -> None:
    """d's two GPUs would not make room for p's worker of eight: d keeps them."""
    moves = [move("p", 1, 2, gpus_per_worker=8), move("d", 4, 2, goal=2)]
    assert arranged(moves, 12, flips=False).targets == {"p": 1, "d": 4}


@pytest.mark.parametrize(("max_gpus", "targets"), [(4, {"m": 2, "d": 0}), (2, {"m": 0, "d": 2})])
def test_what_replaces_a_pool_fits_beside_it_or_neither_moves(max_gpus: int, targets: dict[str, int]) -> None:
    """Mixed workers take over from decode ones, which go only when those are ready: for a while both hold GPUs."""
    moves = [move("m", 0, 2, minimum=0), move("d", 2, 0, minimum=0)]
    got = arrange(moves, lambda a, b: False, lambda a, b: (a, b) == ("m", "d"), max_gpus)
    assert got.targets == targets


@pytest.mark.parametrize("wanted", [10**3, 10**18, 10**400], ids=["10^3", "10^18", "10^400"])
def test_a_target_of_any_size_is_cut_to_the_budget(wanted: int) -> None:
    assert arranged([move("d", 2, wanted)], 12).targets == {"d": 12}
    both = [move("p", 2, wanted), move("d", 6, wanted, gpus_per_worker=2)]
    assert arranged(both, 20, flips=False).targets == {"p": 6, "d": 7}
    replaced = [move("m", 0, wanted, minimum=0), move("d", 2, 0, minimum=0)]
    assert arrange(replaced, lambda a, b: False, lambda a, b: (a, b) == ("m", "d"), 5).targets == {"m": 3, "d": 0}


def given_up_one_at_a_time(starts: Sequence[Starts], over: int) -> tuple[list[str], int]:
    """The pools, in order."""
    left, given = {each.pool: each.count for each in starts}, []
    by_name = {each.pool: each for each in starts}
    while over > 0 and any(left.values()):
        able = [each for each in starts if left[each.pool]]
        best = max(able, key=lambda s: Fraction(s.target - s.count + left[s.pool] - 1, s.need))
        left[best.pool] -= 1
        over -= by_name[best.pool].gpus
        given.append(best.pool)
    return given, over


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30), st.sampled_from([1, 2, 4]))),
    st.integers(0, 60),
)
def test_what_is_given_up_at_least_is_what_goes_first_one_at_a_time(
    sizes: list[tuple[int, int, int, int]], over: int
) -> None:
    starts = [Starts(str(i), kept + n, n, need, gpus) for i, (kept, n, need, gpus) in enumerate(sizes)]
    given, _ = given_up_one_at_a_time(starts, over)
    certain = given_up_at_least(starts, over)
    num_certain = sum(certain.values())
    assert Counter(given[:num_certain]) == Counter({pool: count for pool, count in certain.items() if count})
    assert len(given) - num_certain <= len(starts)


names = ("a", "b", "c")


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[Move], int, frozenset[tuple[str, str]], frozenset[tuple[str, str]]]:
    """Any wants that together run within a budget now."""
    moves = []
    for name in names[: draw(st.integers(1, 3))]:
        current = draw(st.integers(0, 8))
        target = draw(st.integers(0, 12))
        goal = draw(st.integers(target, 14)) if target > current else draw(st.integers(0, target))
        minimum = draw(st.integers(0, max(0, min(current, target))))
        moves.append(
            Move(
                pool=name,
                current=current,
                num_ready=draw(st.integers(0, current)),
                num_draining=draw(st.integers(0, 2)),
                target=target,
                goal=max(goal, minimum),
                flip_floor=draw(st.integers(0, current)),
                pressure_floor=draw(st.integers(0, current)),
                minimum=minimum,
                gpus_per_worker=draw(st.sampled_from([1, 2, 4])),
                step=draw(st.integers(1, 4)),
                held=target == current and draw(st.booleans()),
            )
        )
    held = sum(m.gpus_per_worker * m.current for m in moves)
    pairs = st.frozensets(st.sampled_from([(a, b) for a in names for b in names if a != b]))
    by_name = {m.pool: m for m in moves}
    same = frozenset(
        (a, b)
        for a, b in draw(pairs)
        if a in by_name and b in by_name and by_name[a].gpus_per_worker == by_name[b].gpus_per_worker
    )
    return moves, held + draw(st.integers(0, 8)), same, draw(pairs)


@settings(max_examples=400, deadline=None)
@given(situations())
def test_properties_of_every_arrangement(
    situation: tuple[list[Move], int, frozenset[tuple[str, str]], frozenset[tuple[str, str]]],
) -> None:
    """Within the budget; no pool beyond what it wanted, none grown that wanted to shrink, held ones untouched; a worker
    leaves a pool once; minimums are kept."""
    moves, max_gpus, may_flip, replaces = situation
    got = arrange(moves, lambda a, b: (a, b) in may_flip, lambda a, b: (a, b) in replaces, max_gpus)
    assert sum(m.gpus_per_worker * got.targets[m.pool] for m in moves) <= max_gpus
    for m in moves:
        target = got.targets[m.pool]
        given = sum(n for (source, _), n in got.flips.items() if source == m.pool)
        taken = sum(n for (_, to), n in got.flips.items() if to == m.pool)
        assert target <= max(m.current, m.target)
        if m.target > m.current:
            assert target >= m.current
            assert given == 0
        assert target >= min(m.minimum, m.current, m.target)
        assert given <= m.num_ready
        assert taken <= max(0, target - m.current)
        assert not (given and taken)
        if m.held:
            assert (target, given, taken) == (m.current, 0, 0)
    assert set(got.flips) <= may_flip
