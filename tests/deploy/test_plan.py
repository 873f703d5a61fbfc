from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest

from deploy import config
from deploy.actors.kv_nodes import KVNodeSettings, node_spec
from deploy.config import PoolConfig
from deploy.errors import ConfigError
from deploy.plan import (
    ArenaPlan,
    ClusterPlan,
    check_cpu_memory,
    cluster_name,
    layers_per_fragment,
    make_plan,
    num_cpus_needed,
    stage_boundaries,
)
from kvstore.config import KVStoreConfig, NodeSpec
from kvstore.tiers.host.arena import arena_bytes
from router.config import RouterConfig, RouterSpec
from workers.config import EngineConfig, EngineOptions, WorkerSpec
from workers.kv.grid import fragment_grid
from workers.model.cache_spec import CacheSpec, cache_groups
from workers.model.registry import load_config
from workers.parallel import stage_layers

FULL = CacheSpec(2, 8)


def plan(tiny_model: Path, *overrides: str, num_gpus: float = 0) -> ClusterPlan:
    made = config.load(None, overrides)
    return make_plan(made, load_config(tiny_model), str(tiny_model), num_gpus, "memory://h:1")


def test_the_laptops_plan(tiny_model: Path) -> None:
    made = plan(tiny_model)
    assert [(pool.name, pool.spec.role, pool.replicas, pool.num_ranks) for pool in made.pools] == [
        ("prefill", "prefill", 1, 1),
        ("decode", "decode", 1, 1),
    ]
    assert plan(tiny_model, "model.plugins=[a, b]").pools[1].spec.engine.plugins == ("a", "b")
    engine = made.pools[0].spec.engine
    assert (engine.device, engine.dtype, engine.block_size) == ("cpu", "float32", 16)
    assert made.pools[0].spec.control == "memory://h:1"
    assert made.model_name == "tiny"
    # 4 layers, K and V, 16 tokens, 16 numbers of 4 bytes
    assert made.arena.slot_bytes == 4 * 2 * 16 * 16 * 4
    file_bytes = arena_bytes(made.arena.slot_bytes, made.arena.num_slots)
    assert 0 <= 512 * 2**20 - file_bytes < made.arena.slot_bytes + 128  # not one slot more would fit


@pytest.mark.parametrize(("encoding", "row_bytes"), [("none", 16 * 4), ("int8", 16 + 4), ("fp8", 16 + 4)])
def test_slots_are_as_large_as_what_is_kept_in_them(tiny_model: Path, encoding: str, row_bytes: int) -> None:
    made = plan(tiny_model, f"kvstore.kv_encoding={encoding}", "kvstore.tier_compression=zstd")
    assert made.arena.slot_bytes == 4 * 2 * 16 * row_bytes
    assert {pool.spec.engine.kv_encoding for pool in made.pools} == {encoding}
    assert {pool.spec.kvstore.tier_compression for pool in made.pools} == {"zstd"}


@pytest.mark.parametrize(("kv_cache_dtype", "row_bytes"), [("auto", 16 * 4), ("int8", 16 + 4), ("fp8", 16)])
def test_slots_and_blocks_are_as_large_as_what_the_cache_keeps(
    tiny_model: Path, kv_cache_dtype: str, row_bytes: int
) -> None:
    made = plan(tiny_model, f"kvstore.kv_cache_dtype={kv_cache_dtype}")
    assert made.arena.slot_bytes == 4 * 2 * 16 * row_bytes
    assert {pool.spec.engine.kv_cache_dtype for pool in made.pools} == {kv_cache_dtype}
    model = load_config(tiny_model)
    block_bytes = sum(spec.num_kv_heads for spec in model.cache_specs) * 2 * 16 * row_bytes
    settings = ["pools.decode.num_blocks=100", f"kvstore.kv_cache_dtype={kv_cache_dtype}"]
    check_cpu_memory(config.load(None, settings), model, 100 * block_bytes, has_gpus=False)
    with pytest.raises(ConfigError, match=f"100 blocks of {block_bytes} bytes"):
        check_cpu_memory(config.load(None, settings), model, 100 * block_bytes - 1, has_gpus=False)


def test_gpus_change_block_size_dtype_and_resources(tiny_model: Path) -> None:
    made = plan(tiny_model, "pools.decode.tp=2", "pools.decode.pp=2", num_gpus=8)
    decode = made.pools[1]
    assert (decode.spec.engine.device, decode.spec.engine.dtype, decode.spec.engine.block_size) == (
        "cuda",
        "bfloat16",
        64,
    )
    assert decode.bundles == ({"CPU": 0.1}, {"CPU": 2.0, "GPU": 2.0}, {"CPU": 2.0, "GPU": 2.0})
    assert [decode.bundle_of(rank) for rank in range(4)] == [1, 1, 2, 2]
    assert decode.gpus_per_rank == 1.0


def test_a_cpu_pool_takes_no_gpus(tiny_model: Path) -> None:
    made = plan(tiny_model, "pools.decode.device=cpu", "pools.prefill.device=cpu", num_gpus=8)
    assert all("GPU" not in bundle for pool in made.pools for bundle in pool.bundles)
    assert made.pools[0].gpus_per_rank == 0


