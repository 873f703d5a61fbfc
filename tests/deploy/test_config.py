from __future__ import annotations

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest

from deploy import config
from deploy.config import ClusterConfig, PoolConfig
from deploy.errors import ConfigError
from deploy.overrides import ServeFlags, load_with_flags
from deploy.processes.routers import router_specs
from kvstore.config import KVStoreConfig
from router.config import RouterSpec
from settings.loading import SettingsError, write
from settings.loading import load as load_spec

EXAMPLES = sorted((Path(config.__file__).parent / "examples").glob("*.yaml"))


def load_text(tmp_path: Path, text: str, *overrides: str) -> ClusterConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return config.load(path, overrides)


def test_defaults_are_the_laptops_cluster() -> None:
    made = config.load(None)
    assert made == ClusterConfig()
    assert {name: (pool.role, pool.replicas, pool.tp, pool.pp) for name, pool in made.pools.items()} == {
        "prefill": ("prefill", 1, 1, 1),
        "decode": ("decode", 1, 1, 1),
    }
    assert made.kvstore.control == "memory://"
    assert made.kvstore.tier == ""
    assert made.ray.address == ""
    assert made.autoscaling.mode == "off"


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_text(tmp_path, "# nothing\n") == ClusterConfig()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_load(path: Path) -> None:
    assert config.load(path).pools


def test_there_are_the_promised_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"laptop", "two-hosts", "node-8gpu"}


