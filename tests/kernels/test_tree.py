"""What tree attention promises beyond its cases: a chain is prefill, siblings change nothing, and what it refuses."""

import re

import pytest
import torch

from kernels.attention.prefill import prefill_attention
from kernels.attention.tree import MAX_NODES, tree_attention
from kernels.cases import Draw, PagedShape

RUNS, LENGTHS = (9, MAX_NODES), (150, 200)


@pytest.fixture
def drawn():
    """q, cache, table, starts, lengths of two runs."""
    draw = Draw("cpu", torch.float32)
    q = draw.normal(sum(RUNS), 4, 32)
    kv_cache, table, lengths = draw.paged_cache(PagedShape(LENGTHS, 4, 2, 32, 16, query_lens=RUNS))
    return q, kv_cache, table, draw.integers([0, RUNS[0], sum(RUNS)]), lengths


def chains():
    words = [(1 << i + 1) - 1 for n in RUNS for i in range(n)]
    return torch.tensor([word - (1 << 64) if word >> 63 else word for word in words])


@pytest.mark.parametrize("window", [0, 64, 100])
@pytest.mark.parametrize("run", [tree_attention.reference, tree_attention.cpu], ids=["reference", "cpu"])
def test_a_chain_is_what_prefill_computes(drawn, run, window):
    expected = prefill_attention(*drawn, MAX_NODES, 0.2, window)
    torch.testing.assert_close(run(*drawn, chains(), MAX_NODES, 0.2, window), expected)


def test_a_node_that_is_no_ancestor_changes_no_result(drawn):
    """All nodes of the second run but the first are its children."""
    _, kv_cache, table, *_ = drawn
    words = chains()
    words[RUNS[0] :] = torch.tensor([1 | 1 << i if i < 63 else 1 - (1 << 63) for i in range(MAX_NODES)])
    before = tree_attention(*drawn, words, MAX_NODES, 0.2)
    sibling = LENGTHS[1] - MAX_NODES + 30
    kv_cache[table[1, sibling // 16], :, :, sibling % 16] += 1000
    after = tree_attention(*drawn, words, MAX_NODES, 0.2)
    changed = (before != after).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [RUNS[0] + 30]


@pytest.mark.parametrize("run", [tree_attention.reference, tree_attention.launch, tree_attention.cpu])
def test_what_does_not_fit_is_refused(drawn, run):
    with pytest.raises(ValueError, match=re.escape("max_query_len: 65 nodes in a run, of at most 64")):
        run(*drawn, chains(), 65, 0.2)
    with pytest.raises(ValueError, match=re.escape("window: 63 positions do not hold a run of 64 nodes")):
        run(*drawn, chains(), 64, 0.2, 63)
