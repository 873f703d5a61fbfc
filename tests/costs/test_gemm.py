"""Costs of products with narrow weights against figures worked by hand: 3 tokens, n 8, k 512."""

from costs import gemm
from costs.ops import OpCost

PRODUCTS = 2 * 3 * 8 * 512


def test_weight_only_reads_codes_and_what_each_group_has():
    moved = 3 * (512 + 8) * 2  # activations and results
    assert gemm.weight_only_gemm(3, 8, 512, 4, 128, 0, 2) == OpCost(moved + 8 * 256 + 8 * 4 * 2, PRODUCTS)
    assert gemm.weight_only_gemm(3, 8, 512, 8, 32, 3, 2) == OpCost(moved + 8 * 512 + 8 * 16 * 5, PRODUCTS)


def test_8_bit_rows_times_weights_of_4_and_2_bits():
    moved = 3 * 512 + 3 * 4 + 3 * 8 * 2
    assert gemm.w4a8_gemm(3, 8, 512, 64, 32) == OpCost(moved + 8 * 256 + 96, PRODUCTS, "int8")
    assert gemm.w2a8_gemm(3, 8, 512) == OpCost(moved + 8 * 128 + 8 * 4, PRODUCTS, "int8")


def test_two_of_four_weights_are_9_sixteenths_of_the_bytes_and_half_of_the_products():
    assert gemm.sparse24_gemm(3, 8, 512) == OpCost(3 * 520 * 2 + 8 * 512 * 2 * 9 // 16, PRODUCTS // 2)


def test_outliers_read_the_weights_of_their_inputs_only():
    assert gemm.add_outliers(3, 8, 0, 48) == OpCost(48, 0)
    moved = 64 * 8 + 64 * 3 * 2 + 48 + 8 * 4 + 2 * 3 * 8 * 2
    assert gemm.add_outliers(3, 8, 64, 48) == OpCost(moved, 2 * 3 * 8 * 64)


def test_adapters_are_read_once_each_and_results_twice():
    moved = 3 * (512 + 2 * 8) + 2 * (32 * 512 + 8 * 16)
    assert gemm.add_lora(3, 2, (8, 512), 32, 16, 2) == OpCost(2 * moved, 2 * 3 * (32 * 512 + 8 * 16))


def test_a_low_rank_pair_reads_and_writes_the_result():
    moved = (16 * (512 + 8) + 3 * 512 + 2 * 3 * 8) * 2
    assert gemm.add_low_rank(3, 8, 512, 16, 2) == OpCost(moved, 2 * 3 * 16 * (512 + 8))


def test_experts_of_few_bits_differ_in_the_weights_alone():
    plain = gemm.moe_experts(4, 8, 5, 64, 32, 2)
    narrow = gemm.moe_experts_weight_only(4, 8, 64, 32, 1000, 2)
    assert narrow == OpCost(plain.memory_bytes - 5 * 3 * 64 * 32 * 2 + 1000, plain.flops)
