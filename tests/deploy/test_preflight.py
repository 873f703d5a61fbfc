from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from checkpoint.gguf.directory import open_gguf
from deploy import config
from deploy.cluster import Cluster
from deploy.config import EndpointsConfig, RayConfig
from deploy.errors import ConfigError, StartError
from deploy.host import check_folder, check_host_memory, check_node_ip, check_ports, check_ray, free_port
from deploy.plan import model_name
from deploy.preflight import check_control, check_model, control_warning, disk_warning, tier_secret, tier_warning
from deploy.progress import Steps
from kvstore.network.addresses import listen
from kvstore.tiers.disk.segments import LOCK_NAME, lock_file
from kvstore.tiers.redis.redis_tier import key_prefix_of
from tests.checkpoint.gguf.gguf_files import demo_tokenizer, quantised, stored_tensors, weights_of, write_gguf
from tests.processes import RedisServer


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        check_model(config.load(None, overrides))
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_good_model_is_found(tiny_model: Path) -> None:
    found = check_model(config.load(None, [f"model.path={tiny_model}", "pools.decode.tp=2"]))
    assert found.directory == tiny_model
    assert found.reference == str(tiny_model)
    assert found.config.cache_specs[0].num_kv_heads == 2


@pytest.mark.parametrize("is_named_by_folder", [True, False])
def test_a_gguf_is_found(is_named_by_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers on other hosts get what was named here, and open it there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights = stored_tensors("llama", weights_of("llama", len(demo_tokenizer()["ggml.tokens"])))
    (tmp_path / "models").mkdir()
    path = write_gguf(tmp_path / "models" / "Tiny-Q4_0.gguf", "llama", quantised(weights, [GGMLQuantizationType.Q4_0]))
    named = path.parent if is_named_by_folder else path
    found = check_model(config.load(None, [f"model.path={named}", "pools.decode.tp=2"]))
    assert (found.reference, found.directory) == (str(named), open_gguf(path))
    assert model_name(config.load(None), found.reference) == ("models" if is_named_by_folder else "Tiny-Q4_0")
    assert "tp=4 does not divide" in refusal(f"model.path={named}", "pools.decode.tp=4")
    path.write_bytes(path.read_bytes()[:-1])
    assert refusal(f"model.path={named}").startswith(f"{path}: not a whole GGUF file: it ends within ")


def test_the_fake_engine_needs_no_weights(model: Path) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    assert "model.safetensors: missing" in refusal(f"model.path={model}")
    assert check_model(config.load(None, [f"model.path={model}", "engine.runner=fake"])).directory == model


def test_no_such_directory() -> None:
    assert "no such model directory" in refusal("model.path=/no/such/model")


def test_a_directory_without_config(model: Path) -> None:
    (model / "config.json").unlink()
    assert refusal(f"model.path={model}") == f"{model}/config.json: missing"


def test_an_unsupported_architecture_names_what_is_supported(model: Path) -> None:
    raw = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**raw, "architectures": ["GPT2LMHeadModel"]}))
    said = refusal(f"model.path={model}")
    assert "GPT2LMHeadModel is not supported" in said
    assert "LlamaForCausalLM" in said


def test_a_tp_that_does_not_divide_the_heads_names_pool_and_numbers(model: Path) -> None:
    assert (
        refusal(f"model.path={model}", "pools.decode.tp=3")
        == "pools.decode: tp=3 does not divide num_attention_heads=4"
    )


