"""Layers that see a window of tokens have blocks of their own, which are given back when they have left it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.blocks.block_pool import BlockPool
from kvstore.blocks.block_pools import BlockPools
from tests.workers.paged_runner import BLOCK_SIZE, PagedRunner, make
from workers.engine.engine import Engine
from workers.engine.request import Request, RequestRole
from workers.model.cache_spec import CacheSpec, cache_groups
from workers.sampling.params import SamplingParams

WINDOWS = st.sampled_from([(0, 6), (0, 4, 9), (7,), (0,), (0, 1)])


def request(name: str, length: int, max_tokens: int, role: RequestRole = RequestRole.MIXED, start: int = 0) -> Request:
    ids = [(start + i) % 20 for i in range(length)]
    return Request(name, ids, length, SamplingParams(max_tokens=max_tokens, ignore_eos=True), role=role)


def run(engine: Engine, most_steps: int = 3000) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(most_steps):
        events = engine.step()
        for token in events.tokens if events else ():
            tokens.setdefault(token.request_id, []).append(token.token_id)
        if not engine.scheduler.has_work():
            break
    assert not engine.scheduler.has_work()
    engine.scheduler.pool.check()
    assert engine.scheduler.pool.num_referenced == 0
    return tokens


def alone(new: Request, windows: tuple[int, ...]) -> list[int]:
    """The tokens of a request in an engine of its own, computed in one chunk."""
    engine, _ = make(64, 200, False, windows=windows)
    engine.submit(new)
    return run(engine)[new.request_id]


def test_groups_are_layers_with_equal_specs_the_whole_ones_first():
    full, window, latent = CacheSpec(2, 8), CacheSpec(2, 8, window=16), CacheSpec(1, 24, is_latent=True)
    groups = cache_groups([window, full, window, full, latent])
    assert [(g.index, g.spec, g.layers) for g in groups] == [(0, full, (1, 3)), (1, latent, (4,)), (2, window, (0, 2))]
    assert (full.num_planes, latent.num_planes) == (2, 1)
    for wrong in ({"window": -1}, {"head_dim": 0}, {"num_kv_heads": 2, "is_latent": True}):
        with pytest.raises(ValueError, match=r"no layer keeps|a latent cache"):
            CacheSpec(**{"num_kv_heads": 1, "head_dim": 8, **wrong})


@settings(max_examples=200, deadline=None)
@given(windows=WINDOWS, held=st.lists(st.sets(st.integers(0, 11)), min_size=3, max_size=3), count=st.integers(0, 12))
def test_a_prefix_is_cached_when_every_group_can_go_on_from_it(windows, held, count):
    names = [bytes([i]) * 16 for i in range(12)]
    pools = [BlockPool(12, BLOCK_SIZE) for _ in windows]
    for pool, indices in zip(pools, held, strict=False):
        blocks = pool.allocate(len(indices))
        for block_id, index in zip(blocks, sorted(indices), strict=True):
            pool.register(block_id, names[index])
        pool.release(blocks)
    together = BlockPools(pools, windows)

    def fits(num_blocks: int) -> bool:
        return all(
            set(range(max(0, num_blocks * BLOCK_SIZE - window) // BLOCK_SIZE if window else 0, num_blocks)) <= has
            for window, has in zip(windows, held, strict=False)
        )

    found = together.num_matched(names[:count])
    assert found == max(n for n in range(count + 1) if fits(n))
    tables = together.take_prefix(names[:found])
    assert all(len(table.block_ids) == found for table in tables)
    for pool, table in zip(pools, tables, strict=True):
        assert [pool.name_of(block_id) for block_id in table.held] == names[table.num_released : found]
    together.release(tables)
    together.check()


@pytest.mark.parametrize("is_async", [False, True])
@settings(max_examples=100, deadline=None)
@given(
    windows=WINDOWS,
    shapes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 14), st.integers(0, 2)), min_size=1, max_size=6),
    num_blocks=st.integers(12, 20),
    budget=st.integers(3, 12),
)
def test_tokens_are_those_of_each_request_alone(is_async, windows, shapes, num_blocks, budget):
    """In any batch, with blocks given back, prefixes shared, and requests preempted."""
    requests = [request(f"r{i}", length, n, start=5 * start) for i, (length, n, start) in enumerate(shapes)]
    expected = {r.request_id: alone(request(r.request_id, length, n, start=5 * start), windows)
                for r, (length, n, start) in zip(requests, shapes, strict=True)}  # fmt: skip
    engine, _ = make(num_blocks, budget, is_async, windows=windows)
    for new in requests:
        engine.submit(new)
    assert run(engine) == expected


def test_a_window_holds_a_bounded_number_of_blocks():
    engine, _ = make(64, 8, False, windows=(0, 6))
    engine.submit(request("a", 40, 60))
    most = [0, 0]
    while engine.scheduler.has_work():
        engine.step()
        for group, pool in enumerate(engine.scheduler.pool.pools):
            most[group] = max(most[group], pool.num_referenced)
    assert most[0] == 25
    assert most[1] <= (6 + 8) // BLOCK_SIZE + 2


@pytest.mark.parametrize("is_async", [False, True])
@settings(max_examples=100, deadline=None)
@given(
    windows=WINDOWS,
    length=st.integers(1, 40),
    budget=st.integers(3, 20),
    announced=st.lists(st.integers(0, 10), max_size=6),
    lost=st.sets(st.tuples(st.integers(0, 2), st.integers(0, 10)), max_size=3),
)
def test_what_a_prefill_worker_stores_a_decode_worker_goes_on_from(is_async, windows, length, budget, announced, lost):
    """Whatever is lost on the way. Of a group with a window only what the window sees is pulled."""
    expected = alone(request("r", length, 9), windows)
    prefill, source = make(16, budget, is_async, windows=windows)
    prefill.submit(request("r", length, 9, RequestRole.PREFILL))
    (first,) = run(prefill)["r"]
    assert first == expected[0]
    decode, target = make(16, budget, is_async, windows=windows)
    target.tier = source.tier
    new = request("r", length, 9, RequestRole.DECODE)
    decode.submit(new)
    names = decode.scheduler._names.of_prompt(new)
    target.is_lost = lambda group, name: (group, names.index(name)) in lost
    for count in announced:
        decode.step()
        decode.scheduler.kv_available("r", min(count, len(names)))
    decode.continue_request("r", [first])
    assert [first, *run(decode)["r"]] == expected
    pulled = {(load.group, name) for load in target.loads for name in load.block_names}
    for group, window in enumerate(windows):
        first_seen = max(0, length - window) // BLOCK_SIZE if window else 0
        asked = {names.index(name) for of, name in pulled if of == group}
        if not lost:
            assert asked == set(range(first_seen, len(names)))
    if not lost:
        assert new.num_computed_prompt_tokens == 0


def test_a_tier_keeps_blocks_of_all_groups():
    engine, runner = make(32, 8, False, windows=(0, 6), writes_back=True)
    engine.submit(request("a", 14, 9))
    run(engine)
    assert isinstance(runner, PagedRunner)
    by_group = [{name for of, name in runner.tier if of == group} for group in range(2)]
    assert by_group[0] == by_group[1]
    assert len(by_group[0]) == 5


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("length", [60, 200])
def test_a_window_with_as_few_blocks_as_a_worker_accepts(is_async, length):
    """With async scheduling a second chunk is planned before the first has left the window: it preempted itself."""
    window, budget = 8, 16
    num_blocks = -(-(window + budget * (1 + is_async)) // BLOCK_SIZE) + 2
    engine, _ = make(num_blocks, budget, is_async, windows=(window,))
    engine.scheduler.config = replace(engine.scheduler.config, max_model_len=250)
    new = request("r", length, 5)
    engine.submit(new)
    assert len(run(engine, 300)["r"]) == 5
    assert new.num_preemptions == 0


def test_requests_that_wait_for_window_blocks_of_each_other_go_on():
    """Each held some of a windowed group and waited for more, and nothing else ran."""
    engine, runner = make(40, 8, False, windows=(0, 16))
    pool = engine.scheduler.pool
    pool.pools = (pool.pools[0], BlockPool(8, BLOCK_SIZE))
    source, store = make(40, 8, False, windows=(0, 16))
    for name, start in (("a", 0), ("b", 7)):
        source.submit(request(name, 26, 9, RequestRole.PREFILL, start))
    first = run(source)
    runner.tier = store.tier
    for name, start in (("a", 0), ("b", 7)):
        engine.submit(request(name, 26, 9, RequestRole.DECODE, start))
        engine.continue_request(name, first[name])
    tokens = run(engine, 400)
    for name, start in (("a", 0), ("b", 7)):
        assert [*first[name], *tokens[name]] == alone(request(name, 26, 9, start=start), (0, 16))


@given(
    held=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    taken=st.lists(st.integers(0, 6), min_size=2, max_size=2),
    wanted=st.integers(0, 14),
)
def test_what_is_missing_is_what_keeps_tables_from_being_extended(held, taken, wanted):
    """When so many blocks have become free in every group they can be, and not with one less."""
    pools = BlockPools([BlockPool(24, BLOCK_SIZE) for _ in held], (0, 0))
    tables = pools.take_prefix([])
    others = [pool.allocate(12 + count) for pool, count in zip(pools.pools, taken, strict=True)]
    for group, count in enumerate(held):
        pools.extend(tables, count, [group])
    missing = pools.num_missing(tables, wanted, (0, 1))
    assert (missing <= 0) == pools.can_extend(tables, wanted, (0, 1))
    for left in range(missing, 0, -1):
        assert pools.num_missing(tables, wanted, (0, 1)) == left
        for pool, blocks in zip(pools.pools, others, strict=True):
            pool.release([blocks.pop()])
    pools.extend(tables, wanted, (0, 1))
    pools.check()
