"""The fake engine gives fake_completion's tokens in every batch, and wrong ones when a byte of its cache is wrong."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from kvstore.store import FragmentStore
from kvstore.tiers.host.host_tier import HostTier
from tests.workers.engine_group import run_to_end
from workers.config import EngineConfig
from workers.engine.direct_plan import DirectChunk, direct_plan, run_transfers
from workers.engine.engine import Engine
from workers.engine.request import Request, RequestRole
from workers.engine.step import BlockTransfer
from workers.errors import ModelError
from workers.kv.connector import KVConnector
from workers.model.identity import weights_identity
from workers.model.registry import load_config
from workers.parallel import ParallelGroups, Shard
from workers.runtime.build import load_runner, make_engine, make_executor
from workers.runtime.fake.model import fake_completion
from workers.runtime.fake.runner import FakeModelRunner
from workers.sampling.params import SamplingParams

VOCAB_SIZE, BLOCK_SIZE = 997, 4
SIZES = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
}
PROMPTS = [[i * 31 % VOCAB_SIZE for i in range(n)] for n in (1, 4, 23, 40)] + [[7, 9, 11]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights."""
    directory = tmp_path_factory.mktemp("fake")
    (directory / "config.json").write_text(json.dumps(SIZES))
    return directory


def config_for(model_dir: Path, **options: object) -> EngineConfig:
    settings = {"runner": "fake", "dtype": "float32", "block_size": BLOCK_SIZE, "num_blocks": 64, **options}
    return EngineConfig(str(model_dir), **settings)


