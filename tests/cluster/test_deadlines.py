"""A request whose deadline passes while it waits for its turn ends with a typed error and costs the workers nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from switchyard_client import GenerationError, GenerationRequest, SamplingParams

from tests.cluster.deaths import MakeCluster, prompt
from tests.fake_model import expected
from tests.processes import wait_until

pytestmark = [pytest.mark.cluster]

LENGTH, LATE_LENGTH, NUM_TOKENS = 500, 30, 20


@pytest.mark.parametrize("roles", [{"prefill": 1, "decode": 1}, {"prefill": 0, "decode": 0, "mixed": 1}], ids=str)
def test_one_that_expires_while_it_waits_costs_nothing(fake_cluster: MakeCluster, roles: dict[str, int]) -> None:
    """Its worker is busy with the only request that it takes at a time: with its prompt, or with its tokens."""
    engine = {"max_num_seqs": 1, "max_num_batched_tokens": 16}
    cluster = fake_cluster(**roles, routers=1, step_s=0.02, token_s=0.01, engine=engine)
    first = next(iter(cluster.workers))  # where prompts are computed
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(cluster.ask, cluster.client(), prompt(1, LENGTH), NUM_TOKENS)
        wait_until(lambda: cluster.load(first).num_running == 1, "the first request runs")
        late = GenerationRequest(tuple(prompt(2, LATE_LENGTH)), SamplingParams(max_tokens=NUM_TOKENS), deadline_s=1.5)
        refused = threads.submit(list, cluster.client().generate(late))
        wait_until(lambda: cluster.load(first).num_requests == 2, "the worker has both")
        with pytest.raises(GenerationError, match="DEADLINE_EXCEEDED"):
            refused.result()
        wait_until(lambda: cluster.load(first).num_ended_requests >= 1, "the late one has left the worker")
        assert cluster.load(first).num_running == 1, "the first one still runs: the late one had no turn"
        assert running.result().ids == expected(prompt(1, LENGTH), NUM_TOKENS)
    cluster.wait_at_rest()
    load = cluster.load(first)
    assert (load.num_requests, load.num_ended_requests) == (2, 2)
    assert load.num_computed_prompt_tokens == LENGTH