def test_the_laptop_example_says_what_the_defaults_are() -> None:
    assert config.load(next(path for path in EXAMPLES if path.stem == "laptop")) == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo: 1", "foo: unknown key"),
        ("pools: {d: {role: mixed, replica: 2}}", "pools.d.replica: unknown key (did you mean replicas?)"),
        ("kvstore: {hostbytes: 2}", "kvstore.hostbytes: unknown key (did you mean host_bytes?)"),
        ("pools: {d: {role: mixed, replicas: '2'}}", "pools.d.replicas: must be a valid integer, not the text '2'"),
        ("pools: {d: {role: mixed, replicas: 1.5}}", "pools.d.replicas: must be a valid integer, not 1.5"),
        ("pools: {d: {role: mixed, tp: true}}", "pools.d.tp: must be a valid integer, not true"),
        ("engine: {runner: real}", "engine.runner: must be one of torch, fake, not 'real'"),
        ("engine: {runner: fake}\npools: {m: {role: mixed, tp: 2}}", "pools.m: engine.runner=fake takes tp=1 and pp=1"),
        ("ray: {dashboard: 1}", "ray.dashboard: must be a valid boolean, not 1"),
        ("pools: {d: {role: mixed, resources: {x: a}}}", "pools.d.resources.x: must be a valid number, not the text"),
        ("pools: {d: {replicas: 2}}", "pools.d.role: missing"),
        ("pools: {d: {role: both}}", "pools.d.role: must be one of prefill, decode, mixed, not 'both'"),
        ("pools: {d: {role: mixed, tp: 0}}", "pools.d.tp: must be at least 1, not 0"),
        ("pools: {d: {role: mixed, drain_timeout_s: .nan}}", "pools.d.drain_timeout_s: must be more than 0, not nan"),
        ("pools: {d: {role: mixed, resources: {x: -1}}}", "pools.d.resources.x: must be more than 0, not -1"),
        ("pools: {d: {role: decode}}", "pools: need a mixed pool, or a prefill and a decode pool"),
        ("pools: {}", "pools: must name at least one pool"),
        ("pools: []", "pools: must be keys and values, not a list"),
        ("pools: {d: null}", "pools.d: must be keys and values, not nothing"),
        ("pools: {'a b': {role: mixed}}", "pools: a pool's name is made of"),
        ("model: 3", "model: must be keys and values, not 3"),
        ("model: {dtype: int8}", "model.dtype: must be one of"),
        ("kvstore: {host_bytes: 1}", "kvstore.host_bytes: must be at least 1048576, not 1"),
        ("kvstore: {tier: 'http://x'}", "kvstore.tier: must be empty or a redis:// URL"),
        ("kvstore: {kv_encoding: int4}", "kvstore.kv_encoding: must be one of none, int8, fp8, not 'int4'"),
        (
            "kvstore: {kv_encoding: fp8}\nmodel: {batch_invariant: true}",
            "kvstore.kv_encoding: must be none with model.batch_invariant, which needs every bit, not 'fp8'",
        ),
        (
            "kvstore: {kv_encoding: int8}\nengine: {runner: fake}",
            "kvstore.kv_encoding: must be none with engine.runner=fake, which needs every bit, not 'int8'",
        ),
        ("kvstore: {kv_cache_dtype: int3}", "kvstore.kv_cache_dtype: must be one of auto, int8, fp8, kivi8_4"),
        (
            "kvstore: {kv_cache_dtype: int8, kv_encoding: fp8}",
            "kvstore.kv_encoding: must be none, not 'fp8': with kv_cache_dtype=int8 blocks travel as they",
        ),
        (
            "kvstore: {kv_cache_dtype: int8}\nengine: {runner: fake}",
            "kvstore.kv_cache_dtype: must be auto with engine.runner=fake, not 'int8'",
        ),
        ("kvstore: {tier_compression: lz4}", "kvstore.tier_compression: must be one of none, zstd, not 'lz4'"),
        ("router: {window_tokens: 0}", "router.window_tokens: must be at least 1"),
        ("router: {policy: best}", "router.policy: must be one of cheapest, least_loaded, not 'best'"),
        ("endpoints: {grpc_port: 70000}", "endpoints.grpc_port: must be at most 65535, not 70000"),
        ("endpoints: {grpc_port: 65535, routers: 2}", "endpoints.grpc_port: 2 routers have no ports from 65535 on"),
        ("endpoints: {grpc_port: 7999, routers: 2}", "http_port: port 8000 is one of endpoints.grpc_port"),
        ("ray: {metrics_export_port: 12000}", "ray.metrics_export_port: must lie outside 10002-19999"),
        ("kvstore: {block_size: 1000000000}", "kvstore.block_size: must be at most 65536, not 1000000000"),
        ("kvstore: {disk_bytes: 9999999999999999999999, disk_dir: /x}", "kvstore.disk_bytes: must be less than 2^62"),
        ("kvstore: {tier_ttl_s: 1.0e+300}", "kvstore.tier_ttl_s: must be at most 1000000000, not 1e+300"),
        ("pools: {d: {role: mixed, num_blocks: 999999999999}}", "pools.d.num_blocks: must be less than 2^31, not 9"),
        ("pools: {d: {role: mixed, max_num_seqs: 1000000000}}", "pools.d.max_num_seqs: must be at most 65536, not 1"),
        (
            "pools: {d: {role: mixed, max_num_batched_tokens: 1000000000000}}",
            "pools.d.max_num_batched_tokens: must be at most 1048576, not 1000000000000",
        ),
        ("pools: {d: {role: mixed, replicas: 9999999999999999999999}}", "pools.d.replicas: must be at most 10000, not"),
        ("pools: {d: {role: mixed, cpus_per_rank: .inf}}", "pools.d.cpus_per_rank: must be at most 100000, not inf"),
        (f"pools: {{{'d' * 300}: {{role: mixed}}}}", "pools: a pool's name has at most 63 characters, not 300"),
        ("endpoints: {routers: 9999999999999999999999}", "endpoints.routers: must be at most 1000, not 999"),
        ("router: {window_tokens: 1000000000000}", "router.window_tokens: must be less than 2^31, not 1000000000000"),
        ("ray: {num_cpus: 1000000000000}", "ray.num_cpus: must be at most 100000, not 1000000000000"),
        (
            "pools: {d: {role: mixed, scheduler: {policy: lifo}}}",
            "pools.d.scheduler.policy: must be one of fcfs, priority, deadline, fair_share, not 'lifo'",
        ),
        (
            "pools: {d: {role: mixed, scheduler: {priority_ageing_s: 0}}}",
            "pools.d.scheduler.priority_ageing_s: must be more than 0, not 0",
        ),
        ("pools: {d: {role: mixed, scheduler: {tpot_target_s: -1}}}", "pools.d.scheduler.tpot_target_s: must be at le"),
        ("autoscaling: {mode: on-call}", "autoscaling.mode: must be one of off, advise, act, not 'on-call'"),
        ("autoscaling: {policy: hpa}", "autoscaling.policy: must be one of slo, queue_depth, fixed, not 'hpa'"),
        ("autoscaling: {slo_ttft_ms: 0}", "autoscaling.slo_ttft_ms: must be more than 0, not 0"),
        ("autoscaling: {slo_ttft_quantile: 1}", "autoscaling.slo_ttft_quantile: must be less than 1, not 1"),
        ("autoscaling: {max_utilisation: 1}", "autoscaling.max_utilisation: must be less than 1, not 1"),
        ("autoscaling: {down_margin: .nan}", "autoscaling.down_margin: must be more than 0, not nan"),
        ("autoscaling: {up_delay: 5}", "autoscaling.up_delay: unknown key (did you mean up_delay_s?)"),
        (
            "autoscaling: {max_gpus: 3}\npools: {m: {role: mixed, tp: 2, replicas: 2}}",
            "autoscaling.max_gpus: must be 0 or at least 4, which the pools need at their smallest, not 3",
        ),
        ("[1]", "must hold keys and values, not a list"),
        ("a: b: c", "not YAML"),
        ("router: {drain_s: 5}\nendpoints: {}\nrouter: {window_tokens: 9}", ":3: not YAML (router is given twice)"),
        ("router:\n  drain_s: 5\n  drain_s: 7", ":3: not YAML (drain_s is given twice)"),
    ],
)
def test_a_wrong_file_is_refused_with_the_path_of_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_text(tmp_path, text)
    assert message in str(refused.value)
    assert str(refused.value).startswith(str(tmp_path / "c.yaml"))
    assert "\n" not in str(refused.value)


