"""The definitions against independent torch code, and the CPU paths against the definitions."""

import pytest
import torch
import torch.nn.functional as F

from kernels.cases import Draw, PagedShape
from kernels.harness import OPS
from kernels.harness.compare import case_error, row_error
from tests.kernels import expected_attention, expected_mixed_precision
from tests.kernels.expected_elementwise import EXPECTED as EXPECTED_ELEMENTWISE
from tests.kernels.expected_gemm import TORCH_GEMM

CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in OPS for case in op.small]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_cpu_path_equals_the_definition(op, case):
    with torch.inference_mode():
        assert case_error(op, case, op, "cpu") <= op.tolerance[case.dtype]


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_definition_equals_torch(op, case):
    arguments, untouched = case.build("cpu"), case.build("cpu")
    results = op.reference(*arguments)
    expected = TORCH[op.name](*untouched)
    assert len(results) == len(expected) if isinstance(results, tuple) else True
    pairs = zip(results, expected, strict=True) if isinstance(results, tuple) else [(results, expected)]
    for out, want in pairs:
        assert row_error(out, want.to(out.dtype)) <= op.tolerance[case.dtype]


def torch_rms_norm(x, weight, eps):
    return F.rms_norm(x.double(), weight.shape, weight.double(), eps)


def torch_add_rms_norm(x, residual, weight, eps):
    total = x + residual
    return torch_rms_norm(total, weight, eps), total


def torch_rope(q, k, v, cos_sin, positions, kv_cache, slot_mapping):
    """The Hugging Face formula: x * cos + rotate_half(x) * sin, with the halves of both tables repeated."""
    half = q.shape[-1] // 2
    cos = cos_sin[positions][:, None, :half].repeat(1, 1, 2)
    sin = cos_sin[positions][:, None, half:].repeat(1, 1, 2)
    rotated_half = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
    return q * cos + rotated_half * sin


TORCH = {
    **expected_attention.TORCH,
    **expected_mixed_precision.TORCH,
    "rms_norm": torch_rms_norm,
    "add_rms_norm": torch_add_rms_norm,
    "rope_and_write_kv": torch_rope,
    "swiglu": lambda gate_up: F.silu(gate_up[:, : gate_up.shape[1] // 2].double()) * gate_up.double().chunk(2, -1)[1],
}
TORCH |= TORCH_GEMM | EXPECTED_ELEMENTWISE


def op_named(name):
    return next(op for op in OPS if op.name == name)


def test_rope_in_fp32_is_the_hugging_face_formula_bit_for_bit():
    op = op_named("rope_and_write_kv")
    arguments = op.small[0].build("cpu")
    assert torch.equal(op(*arguments), torch_rope(*op.small[0].build("cpu")))


def test_rope_writes_k_rotated_and_v_as_it_is_to_the_slots_and_nowhere_else():
    op = op_named("rope_and_write_kv")
    case = next(c for c in op.small if "skipping" in c.name and c.dtype == torch.float32)
    q, k, v, cos_sin, positions, kv_cache, slots = case.build("cpu")
    before = kv_cache.clone()
    op(q, k, v, cos_sin, positions, kv_cache, slots)
    rotated = torch_rope(k, k, v, cos_sin, positions, before, slots)
    block_size = kv_cache.shape[3]
    for token, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        assert torch.equal(kv_cache[slot // block_size, :, 0, slot % block_size], rotated[token])
        assert torch.equal(kv_cache[slot // block_size, :, 1, slot % block_size], v[token])
        before[slot // block_size, :, :, slot % block_size] = kv_cache[slot // block_size, :, :, slot % block_size]
    assert (slots < 0).any()
    assert torch.equal(kv_cache, before)


@pytest.mark.parametrize("unused", [-1, 10**9])
@pytest.mark.parametrize("name", ["decode_attention", "prefill_attention"])
def test_table_entries_behind_the_end_may_hold_anything(name, unused):
    op = op_named(name)
    for case in op.small:
        arguments = list(case.build("cpu"))
        expected = op.reference(*arguments)
        kv_cache, table, lengths = arguments[1], arguments[2], arguments[3 if name == "decode_attention" else 4]
        used = -(-lengths // kv_cache.shape[3])
        table[torch.arange(table.shape[1]) >= used[:, None]] = unused
        assert row_error(op(*arguments), expected) <= op.tolerance[case.dtype]


def test_a_nan_of_another_sequence_stays_there():
    op = op_named("decode_attention")
    shape = PagedShape((30, 100, 31), 4, 2, 32, 16)
    draw = Draw("cpu", torch.float32)
    q = draw.normal(3, 4, 32)
    kv_cache, table, lengths = draw.paged_cache(shape)
    expected = op(q, kv_cache, table, lengths, 0.2)
    kv_cache[table[1, :7].long()] = float("nan")
    out = op(q, kv_cache, table, lengths, 0.2)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])


def test_very_ragged_decode_is_cut_into_calls_of_similar_length():
    from kernels.attention.decode_cpu import _ELEMENTS_WORTH_A_CALL, similar_lengths

    assert similar_lengths([8, 8, 8], 1 << 20) == [[0, 1, 2]]
    assert similar_lengths([9, 7], 1) == [[0, 1]]  # a little padding is cheaper than a call
    assert similar_lengths([10, 4000, 12, 3980, 11], 2048) == [[0, 2, 4], [1, 3]]
    steps = similar_lengths(list(range(1000)), 2048)
    assert sorted(i for group in steps for i in group) == list(range(1000))
    assert all(sum(max(group) - i for i in group) * 2048 <= _ELEMENTS_WORTH_A_CALL for group in steps)
