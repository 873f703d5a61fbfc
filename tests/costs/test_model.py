"""The cost of a whole step, against figures worked out by hand."""

import pytest

from costs.model import DecoderSizes, model_step


def test_a_step_costs_each_weight_once_and_two_flops_per_weight_and_token():
    model = DecoderSizes(4096, 14336, 32, 32, 8, 128, 128256)  # Llama 3.1 8B
    layer = model.attention_parameters + 3 * 4096 * 14336
    weights = 32 * layer + 128256 * 4096
    assert weights == 7_504_658_432  # 8.03 B with the embedding, which is looked up and not read, and the norms
    decode = model_step(model, [1], [1000], 1, 2)
    kv_bytes = 32 * 2 * 8 * 128 * 1000 * 2
    assert decode.memory_bytes == pytest.approx(2 * weights + kv_bytes, rel=1e-3)
    assert decode.flops == pytest.approx(2 * weights + 32 * 4 * 1000 * 32 * 128, rel=1e-6)
    prefill = model_step(model, [8192], [8192], 1, 2)
    pairs = 8192 * 8193 // 2
    attention = 32 * 4 * pairs * 32 * 128
    assert prefill.flops == 2 * (8192 * 32 * layer + 128256 * 4096) + attention


def test_of_the_experts_those_are_read_that_some_token_chooses():
    model = DecoderSizes(2048, 6144, 48, 32, 4, 128, 151936, 128, 8, 768)  # Qwen3-30B-A3B
    of_one, router = 3 * 2048 * 768, 2048 * 128
    alone = model.mlp(1, 2)
    assert alone.memory_bytes == pytest.approx(2 * (8 * of_one + router), rel=1e-6)
    assert alone.flops == 2 * (8 * of_one + router)
    many = model.mlp(4096, 2)
    assert many.memory_bytes == pytest.approx(2 * (128 * of_one + router), rel=1e-6)
    assert many.flops == 4096 * alone.flops
    whole = 48 * (model.attention_parameters + many.memory_bytes / 2) + 151936 * 2048
    assert whole == pytest.approx(30.5e9 - 151936 * 2048, rel=0.01)  # the embedding is looked up and not read
