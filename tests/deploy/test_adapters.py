"""Adapters from the configuration to workers and routers: keys, flags, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import config
from deploy.errors import ConfigError
from deploy.overrides import ServeFlags, load_with_flags
from deploy.plan import make_plan
from deploy.preflight import check_adapters, find_model
from router.adapters.config import AdaptersConfig
from router.config import RouterSpec
from settings.loading import load as load_spec
from settings.loading import write
from tests.router.adapters.lora_files import write_adapter
from workers.model.registry import load_config

ON = "adapters.enabled=true"


def sizes(tiny_model: Path) -> dict[str, tuple[int, int]]:
    """[outputs, inputs] of the query matrices."""
    (target,) = (one for one in targets(tiny_model) if one.name.endswith("q_proj"))
    first, last = target.numbers[0]
    return {target.name.replace("*", str(i)): (target.outputs, target.inputs) for i in range(first, last + 1)}


def targets(tiny_model: Path) -> tuple:
    return find_model(config.load(None, [f"model.path={tiny_model}"])).adapter_targets


def test_off_by_default_and_the_same_in_all_pools(tiny_model: Path) -> None:
    def engines(*overrides: str) -> list[tuple[bool, int, int, int, float]]:
        plan = make_plan(config.load(None, overrides), load_config(tiny_model), str(tiny_model), 0, "memory://h:1")
        return [
            (e.enable_lora, e.max_loras, e.max_lora_rank, e.max_cpu_loras, e.lora_load_timeout_s)
            for e in (pool.spec.engine for pool in plan.pools)
        ]

    assert [engine[0] for engine in engines()] == [False, False]
    sized = (
        "adapters.max_loras=3",
        "adapters.max_lora_rank=64",
        "adapters.max_cpu_loras=9",
        "adapters.load_timeout_s=7",
    )
    assert engines(ON, *sized) == [(True, 3, 64, 9, 7.0)] * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapters.root=/adapters"], "adapters.root: needs enabled=true"),
        (["adapters.modules.a=/adapters/a"], "adapters.modules: needs enabled=true"),
        ([ON, "adapters.root=adapters"], "adapters.root: must be an absolute path"),
        ([ON, "adapters.max_loras=0"], "adapters.max_loras: must be at least 1"),
        ([ON, "adapters.max_cpu_loras=3"], "adapters.max_cpu_loras: must be 0 or at least max_loras=16"),
        ([ON, "adapters.pinned=[a]"], "adapters.pinned: 'a' is not in modules"),
        ([ON, "adapters.max_lora=3"], "adapters.max_lora: unknown key"),
        ([ON, "pools.decode.max_loras=3"], "pools.decode.max_loras: unknown key"),
        (["pools.decode.enable_lora=true"], "pools.decode.enable_lora: unknown key"),
    ],
)
def test_bad_keys_are_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(None, overrides)
    assert message in str(refused.value)


def test_flags_are_vllms() -> None:
    flags = ServeFlags(enable_lora=True, lora_modules=("a=/x", "b=/y=z"), lora_root="/r", max_loras=2, max_lora_rank=8)
    made = load_with_flags(None, flags, []).adapters
    assert made == AdaptersConfig(True, {"a": "/x", "b": "/y=z"}, root="/r", max_loras=2, max_lora_rank=8)
    for wrong in ("a", "a=", "=x"):
        with pytest.raises(ConfigError, match=r"^--lora-modules .*NAME=PATH"):
            load_with_flags(None, ServeFlags(enable_lora=True, lora_modules=(wrong,)), [])
    with pytest.raises(ConfigError, match="a is named twice"):
        load_with_flags(None, ServeFlags(enable_lora=True, lora_modules=("a=x", "a=y")), [])


def test_modules_of_the_model_pass_and_get_absolute_paths(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adapter(tmp_path / "sql", modules=sizes(tiny_model))
    monkeypatch.chdir(tmp_path)
    made = config.load(
        None, [f"model.path={tiny_model}", ON, "adapters.modules.sql-lora=./sql", f"adapters.root={tmp_path}"]
    )
    checked = check_adapters(made, find_model(made), "tiny")
    assert checked.modules == {"sql-lora": str(tmp_path / "sql")}
    assert checked.root == str(tmp_path)


def test_what_cannot_be_served_ends_the_start(tiny_model: Path, tmp_path: Path) -> None:
    write_adapter(tmp_path / "good", modules=sizes(tiny_model))
    write_adapter(tmp_path / "wrong", modules={name: (out + 1, 1) for name, (out, _) in sizes(tiny_model).items()})
    write_adapter(tmp_path / "large", modules=sizes(tiny_model), rank=17)
    for name, path, message in (
        ("a", tmp_path / "none", "adapters.modules.a: "),
        ("a", tmp_path / "wrong", "q_proj.lora_A.weight"),
        ("a", tmp_path / "large", "rank 17 is more than 16"),
        ("tiny", tmp_path / "good", "adapters.modules: 'tiny'"),
    ):
        made = config.load(None, [f"model.path={tiny_model}", ON, f"adapters.modules.{name}={path}"])
        with pytest.raises(ConfigError) as refused:
            check_adapters(made, find_model(made), "tiny")
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
    made = config.load(None, [f"model.path={tiny_model}", ON, f"adapters.root={tmp_path}/none"])
    with pytest.raises(ConfigError, match=r"^adapters\.root: .*none: no such folder"):
        check_adapters(made, find_model(made), "tiny")


def test_a_router_reads_back_what_was_written(tiny_model: Path, tmp_path: Path) -> None:
    adapters = AdaptersConfig(enabled=True, modules={"a": "/x"}, root="/r")
    spec = RouterSpec("r", str(tiny_model), "tiny", "memory://", adapters=adapters, adapter_targets=targets(tiny_model))
    write(tmp_path / "spec.json", spec)
    assert load_spec(RouterSpec, tmp_path / "spec.json") == spec
    assert {target.name for target in spec.adapter_targets} >= {
        f"model.layers.*.{name}"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
