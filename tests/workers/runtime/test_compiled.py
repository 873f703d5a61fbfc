"""Steps with compiled layers beside the same steps without, and what happens where nothing can be compiled."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.quant.served import FIXTURES
from tests.workers.engine_group import EngineGroup
from tests.workers.tiny_llama import make_checkpoint, prompts
from workers.config import EngineConfig
from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.step import ModelRunnerOutput
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.compiled import library, stage
from workers.runtime.compiled.held import NotDescribed, describe, in_place_of
from workers.runtime.compiled.library import Traced, compiled
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams
from workers.speculation.features import StepFeatures

GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.1, top_p=0.9, seed=4, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Libraries of this module's own."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "switchyard" / "compiled"


def engine(shape: str, folder: Path, **options: object) -> EngineConfig:
    checkpoint = make_checkpoint(shape, folder)
    return EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, max_num_batched_tokens=20, max_num_seqs=5, **options
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dtype", "pp"),
    [
        ("qwen3", "float32", 1),
        pytest.param("gqa", "bfloat16", 2, marks=pytest.mark.slow),
        pytest.param("tied", "float32", 2, marks=pytest.mark.slow),
    ],
)
def test_tokens_are_those_of_eager_steps(shape: str, dtype: str, pp: int, home: Path, tmp_path: Path) -> None:
    """In chunks, in batches of any size, after a preemption, and after a prompt that was wholly cached."""
    eager = engine(shape, tmp_path, pp=pp, num_blocks=14, compile=False)
    eager = replace(eager, dtype=dtype)
    many = [*prompts(), *prompts()]
    with EngineGroup(1, pp) as group:
        for sampling in (GREEDY, SAMPLED):
            expected = group.run(eager, many, sampling)
            found = group.run(replace(eager, compile=True), many, sampling)
            assert expected.num_preemptions
            assert found.completions == expected.completions
    assert len(list(home.glob("*.so"))) >= 3


def loaded(config: EngineConfig, feature_layers: tuple[int, ...] = ()) -> TorchModelRunner:
    model, device = load_config(config.model_dir), torch.device("cpu")
    runner = TorchModelRunner(config, model, ParallelGroups(Shard(), device), device, feature_layers=feature_layers)
    runner.warm_up()
    return runner


def both_ways(runner: TorchModelRunner, *lengths: int) -> list[ModelRunnerOutput]:
    """The same step, of prompts of these lengths, with compiled layers and without."""
    blocks, chunks = count(), []
    for length in lengths:
        table = [next(blocks) for _ in range(-(-length // 4))]
        chunks.append(DirectChunk(list(range(1, length + 1)), 0, 0, [table], 1, GREEDY))
    outputs = []
    for runner.replays in (True, False):
        outputs.append(runner.execute(direct_plan(chunks)))
    return outputs


@pytest.mark.slow
def test_hidden_states_that_a_drafter_wants_are_those_of_eager_steps(home: Path, tmp_path: Path) -> None:
    """Before the first layer, between two, and after the last."""
    runner = loaded(engine("gqa", tmp_path, num_blocks=14, compile=True), (0, 2, 3))
    assert runner.is_compiled
    for lengths in ((1,), (7, 1, 5)):
        compiled_step, eager = both_ways(runner, *lengths)
        assert isinstance(compiled_step.features, StepFeatures)
        assert isinstance(eager.features, StepFeatures)
        assert compiled_step.features.hidden.shape == (sum(lengths), 3 * 32)
        torch.testing.assert_close(compiled_step.features.hidden, eager.features.hidden, rtol=1e-4, atol=1e-4)
        assert list(compiled_step.sampled_token_ids) == list(eager.sampled_token_ids)


@pytest.mark.parametrize(
    ("name", "dtype", "is_compiled"),
    [
        pytest.param("ct-w8a8", "float32", True, marks=pytest.mark.slow),
        pytest.param("ct-w4a16-g32", "bfloat16", True, marks=pytest.mark.slow),
        ("ct-w8a8-static", "float32", False),
    ],
)
@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="integer products are those of other processors here")
def test_quantized_weights_are_compiled(name: str, dtype: str, is_compiled: bool, home: Path) -> None:
    config = EngineConfig(str(FIXTURES / name), dtype, "cpu", block_size=4, num_blocks=14, compile=True)
    before = set(home.glob("*.so"))
    runner = loaded(config)
    assert runner.is_compiled == is_compiled
    num_libraries = 4 if "w4" in name else 3  # another one for one row
    assert len(set(home.glob("*.so")) - before) == is_compiled * num_libraries
    for lengths in ((1,), (7, 1, 5)):
        compiled_step, eager = both_ways(runner, *lengths)
        assert list(compiled_step.sampled_token_ids) == list(eager.sampled_token_ids)


def test_one_row_of_4_bit_weights_takes_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced, and run as it is in place of compiled code."""
    ran: list[bool] = []

    def uncompiled(description: Sequence[str], trace: Callable[[], Traced]) -> library.Run:
        traced = trace()

        def run(arguments: list[Tensor]) -> list[Tensor]:
            ran.append(traced.is_one_row)
            return list(traced.code(*arguments))

        return run

    monkeypatch.setattr(stage, "compiled", uncompiled)
    config = EngineConfig(str(FIXTURES / "ct-w4a16-g32"), "bfloat16", "cpu", block_size=4, num_blocks=14, compile=True)
    runner = loaded(config)
    for lengths, expected in (((1,), True), ((7, 1, 5), False)):
        ran.clear()
        compiled_step, eager = both_ways(runner, *lengths)
        assert list(compiled_step.sampled_token_ids) == list(eager.sampled_token_ids)
        assert set(ran) == {expected}