def test_the_routers_lists_and_the_models_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("router: {cors_origins: [https://app.example]}\nmodel: {generation_config: none}")
    read = config.load(path)
    assert read.router.cors_origins == ("https://app.example",)
    assert read.model.generation_config == "none"
    (spec,) = router_specs(
        RouterSpec("", "m", "n", "memory://x", generation_config="none"), read.endpoints, read.router, "c"
    )
    write(tmp_path / "spec.json", spec)
    assert load_spec(RouterSpec, tmp_path / "spec.json") == spec
    for text, message in (
        (
            "router: {cors_origins: [app.example]}",
            "router.cors_origins: must be SCHEME://HOST[:PORT] or *, not 'app.example'",
        ),
        ("router: {cors_origins: https://app.example}", "router.cors_origins: must be a valid array"),
        ("model: {generation_config: vllm}", "model.generation_config: must be one of auto, none, not 'vllm'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=re.escape(message)):
            config.load(path)
    (tmp_path / "spec.json").write_text(json.dumps({**dataclasses.asdict(spec), "config": {"cors_origins": "x"}}))
    with pytest.raises(SettingsError, match=r"config\.cors_origins: must be a valid array, not the text 'x'"):
        load_spec(RouterSpec, tmp_path / "spec.json")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no-such\.yaml: No such file"):
        config.load("no-such.yaml")


def test_set_reaches_into_defaults_and_files(tmp_path: Path) -> None:
    made = load_text(
        tmp_path, "kvstore: {block_size: 32}", "pools.decode.tp=2", "kvstore.host_bytes=2097152", "ray.dashboard=false"
    )
    assert made.pools == {"prefill": PoolConfig("prefill"), "decode": PoolConfig("decode", tp=2)}
    assert made.kvstore == KVStoreConfig(block_size=32, host_bytes=2097152)
    assert made.ray.dashboard is False


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("pools.decode.tp", "must look like a.b=c"),
        (".tp=1", "must look like a.b=c"),
        ("pools.decode.tp=two", "pools.decode.tp: must be a valid integer, not the text 'two'"),
        ("pools.decode.max_num_seq=1", "did you mean max_num_seqs?"),
        ("pools.decode.role.x=1", "pools.decode.role has no keys"),
        ("pools.decode.tp={", "not YAML"),
    ],
)
def test_a_wrong_set_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(None, [assignment])
    assert message in str(refused.value)