def test_truncated_weights(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"{weights}: not readable as safetensors" in refusal(f"model.path={model}")


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "model.safetensors: missing" in refusal(f"model.path={model}")


@pytest.fixture
def taken_port() -> Iterator[int]:
    """One whose lower neighbour is free."""
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
            if free_port("127.0.0.1", port - 1) == port - 1:
                listener.listen()
                yield port
                return


def test_a_port_in_use_is_named(taken_port: int) -> None:
    with pytest.raises(ConfigError, match=rf"endpoints\.http_port: port {taken_port} on 127\.0\.0\.1 is in use"):
        check_ports(EndpointsConfig(grpc_port=0, http_port=taken_port), RayConfig())
    with pytest.raises(ConfigError, match=rf"endpoints\.grpc_port: port {taken_port}"):
        check_ports(EndpointsConfig(grpc_port=taken_port - 1, http_port=0, routers=2), RayConfig())
    with pytest.raises(ConfigError, match=r"ray\.dashboard_port"):
        check_ports(EndpointsConfig(grpc_port=0, http_port=0), RayConfig(dashboard_port=taken_port))


def test_rays_ports_are_not_ours_when_we_join(taken_port: int) -> None:
    check_ports(EndpointsConfig(grpc_port=0, http_port=0), RayConfig(address="h:1", dashboard_port=taken_port))


def test_a_foreign_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"endpoints\.grpc_port: 203\.0\.113\.7 is not an address of this machine"):
        check_ports(EndpointsConfig(grpc_host="203.0.113.7"), RayConfig())
    for foreign in ("203.0.113.7", "no.such.host.invalid"):  # Ray's own start hung for 80 s
        with pytest.raises(ConfigError, match=rf"^ray\.node_ip: {foreign} is not an address of this machine$"):
            check_node_ip(foreign)
    with pytest.raises(ConfigError, match=r"^ray\.node_ip: 0\.0\.0\.0 stands for all addresses"):
        check_node_ip("0.0.0.0")
    for ours in ("", "127.0.0.1", "::1", "[::1]"):
        check_node_ip(ours)


def test_free_ports(taken_port: int) -> None:
    assert free_port("127.0.0.1", taken_port) > taken_port
    assert free_port("127.0.0.1") > 0


def test_servers_that_are_away(taken_port: int) -> None:
    port = free_port("127.0.0.1")
    assert tier_warning("") == ""
    warning = tier_warning(f"redis://127.0.0.1:{port}/0")
    assert warning.startswith(f"kvstore.tier: Redis at 127.0.0.1:{port}: ")
    assert "\n" not in warning
    assert tier_warning(f"redis+cluster://:hush@127.0.0.1:{port}").startswith("kvstore.tier: Redis at 127.0.0.1:")
    check_control("memory://", "c")
    with pytest.raises(
        StartError, match=rf"ray\.address: no Ray cluster at 127\.0\.0\.1:{port} \(connection refused\)"
    ):
        check_ray(f"127.0.0.1:{port}")
    with pytest.raises(ConfigError, match=r"ray\.address: must be HOST:PORT, not 'auto'"):
        check_ray("auto")
    check_ray(f"127.0.0.1:{taken_port}")
    with pytest.raises(StartError, match=r"kvstore\.control: "):
        check_control(f"redis://127.0.0.1:{port}/0", "c")


def test_the_tiers_secret_is_drawn_or_read(tmp_path: Path) -> None:
    assert tier_secret("") != tier_secret("")
    (tmp_path / "secret").write_text("0123456789abcdef\n")
    assert tier_secret(str(tmp_path / "secret")) == "0123456789abcdef"
    (tmp_path / "short").write_text("hush")
    with pytest.raises(ConfigError, match=r"kvstore\.tier_secret_file: .*short: has 4 characters, 16 are the least"):
        tier_secret(str(tmp_path / "short"))
    with pytest.raises(ConfigError, match=r"kvstore\.tier_secret_file: .*No such file"):
        tier_secret(str(tmp_path / "nothing"))


