"""Real drafters in a whole cluster of the demo model: handed over, as several choices, and after SIGKILL, a stream has
the tokens that it has without drafts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from switchyard_client import Finished, GenerationRequest, SamplingParams, Tokens

from bench.speculation.drafters import DRAFTS
from tests.cluster.deaths import NUM_TOKENS, Once, at_work, prompt
from tests.fake_cluster import FakeCluster
from tests.fake_model import DEMO
from workers.config import SpeculativeOptions

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NUM_CHOICES = 3


def drafts(method: str) -> dict[str, SpeculativeOptions]:
    """In every step, whether they pay or not."""
    model = str(DRAFTS.get(method, ""))
    options = SpeculativeOptions(
        method=method, model=model, num_speculative_tokens=3, enable_adaptive_verification=False
    )
    return {"speculative": options}


@pytest.mark.parametrize(
    ("first", "second"),
    [("draft_model", "eagle3"), pytest.param("suffix", "draft_model", marks=pytest.mark.slow)],
)
def test_tokens_are_those_of_plain_decoding(fake_cluster: Callable[..., FakeCluster], first: str, second: str) -> None:
    """A request for no draft tokens decodes plainly on the same workers. first, second: drafters of the two decode
    workers; either may be the one that dies."""
    engine = {"runner": "torch", "batch_invariant": True}
    engine_of = {"decode-0": drafts(first), "decode-1": drafts(second)}
    cluster = fake_cluster(prefill=1, model_dir=str(DEMO), block_size=16, engine=engine, engine_of=engine_of)
    client = cluster.client()
    ids = prompt(1, 40)
    for temperature, position in ((0.0, 9), (0.9, 23)):
        options = {"temperature": temperature, "seed": 5, "repetition_penalty": 1.1}
        plain = cluster.ask(client, ids, NUM_TOKENS, num_speculative_tokens=0, **options)
        assert plain.finished is not None
        assert plain.finished.stats.num_draft_tokens == 0
        killed: list[str] = []

        def kill(killed: list[str] = killed) -> None:
            killed.append(at_work(cluster, "decode"))
            cluster.kill(killed[0])

        answer = cluster.ask(client, ids, NUM_TOKENS, Once(position, kill), **options)
        assert answer.ids == plain.ids
        assert answer.finished is not None
        stats = answer.finished.stats
        assert stats.num_replacements == 1
        assert stats.num_drafts <= stats.num_draft_tokens <= 3 * stats.num_drafts
        (survivor,) = {"decode-0", "decode-1"} - set(killed)
        assert cluster.load(survivor).num_drafts > 0
        cluster.start_worker(killed[0])
        cluster.wait_complete()

    sampling = SamplingParams(temperature=0.9, max_tokens=NUM_TOKENS, ignore_eos=True, seed=5, repetition_penalty=1.1)
    choices: list[list[int]] = [[] for _ in range(NUM_CHOICES)]
    num_draft_tokens = 0
    for index, event in client.generate_many([GenerationRequest(tuple(ids), sampling)], NUM_CHOICES):
        if isinstance(event, Tokens):
            choices[index] += event.ids
        elif isinstance(event, Finished):
            num_draft_tokens += event.stats.num_draft_tokens
    options = {"temperature": 0.9, "repetition_penalty": 1.1, "num_speculative_tokens": 0}
    alone = [cluster.ask(client, ids, NUM_TOKENS, seed=seed, **options).ids for seed in range(5, 5 + NUM_CHOICES)]
    assert choices == alone
    assert num_draft_tokens > 0
    cluster.wait_at_rest()
