"""A weight format that a plugin brings, as one file: int8 weights give the tokens of the numbers that they mean."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.plugins.int8_rows import Int8Linear
from tests.workers.engine_group import EngineGroup, JobResult
from tests.workers.forked_worker import spec_for, worker
from tests.workers.tiny_llama import generate_with_transformers, make_checkpoint, prompts
from tests.workers.worker_client import disaggregate
from workers.config import EngineConfig
from workers.engine.request import SamplingParams
from workers.errors import ModelError
from workers.model.loader import Checkpoint
from workers.model.registry import load_config, load_registry
from workers.model.stage import build_stage
from workers.model.tensor_layout import check_checkpoint, check_split, tensor_layout
from workers.parallel import ParallelGroups, Shard

CPU = torch.device("cpu")
SERVED = ", ".join(load_registry().quant_methods)
PLUGINS = ("tests.plugins.int8_rows",)
GREEDY = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)


def quantise(path: Path, **options: object) -> tuple[Path, Path]:
    """Two checkpoints made of one: in int8, and in fp32 with the same numbers."""
    small, plain = (Path(shutil.copytree(path, f"{path}-{kind}")) for kind in ("int8", "plain"))
    tensors = load_file(path / "model.safetensors")
    meant = {name: tensor.float() for name, tensor in tensors.items()}
    for matrices in tensor_layout(load_config(path)).matrices:
        for name, _ in matrices.tensors():
            weight = tensors.pop(name + ".weight").float()
            scale = weight.abs().amax(1, keepdim=True) / 127
            rows = (weight / scale).round().to(torch.int8)
            tensors |= {name + ".weight": rows, name + ".weight_scale": scale}
            meant[name + ".weight"] = rows.float() * scale
    save_file(tensors, small / "model.safetensors")
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((small / "config.json").read_text())
    quantization = {"quant_method": "int8_rows", **options}
    (small / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return small, plain


@pytest.fixture(scope="module", params=["gqa", "qwen3_experts"])
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return quantise(make_checkpoint(request.param, tmp_path_factory.mktemp("int8")))


def assert_same(found: JobResult, expected: JobResult) -> None:
    """A weight that is made anew for each product is not packed, so the products may round differently."""
    assert found.completions == expected.completions
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


def test_logits_are_those_of_the_plain_weights(checkpoints: tuple[Path, Path]) -> None:
    small, plain = checkpoints
    check_checkpoint(small, load_config(small, plugins=PLUGINS))
    config = EngineConfig(str(plain), "float32", "cpu", tp=2, block_size=4, num_blocks=64, max_num_batched_tokens=12)
    modes = [False] if "experts" in plain.name else [False, True]
    with EngineGroup(2, 1) as group:
        for is_invariant in modes:
            config = replace(config, batch_invariant=is_invariant)
            expected = group.run(config, prompts(), GREEDY)
            found = group.run(replace(config, model_dir=str(small), plugins=PLUGINS), prompts(), GREEDY)
            assert_same(found, expected)


def test_it_is_served_disaggregated_by_two_ranks_each(checkpoints: tuple[Path, Path], shared_kv_node) -> None:
    small, plain = checkpoints
    specs = [spec_for(small, role, shared_kv_node, tp=2) for role in ("prefill", "decode")]
    specs = [replace(spec, engine=replace(spec.engine, plugins=PLUGINS)) for spec in specs]
    with ExitStack() as stack:
        prefill, decode = (stack.enter_context(worker(spec)) for spec in specs)
        for token_ids in prompts():
            tokens, _, decoded = disaggregate(prefill, decode, token_ids)
            assert tokens == generate_with_transformers(plain, token_ids, 8)
            assert decoded.num_computed_prompt_tokens == 0


def test_norms_and_activations_hand_over_8_bits_where_a_format_asks(tmp_path: Path) -> None:
    """Rounded by the layer before or by the product itself: the same numbers."""
    base = make_checkpoint("qwen3", tmp_path)
    fused, _ = quantise(base, rounds_activations=True)
    itself = Path(shutil.copytree(fused, tmp_path / "itself"))
    config = json.loads((itself / "config.json").read_text())
    config["quantization_config"]["fuses"] = False
    (itself / "config.json").write_text(json.dumps(config))
    stage = build_stage(load_config(fused, plugins=PLUGINS), Checkpoint(fused, torch.float32, CPU), one_rank())
    assert isinstance(stage.layers[0].self_attention.qkv, Int8Linear)
    assert stage.layers[0].mlp.input_scheme == "int8"
    with EngineGroup(1, 1) as group:
        one, other = (
            group.run(
                EngineConfig(str(path), "float32", "cpu", block_size=4, num_blocks=64, plugins=PLUGINS),
                prompts(),
                GREEDY,
            )
            for path in (fused, itself)
        )
        assert_same(one, other)


def one_rank() -> ParallelGroups:
    return ParallelGroups(Shard(), CPU)


def test_what_a_format_does_not_do_is_one_line(checkpoints: tuple[Path, Path]) -> None:
    small, _ = checkpoints
    model = load_config(small, plugins=PLUGINS)
    with pytest.raises(ModelError, match=r"int8_rows is served with tp up to 2, and model\.layers\.0\."):
        model.weight_format.check_split(tensor_layout(model).matrices[0], 4)
    check_split(model, 2, 1)
    path = small / "config.json"
    with pytest.raises(ModelError) as refused:
        load_config(small)
    assert str(refused.value) == (
        f"{path}: quantization_config.quant_method='int8_rows' is not served (served: {SERVED})"
    )
    config = json.loads(path.read_text())
    for quantization, complaint in (
        (
            {"quant_method": "foo"},
            f"quantization_config.quant_method='foo' is not served (served: {SERVED}, int8_rows)",
        ),
        ({}, f"quantization_config.quant_method=None is not served (served: {SERVED}, int8_rows)"),
        ({"quant_method": "int8_rows", "bits": 3}, "quantization_config.bits: unknown key"),
        ("int8", "quantization_config must be an object, not 'int8'"),
    ):
        path.write_text(json.dumps({**config, "quantization_config": quantization}))
        with pytest.raises(ModelError) as refused:
            load_config(small, plugins=PLUGINS)
        assert str(refused.value) == f"{path}: {complaint}"
    path.write_text(json.dumps(config))


def test_its_tensors_are_checked(checkpoints: tuple[Path, Path]) -> None:
    small, plain = checkpoints
    name = r"model\.layers\.0\.self_attn\.q_proj\.weight"
    with pytest.raises(ModelError, match=rf"{plain.name}.*: {name} is F32; by config\.json it must be I8$|no tensor"):
        check_checkpoint(plain, load_config(small, plugins=PLUGINS))
    with pytest.raises(ModelError, match=rf"{name} is I8; by config\.json it must be F64 or F32 or F16 or BF16"):
        check_checkpoint(small, load_config(plain))
