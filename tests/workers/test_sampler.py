"""The counter-based sampler: known answers, and that a choice depends on its counter alone."""

import pytest
import torch

from kernels.philox import gumbel, philox4x32, uniform_words
from tests.workers.sampling import Choice, choose, mask_top_k_top_p
from workers.parallel import ParallelGroups, Shard
from workers.sampling.params import NO_CHOICE, NO_TOKEN

# Known-answer vectors of Random123 (philox4x32, 10 rounds): counter, key, result.
KNOWN_ANSWERS = [
    ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
ALONE = ParallelGroups(Shard(), torch.device("cpu"))


def spec(temperature=1.0, top_p=1.0, top_k=0, seed=7, position=0) -> Choice:
    return Choice(temperature, top_p, top_k, seed, position)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([c], dtype=torch.int64) for c in counter), key)
    assert [int(w) for w in words] == expected


def noise(seed, position, first_id, num_ids):
    return gumbel(uniform_words(seed, position, first_id, num_ids, torch.device("cpu")))


def test_noise_of_a_token_does_not_depend_on_how_the_vocabulary_is_cut():
    whole = noise(2**63 + 5, 9, 0, 103)
    parts = [noise(2**63 + 5, 9, first, count) for first, count in ((0, 34), (34, 35), (69, 34))]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_differs_by_seed_and_position():
    base = noise(1, 0, 0, 64)
    assert not torch.equal(base, noise(2, 0, 0, 64))
    assert not torch.equal(base, noise(1 << 32, 0, 0, 64))
    assert not torch.equal(base, noise(1, 1, 0, 64))


def test_greedy_takes_the_smallest_id_of_a_tie():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    assert choose(logits, [spec(temperature=0)], ALONE, 4).tolist() == [1]


def test_padding_of_the_vocabulary_is_never_chosen():
    logits = torch.tensor([[-5.0, -6.0, 0.0, 0.0]])
    assert choose(logits, [spec(temperature=0)], ALONE, 2).tolist() == [0]
    assert all(choose(logits, [spec(position=i)], ALONE, 2).item() < 2 for i in range(50))


def test_same_seed_gives_the_same_token_alone_and_in_a_batch():
    torch.manual_seed(0)
    logits = torch.randn(5, 50)
    specs = [spec(seed=3, position=i, top_k=10 * (i % 2), temperature=0.5 + i) for i in range(5)]
    together = choose(logits, specs, ALONE, 50).tolist()
    alone = [choose(logits[i : i + 1], [specs[i]], ALONE, 50).item() for i in range(5)]
    assert together == alone


def test_frequencies_follow_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).expand(4000, 4)
    chosen = choose(logits, [spec(temperature=2.0, position=i) for i in range(4000)], ALONE, 4)
    found = torch.bincount(chosen, minlength=4) / 4000
    assert torch.allclose(found, torch.softmax(logits[0] / 2.0, -1), atol=0.03)


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-30, 1e-6])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.5)])
def test_hardly_any_temperature_is_greedy(temperature, top_k, top_p):
    logits = torch.tensor([[-30.0, 12.0, 40.0, 39.0]])
    specs = [spec(temperature, top_p, top_k, position=i) for i in range(20)]
    assert choose(logits.expand(20, 4), specs, ALONE, 4).tolist() == [2] * 20


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = torch.log(torch.tensor([0.5, 0.1, 0.25, 0.15]))
    assert torch.isfinite(mask_top_k_top_p(logits, 2, 1.0)).tolist() == [True, False, True, False]
    assert torch.isfinite(mask_top_k_top_p(logits, 0, 0.6)).tolist() == [True, False, True, False]
    assert torch.isfinite(mask_top_k_top_p(logits, 0, 0.5)).tolist() == [True, False, False, False]
    assert torch.isfinite(mask_top_k_top_p(logits, 0, 1e-6)).tolist() == [True, False, False, False]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_without_finite_logits_has_no_token_and_the_others_have_theirs(temperature, bad):
    logits = torch.randn(3, 50)
    expected = choose(logits, [spec(temperature, position=i) for i in range(3)], ALONE, 50)
    logits[1] = bad
    tokens = choose(logits, [spec(temperature, position=i) for i in range(3)], ALONE, 50)
    lost = NO_CHOICE if bad == float("-inf") else NO_TOKEN  # bans take all of a row's logits, too
    assert tokens.tolist() == [int(expected[0]), lost, int(expected[2])]


def test_one_nan_in_a_row_is_enough():
    logits = torch.randn(2, 50)
    logits[0, 7] = float("nan")
    assert choose(logits, [spec(0.0), spec(0.0)], ALONE, 50).tolist() == [NO_TOKEN, int(logits[1].argmax())]
