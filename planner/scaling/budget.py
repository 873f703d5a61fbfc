"""All pools together: flips before starts, and never more GPUs than the budget.

Rules, each from a fault of an anchor (shared/research/control.md, section 1.2): pools are clamped together (dynamo
12428); no pool moves against the direction it wanted (13064); of opposing moves both are made or neither. Where the
budget is short the pool that is served worst gets the next GPUs. Knows nothing of objectives or of time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """What one pool wants."""

    pool: str
    current: int
    """Workers now: ready, starting and on their way from other pools."""
    num_ready: int
    """Those that can be given to another pool."""
    num_draining: int = 0
    """Those that retire, and hold their GPUs until they are gone."""
    target: int
    """Workers wanted now."""
    goal: int
    """Workers wanted in the end, when steps are limited."""
    flip_floor: int
    """Workers above it may go to another pool at once."""
    pressure_floor: int
    """Workers above it may go when the budget is short."""
    minimum: int
    """Fewest workers."""
    gpus_per_worker: int
    """Of one worker."""
    step: int = 1
    """Most workers that it gives away in one decision."""
    held: bool = False
    """Neither gives workers to other pools nor takes any of theirs."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What all pools get."""

    targets: dict[str, int]
    flips: dict[tuple[str, str], int]
    """Workers by (from pool, to pool)."""
    limited: frozenset[str]
    """Pools that the budget kept from what they wanted."""


def arrange(
    moves: Sequence[Move],
    may_flip: Callable[[str, str], bool],
    replaces: Callable[[str, str], bool],
    max_gpus: int,
) -> Arrangement:
    """The targets, none further than wanted, together within the budget where minimums allow it.

    may_flip(a, b): a worker of a can serve in b. replaces(a, b): b's requests can go to a.
    """
    work = _Work(moves, may_flip, max_gpus)
    work.flip_before_starting()
    if work.over > 0:
        work.take_under_pressure()
        work.trim_growth()
        work.give_back()
        work.shrink_to_budget()
    work.both_or_neither()
    work.replace_within_budget(replaces)
    limited = {
        move.pool
        for move in moves
        if (move.target > move.current and work.targets[move.pool] < move.target)
        or (work.targets[move.pool] < min(move.target, move.current) and move.pool not in {f for f, _ in work.flips})
        or (move.target < move.current and work.targets[move.pool] > move.target)
    }
    flips = {pair: count for pair, count in work.flips.items() if count}
    return Arrangement(work.targets, flips, frozenset(limited))


@dataclass(frozen=True, slots=True)
class Starts:
    """What one pool may give up when the budget is short."""

    pool: str
    target: int
    count: int
    """Starts among the target."""
    need: int
    """The target over this is how well the pool would be served."""
    gpus: int
    """Of one worker."""

    def above(self, level: int, unit: int) -> int:
        """Starts without which the pool would still be served better than level / unit."""
        left = level * self.need // unit + 1
        return max(0, min(self.count, self.target - left))