@pytest.mark.parametrize("reason", ["compiler", "home", "others"])
def test_where_nothing_can_be_compiled_steps_run_without(
    reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    said = {"compiler": "no C++ compiler", "home": "no cache", "others": "could be written to by others"}[reason]
    if reason == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    if reason == "home":
        (tmp_path / "home").write_text("a file")
    if reason == "others":
        (tmp_path / "home" / "switchyard" / "compiled").mkdir(parents=True)
        (tmp_path / "home" / "switchyard" / "compiled").chmod(0o777)
    runner = loaded(engine("gqa", tmp_path, compile=True))
    assert said in caplog.text
    assert "steps run without compiled layers" in caplog.text
    assert not runner.is_compiled


@pytest.mark.parametrize(
    ("shape", "options"), [("qwen3_experts", {}), ("gqa", {"kv_cache_dtype": "int8"}), ("gqa", {"enable_lora": True})]
)
def test_what_has_no_compiled_form_runs_without(
    shape: str, options: dict[str, object], tmp_path: Path, home: Path
) -> None:
    before = set(home.glob("*"))
    assert not loaded(engine(shape, tmp_path, compile=True, **options)).is_compiled
    assert set(home.glob("*.so")) <= before


def test_small_models_are_compiled_only_when_asked(tmp_path: Path, home: Path) -> None:
    assert not loaded(engine("gqa", tmp_path)).is_compiled


def test_a_broken_library_is_made_anew(home: Path) -> None:
    """And what a killed process left, or nobody has used for long, goes."""

    class MadeAnew(Exception):
        pass

    def trace() -> Traced:
        raise MadeAnew

    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    (home / "left").mkdir()
    (home / "old.so").touch()
    os.utime(home / "old.so", (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.xxhash, "xxh3_128_hexdigest", lambda text: "broken")
        (home / "broken.so").write_bytes(b"no library")
        with pytest.raises(MadeAnew):
            compiled(("anything",), trace)
    assert {path.name for path in home.iterdir()} & {"left", "old.so", "broken.so"} == {"broken.so"}
    (home / "broken.so").unlink()


@dataclass
class Inner:
    weight: Tensor
    scale: float


@dataclass(frozen=True)
class Outer:
    inner: Inner
    again: Inner
    bias: Tensor | None


KNOWN = (Inner, Outer)


def test_code_that_reads_other_tensors_is_not_compiled(tmp_path: Path) -> None:
    """Its library would hold the first layer's, for all layers."""
    from workers.runtime.compiled.inductor import compile_to

    hidden = torch.rand(8)
    traced = Traced(lambda x: (x + hidden,), [torch.zeros(6, 8)], 1, False, ())
    with pytest.raises(ValueError, match="not among its arguments"):
        compile_to(tmp_path / "piece.pt2", traced)


def test_objects_are_described_by_all_but_their_tensors_values() -> None:
    def outer(scale: float = 1.0, rows: int = 3, is_shared: bool = True) -> Outer:
        inner = Inner(torch.rand(rows, 2), scale)
        return Outer(inner, inner if is_shared else Inner(torch.rand(rows, 2), scale), None)

    first = describe([outer()], KNOWN)
    assert [held.name for held in first.tensors] == ["weight"]
    assert describe([outer()], KNOWN).rest == first.rest
    for other in (outer(scale=2.0), outer(rows=4), outer(is_shared=False)):
        assert describe([other], KNOWN).rest != first.rest
    assert describe([outer(rows=4)], KNOWN, dynamic=(Inner,)).rest == describe([outer()], KNOWN, dynamic=(Inner,)).rest
    assert describe([outer(scale=2.0)], (Outer,), (Inner,)).rest == describe([outer()], (Outer,), (Inner,)).rest
    with pytest.raises(NotDescribed, match="no compiled form of Inner"):
        describe([outer()], (Outer,))


def test_tensors_come_back_after_a_failure() -> None:
    inner = Inner(torch.rand(3), 1.0)
    held = describe([inner], KNOWN).tensors
    weight, other = inner.weight, torch.rand(3)
    with pytest.raises(ZeroDivisionError), in_place_of(held, [other]):
        _ = 1 / (inner.weight is not other)
    assert inner.weight is weight
