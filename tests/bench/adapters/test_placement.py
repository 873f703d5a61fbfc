"""The simulation of placement by residency: repeatable, and homes are worth something in it."""

from __future__ import annotations

from bench.adapters.placement import NUM_WORKERS, simulate


def test_homes_keep_more_adapters_where_they_are_and_load_spreads_all_the_same() -> None:
    homes, resident, blind = (simulate(way, 100, 40.0, 600, seed=1) for way in ("homes", "resident", "blind"))
    assert homes == simulate("homes", 100, 40.0, 600, seed=1)
    assert homes.hit_share > resident.hit_share > blind.hit_share
    assert homes.loads_per_request < resident.loads_per_request < blind.loads_per_request
    assert homes.max_share < 2 / NUM_WORKERS