def make(config: EngineConfig) -> tuple[Engine, FakeModelRunner]:
    model, groups = load_config(config.model_dir), ParallelGroups(Shard(), CPU)
    runner = load_runner(config, model, groups, CPU)
    assert isinstance(runner, FakeModelRunner)
    executor = make_executor(config, runner, groups)
    return make_engine(config, model, runner, executor, b"names", clock=lambda: 0.0), runner


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def complete(engine: Engine, sampling: SamplingParams) -> list[list[int]]:
    requests = [Request(f"r{i}", list(p), len(p), sampling, arrival_time_s=float(i)) for i, p in enumerate(PROMPTS)]
    tokens = run_to_end(engine, requests)
    return [tokens[r.request_id] for r in requests]


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["step by step", "async scheduling"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_right_in_any_batch(model_dir: Path, dtype: str, async_scheduling: bool) -> None:
    expected = [fake_completion(p, 12, VOCAB_SIZE) for p in PROMPTS]
    for caching, chunk, num_blocks in itertools.product((True, False), (7, 512), (14, 64)):
        options = {"enable_prefix_caching": caching, "max_num_batched_tokens": chunk, "num_blocks": num_blocks}
        engine, _ = make(config_for(model_dir, dtype=dtype, async_scheduling=async_scheduling, **options))
        assert complete(engine, greedy(12)) == expected, options
        assert complete(engine, greedy(12)) == expected, f"again, from the prefix cache: {options}"
        engine.close()
        assert (engine.scheduler.num_preemptions > 0) == (num_blocks == 14), options


def test_sampled_tokens_depend_on_seed_and_position_alone(model_dir: Path) -> None:
    sampling = SamplingParams(temperature=0.7, seed=2**40 + 3, max_tokens=20, ignore_eos=True)
    engine, _ = make(config_for(model_dir, max_num_batched_tokens=5))
    found = complete(engine, sampling)
    assert found == [fake_completion(p, 20, VOCAB_SIZE, 0.7, 2**40 + 3) for p in PROMPTS]
    assert found != [fake_completion(p, 20, VOCAB_SIZE, 0.7, 3) for p in PROMPTS]
    assert found != [fake_completion(p, 20, VOCAB_SIZE) for p in PROMPTS]


def test_a_stream_goes_on_from_its_emitted_tokens(model_dir: Path) -> None:
    prompt = PROMPTS[2]
    whole = fake_completion(prompt, 20, VOCAB_SIZE)
    for cut in range(1, 20):
        engine, _ = make(config_for(model_dir))
        tokens = {}
        engine.submit(Request("r", prompt + whole[:cut], len(prompt), greedy(20)))
        while (events := engine.step()) is not None:
            tokens.update((token.position, token.token_id) for token in events.tokens)
        assert [tokens[i] for i in range(cut, 20)] == whole[cut:]


def filled_runner(model_dir: Path) -> tuple[FakeModelRunner, list[int]]:
    """A runner that holds the KV of a prompt of ten tokens, and its block table."""
    _, runner = make(config_for(model_dir))
    table = [5, 2, 9]
    runner.execute(direct_plan([DirectChunk(PROMPTS[2][:9], 0, 0, [table])]))
    return runner, table


def next_token(runner: FakeModelRunner, table: list[int]) -> int:
    last = DirectChunk(PROMPTS[2][9:10], 9, 0, [table], num_logits=1)
    return runner.execute(direct_plan([last])).sampled_token_ids[0]


def test_any_wrong_word_of_the_cache_changes_the_tokens(model_dir: Path) -> None:
    runner, table = filled_runner(model_dir)
    (right,) = fake_completion(PROMPTS[2][:10], 1, VOCAB_SIZE)
    assert next_token(runner, table) == right
    num_same = num_tried = 0
    for position in range(9):
        slots = runner.cache.tensors[0][0][:, table[position // BLOCK_SIZE], :, :, position % BLOCK_SIZE]
        for word in itertools.product(*map(range, slots.shape)):
            slots[word] ^= 1 << (num_tried % 31)
            num_same += next_token(runner, table) == right
            slots[word] ^= 1 << (num_tried % 31)
            num_tried += 1
    assert next_token(runner, table) == right
    assert num_tried == 9 * 3 * 2 * 2 * 4
    assert num_same < 5, f"{num_same} of {num_tried}: chance alone gives one in {VOCAB_SIZE}"


def test_words_in_the_wrong_slot_change_the_tokens(model_dir: Path) -> None:
    (right,) = fake_completion(PROMPTS[2][:10], 1, VOCAB_SIZE)
    swaps = {
        "layers": lambda c: (c[0, 5], c[1, 5]),
        "heads": lambda c: (c[:, 5, 0], c[:, 5, 1]),
        "K and V": lambda c: (c[:, 5, :, 0], c[:, 5, :, 1]),
        "slots": lambda c: (c[:, 5, :, :, 0], c[:, 5, :, :, 1]),
        "blocks": lambda c: (c[:, 5], c[:, 2]),
        "fragments": lambda c: (c[2, 5, 1], c[2, 2, 1]),
    }
    for name, words_of in swaps.items():
        runner, table = filled_runner(model_dir)
        one, other = words_of(runner.cache.tensors[0][0])
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)
        assert next_token(runner, table) != right, name
    runner, table = filled_runner(model_dir)
    assert next_token(runner, [table[1], table[0], table[2]]) != right


def tokens_of(engine: Engine) -> list[int]:
    """All of them, in the order of the steps."""
    tokens: list[int] = []
    while engine.scheduler.has_work():
        events = engine.step()
        tokens += [token.token_id for token in events.tokens] if events is not None else []
    return tokens


def test_what_one_publishes_another_reads(model_dir: Path, shared_kv_node) -> None:
    """Prefill in one engine, decode in another, blocks through a real node's arena: nothing is computed twice."""
    prompt = PROMPTS[3][:38]
    sides = []
    for _ in range(2):
        engine, runner = make(config_for(model_dir, max_num_batched_tokens=16))
        store = FragmentStore([HostTier(shared_kv_node.host_address)])
        connector = KVConnector(runner.cache.memories(1, "none"), runner.cache.grids(1), store)
        runner.attach(connector)
        sides.append((engine, connector, store))
    (prefill, _, published), (decode, _, pulled) = sides
    prefill.submit(Request("r", list(prompt), len(prompt), greedy(9), RequestRole.PREFILL))
    tokens = tokens_of(prefill)
    decode.submit(Request("r", list(prompt), len(prompt), greedy(9), RequestRole.DECODE))
    decode.continue_request("r", list(tokens))
    tokens += tokens_of(decode)
    assert tokens == fake_completion(prompt, 9, VOCAB_SIZE)
    assert decode.counters.num_transferred_blocks == 10
    assert decode.counters.num_computed_prompt_tokens == 0
    assert pulled.stats().pulled_bytes == published.stats().published_bytes
    for _, connector, store in sides:
        connector.close()
        store.close()


def test_unverified_bytes_would_show(model_dir: Path) -> None:
    """The same KV transfer without a check in between: a store that gives a wrong fragment gives wrong tokens."""

    class Careless(FragmentStore):
        def load(self, keys, buffers):
            for buffer in buffers:
                buffer[...] = 1
            return [True] * len(keys)

    _, runner = make(config_for(model_dir))
    connector = KVConnector(runner.cache.memories(1, "none"), runner.cache.grids(1), Careless([]))
    runner.attach(connector)
    load = BlockTransfer(1, 0, [b"n" * 16, b"m" * 16], [5, 2], [4, 4])
    assert run_transfers(runner, loads=[load]) == [2]
    step = DirectChunk(PROMPTS[2][8:10], 8, 0, [[5, 2, 9]], num_logits=1)
    output = runner.execute(direct_plan([step]))
    connector.close()
    assert list(output.sampled_token_ids) != fake_completion(PROMPTS[2][:10], 1, VOCAB_SIZE)


def test_its_blocks_are_nobody_elses(model_dir: Path) -> None:
    demo = Path(__file__).parents[3] / "models" / "demo"
    model = load_config(demo)
    assert weights_identity(demo, model, "fake") != weights_identity(demo, model, "torch")


def test_what_it_cannot_do_is_one_line(model_dir: Path) -> None:
    model, groups = load_config(model_dir), ParallelGroups(Shard(), CPU)
    with pytest.raises(ModelError, match="runner=fake takes tp=1 and pp=1, not tp=2 and pp=1"):
        load_runner(config_for(model_dir, tp=2), model, groups, CPU)
    with pytest.raises(ValueError, match=r"^runner: must be one of torch, fake, not 'vapour'"):
        config_for(model_dir, runner="vapour")
    with pytest.raises(ValueError, match=r"^fake_step_s: must be at least 0, not -1.0"):
        config_for(model_dir, fake_step_s=-1.0)
