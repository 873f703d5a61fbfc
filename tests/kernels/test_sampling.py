"""Sampling: the generator's bits, the worker's sampler as an oracle, shards, and what the filters leave."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.harness import OPS
from kernels.philox import uniform_words, uniform_words_at
from tests.workers.sampling import Choice, choose
from workers.parallel import ParallelGroups, Shard

ROOT = Path(__file__).parents[2]
OPERATIONS = {op.name: op for op in OPS}
SAMPLE, ARGMAX = OPERATIONS["sample"], OPERATIONS["vocab_argmax"]
ALONE = ParallelGroups(Shard(), torch.device("cpu"))


def arguments(logits, specs, first_id=0):
    """The operation's arguments for the worker's specs."""
    seeds = torch.tensor([s.seed - (s.seed >> 63 << 64) for s in specs], dtype=torch.int64)
    return (
        logits,
        torch.tensor([s.temperature for s in specs], dtype=torch.float64),
        torch.tensor([s.top_k for s in specs], dtype=torch.int32),
        torch.tensor([s.top_p for s in specs], dtype=torch.float64),
        torch.zeros(len(specs)),
        seeds,
        torch.tensor([s.position for s in specs], dtype=torch.int64),
        first_id,
    )


def words_by_hand(seed, position, vocabulary_id):
    """Ten rounds in Python's integers, which do not overflow."""
    c, k = [0, position, vocabulary_id // 4, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ k[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ k[1], first & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c[vocabulary_id % 4]


def test_words_are_those_of_the_generator():
    for seed, position, first_id, count in [(7, 0, 0, 37), (2**63 + 5, 9, 34, 35), (-1, 2**31 - 1, 128001, 50)]:
        words = uniform_words(seed, position, first_id, count, torch.device("cpu"))
        assert words.tolist() == [words_by_hand(seed, position, i) for i in range(first_id, first_id + count)]
        assert torch.equal(uniform_words_at(seed, position, torch.arange(first_id, first_id + count)), words)


@pytest.mark.parametrize("run", ["cpu", "reference"])
@pytest.mark.parametrize("scale", [0.5, 2.0, 8.0])
def test_the_choice_is_that_of_the_workers_sampler(run, scale):
    generator = torch.Generator().manual_seed(int(10 * scale))
    specs = [
        Choice(temperature, top_p, top_k, seed, position)
        for position, (temperature, top_k, top_p, seed) in enumerate(
            [(0.0, 0, 1.0, 1), (1.0, 0, 1.0, 2**64 - 1), (0.7, 50, 1.0, 3), (1.0, 0, 0.9, 2**63), (0.6, 40, 0.95, 5),
             (1.5, 1, 1.0, 6), (2.0, 1500, 1.0, 7), (1.0, 2000, 0.99, 8), (1e-40, 0, 1.0, 9), (1e-40, 3, 0.5, 9)]
        )
    ]  # fmt: skip
    logits = scale * torch.randn(len(specs), 5000, generator=generator)
    _, ids = getattr(SAMPLE, run)(*arguments(logits, specs))
    assert ids.tolist() == choose(logits, specs, ALONE, 5000).tolist()


def test_shards_of_the_vocabulary_reduce_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 1003, generator=generator).mul_(3).to(torch.bfloat16)
    specs = [Choice(1.0 * (i > 0), 1.0, 0, i, i) for i in range(4)]
    for op, extra in ((ARGMAX, lambda first: (first,)), (SAMPLE, lambda first: arguments(logits, specs, first)[1:])):
        _, whole = op(logits, *extra(0))
        cuts = [(0, 251), (251, 502), (502, 1003)]
        parts = [op(logits[:, first:end], *extra(first)) for first, end in cuts]
        values, ids = (torch.stack(x) for x in zip(*parts, strict=True))
        assert torch.equal(ids.gather(0, values.argmax(0, keepdim=True))[0], whole)


