"""The benchmark of policies: each does for the two tenants what it is for, and the prefill budget keeps its target."""

from __future__ import annotations

from bench.scheduling import SETTINGS, TARGET_S, Outcome, measure

DURATION_S = 12.0


def outcomes(name: str) -> dict[str, Outcome]:
    (setting,) = (setting for setting in SETTINGS if setting.name == name)
    return {outcome.tenant: outcome for outcome in measure(setting, DURATION_S)}


def test_chats_do_not_wait_behind_a_flood_but_under_fcfs() -> None:
    by_policy = {name: outcomes(name) for name in ("fcfs", "priority", "deadline", "fair_share")}
    fcfs = by_policy.pop("fcfs")
    for name, found in by_policy.items():
        assert found["chat"].ttft_p95_s < fcfs["chat"].ttft_p95_s / 2, name
        assert found["batch"].last_end_s < 1.2 * fcfs["batch"].last_end_s, name


def test_times_between_tokens_stay_under_the_target() -> None:
    for tenant, outcome in outcomes("fair_share, tpot_target").items():
        assert outcome.gap_p95_s < 1.05 * TARGET_S, tenant
    assert outcomes("fair_share")["chat"].gap_p95_s > 2 * TARGET_S


def test_blocks_are_swapped_where_the_tiers_are_faster() -> None:
    assert outcomes("fcfs, few blocks")["chat"].num_swaps == 0
    swapping = outcomes("fcfs, few blocks, swap")["chat"]
    assert swapping.num_swaps > 0
    assert swapping.num_recomputes == 0
