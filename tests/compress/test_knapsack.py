"""The knapsack against the exact solution; mixed precision against uniform schemes of the same size."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.job import compress_model, open_model
from compress.request import Request, parse_bytes, recipe_for
from compress.schemes import scheme_labelled
from compress.selection.knapsack import Choice, Items, choose, total_bytes, total_loss
from compress.selection.mixed import end_bytes, measure, mixed_recipe
from tests.compress.models import make_blocks, make_model

choices = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 100)), min_size=1, max_size=4)


def choose_exactly(items: Items, budget_bytes: int) -> dict[str, Choice] | None:
    """Over all sums of bytes that can be reached."""
    reached: dict[int, tuple[float, dict[str, Choice]]] = {0: (0.0, {})}
    for name, choices in items.items():
        grown: dict[int, tuple[float, dict[str, Choice]]] = {}
        for used, (loss, picked) in reached.items():
            for choice in choices:
                size, total = used + choice.num_bytes, loss + choice.loss
                if size <= budget_bytes and (size not in grown or total < grown[size][0]):
                    grown[size] = (total, {**picked, name: choice})
        reached = grown
    return min(reached.values(), key=lambda found: found[0])[1] if reached else None


@settings(max_examples=150, deadline=None)
@given(st.lists(choices, min_size=1, max_size=5), st.integers(1, 160))
def test_greed_with_exchange_is_close_to_the_exact_solution(raw: list[list[tuple[int, int]]], budget: int) -> None:
    items = {
        f"item {i}": [Choice(f"choice {j}", size, float(loss)) for j, (size, loss) in enumerate(options)]
        for i, options in enumerate(raw)
    }
    exact, found = choose_exactly(items, budget), choose(items, budget)
    assert (exact is None) == (found is None)
    if exact is None or found is None:
        return
    assert total_bytes(found) <= budget
    assert total_loss(exact) <= total_loss(found)
    most = sum(max(choice.loss for choice in options) for options in items.values())
    assert total_loss(found) - total_loss(exact) <= 0.15 * most


def test_a_hull_point_that_does_not_fit_leaves_room_for_others() -> None:
    items = {
        "a": [Choice("small", 1, 10.0), Choice("large", 11, 0.0)],
        "b": [Choice("small", 1, 5.0), Choice("middle", 3, 1.0), Choice("large", 20, 0.0)],
    }
    found = choose(items, 13)
    assert found is not None
    assert {name: choice.name for name, choice in found.items()} == {"a": "large", "b": "small"}
    found = choose(items, 14)
    assert found is not None
    assert {name: choice.name for name, choice in found.items()} == {"a": "large", "b": "middle"}


@pytest.mark.parametrize("kind", ["llama", "qwen3_experts"])
def test_mixed_precision_fits_its_budget_and_agrees_within_products(tmp_path: Path, kind: str) -> None:
    model, blocks, recipe = open_model(make_model(kind, tmp_path)), make_blocks(40, 6), recipe_for(Request("gptq"))
    schemes = [scheme_labelled(label) for label in ("w4a16:32", "w8a16:32", "plain")]
    items = measure(model, recipe, schemes, blocks, lambda done: None)
    assert all(options[0].loss >= options[1].loss >= options[2].loss == 0 for options in items.values())
    smallest = end_bytes(model) + sum(options[0].num_bytes for options in items.values())
    mixed = mixed_recipe(model, recipe, items, int(smallest * 1.1))
    assert mixed.weight_bytes <= smallest * 1.1
    used = dict(mixed.recipe.schemes)
    assert len(set(used.values())) > 1
    for name, scheme in used.items():
        if name.endswith("k_proj"):
            assert used[name.replace("k_proj", "q_proj")] == scheme
        if name.endswith("up_proj"):
            assert used[name.replace("up_proj", "gate_proj")] == scheme
    report = compress_model(model, mixed.recipe, blocks, tmp_path / "out", lambda done: None, mixed.predicted_kl_nats)
    assert report.loss is not None
    assert mixed.predicted_kl_nats is not None
    assert 0.3 < report.loss.kl_nats / mixed.predicted_kl_nats < 3
    with pytest.raises(CompressError, match=r"--budget 1000: the smallest choices take \d+ bytes"):
        mixed_recipe(model, recipe, items, 1000)


def test_a_budget_is_bytes() -> None:
    assert parse_bytes("6.2MB") == 6_200_000
    assert parse_bytes("40GB") == 40_000_000_000
    for wrong in ("", "much", "-3", "4 bits", "nan", "1e40"):
        with pytest.raises(CompressError, match="--budget"):
            parse_bytes(wrong)
