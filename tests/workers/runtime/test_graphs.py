"""Steps through graphs, rehearsed on the CPU: ladders, padding, fixed buffers, and the same tokens as without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.workers.engine_group import EngineGroup, run_to_end
from tests.workers.tiny_llama import make_checkpoint, prompts
from workers.config import EngineConfig
from workers.engine.direct_plan import DirectChunk, direct_plan
from workers.engine.request import Request
from workers.model.registry import load_config
from workers.model.stage import DecoderStage
from workers.parallel import ParallelGroups, Shard
from workers.runtime.batching import NO_PADDING, InputBuffers, Padding, PreparedBatch
from workers.runtime.build import make_engine, make_executor
from workers.runtime.graphs import GraphedStage, decode_capture_sizes, token_capture_sizes
from workers.runtime.runner import TorchModelRunner
from workers.sampling.params import SamplingParams

CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.1, top_p=0.9, seed=4, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))


def many_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return prompts() + [torch.randint(97, (n,), generator=generator).tolist() for n in (1, 2, 30)]


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (30, [1, 2, 4, 8, 16, 24, 30])]
)
def test_ladder_of_decodes(most, sizes):
    assert decode_capture_sizes(most) == sizes


@pytest.mark.parametrize(("most", "sizes"), [(4, [4]), (8, [8]), (100, [8, 16, 32, 64, 100]), (8192, None)])
def test_ladder_of_tokens(most, sizes):
    assert token_capture_sizes(most) == (sizes or [8, 16, 32, 64, 128, 256, 512])


def filled(
    inputs: InputBuffers, chunks: list[DirectChunk], all_as_prefills: bool = False, padding: Padding = NO_PADDING
) -> PreparedBatch:
    plan = direct_plan(chunks)
    inputs.apply(plan)
    return inputs.fill(plan, 4, all_as_prefills, padding)


def test_a_batch_is_filled_up_with_what_changes_nothing():
    inputs = InputBuffers(64, 8, 6, CPU)
    filled(inputs, [DirectChunk(list(range(20, 30)), 0, 0, [[5, 4, 3]])])  # leaves its traces in the buffer
    first = DirectChunk([7], 9, 9, [[2, 1, 5]], 1, SamplingParams(seed=3), num_prompt_tokens=4)
    cached = DirectChunk([8], 3, 4, [[4]])  # cached already, and no token is chosen after it
    prepared = filled(inputs, [first, cached], padding=Padding(4, 4, 16))
    batch = prepared.batch
    assert (batch.num_decodes, prepared.num_tokens, prepared.positions.tolist()) == (4, 2, [6])
    assert (prepared.order.tolist(), prepared.sampling.seed.tolist()) == ([0], [3])
    assert batch.token_ids.tolist() == [7, 8, 0, 0]
    assert batch.positions.tolist() == [9, 3, 0, 0]
    assert batch.groups[0].slot_mapping.tolist() == [5 * 4 + 1, -1, -1, -1]
    assert batch.seq_lens.tolist() == [10, 4, 0, 0]
    assert batch.logit_rows.tolist() == [0, 0, 0, 0]
    assert batch.query_start_loc.tolist() == [0]
    assert batch.groups[0].block_table.shape == (4, 16)
    assert batch.groups[0].block_table[0, :3].tolist() == [2, 1, 5]

    batch = filled(inputs, [first, cached], all_as_prefills=True, padding=Padding(4, 4, 16)).batch
    assert (batch.num_decodes, batch.max_query_len) == (0, 1)
    assert batch.query_start_loc.tolist() == [0, 1, 2, 2, 2]  # what fills it up asks nothing

    chunk = DirectChunk([1, 2, 3], 4, 4, [[0, 2]], 2)  # its last two tokens' logits are wanted
    prepared = filled(inputs, [chunk, first], padding=Padding(num_tokens=8))
    batch = prepared.batch
    assert (batch.num_decodes, prepared.num_tokens) == (1, 4)
    assert (prepared.order.tolist(), prepared.positions.tolist()) == ([2, 0, 1], [6, 6, 7])
    assert [part.tolist() for part in prepared.last] == [[0, 2], [1, 0]]
    assert batch.token_ids.tolist() == [7, 1, 2, 3, 0, 0, 0, 0]
    assert batch.groups[0].slot_mapping.tolist() == [21, 8, 9, 10, -1, -1, -1, -1]
    assert batch.groups[0].block_table[:, :2].tolist() == [[2, 1], [0, 2]]
    assert batch.seq_lens.tolist() == [10, 7]
    assert batch.query_start_loc.tolist() == [0, 3]
    assert batch.logit_rows.tolist() == [0, 2, 3]


def test_inputs_of_a_size_stay_where_they_are():
    inputs = InputBuffers(64, 8, 6, CPU)
    one = DirectChunk([7], 9, 9, [[2, 1, 5]])
    before = filled(inputs, [one], padding=Padding(8, 8, 16)).batch
    after = filled(inputs, [one] * 7, padding=Padding(8, 8, 16)).batch
    for name in ("token_ids", "positions", "seq_lens", "logit_rows"):
        assert getattr(before, name).data_ptr() == getattr(after, name).data_ptr(), name
    for name in ("slot_mapping", "block_table"):
        assert getattr(before.groups[0], name).data_ptr() == getattr(after.groups[0], name).data_ptr(), name


@pytest.mark.parametrize("split", [(1, 1), (2, 1), (1, 2)], ids=lambda s: f"tp{s[0]}pp{s[1]}")
def test_tokens_are_those_of_eager_steps(split, checkpoint):
    with EngineGroup(*split) as group:
        for chunk, num_blocks, sampling in ((7, 64, GREEDY), (512, 14, GREEDY), (20, 64, SAMPLED)):
            eager = EngineConfig(
                str(checkpoint), "float32", "cpu", tp=split[0], pp=split[1], block_size=4, num_blocks=num_blocks,
                max_num_batched_tokens=chunk, max_num_seqs=5,
            )  # fmt: skip
            expected = group.run(eager, many_prompts(), sampling)
            assert (expected.num_preemptions > 0) == (num_blocks == 14)
            assert group.run(replace(eager, cuda_graphs=True), many_prompts(), sampling).completions == (
                expected.completions
            )


def run_counting(runner: TorchModelRunner, config: EngineConfig, monkeypatch) -> tuple[dict, int, list, list]:
    """Tokens, number of steps, the batches that were replayed, and those of whole forward passes."""
    replays, forwards = [], []
    run, forward = GraphedStage.run, DecoderStage.forward
    with monkeypatch.context() as patch:
        patch.setattr(GraphedStage, "run", lambda *a: (replays.append(a[1].batch), run(*a))[1])
        patch.setattr(DecoderStage, "forward", lambda *a: (forwards.append(a[1]), forward(*a))[1])
        model = load_config(config.model_dir)
        executor = make_executor(config, runner, ParallelGroups(Shard(), CPU))
        engine = make_engine(config, model, runner, executor, b"names", clock=lambda: 0.0)
        requests = [Request(f"r{i}", list(p), len(p), GREEDY) for i, p in enumerate(many_prompts())]
        tokens = run_to_end(engine, requests)
    return tokens, engine.counters.num_steps, replays, forwards


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_every_small_step_is_a_replay_and_reads_no_foreign_slot(checkpoint, monkeypatch, batch_invariant):
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, num_blocks=64, max_num_batched_tokens=64, max_num_seqs=6,
        batch_invariant=batch_invariant,
    )  # fmt: skip
    completions = []
    for with_graphs in (False, True):
        options = replace(config, cuda_graphs=with_graphs)
        runner = TorchModelRunner(options, load_config(checkpoint), ParallelGroups(Shard(), CPU), CPU)
        runner.warm_up()
        runner.cache.tensors[0][0].fill_(float("nan"))  # as if other requests had left that
        tokens, num_steps, replays, forwards = run_counting(runner, options, monkeypatch)
        completions.append(tokens)
        if with_graphs:
            decodes = [b for b in replays if len(b.seq_lens) == len(b.token_ids)]
            assert len(replays) == num_steps
            assert 0 < len(decodes) < len(replays)
            assert len(forwards) == len(decodes)  # on a CPU a whole graph is the call itself, made again
        else:
            assert (len(replays), len(forwards)) == (0, num_steps)
    assert completions[0] == completions[1]


@pytest.mark.parametrize("with_graphs", [False, True])
def test_the_largest_steps_of_a_warm_up_fit_and_write_nothing(checkpoint, with_graphs):
    """Only CUDA runs them when it warms up; that they are within bounds shows anywhere."""
    config = EngineConfig(
        str(checkpoint), "float32", "cpu", block_size=4, num_blocks=3, max_num_batched_tokens=300, max_num_seqs=9,
        max_model_len=100, cuda_graphs=with_graphs,
    )  # fmt: skip
    runner = TorchModelRunner(config, load_config(checkpoint), ParallelGroups(Shard(), CPU), CPU)
    runner.warm_up()
    ((cache,),) = runner.cache.tensors
    before = cache.clone()
    runner._run_largest_steps()
    assert torch.equal(cache, before)
    assert not cache[:, 1:].any()
