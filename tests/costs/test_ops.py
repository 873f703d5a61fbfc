"""Costs against figures worked by hand."""

import pytest

from costs import ops
from costs.ops import OpCost


def test_costs_add_up():
    assert OpCost(3, 10) + OpCost(4, 5) == OpCost(7, 15)


def test_decode_attention_reads_every_cached_token_once():
    # Two sequences of 3 and 5 tokens, 4 query heads on 2 KV heads of 8 dimensions, 2-byte elements. q and output: 2 *
    # 2 * 4 * 8 * 2 = 256; K and V: 2 * 8 * 2 * 8 * 2 = 512. Each (head, key) pair: 2 * 8 multiply-adds.
    assert ops.decode_attention([3, 5], 4, 2, 8, 2) == OpCost(256 + 512, 4 * 8 * 4 * 8)


def test_a_padded_decode_row_costs_nothing():
    assert ops.decode_attention([0, 5], 4, 2, 8, 2) == ops.decode_attention([5], 4, 2, 8, 2)


def test_prefill_attention_counts_the_causal_pairs():
    # 3 queries at the end of 10 tokens see 8, 9 and 10 keys.
    cost = ops.prefill_attention([3], [10], 4, 2, 8, 2)
    assert cost.flops == 4 * (8 + 9 + 10) * 4 * 8
    assert cost.memory_bytes == 2 * 3 * 4 * 8 * 2 + 2 * 10 * 2 * 8 * 2


def test_a_window_bounds_what_each_token_sees_and_what_is_read():
    # tokens 8, 9 and 10 see 4 each, from the 5th to the 10th: 6 of the cache are read
    cost = ops.prefill_attention([3], [10], 4, 2, 8, 2, window=4)
    assert cost == OpCost(2 * 3 * 4 * 8 * 2 + 6 * 2 * 2 * 8 * 2, 4 * 12 * 4 * 8)
    assert ops.prefill_attention([3], [3], 4, 2, 8, 2, window=2).flops == 4 * (1 + 2 + 2) * 4 * 8
    assert ops.decode_attention([100], 4, 2, 8, 2, window=7) == ops.decode_attention([7], 4, 2, 8, 2)
    assert ops.prefill_attention([3], [10], 4, 2, 8, 2, window=10) == ops.prefill_attention([3], [10], 4, 2, 8, 2)


def test_a_quantised_cache_is_read_in_its_own_bytes():
    plain = ops.decode_attention([100], 4, 2, 8, 2)
    narrow = ops.decode_attention([100], 4, 2, 8, 2, kv_token_bytes=2 * 8 + 2 * 4)
    assert plain.memory_bytes - narrow.memory_bytes == 100 * 2 * (2 * 8 * 2 - 24)
    assert plain.flops == narrow.flops


def test_a_node_of_a_tree_asks_its_ancestors_only():
    # a root with two children, after 7 tokens: 8, 9 and 9 keys; all 10 are read
    cost = ops.tree_attention([3], [10], [0, 1, 1], 4, 2, 8, 2)
    assert cost.flops == 4 * (8 + 9 + 9) * 4 * 8
    assert cost.memory_bytes == ops.prefill_attention([3], [10], 4, 2, 8, 2).memory_bytes
    assert ops.tree_attention([3], [10], [0, 1, 2], 4, 2, 8, 2) == ops.prefill_attention([3], [10], 4, 2, 8, 2)
    chain = ops.tree_attention([3], [10], [0, 1, 2], 4, 2, 8, 2, window=4)
    assert chain == ops.prefill_attention([3], [10], 4, 2, 8, 2, window=4)


def test_prefill_of_a_sequence_that_asks_nothing_is_free():
    assert ops.prefill_attention([0, 2], [100, 2], 4, 2, 8, 2) == ops.prefill_attention([2], [2], 4, 2, 8, 2)


@pytest.mark.parametrize(("chunks", "total"), [([4, 4, 4], 12), ([1, 10, 1], 12), ([12], 12)])
def test_chunking_changes_no_flops(chunks, total):
    done = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    cost = sum(
        (ops.prefill_attention([n], [end], 2, 1, 4, 4) for n, end in zip(chunks, done, strict=True)), OpCost(0, 0)
    )
    assert cost.flops == ops.prefill_attention([total], [total], 2, 1, 4, 4).flops


def test_norms_gate_and_rope_move_each_tensor_once():
    assert ops.rms_norm(10, 64, 2) == OpCost(10 * 64 * 2 * 2 + 64 * 2, 4 * 640)
    assert ops.add_rms_norm(10, 64, 2) == OpCost(4 * 10 * 64 * 2 + 64 * 2, 5 * 640)
    assert ops.swiglu(10, 96, 2) == OpCost(3 * 960 * 2, 5 * 960)
    # q twice, k twice, v twice in 2-byte elements; a row of fp32 angles, a position and a slot per token.
    assert ops.rope_and_write_kv(10, 4, 2, 8, 2) == OpCost(10 * (2 * 8 * 8 * 2 + 8 * 4 + 16), 3 * 10 * 6 * 8)


def test_decode_of_a_large_model_is_bound_by_its_cache():
    # Llama 3.1 8B, 32 sequences of 4096 tokens, bf16: 537 MB of K and V, and 4 flops per byte for a group of 4.
    cost = ops.decode_attention([4096] * 32, 32, 8, 128, 2)
    assert cost.memory_bytes == pytest.approx(537e6, rel=0.01)
    assert cost.flops / cost.memory_bytes == pytest.approx(4, rel=0.01)


def test_mla_decode_reads_a_latent_once_for_all_heads():
    # two tokens of 32 + 8 numbers, two heads that ask with 40 and answer with 32
    assert ops.mla_decode_attention([2, 0], 2, 32, 8, 2) == OpCost((2 * 40 + 2 * (40 + 32)) * 2, 2 * 2 * 2 * (40 + 32))


def test_a_copy_reads_and_writes():
    assert ops.copy(10) == OpCost(20, 0)


def test_mla_prefill_counts_pairs_over_keys_of_each_head():
    cost = ops.mla_prefill_attention([3, 0], [10, 7], 2, 8, 4, 16, 2)
    queries, keys = 3 * 2 * (8 + 4 + 16), 10 * (2 * (8 + 16) + 4)
    assert cost == OpCost(2 * (queries + keys), 2 * (8 + 9 + 10) * 2 * (8 + 4 + 16))
