"""SIGKILL while tokens are drafted: the stream goes on, on a worker that drafts otherwise or not at all, with the same
tokens, each once.

The fake engine's tokens are hashes of what lies in the KV cache: a slot of a rejected draft that was ever read, or a
draft that was published, would change them. A worker remembers what it has generated (suffix), so that a prompt that
comes again has right drafts, and with another seed wrong ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from switchyard_client import Finished, GenerationRequest, SamplingParams, Tokens

from tests.cluster.deaths import EVERY, NUM_TOKENS, SPREAD, Once, all_positions, busy
from tests.fake_cluster import Answer, FakeCluster
from workers.config import SpeculativeOptions
from workers.runtime.fake.model import fake_completion

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

STEP_S = 0.004
VOCAB_SIZE = 64
# Of these every step has drafts, whether they pay or not: what pays would hang on the machine's other work.
DRAFTS = {
    "speculative": SpeculativeOptions(method="suffix", num_speculative_tokens=3, enable_adaptive_verification=False)
}
OTHER_DRAFTS = {"speculative": SpeculativeOptions(method="ngram", prompt_lookup_min=1)}

MakeCluster = Callable[..., FakeCluster]


def prompt(number: int) -> list[int]:
    return [(number * 17 + i * i * 31 + 7) % VOCAB_SIZE for i in range(30)]


def check(answer: Answer, number: int, temperature: float) -> None:
    assert answer.ids == fake_completion(prompt(number), NUM_TOKENS, VOCAB_SIZE, temperature, 1)
    assert answer.finished is not None
    assert answer.finished.num_output_tokens == NUM_TOKENS


@all_positions(SPREAD, EVERY)
@pytest.mark.parametrize(
    "successor", ["other", pytest.param("same", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)]
)
def test_a_drafting_worker_may_die_at_any_token(
    fake_cluster: MakeCluster, successor: str, positions: tuple[int, ...]
) -> None:
    second = {"same": DRAFTS, "other": OTHER_DRAFTS, "none": {}}[successor]
    cluster = fake_cluster(
        step_s=STEP_S, engine_of={"decode-0": DRAFTS, "decode-1": second}, sizes={"vocab_size": VOCAB_SIZE}
    )
    client = cluster.client()
    num_replaced = num_accepted = num_drafts = 0
    for number, position in enumerate(positions):
        killed: list[str] = []

        def kill(killed: list[str] = killed) -> None:
            if name := busy(cluster, "decode"):
                cluster.kill(name)
                killed.append(name)

        temperatures = (0.0, 0.8, 0.8, 0.0) if number % 2 else (0.8, 0.0, 0.0, 0.8)
        for turn, temperature in enumerate(temperatures):
            is_victim = turn == 2 + number % 2
            on_tokens = Once(position, kill if is_victim else lambda: None)
            answer = cluster.ask(client, prompt(number), NUM_TOKENS, on_tokens, temperature=temperature)
            check(answer, number, temperature)
            assert answer.finished is not None
            stats = answer.finished.stats
            num_replaced += stats.num_replacements
            num_accepted += stats.num_accepted_tokens
            num_drafts += stats.num_draft_tokens
        for name in killed:
            cluster.start_worker(name)
        cluster.wait_complete()
    assert num_replaced >= len(positions) // 3
    assert 0 < num_accepted < num_drafts
    cluster.wait_at_rest()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_each_choice_of_a_request_has_its_own_tokens(fake_cluster: MakeCluster, temperature: float) -> None:
    """Several choices over shared prompt blocks, all with drafts. Of three times, each choice comes twice to one of the
    two decode workers, which has its tokens in memory then."""
    cluster = fake_cluster(step_s=STEP_S, engine=DRAFTS, sizes={"vocab_size": VOCAB_SIZE})
    client, num_choices = cluster.client(), 4
    sampling = SamplingParams(temperature=temperature, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1)
    num_accepted = 0
    for _ in range(3):
        ids: list[list[int]] = [[] for _ in range(num_choices)]
        for index, event in client.generate_many([GenerationRequest(tuple(prompt(3)), sampling)], num_choices):
            if isinstance(event, Tokens):
                ids[index] += event.ids
            elif isinstance(event, Finished):
                num_accepted += event.stats.num_accepted_tokens
        seeds = range(1, num_choices + 1)
        assert ids == [fake_completion(prompt(3), NUM_TOKENS, VOCAB_SIZE, temperature, seed) for seed in seeds]
    assert num_accepted > 0
    cluster.wait_at_rest()