def test_pools_on_different_devices_must_agree_on_a_dtype(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.dtype"):
        plan(tiny_model, "pools.decode.device=cpu", num_gpus=8)
    made = plan(tiny_model, "pools.decode.device=cpu", "model.dtype=bfloat16", num_gpus=8)
    assert {pool.spec.engine.dtype for pool in made.pools} == {"bfloat16"}
    assert {pool.spec.engine.block_size for pool in made.pools} == {64}


def test_one_batch_invariance_for_all_pools(tiny_model: Path) -> None:
    made = plan(tiny_model, "model.batch_invariant=true", "pools.decode.tp=2", "pools.prefill.tp=2")
    assert all(pool.spec.engine.batch_invariant for pool in made.pools)
    with pytest.raises(ConfigError, match=r"model\.batch_invariant: all pools must have the same tp"):
        plan(tiny_model, "model.batch_invariant=true", "pools.decode.tp=2")
    with pytest.raises(ConfigError, match=r"model\.batch_invariant"):
        plan(tiny_model, "model.batch_invariant=true", "model.dtype=float32", "pools.decode.device=cpu", num_gpus=8)
    assert not any(pool.spec.engine.batch_invariant for pool in plan(tiny_model).pools)


def test_custom_resources_tie_every_bundle(tiny_model: Path) -> None:
    made = plan(tiny_model, "pools.decode.resources={decode_host: 0.01}")
    assert all(bundle["decode_host"] == 0.01 for bundle in made.pools[1].bundles)
    assert all("decode_host" not in bundle for bundle in made.pools[0].bundles)


def test_the_fake_engine_stays_on_the_cpu_and_knows_its_speed(tiny_model: Path) -> None:
    engine = plan(tiny_model, "engine.runner=fake", "engine.fake_step_s=0.01", num_gpus=8).pools[0].spec.engine
    assert (engine.runner, engine.fake_step_s, engine.device) == ("fake", 0.01, "cpu")


@pytest.mark.parametrize(
    ("override", "positions", "complaint"),
    [
        (
            "pools.decode.num_blocks=2147483647",
            512,
            r"^pools\.decode\.num_blocks: 2147483647 blocks of 16384 ",
        ),
        ("kvstore.block_size=65536", 512, r"^kvstore\.block_size: one block takes 67108864 bytes, more than"),
        (
            "model.dtype=auto",
            2**27,
            r"^config\.json: max_position_embeddings=134217728 takes a table of 8589934592",
        ),
    ],
)
def test_more_than_the_machines_memory_is_refused_on_cpus(
    tiny_model: Path, override: str, positions: int, complaint: str
) -> None:
    model = replace(load_config(tiny_model), max_position_embeddings=positions)
    made = config.load(None, [override])
    with pytest.raises(ConfigError, match=complaint):
        check_cpu_memory(made, model, 2**24, has_gpus=False)
    check_cpu_memory(made, model, 2**24, has_gpus=True)
    check_cpu_memory(config.load(None), load_config(tiny_model), 2**24, has_gpus=False)


def test_cpus_needed_counts_every_rank() -> None:
    made = config.load(None, ["pools.decode.tp=2", "pools.decode.pp=2", "pools.prefill.replicas=3"])
    assert num_cpus_needed(made) == math.ceil(3 * 1.1 + 4.1)


@pytest.mark.parametrize(
    ("num_layers", "depths", "expected"),
    [
        (8, (1, 1), 8),
        (8, (2, 1), 4),
        (8, (2, 4), 2),
        (7, (2, 1), 1),  # stages of 4 and 3 layers
        (6, (2, 3), 1),  # boundaries 3, and 2 and 4
        (12, (4, 2), 3),
        (32, (1, 8), 4),
    ],
)
def test_the_greatest_group_of_layers_that_no_stage_cuts(
    num_layers: int, depths: tuple[int, int], expected: int
) -> None:
    made = config.load(None, [f"pools.prefill.pp={depths[0]}", f"pools.decode.pp={depths[1]}"])
    found = layers_per_fragment(made, [FULL] * num_layers)
    assert found == expected
    boundaries = stage_boundaries(depths, num_layers, stage_layers)
    fits = [g for g in range(1, num_layers + 1) if all(edge % g == 0 for edge in boundaries)]
    assert found == max(fits)


def test_a_configured_group_of_layers_is_checked() -> None:
    made = config.load(None, ["pools.prefill.pp=2", "kvstore.layers_per_fragment=2"])
    assert layers_per_fragment(made, [FULL] * 8) == 2
    wrong = config.load(None, ["pools.prefill.pp=2", "kvstore.layers_per_fragment=3"])
    with pytest.raises(
        ConfigError, match=r"kvstore\.layers_per_fragment: 3 does not divide .* 4, 8; 4 is the greatest"
    ):
        layers_per_fragment(wrong, [FULL] * 8)


@pytest.mark.parametrize(("num_layers", "depth", "expected"), [(4, 1, 2), (8, 2, 2), (6, 1, 3), (6, 2, 1), (2, 2, 1)])
def test_fragments_have_layers_of_one_cache_group(num_layers: int, depth: int, expected: int) -> None:
    """A model of alternating layers did not start: its fragments had as many layers as the whole model."""
    specs = [CacheSpec(2, 8, window=index % 2 * 16) for index in range(num_layers)]
    made = config.load(None, [f"pools.prefill.pp={depth}", f"pools.decode.pp={depth}"])
    assert layers_per_fragment(made, specs) == expected
    for group in cache_groups(specs):
        for stage in range(depth):
            held = stage_layers(num_layers, depth, stage)
            grid = fragment_grid(group, held, expected, range(2))
            assert len(grid.keys(b"n" * 16)) == len(grid.layers) // expected * 2


def test_slots_hold_the_largest_groups_fragments(tiny_model: Path) -> None:
    made = config.load(None)
    narrow, wide = CacheSpec(2, 8), CacheSpec(2, 64, window=16)
    model = replace(load_config(tiny_model), num_hidden_layers=2, decoder=Specs((narrow, wide)))
    plan = make_plan(made, model, "/models/m", 0, "")
    assert plan.arena.slot_bytes == 1 * 2 * 16 * 64 * 4


@dataclass(frozen=True)
class Specs:
    """A decoder of which only the cache matters."""

    cache_specs: tuple[CacheSpec, ...]


def test_a_hub_id_is_the_models_name(tiny_model: Path) -> None:
    assert make_plan(config.load(None), load_config(tiny_model), "org/name", 0, "").model_name == "org/name"


def test_a_disk_that_holds_no_fragments_is_refused_by_name(tiny_model: Path) -> None:
    """It was found by the KV node, when everything else had been started."""
    sizes = ["kvstore.disk_bytes=16777216", "kvstore.disk_dir=/disk", "kvstore.block_size=16384"]
    with pytest.raises(ConfigError, match=r"^kvstore\.disk_bytes: must be at least \d+ for fragments of 8388608 bytes"):
        plan(tiny_model, *sizes)


def test_a_clusters_name_is_its_own_and_stays(tiny_model: Path) -> None:
    def name(*overrides: str, host: str = "host", start: str = "1") -> str:
        return cluster_name(config.load(None, overrides), str(tiny_model), host, start)

    assert name() == name(start="2")
    others = [name(host="other"), name("endpoints.grpc_port=50052"), name("model.name=other"), name("name=given")]
    assert len({name(), *others}) == 5
    assert others[-1] == "given"
    assert name("endpoints.grpc_port=0") != name("endpoints.grpc_port=0", start="2")  # any port: nothing stays
    assert (
        make_plan(config.load(None), load_config(tiny_model), str(tiny_model), 0, "", cluster="c").pools[0].spec.cluster
        == "c"
    )
    with pytest.raises(ConfigError, match=r"^name: must be at most 63 letters, digits, dots, - and _, not 'a b'"):
        config.load(None, ["name=a b"])


def test_what_an_operator_sets_is_declared_once() -> None:
    """Specs hold the branch of the configuration; its fields stand in no other class, but for what is derived."""
    names = {
        cls: {item.name for item in fields(cls)} for cls in (KVStoreConfig, RouterConfig, PoolConfig, EngineConfig)
    }
    for spec in (NodeSpec, WorkerSpec, KVNodeSettings):
        assert {item.name for item in fields(spec)} & names[KVStoreConfig] <= {"control", "layers_per_fragment"}
    assert {item.name for item in fields(RouterSpec)} & names[RouterConfig] == set()
    options = {item.name for item in fields(EngineOptions)}
    assert names[PoolConfig] & names[EngineConfig] == options | {"device"}


def test_each_process_gets_the_branch_as_it_was_written(tiny_model: Path) -> None:
    overrides = [
        "kvstore.disk_compression=zstd",
        "kvstore.prefix_fetch=never",
        "pools.decode.max_num_seqs=7",
        "pools.decode.scheduler.policy=priority",
    ]
    made = config.load(None, overrides)
    decode = plan(tiny_model, *overrides).pools[1].spec
    assert decode.kvstore == made.kvstore
    assert decode.engine.options() == made.pools["decode"].options()
    assert decode.engine.scheduler.policy == "priority"
    settings = KVNodeSettings("id", "c", "/run", ArenaPlan("/shm", 64, 8), "", "", made.kvstore, secret="s3cret")
    spec = node_spec(settings, "n", Path("/shm/a"), 8)
    assert (spec.kvstore, spec.host_address, spec.secret) == (made.kvstore, "unix:/run/kv-n.sock", "")
    with_disk = replace(settings, kvstore=replace(made.kvstore, disk_bytes=1 << 24, disk_dir="/disk"))
    assert node_spec(with_disk, "n", Path("/shm/a"), 8).secret == "s3cret"
    assert "s3cret" not in f"{settings} {node_spec(with_disk, 'n', Path('/shm/a'), 8)} {decode}"
