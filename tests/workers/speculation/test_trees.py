"""Trees of draft tokens: their words, and which of their paths counts."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import kernels
from kernels.attention.tree import seen_by_nodes
from workers.parallel import ParallelGroups, Shard
from workers.sampling.candidates import best_candidates
from workers.sampling.params import NO_TOKEN, SamplingParams, SamplingRows
from workers.sampling.sampler import sample
from workers.speculation.trees import (
    MAX_NODES,
    NO_PARENT,
    DraftTree,
    TreeShape,
    chain_shape,
    likeliest_shape,
    star_shape,
)

VOCABULARY = 5


@st.composite
def trees(draw, most_nodes=20):
    """Any tree over a few tokens."""
    count = draw(st.integers(1, most_nodes))
    token_ids, parents, edges = [draw(st.integers(0, VOCABULARY - 1))], [NO_PARENT], set()
    for _ in range(count - 1):
        edge = draw(st.tuples(st.integers(0, len(parents) - 1), st.integers(0, VOCABULARY - 1)))
        if edge not in edges:
            edges.add(edge)
            parents.append(edge[0])
            token_ids.append(edge[1])
    return DraftTree(tuple(token_ids), tuple(parents))


def path_to(tree, node):
    path = [node]
    while tree.parents[path[0]] != NO_PARENT:
        path.insert(0, tree.parents[path[0]])
    return path


@given(trees(), st.data())
def test_the_accepted_path_is_the_longest_of_right_choices_from_the_root(tree, data):
    chosen = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=len(tree.parents), max_size=len(tree.parents)))
    accepted = tree.accepted(chosen)
    right = [
        path
        for path in (path_to(tree, node) for node in range(len(tree.parents)))
        if all(tree.token_ids[child] == chosen[parent] for parent, child in itertools.pairwise(path))
    ]
    longest = max(map(len, right))
    assert [path for path in right if len(path) == longest] == [accepted]


@given(trees(MAX_NODES))
def test_words_depths_and_branches_are_those_of_the_paths(tree):
    for node in range(len(tree.parents)):
        path = path_to(tree, node)
        assert [j for j in range(MAX_NODES) if tree.ancestors[node] >> j & 1 and j < len(tree.parents)] == path
        assert tree.depths[node] == len(path) - 1
    assert all(-(1 << 63) <= word < 1 << 63 for word in tree.ancestors)
    assert tree.positions(7) == tuple(7 + depth for depth in tree.depths)
    leaves = [node for node in range(len(tree.parents)) if node not in tree.parents]
    assert tree.branches() == [path_to(tree, leaf) for leaf in leaves]


def test_a_tree_of_all_64_nodes_has_words_that_are_int64():
    tree = DraftTree.chain(range(MAX_NODES))
    assert tree.ancestors[-1] == -1
    words = torch.tensor(tree.ancestors, dtype=torch.int64)
    assert torch.equal(seen_by_nodes(words, MAX_NODES, 0), torch.ones(MAX_NODES, MAX_NODES).tril().bool())


@pytest.mark.parametrize(
    ("token_ids", "parents", "named"),
    [
        ((), (), "token_ids: 0 nodes"),
        ((1, 2), (-1,), "parents: 1 of 2 nodes"),
        (tuple(range(65)), tuple(range(-1, 64)), "token_ids: 65 nodes"),
        ((1, 2), (0, 0), "parents\\[0\\]: 0"),
        ((1, 2, 3), (-1, 2, 0), "parents\\[1\\]: 2"),
        ((1, 2, 3), (-1, 0, -1), "parents\\[2\\]: -1"),
        ((1, 2, 2), (-1, 0, 0), "token_ids: a node has two children"),
    ],
)
def test_what_is_no_tree_is_refused(token_ids, parents, named):
    with pytest.raises(ValueError, match=named):
        DraftTree(token_ids, parents)


@given(trees(MAX_NODES))
def test_each_node_attends_as_the_last_token_of_its_branch_alone(tree):
    """The kernel on the whole tree, against causal attention over each path; then what is left after compaction."""
    generator = torch.Generator().manual_seed(len(tree.parents))
    n, before, dim = len(tree.parents), 5, 16
    kv = torch.randn(before + n, 1, 2, dim, generator=generator)
    q = torch.randn(n, 2, dim, generator=generator)
    words = torch.tensor(tree.ancestors, dtype=torch.int64)
    out = kernels.tree_attention(q, paged(kv), table(before + n), starts(n), lengths(before + n), words, n, 0.25)
    for node in {n - 1, n // 2}:
        path = path_to(tree, node)
        rows = [*range(before), *(before + j for j in path)]
        alone = kernels.decode_attention(
            q[node : node + 1], paged(kv[rows]), table(len(rows)), lengths(len(rows)), 0.25
        )
        torch.testing.assert_close(out[node], alone[0])


@given(trees(MAX_NODES), st.data())
def test_compaction_leaves_the_accepted_path_in_the_order_of_depth(tree, data):
    node = data.draw(st.integers(0, len(tree.parents) - 1))
    path, n, before = path_to(tree, node), len(tree.parents), 5
    kv = torch.randn(before + n, 1, 2, 4)
    cache = paged(kv)[None]
    slots = torch.arange(before, before + n)
    moved = kernels.compact_kv(cache, slots[path], slots[: len(path)], torch.tensor([0, len(path)], dtype=torch.int32))
    expected = kv[[*range(before), *(before + j for j in path)]]
    flat = moved[0].permute(0, 3, 1, 2, 4).flatten(0, 1)
    assert torch.equal(flat[: before + len(path)], expected)


BLOCK = 16


def paged(kv):
    """[tokens, heads, 2, dim] in blocks that follow each other."""
    count = -(-len(kv) // BLOCK)
    whole = torch.zeros(count * BLOCK, *kv.shape[1:])
    whole[: len(kv)] = kv
    return whole.view(count, BLOCK, *kv.shape[1:]).permute(0, 2, 3, 1, 4).contiguous()


def table(num_tokens):
    return torch.arange(-(-num_tokens // BLOCK), dtype=torch.int32)[None]


def starts(n):
    return torch.tensor([0, n], dtype=torch.int32)


def lengths(n):
    return torch.tensor([n], dtype=torch.int32)


# ---------------------------------------------------------------------------------------------------------- candidates
def rows_of(params):
    rows = SamplingRows.greedy(len(params))
    for i, one in enumerate(params):
        rows.put(i, one)
    return rows


KINDS = [
    SamplingParams(seed=1),
    SamplingParams(seed=2, temperature=1),
    SamplingParams(seed=3, temperature=0.7, top_p=0.9),
    SamplingParams(seed=4, temperature=1.3, top_k=7),
    SamplingParams(seed=5, temperature=1, top_p=0.95, top_k=20, min_p=0.05),
    SamplingParams(seed=6, temperature=1, typical_p=0.8),
]


@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0], ids=["far apart", "close", "all equal"])
def test_the_first_candidate_is_what_the_sampler_chooses(spread):
    rows = rows_of(KINDS * 20)
    logits = torch.randn(len(KINDS) * 20, 300, generator=torch.Generator().manual_seed(3)) * 3 * spread
    positions = np.arange(len(logits))
    chosen = sample(logits, rows, positions, ParallelGroups(Shard(), torch.device("cpu")), 300)
    assert torch.equal(best_candidates(logits, rows, positions, 1)[:, 0], chosen)
    assert torch.equal(best_candidates(logits, rows, positions, 4)[:, 0], chosen)


def test_each_next_candidate_is_the_choice_without_those_before():
    """Where nothing is cut: a filter would let others in."""
    rows = rows_of(KINDS[:2] * 20)
    logits = torch.randn(40, 50, generator=torch.Generator().manual_seed(4))
    positions, groups = np.arange(40), ParallelGroups(Shard(), torch.device("cpu"))
    found = best_candidates(logits, rows, positions, 5)
    left = logits.clone()
    for rank in range(5):
        chosen = sample(left, rows, positions, groups, 50)
        assert torch.equal(found[:, rank], chosen)
        left.scatter_(1, chosen[:, None], float("-inf"))


def test_a_row_of_few_tokens_offers_no_others():
    rows = rows_of([SamplingParams(temperature=1, top_k=3), SamplingParams(temperature=0)])
    logits = torch.tensor([[1.0, 5.0, 4.0, 3.0, 2.0], [1.0, float("-inf"), 2.0, float("-inf"), float("-inf")]])
    found = best_candidates(logits, rows, np.zeros(2, np.int64), 6)
    assert sorted(found[0, :3].tolist()) == [1, 2, 3]
    assert found[0, 3:].tolist() == [NO_TOKEN] * 3
    assert found[1].tolist() == [2, 0, *[NO_TOKEN] * 4]


# -------------------------------------------------------------------------------------------------------------- shapes
def expected_accepted(shape, shares):
    """By all outcomes, each depth a rank of its own."""
    total = 0.0
    for ranks in itertools.product(range(len(shares) + 1), repeat=shape.depth):
        likely = 1.0
        for rank in ranks:
            likely *= shares[rank] if rank < len(shares) else 1 - sum(shares)
        total += likely * shape.num_accepted(ranks)
    return total


def all_shapes(num_drafts, num_ranks):
    """Every tree of so many drafts, each once."""
    kept = {((), ()): ((NO_PARENT,), (0,))}
    for _ in range(num_drafts):
        grown = {}
        for parents, ranks in kept.values():
            taken = set(zip(parents[1:], ranks[1:], strict=True))
            for edge in itertools.product(range(len(parents)), range(num_ranks)):
                if edge not in taken:
                    shape = (*parents, edge[0]), (*ranks, edge[1])
                    grown[shape] = shape
        kept = grown
    return [TreeShape(*shape) for shape in kept.values()]


@pytest.mark.parametrize("shares", [(0.5, 0.2), (0.9, 0.05), (0.3, 0.29), (0.1, 0.05)])
def test_the_likeliest_shape_is_the_best_of_all(shares):
    best = max(expected_accepted(shape, shares) for shape in all_shapes(3, 2))
    shape = likeliest_shape(shares, 3)
    assert shape.num_drafts == 3
    assert expected_accepted(shape, shares) == pytest.approx(best)


def test_named_shapes():
    assert chain_shape(3) == TreeShape((-1, 0, 1, 2), (0, 0, 0, 0))
    assert star_shape(3) == TreeShape((-1, 0, 0, 0), (0, 0, 1, 2))
    assert chain_shape(3).num_accepted([0, 0, 1]) == 2
    assert star_shape(3).num_accepted([2, 0, 0]) == 1
    shape = likeliest_shape((0.5, 0.3), 5, max_depth=2)
    assert (shape.depth, shape.num_drafts, sorted(shape.branch_lengths)) == (2, 5, [3, 3, 3])
    assert shape.widths == (1, 2)
    assert chain_shape(3).branch_lengths == (4,)
    assert star_shape(3).branch_lengths == (2, 2, 2)
