"""What an adapter is refused for: where it lies, and what the model has in place of what it changes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.adapters.files import below, read_fitting
from router.adapters.targets import targets_of
from router.errors import AdapterRefused, PathForbidden
from tests.router.adapters.lora_files import MODULES, TARGETS, write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "root" / "team" / "sql")
    write_adapter(tmp_path / "outside")
    return tmp_path / "root"


def test_a_path_below_the_root_is_relative_or_absolute(root: Path) -> None:
    assert below(str(root), "team/sql", "path") == root / "team" / "sql"
    assert below(str(root), str(root / "team" / "sql"), "path") == root / "team" / "sql"
    assert below(str(root), "team/../team/./sql", "path") == root / "team" / "sql"


@pytest.mark.parametrize("path", ["../outside", "/etc", "team/../../outside", "../no-such", "~/x/../../..", ".", ""])
def test_a_path_that_leads_out_is_refused_whether_it_is_there_or_not(root: Path, path: str) -> None:
    with pytest.raises((PathForbidden, AdapterRefused), match=r"^lora_path: ") as refused:
        below(str(root), path, "lora_path")
    assert refused.value.param == "lora_path"
    assert isinstance(refused.value, PathForbidden) == (path != "")


def test_a_pipe_is_not_waited_for(root: Path) -> None:
    tensors = root / "team" / "sql" / "adapter_model.safetensors"
    tensors.unlink()
    os.mkfifo(tensors)
    with pytest.raises(AdapterRefused, match="not a regular file"):
        read_fitting(root / "team" / "sql", TARGETS, 16, "lora_path")
    with pytest.raises(AdapterRefused, match=r"^lora_path: .*File name too long"):
        read_fitting(root / ("a" * 5000), TARGETS, 16, "lora_path")


def test_links_are_followed_before_the_look(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "outside")
    (root / "inside").symlink_to(root / "team" / "sql")
    (root / "circle").symlink_to(root / "circle")
    (root / "file").mkdir()
    (root / "file" / "adapter_config.json").symlink_to(root.parent / "outside" / "adapter_config.json")
    assert below(str(root), "inside", "path") == root / "team" / "sql"
    for path in ("link", "link/..", "file"):
        with pytest.raises(PathForbidden, match=r"leads out of .*root|is adapters\.root itself"):
            below(str(root), path, "path")
    with pytest.raises(AdapterRefused):
        read_fitting(below(str(root), "circle", "path"), TARGETS, 16, "path")


def test_a_root_that_is_a_link_is_the_directory_behind_it(root: Path) -> None:
    (root.parent / "mount").symlink_to(root)
    assert below(str(root.parent / "mount"), "team/sql", "path") == root / "team" / "sql"


def test_a_fitting_adapter_is_read(root: Path) -> None:
    adapter = read_fitting(root / "team" / "sql", TARGETS, 4, "path")
    assert {module.name for module in adapter.modules} == set(MODULES)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"model.layers.0.self_attn.q_proj": (16, 8)}, r"0\.self_attn\.q_proj\.lora_A.* is \[4, 8\].* 16 inputs"),
        ({"model.layers.2.mlp.down_proj": (32, 48)}, r"layers\.2\.mlp\.down_proj\.lora_B.* is \[32, 4\].* 16 outputs"),
        ({"model.layers.3.self_attn.q_proj": (16, 16)}, r"no linear module model\.layers\.3\.self_attn\.q_proj"),
        ({"model.layers.*.self_attn.q_proj": (16, 16)}, r"no linear module model\.layers\.\*\.self_attn\.q_proj"),
        ({"model.layers.02.self_attn.q_proj": (16, 16)}, r"no linear module model\.layers\.02\.self_attn"),
        ({"transformer.h.0.attn": (16, 16)}, r"no linear module transformer\.h\.0\.attn"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_model_is_refused_with_the_tensor(
    tmp_path: Path, modules: dict[str, tuple[int, int]], message: str
) -> None:
    write_adapter(tmp_path, modules=modules)
    with pytest.raises(AdapterRefused, match=rf"^path: {tmp_path}/adapter_model\.safetensors: .*{message}"):
        read_fitting(tmp_path, TARGETS, 16, "path")


def test_a_rank_beyond_the_largest_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, rank=32)
    with pytest.raises(AdapterRefused, match=r"rank 32 is more than 16 \(max_lora_rank\)"):
        read_fitting(tmp_path, TARGETS, 16, "path")


def test_pickles_and_dora_are_refused_by_name(tmp_path: Path) -> None:
    write_adapter(tmp_path / "pickle")
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"pickle")
    config = json.loads((write_adapter(tmp_path / "dora") / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    for name, message in (
        ("pickle", r"adapter_model\.bin: a pickle"),
        ("dora", "use_dora"),
        ("none", "no such directory"),
    ):
        with pytest.raises(AdapterRefused, match=message):
            read_fitting(tmp_path / name, TARGETS, 16, "path")


_indices = st.sets(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1)


@given(_indices, st.sets(st.integers(0, 5)))
def test_targets_stand_for_the_modules_and_for_no_others(experts: set[tuple[int, int]], dense: set[int]) -> None:
    sizes = {f"model.layers.{layer}.mlp.experts.{expert}.up_proj": (8, 4) for layer, expert in experts}
    sizes |= {f"model.layers.{layer}.mlp.up_proj": (16 if layer % 2 else 8, 4) for layer in dense} | {"lm_head": (9, 4)}
    told = {
        name.replace("*", "{}").format(*numbers): (target.outputs, target.inputs)
        for target in targets_of(sizes)
        for name in [target.name]
        for numbers in _members(target.numbers)
    }
    assert told == sizes


def _members(ranges: tuple[tuple[int, int], ...]) -> list[tuple[int, ...]]:
    members: list[tuple[int, ...]] = [()]
    for first, last in ranges:
        members = [(*member, number) for member in members for number in range(first, last + 1)]
    return members


def test_uniform_layers_are_one_target_each() -> None:
    assert {(target.name, target.numbers) for target in TARGETS} == {
        ("model.layers.*.self_attn.q_proj", ((0, 2),)),
        ("model.layers.*.self_attn.k_proj", ((0, 2),)),
        ("model.layers.*.mlp.down_proj", ((0, 2),)),
    }