def test_the_smallest_id_of_a_tie_is_chosen():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert ARGMAX(logits, 8)[1].tolist() == [9]
    assert SAMPLE(*arguments(logits, [Choice(0.0, 1.0, 0, 0, 0)], 8))[1].tolist() == [9]


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p", "left"),
    [
        (2, 1.0, 0.0, {0, 1, 2}),  # 1 and 2 are tied: both stay
        (0, 0.45, 0.0, {0}),
        (0, 0.55, 0.0, {0, 1, 2}),
        (4, 0.9, 0.0, {0, 1, 2}),  # of the four that top-k leaves, three hold 0.9
        (0, 0.9, 0.0, {0, 1, 2, 3}),  # of all, they do not
        (0, 1.0, 0.11, {0, 1, 2, 3}),
        (0, 1.0, 0.25, {0, 1, 2}),
        (0, 0.95, 1.0, {0}),
    ],
)
@pytest.mark.parametrize("run", ["cpu", "reference"])
def test_what_the_filters_leave(run, top_k, top_p, min_p, left):
    shares = torch.tensor([0.5, 0.17, 0.17, 0.06, 0.05, 0.05])
    rows = 120
    arguments = (
        shares.log().expand(rows, 6).contiguous(), torch.ones(rows), torch.full((rows,), top_k),
        torch.full((rows,), top_p), torch.full((rows,), min_p), torch.full((rows,), 11), torch.arange(rows), 0,
    )  # fmt: skip
    _, ids = getattr(SAMPLE, run)(*arguments)
    assert set(ids.tolist()) == left


INTERPRETED = """
import json, torch, triton, triton.language as tl
from kernels.harness.interpret import repair
from kernels.philox import fast_gumbel, gumbel, gumbel_bound, uniform_words, words_of_ids, words_of_tile

@triton.jit
def kernel(tile_ptr, ids_ptr, noise_ptr, bound_ptr, seed, position, first_block, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    words = words_of_tile(seed, tl.full([], position, tl.int64), first_block, BLOCK)
    tl.store(tile_ptr + lane, words.to(tl.int64))
    tl.store(ids_ptr + lane, words_of_ids(seed, tl.full([], position, tl.int64), first_block * 4 + lane).to(tl.int64))
    tl.store(noise_ptr + lane, fast_gumbel(words))
    tl.store(bound_ptr + lane, gumbel_bound(words))

@triton.jit
def noise_of(words_ptr, noise_ptr, bound_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + lane).to(tl.uint32)
    tl.store(noise_ptr + lane, fast_gumbel(words))
    tl.store(bound_ptr + lane, gumbel_bound(words))

repair()
N = 1024
out = {"unequal": 0, "error": 0.0, "above_bound": 0}
def note(noise, bound, words):
    exact = gumbel(words)
    out["error"] = max(out["error"], float((noise - exact).abs().max()))
    out["above_bound"] += int((noise > bound + 1e-5).sum())
for seed, position, first_block in [(3, 0, 0), (-7, 12345, 32064), (2**62 + 11, 2**31 - 1, 999)]:
    tile, ids = torch.zeros(2, N, dtype=torch.int64)
    noise, bound = torch.zeros(2, N)
    kernel[(1,)](tile, ids, noise, bound, seed, position, first_block, BLOCK=N)
    words = uniform_words(seed, position, 4 * first_block, N, torch.device("cpu"))
    out["unequal"] += int((tile != words).sum() + (ids != words).sum())
    note(noise, bound, words)
steps = torch.tensor([round(2 ** (i / 16)) for i in range(512)])
words = torch.cat((steps, 2**32 - steps)).clamp(0, 2**32 - 1)
noise, bound = torch.zeros(2, N)
noise_of[(1,)](words, noise, bound, BLOCK=N)
note(noise, bound, words)
print(json.dumps(out))
"""


def test_triton_draws_the_same_bits_and_nearly_the_same_noise(tmp_path):
    script = tmp_path / "noise.py"
    script.write_text(INTERPRETED)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["unequal"] == 0
    assert found["above_bound"] == 0
    assert found["error"] < 2e-5


def test_samples_follow_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0, -math.inf]]).expand(2000, 5)
    specs = [Choice(2.0, 1.0, 0, 5, i) for i in range(2000)]
    _, ids = SAMPLE(*arguments(logits, specs))
    shares = torch.bincount(ids, minlength=5) / 2000
    assert torch.allclose(shares, torch.softmax(logits[0] / 2.0, -1), atol=0.03)