def given_up_at_least(starts: Sequence[Starts], over: int) -> dict[str, int]:
    """Starts by pool that trim_growth gives up for certain when the targets have `over` GPUs too many.

    It gives up a few more of each pool, one at a time. The level down to which all of them go is found by bisection, so
    targets may be of any size.
    """
    if over <= 0 or not starts:
        return {}
    unit = max(each.need for each in starts) ** 2 + 1  # two different levels are further apart than 1 / unit
    low, high = -unit, max(each.target * unit // each.need for each in starts) + 1
    while high - low > 1:
        middle = (low + high) // 2
        freed = sum(each.gpus * each.above(middle, unit) for each in starts)
        low, high = (low, middle) if freed < over else (middle, high)
    return {each.pool: each.above(high, unit) for each in starts}


class _Work:
    """The targets while they are worked out."""

    def __init__(self, moves: Sequence[Move], may_flip: Callable[[str, str], bool], max_gpus: int) -> None:
        self._moves = {move.pool: move for move in moves}
        self._may_flip, self._max_gpus = may_flip, max_gpus
        self.targets = {move.pool: move.target for move in moves}
        self.flips: dict[tuple[str, str], int] = {}
        self._taken: list[str] = []  # one entry for each worker that only the budget's shortness takes

    @property
    def over(self) -> int:
        """GPUs beyond the budget."""
        return sum(self._moves[name].gpus_per_worker * n for name, n in self.targets.items()) - self._max_gpus

    def _growing(self) -> list[Move]:
        """Those with the least of what they need first."""
        growing = [m for m in self._moves.values() if self.targets[m.pool] > m.current]
        return sorted(growing, key=lambda m: self._served(m, self.targets[m.pool]))

    def _served(self, move: Move, count: int) -> float:
        """How much of what it needs a pool would have: the measure of attainment when there are too few GPUs."""
        return count / self._need(move)

    def _need(self, move: Move) -> int:
        return max(1, move.goal, move.pressure_floor)

    def _starts(self, move: Move) -> int:
        """Workers to be started: growth that no flip covers."""
        flipped = sum(count for (_, to), count in self.flips.items() if to == move.pool)
        return max(0, self.targets[move.pool] - move.current - flipped)

    def _givable(self, move: Move, floor: int) -> int:
        """Workers that a pool which does not grow can give, down to a floor."""
        if move.held or move.target > move.current:
            return 0
        given = sum(count for (source, _), count in self.flips.items() if source == move.pool)
        left = move.current - given
        return max(0, min(left - max(floor, move.minimum), move.num_ready - given, move.step - given))

    def flip_before_starting(self) -> None:
        """Workers that retire anyway, then workers to spare, serve where workers are needed."""
        for spare in (False, True):
            for taker in self._growing():
                for giver in self._moves.values():
                    if taker.held or not self._may_flip(giver.pool, taker.pool):
                        continue
                    floor = giver.flip_floor if spare else giver.target
                    self._flip(giver, taker, min(self._starts(taker), self._givable(giver, floor)))

    def _flip(self, giver: Move, taker: Move, count: int) -> None:
        if count <= 0:
            return
        pair = (giver.pool, taker.pool)
        self.flips[pair] = self.flips.get(pair, 0) + count
        given = sum(n for (source, _), n in self.flips.items() if source == giver.pool)
        self.targets[giver.pool] = min(self.targets[giver.pool], giver.current - given)

    def take_under_pressure(self) -> None:
        """Workers that a pool could do without just now: by a flip where that is possible, else by retiring."""
        for taker in self._growing():
            for giver in self._moves.values():
                while self.over > 0 and self._starts(taker) and self._givable(giver, giver.pressure_floor):
                    if taker.held or not self._may_flip(giver.pool, taker.pool):
                        break
                    self._flip(giver, taker, 1)
        for giver in self._moves.values():
            while self.over > 0 and self._growing() and not giver.held and giver.target <= giver.current:
                floor = max(giver.pressure_floor, giver.minimum, giver.current - giver.step)
                if self.targets[giver.pool] <= floor:
                    break
                self.targets[giver.pool] -= 1
                self._taken.append(giver.pool)

    def trim_growth(self) -> None:
        """Starts are given up, one at a time, by the pool that would still be served best."""
        starts = [
            Starts(move.pool, self.targets[move.pool], self._starts(move), self._need(move), move.gpus_per_worker)
            for move in self._growing()
        ]
        for pool, count in given_up_at_least(starts, self.over).items():
            self.targets[pool] -= count
        while self.over > 0:
            starting = [move for move in self._growing() if self._starts(move)]
            if not starting:
                return
            best = max(starting, key=lambda m: self._served(m, self.targets[m.pool] - 1))
            self.targets[best.pool] -= 1

    def give_back(self) -> None:
        """What was taken without need, as a larger worker did not fit after all."""
        for name in reversed(self._taken):
            if self.over + self._moves[name].gpus_per_worker <= 0:
                self.targets[name] += 1

    def shrink_to_budget(self) -> None:
        """The budget became smaller than what runs: the pool that is served best gives, down to its minimum."""
        while self.over > 0:
            able = [move for move in self._moves.values() if self.targets[move.pool] > move.minimum]
            if not able:
                return
            best = max(able, key=lambda m: self._served(m, self.targets[m.pool] - 1))
            self.targets[best.pool] -= 1
            for pair in self.flips:  # a flip into it is one less; its giver keeps the worker, and may have to end it
                if pair[1] == best.pool and self.flips[pair]:
                    self.flips[pair] -= 1
                    self.targets[pair[0]] += 1
                    break

    def both_or_neither(self) -> None:
        """A pool does not shrink to make room for growth that does not come."""
        moves = self._moves.values()
        wanted = [m for m in moves if m.target > m.current]
        if not wanted or any(self.targets[m.pool] > m.current for m in wanted):
            return
        now = sum(m.gpus_per_worker * m.current for m in moves)
        freed = sum(m.gpus_per_worker * (m.current - m.goal) for m in moves if m.goal < m.current)
        if now > self._max_gpus or now - freed + min(m.gpus_per_worker for m in wanted) <= self._max_gpus:
            return  # the budget itself needs the shrink, or later steps of it make room
        for move in moves:
            if move.target < move.current and not move.held:
                self.targets[move.pool] = move.current

    def replace_within_budget(self, replaces: Callable[[str, str], bool]) -> None:
        """What takes over for a pool is ready before it shrinks: the budget has room for both, or neither moves."""
        moves = self._moves.values()
        kept = {m.pool: m.current - sum(n for (source, _), n in self.flips.items() if source == m.pool) for m in moves}
        shrinking = [m for m in moves if self.targets[m.pool] < kept[m.pool] and not m.held]
        pairs = [(g, s) for g in self._growing() if self._starts(g) for s in shrinking if replaces(g.pool, s.pool)]
        staying = {s.pool for _, s in pairs}
        need = sum(m.gpus_per_worker * (m.current + m.num_draining) for m in moves)
        need -= sum(
            m.gpus_per_worker * (kept[m.pool] - self.targets[m.pool]) for m in shrinking if m.pool not in staying
        )
        need += sum(m.gpus_per_worker * self._starts(m) for m in self._growing())
        for grower, shrinker in pairs:
            excess = max(0, need - self._max_gpus)
            count = min(self._starts(grower), -(-excess // grower.gpus_per_worker))
            self.targets[grower.pool] -= count
            need -= count * grower.gpus_per_worker
            if not self._starts(grower):
                self.targets[shrinker.pool] = kept[shrinker.pool]
        # Others may have counted on the GPUs of a pool that stays after all.
        self.trim_growth()
        self.shrink_to_budget()