def test_more_host_memory_than_there_is_is_refused() -> None:
    check_host_memory("kvstore.host_bytes", 1 << 20)
    with pytest.raises(ConfigError, match=r"^kvstore\.host_bytes: 99999999999999999 is more than this machine"):
        check_host_memory("kvstore.host_bytes", 99999999999999999)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_whatever_is_wrong_with_the_models_files_is_found_before_anything_starts(model: Path) -> None:
    """They were found by workers and routers, 10 to 14 s after the start."""
    path = f"model.path={model}"
    tokenizer = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").unlink()
    assert refusal(path) == f"{model}/tokenizer.json: missing"
    unreadable = {**json.loads(tokenizer), "decoder": {"type": "NoSuchDecoder"}}
    (model / "tokenizer.json").write_text(json.dumps(unreadable))
    assert refusal(path).startswith(f"{model}/tokenizer.json: not a tokenizer")
    (model / "tokenizer.json").write_text(tokenizer)
    edit(model / "tokenizer_config.json", chat_template="{% for %}")
    assert refusal(path).startswith(f"{model}/tokenizer_config.json: chat_template, line 1: ")
    edit(model / "tokenizer_config.json", chat_template=None, a_new_key=1)
    assert refusal(path).startswith(f"{model}/tokenizer_config.json: a_new_key: unknown key")
    assert check_model(config.load(None, [path, "model.ignore_keys=[a_new_key]"])).directory == model
    edit(model / "tokenizer_config.json", a_new_key=None)
    edit(model / "config.json", sliding_window=4)
    assert refusal(path).startswith(f"{model}/config.json: sliding_window=4 is not supported: ")
    edit(model / "config.json", sliding_window=None)
    (model / "generation_config.json").write_text(json.dumps({"no_repeat_ngram_size": 3}))
    assert refusal(path).startswith(f"{model}/generation_config.json: no_repeat_ngram_size=3 is not supported")
    (model / "generation_config.json").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a-of-2.safetensors"}}))
    assert refusal(path) == f"{model}/a-of-2.safetensors: missing, and listed in model.safetensors.index.json"


