"""The cost of a whole step, against figures worked out by hand."""

import pytest

from costs.model import DenseModel, model_step


def test_a_step_costs_each_weight_once_and_two_flops_per_weight_and_token():
    model = DenseModel(4096, 14336, 32, 32, 8, 128, 128256)  # Llama 3.1 8B
    weights = 32 * model.layer_parameters + 128256 * 4096
    assert weights == 7_504_658_432  # 8.03 B with the embedding, which is looked up and not read, and the norms
    decode = model_step(model, [1], [1000], 1, 2)
    kv_bytes = 32 * 2 * 8 * 128 * 1000 * 2
    assert decode.memory_bytes == pytest.approx(2 * weights + kv_bytes, rel=1e-3)
    assert decode.flops == pytest.approx(2 * weights + 32 * 4 * 1000 * 32 * 128, rel=1e-6)
    prefill = model_step(model, [8192], [8192], 1, 2)
    pairs = 8192 * 8193 // 2
    attention = 32 * 4 * pairs * 32 * 128
    assert prefill.flops == 2 * (8192 * 32 * model.layer_parameters + 128256 * 4096) + attention
