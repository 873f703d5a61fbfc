"""What the quantised cache writes leave in the cache, slot by slot, against independent arithmetic."""

import pytest
import torch

from kernels.harness import OPS
from kernels.quantise import FP8, narrow
from tests.kernels.expected_elementwise import quantised, rope, round_e4m3

OPERATIONS = {op.name: op for op in OPS}
FP8_OP, INT8_OP = OPERATIONS["rope_and_write_kv_fp8"], OPERATIONS["rope_and_write_kv_int8"]


def written(slots, block_size):
    return [(token, slot // block_size, slot % block_size) for token, slot in enumerate(slots.tolist()) if slot >= 0]


@pytest.mark.parametrize("run", ["cpu", "reference"])
@pytest.mark.parametrize("case", FP8_OP.small, ids=lambda case: case.name)
def test_fp8_slots_hold_the_rotation_over_the_heads_scale(run, case):
    arguments = case.build("cpu")
    _, k, v, cos_sin, positions, kv_cache, slots, kv_scales = arguments
    before = kv_cache.clone()
    k_scale, v_scale = kv_scales.double()[:, :, None].unbind(1)
    getattr(FP8_OP, run)(*arguments)
    keys = round_e4m3(rope(k, cos_sin, positions) / k_scale).float()
    values = round_e4m3(v.double() / v_scale).float()
    num_slots = 0
    for token, block, offset in written(slots, kv_cache.shape[3]):
        for which, want in enumerate((keys[token], values[token])):
            got = kv_cache[block, :, which, offset].float()
            # fp32 may round to the other side of a boundary: at most a step, at most here and there.
            assert torch.allclose(got, want, rtol=0.13, atol=2**-9)
            assert (got != want).float().mean() < 0.02
            before[block, :, which, offset] = kv_cache[block, :, which, offset]
            num_slots += 1
    assert num_slots > 0
    assert torch.equal(kv_cache.view(torch.uint8), before.view(torch.uint8))
    assert values[..., -1, :].abs().max() == 448  # the last head does saturate


@pytest.mark.parametrize("run", ["cpu", "reference"])
@pytest.mark.parametrize("case", INT8_OP.small, ids=lambda case: case.name)
def test_int8_slots_hold_the_rotation_over_their_own_scale(run, case):
    arguments = case.build("cpu")
    _, k, v, cos_sin, positions, kv_cache, slots, kv_scales = arguments
    cache_before, scales_before = kv_cache.clone(), kv_scales.clone()
    getattr(INT8_OP, run)(*arguments)
    for token, block, offset in written(slots, kv_cache.shape[3]):
        rotated = rope(k[token : token + 1], cos_sin, positions[token : token + 1])[0]
        for which, want in enumerate((rotated, v[token].double())):
            numbers, scales = quantised(want, "int8")
            got = kv_cache[block, :, which, offset]
            assert (got.int() - numbers.int()).abs().max() <= 1
            assert (got != numbers).float().mean() < 0.02
            assert torch.allclose(kv_scales[block, :, which, offset].double(), scales[:, 0], rtol=1e-5)
            cache_before[block, :, which, offset] = got
            scales_before[block, :, which, offset] = kv_scales[block, :, which, offset]
    assert torch.equal(kv_cache, cache_before)
    assert torch.equal(kv_scales, scales_before)


def test_fp8_rounds_to_nearest_even_and_saturates():
    values = [1.0625, 1.1875, 464.0, 480.0, -1e9, 2.0**-10, 3 * 2.0**-10, 0.0]
    rounded = narrow(torch.tensor(values, dtype=torch.float64), FP8).float().tolist()
    assert rounded == [1.0, 1.25, 448.0, 448.0, -448.0, 0.0, 2.0**-8, 0.0]
    spread = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(narrow(spread, FP8).float(), round_e4m3(spread).float())


def test_int8_rounds_to_nearest_even_and_saturates():
    rounded = narrow(torch.tensor([0.5, 1.5, -2.5, 126.6, 300.0, -300.0]), torch.int8).tolist()
    assert rounded == [0, 2, -2, 127, 127, -127]


def test_a_row_of_zeros_quantises_to_zeros():
    op = OPERATIONS["swiglu_quantised"]
    for scheme in ("fp8", "fp8 groups", "int8"):
        numbers, scales = op(torch.zeros(2, 512), scheme)
        assert not numbers.float().any()
        assert scales.isfinite().all()