def test_a_checkpoint_that_is_half_quantized_is_refused_by_name(model: Path) -> None:
    """A Qwen 3 in the FP8 layout once started, and answered garbage."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.float8_e4m3fn)
    weights[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(weights, model / "model.safetensors")
    said = refusal(f"model.path={model}")
    assert said.startswith(f"{model}/model.safetensors: {name} is F8_E4M3; by config.json it must be F64 or F32 or")
    edit(model / "config.json", quantization_config={"quant_method": "fp8"})
    said = refusal(f"model.path={model}")
    assert said == f"{model}: no tensor model.layers.0.self_attn.q_proj.weight_scale"
    edit(model / "config.json", quantization_config={"quant_method": "foo"})
    said = refusal(f"model.path={model}")
    assert said.startswith(f"{model}/config.json: quantization_config.quant_method='foo' is not served (served: awq, ")


def test_a_family_of_a_plugin_is_found_before_anything_starts(model: Path) -> None:
    path, architecture = f"model.path={model}", "WindowedLlamaForCausalLM"
    own = {"model_type": "windowed_llama", "sliding_window": 8, "attn_logit_softcapping": 3.0}
    edit(model / "config.json", architectures=[architecture], **own)
    assert f"architecture {architecture} is not supported (supported: LlamaForCausalLM, " in refusal(path)
    assert refusal(path, "model.plugins=[no_such_module]").startswith(
        "model.plugins: no_such_module cannot be imported"
    )
    assert refusal(path, "model.plugins=[json]").startswith("model.plugins: json has neither FAMILIES nor ")
    plugins = "model.plugins=[tests.plugins.windowed_llama]"
    assert "no tensor model.layers.0.self_attn.q_proj.bias" in refusal(path, plugins)
    found = check_model(config.load(None, [path, plugins, "engine.runner=fake"]))
    assert [spec.window for spec in found.config.cache_specs] == [0, 8, 0, 8]


def test_mistakes_with_tiers_end_the_start(redis_server: RedisServer, tmp_path: Path) -> None:
    wrong = redis_server.url.replace("redis://", "redis://default:wrong@")
    with redis_server.client() as client:
        client.execute_command("CONFIG", "SET", "requirepass", "right")
        try:
            for url in (redis_server.url, wrong):
                with pytest.raises(ConfigError, match=r"^kvstore\.tier: Redis at 127\.0\.0\.1:\d+: "):
                    tier_warning(url)
                with pytest.raises(ConfigError, match=r"^kvstore\.control: Redis at 127\.0\.0\.1:\d+: "):
                    check_control(url, "c")
        finally:
            client.execute_command("CONFIG", "SET", "requirepass", "")
    (tmp_path / "file").write_text("")
    kvstore = config.load(None, ["kvstore.disk_bytes=33554432", f"kvstore.disk_dir={tmp_path}/file"]).kvstore
    with pytest.raises(ConfigError, match=r"^kvstore\.disk_dir: .*/file: not a directory"):
        disk_warning(kvstore)


def test_a_folder_for_the_arena_that_is_not_there(tmp_path: Path) -> None:
    check_folder("kvstore.arena_dir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^kvstore\.arena_dir: /no/such: no such folder$"):
        check_folder("kvstore.arena_dir", "/no/such")
    with pytest.raises(ConfigError, match=r"^kvstore\.arena_dir: /proc: no.* files .*there"):
        check_folder("kvstore.arena_dir", "/proc")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^kvstore\.arena_dir: .*/file: not a folder$"):
        check_folder("kvstore.arena_dir", str(tmp_path / "file"))
    (tmp_path / "closed").mkdir(mode=0o555)
    if os.geteuid():
        with pytest.raises(ConfigError, match=r"^kvstore\.arena_dir: .*/closed: not allowed to make files there$"):
            check_folder("kvstore.arena_dir", str(tmp_path / "closed"))


def test_a_temp_dir_that_is_not_there_is_not_made(tiny_model: Path, tmp_path: Path) -> None:
    options = [f"model.path={tiny_model}", "ray.temp_dir=/no/such", "endpoints.grpc_port=0", "endpoints.http_port=0"]
    with pytest.raises(ConfigError, match=r"^ray\.temp_dir: /no/such: no such folder$"):
        Cluster(config.load(None, options), Steps()).start()
    assert not Path("/no").exists()


def test_ports_on_ipv6() -> None:
    with listen("::1", 0, backlog=1) as taken:
        port = taken.getsockname()[1]
        for host in ("::1", "[::1]"):
            with pytest.raises(ConfigError, match=rf"endpoints\.http_port: port {port} on \S*::1\S* is in use"):
                check_ports(EndpointsConfig(grpc_port=0, http_host=host, http_port=port), RayConfig())
    assert free_port("::1") > 0
    assert free_port("[::]", 20_000, reserved=range(20_000, 20_005)) >= 20_005


def test_a_disk_that_another_cluster_holds_is_a_warning(tmp_path: Path) -> None:
    kvstore = config.load(None, ["kvstore.disk_bytes=33554432", f"kvstore.disk_dir={tmp_path}"]).kvstore
    assert disk_warning(kvstore) == ""
    holder = lock_file(tmp_path / LOCK_NAME)
    warning = f"kvstore.disk_dir: {tmp_path}: another process holds it; serving without this tier until it is free"
    assert disk_warning(kvstore) == warning
    os.close(holder)
    assert disk_warning(kvstore) == ""


def test_a_redis_that_fills_up_takes_the_leases_with_it(redis_server: RedisServer) -> None:
    """The tier filled a Redis that leases were kept in: they expired, and every request was refused."""

    def warning(control: str, tier: str = "") -> str:
        return control_warning(config.load(None, [f"kvstore.control={control}", f"kvstore.tier={tier!r}"]).kvstore)

    url, other = redis_server.url, "redis://127.0.0.1:1/0"
    with redis_server.client() as client:
        try:
            assert warning(url, url) == ""
            client.config_set("maxmemory", "100mb")
            assert warning(url, url).startswith(
                f"kvstore.control: Redis at 127.0.0.1:{redis_server.port}: has a maxmemory"
            )
            assert warning(url, other) == warning(url) == warning(other, url) == ""
            client.config_set("maxmemory-policy", "allkeys-lru")
            assert "may drop leases when it is full (maxmemory-policy allkeys-lru)" in warning(url)
        finally:
            client.config_set("maxmemory", "0")
            client.config_set("maxmemory-policy", "noeviction")


def test_clusters_with_one_secret_file_tag_their_fragments_apart(tiny_model: Path, tmp_path: Path) -> None:
    """Peers, Redis and disks of another cluster hold nothing that verifies here."""
    (tmp_path / "secret").write_text("0123456789abcdef")

    def prefix(name: str) -> bytes:
        options = [f"model.path={tiny_model}", f"kvstore.tier_secret_file={tmp_path}/secret", f"name={name}"]
        ports = ["endpoints.grpc_port=0", "endpoints.http_port=0"]
        cluster = Cluster(config.load(None, [*options, *ports]), Steps())
        cluster.check()
        return key_prefix_of(cluster._tier_secret)

    assert prefix("one") == prefix("one")
    assert len({prefix("one"), prefix("two"), key_prefix_of("0123456789abcdef")}) == 3
