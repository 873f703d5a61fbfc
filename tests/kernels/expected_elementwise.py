"""Independent torch expectations of the elementwise operations, by operation."""

import torch
import torch.nn.functional as F

from kernels.philox import gumbel, uniform_words  # held to known answers in tests/workers/test_sampler.py
from tests.workers.sampling import mask_top_k_top_p

E4M3, INT8 = torch.float8_e4m3fn, torch.int8


def round_e4m3(x):
    """By arithmetic, not by a cast: three bits of mantissa, exponents from -6, largest 448."""
    exponent = torch.floor(torch.log2(x.abs().clamp(min=2.0**-20))).clamp(min=-6)
    step = torch.exp2(exponent - 3)
    return (torch.round(x / step) * step).clamp(-448, 448).to(E4M3)


def quantised(x, scheme):
    """Row by row, group by group."""
    largest = 127 if scheme == "int8" else 448
    rows, scales = [], []
    for row in x.double():
        parts = row.split(128) if scheme == "fp8 groups" else [row]
        row_scales = [part.abs().max() / largest for part in parts]
        scaled = torch.cat([part / scale for part, scale in zip(parts, row_scales, strict=True)])
        rows.append(torch.round(scaled).to(INT8) if scheme == "int8" else round_e4m3(scaled))
        scales.append(torch.stack(row_scales))
    return torch.stack(rows), torch.stack(scales)


def rms_norm(x, weight, eps):
    return F.rms_norm(x.double(), weight.shape, weight.double(), eps)


def rms_norm_quantised(x, weight, eps, scheme):
    return quantised(rms_norm(x, weight, eps), scheme)


def add_rms_norm_quantised(x, residual, weight, eps, scheme):
    total = x + residual
    return (*rms_norm_quantised(total, weight, eps, scheme), total)


def swiglu_quantised(gate_up, scheme):
    gate, up = gate_up[:, : gate_up.shape[1] // 2].double(), gate_up[:, gate_up.shape[1] // 2 :].double()
    return quantised(gate / (1 + torch.exp(-gate)) * up, scheme)


def rope(q, cos_sin, positions):
    """As a product of complex numbers."""
    turn = torch.complex(*cos_sin[positions].double().chunk(2, -1))[:, None]
    turned = torch.complex(*q.double().chunk(2, -1)) * turn
    return torch.cat((turned.real, turned.imag), -1)


def rope_and_write_kv_fp8(q, k, v, cos_sin, positions, kv_cache, slot_mapping, kv_scales):
    return rope(q, cos_sin, positions)


def rope_and_write_kv_int8(q, k, v, cos_sin, positions, kv_cache, slot_mapping, kv_scales):
    return rope(q, cos_sin, positions)


def vocab_argmax(logits, first_id):
    values, indices = logits.double().sort(dim=-1, descending=True, stable=True)
    return values[:, 0], indices[:, 0] + first_id


def sample(logits, temperature, top_k, top_p, min_p, seeds, positions, first_id):
    """The worker's first sampler, and min-p after it."""
    values, ids = [], []
    for i, row in enumerate(logits.double()):
        if temperature[i] == 0:
            scores = row
        else:
            scaled = row / temperature[i].double()
            left = mask_top_k_top_p(scaled, int(top_k[i]), float(top_p[i]))
            left[
                torch.softmax(scaled, 0) < min_p[i].double() * torch.softmax(scaled, 0).max() * (1 - 1e-9)
            ] = -torch.inf
            words = uniform_words(int(seeds[i]) % 2**64, int(positions[i]), first_id, len(row), row.device)
            scores = left + gumbel(words)
        value, index = scores.max(dim=-1)
        values.append(value)
        ids.append(index + first_id)
    return torch.stack(values), torch.stack(ids)


def vocab_embedding(weight, token_ids, first_id):
    """As a product with one-hot rows."""
    one_hot = token_ids[:, None] == torch.arange(first_id, first_id + weight.shape[0])
    return one_hot.double() @ weight.double()


def apply_penalties(logits, counts, count_rows, repetition, presence, frequency):
    """Token by token."""
    out = logits.double()
    for i, slot in enumerate(count_rows.tolist()):
        for token in counts[slot].nonzero()[:, 0].tolist() if slot >= 0 else ():
            count = int(counts[slot, token])
            out[i, token] *= repetition[i] if out[i, token] <= 0 else 1 / repetition[i].double()
            out[i, token] -= (presence[i] if count >= 2 else 0.0) + frequency[i].double() * (count // 2)
    return out


EXPECTED = {
    "rms_norm_quantised": rms_norm_quantised,
    "add_rms_norm_quantised": add_rms_norm_quantised,
    "swiglu_quantised": swiglu_quantised,
    "vocab_argmax": vocab_argmax,
    "vocab_embedding": vocab_embedding,
    "apply_penalties": apply_penalties,
    "sample": sample,
    "rope_and_write_kv_fp8": rope_and_write_kv_fp8,
    "rope_and_write_kv_int8": rope_and_write_kv_int8,
}