def test_flags_become_keys() -> None:
    flags = ServeFlags(model="m", prefill=2, routers=3, tp=2, grpc_port=1000, http_port=2000)
    made = load_with_flags(None, flags, ["pools.prefill.tp=4"])
    assert made.model.path == "m"
    assert made.pools == {"prefill": PoolConfig("prefill", replicas=2, tp=4), "decode": PoolConfig("decode", tp=2)}
    assert (made.endpoints.routers, made.endpoints.grpc_port, made.endpoints.http_port) == (3, 1000, 2000)


def test_mixed_alone_replaces_the_default_pair() -> None:
    assert load_with_flags(None, ServeFlags(mixed=2), []).pools == {"mixed": PoolConfig("mixed", replicas=2)}


def test_mixed_beside_the_pair() -> None:
    made = load_with_flags(None, ServeFlags(mixed=1, decode=2), [])
    assert {name: pool.replicas for name, pool in made.pools.items()} == {"prefill": 1, "decode": 2, "mixed": 1}


def test_zero_takes_a_pool_away() -> None:
    made = load_with_flags(None, ServeFlags(prefill=0, decode=0, mixed=1), [])
    assert list(made.pools) == ["mixed"]


def test_flags_find_a_files_pool_by_its_role(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("pools: {small: {role: prefill}, d: {role: decode}}")
    made = load_with_flags(str(path), ServeFlags(prefill=3), [])
    assert {name: pool.replicas for name, pool in made.pools.items()} == {"small": 3, "d": 1}


def test_a_flag_that_could_mean_two_pools_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("pools: {a: {role: mixed}, b: {role: mixed}}")
    with pytest.raises(ConfigError, match=r"--mixed: several pools have that role \(a, b\)"):
        load_with_flags(str(path), ServeFlags(mixed=3), [])


def test_what_the_user_set_for_ray_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    config.prepare_ray_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    ours = [str(config.ROOT), str(config.ROOT / "proto" / "gen"), str(config.ROOT / "client")]
    assert os.environ["PYTHONPATH"].split(":") == [*ours, "/elsewhere"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["ray.dashboard_port=8001", "endpoints.routers=2"],
            "ray.dashboard_port: port 8001 is one of endpoints.http_port",
        ),
        (["ray.metrics_export_port=50051"], "ray.metrics_export_port: port 50051 is one of endpoints.grpc_port too"),
        (
            ["ray.dashboard_port=9200", "ray.metrics_export_port=9200"],
            "ray.metrics_export_port: port 9200 is one of ray.dash",
        ),
        (
            ["endpoints.http_host=::", "endpoints.http_port=50051"],
            "http_port: port 50051 is one of endpoints.grpc_port",
        ),
    ],
)
def test_ports_that_equal_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        config.load(None, overrides)


def test_equal_ports_that_are_not_in_each_others_way() -> None:
    config.load(None, ["ray.dashboard_port=8000", "ray.dashboard=false"])
    config.load(None, ["ray.dashboard_port=8000", "ray.address=h:1"])
    config.load(None, ["ray.dashboard_port=8000", "endpoints.http_host=10.0.0.1"])


def test_an_ipv6_address_can_be_set_as_it_is() -> None:
    for host in ("::", "::1", "[::1]"):
        assert config.load(None, [f"endpoints.http_host={host}"]).endpoints.http_host == host


def test_children_find_modules_where_we_say_and_never_in_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", "lib", "", "/abs"]))
    monkeypatch.setenv("HF_HOME", "cache")
    environment = config.child_environment()
    assert environment["PYTHONSAFEPATH"] == "1"
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert paths[-2:] == [str(tmp_path / "lib"), "/abs"]
    assert all(Path(path).is_absolute() for path in paths)
    assert str(tmp_path) not in paths
    assert environment["HF_HOME"] == str(tmp_path / "cache")
