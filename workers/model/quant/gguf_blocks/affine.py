"""Block types whose values are scale * (code - zero), or scale * code + offset, with a scale for each group of values.

All but ggml's newest and rarest types are of this kind: Q4_0 to Q8_K, and the ternary ones. Codes, scales and offsets
are exact; a value computed from them in fp32 has the bits that ggml's reference gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.quant.gguf_blocks.fields import half, in_turn, spread


@dataclass(frozen=True, slots=True)
class Affine:
    """Values of n blocks: scales * (codes - zero) + offsets."""

    codes: Tensor  # uint8 [n, block_size]
    scales: Tensor  # fp32 [n, groups]; a group is as many values of a block, side by side
    zero: int = 0
    offsets: Tensor | None = None  # fp32 [n, groups]; then zero is 0

    def values(self) -> Tensor:
        """fp32 [n, block_size]."""
        n, groups = self.scales.shape
        numbers = (self.codes.float() - self.zero).view(n, groups, -1)
        values = self.scales.unsqueeze(-1) * numbers
        if self.offsets is not None:
            values += self.offsets.unsqueeze(-1)
        return values.view(n, -1)


def _signed(data: Tensor) -> Tensor:
    """Codes of int8 values: 128 is zero."""
    return data ^ 128


def _q4_0(blocks: Tensor) -> Affine:
    return Affine(spread(blocks[:, 2:], 4).flatten(1), half(blocks, 0), zero=8)


def _q4_1(blocks: Tensor) -> Affine:
    return Affine(spread(blocks[:, 4:], 4).flatten(1), half(blocks, 0), offsets=half(blocks, 2))


def _five_bits(high: Tensor, low: Tensor) -> Tensor:
    return spread(low, 4).flatten(1) | (in_turn(high, 1) << 4)


def _q5_0(blocks: Tensor) -> Affine:
    return Affine(_five_bits(blocks[:, 2:6], blocks[:, 6:]), half(blocks, 0), zero=16)


def _q5_1(blocks: Tensor) -> Affine:
    return Affine(_five_bits(blocks[:, 4:8], blocks[:, 8:]), half(blocks, 0), offsets=half(blocks, 2))


def _q8_0(blocks: Tensor) -> Affine:
    return Affine(_signed(blocks[:, 2:]), half(blocks, 0), zero=128)


def _q8_1(blocks: Tensor) -> Affine:
    return Affine(_signed(blocks[:, 4:]), half(blocks, 0), zero=128)  # bytes 2 and 3: a sum that products use


def _q8_k(blocks: Tensor) -> Affine:
    scales = blocks[:, :4].contiguous().view(torch.float32)
    return Affine(_signed(blocks[:, 4:260]), scales, zero=128)  # sums of groups follow


def _q2_k(blocks: Tensor) -> Affine:
    scales, minima = blocks[:, :16] & 15, blocks[:, :16] >> 4
    codes = spread(blocks[:, 16:80].unflatten(1, (2, 32)), 2).flatten(1)
    return Affine(codes, half(blocks, 80) * scales.float(), offsets=-(half(blocks, 82) * minima.float()))


def _q3_k(blocks: Tensor) -> Affine:
    low = spread(blocks[:, 32:96].unflatten(1, (2, 32)), 2).flatten(1)
    codes = low | (spread(blocks[:, :32], 1).flatten(1) << 2)
    scales = spread(blocks[:, 96:104], 4).flatten(1) | (spread(blocks[:, 104:108], 2).flatten(1) << 4)
    return Affine(codes, half(blocks, 108) * (scales.float() - 32), zero=4)


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits each: uint8 [n, 12] -> fp32 [n, 8] twice. The first four stand in the
    low bits of their bytes; of the others four bits are in the last bytes, and two above the first four."""
    first, second, rest = packed.split(4, dim=1)
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1)
    minima = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1)
    return scales.float(), minima.float()


def _q4_k(blocks: Tensor) -> Affine:
    scales, minima = _six_bits(blocks[:, 4:16])
    codes = spread(blocks[:, 16:].unflatten(1, (4, 32)), 4).flatten(1)
    return Affine(codes, half(blocks, 0) * scales, offsets=-(half(blocks, 2) * minima))


def _q5_k(blocks: Tensor) -> Affine:
    scales, minima = _six_bits(blocks[:, 4:16])
    low = spread(blocks[:, 48:].unflatten(1, (4, 32)), 4).flatten(1)
    codes = low | (spread(blocks[:, 16:48], 1).flatten(1) << 4)
    return Affine(codes, half(blocks, 0) * scales, offsets=-(half(blocks, 2) * minima))


def _q6_k(blocks: Tensor) -> Affine:
    low = spread(blocks[:, :128].unflatten(1, (2, 64)), 4).flatten(1)
    codes = low | (spread(blocks[:, 128:192].unflatten(1, (2, 32)), 2).flatten(1) << 4)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return Affine(codes, half(blocks, 208) * scales, zero=32)


def _trits(data: Tensor, count: int) -> Tensor:
    """Digits of base 3, highest first, of bytes that hold 256 / 243 of a number of five: uint8 [n, m] ->
    [n, count * m], each digit of all bytes together."""
    powers = torch.tensor([3**digit for digit in range(count)], dtype=torch.uint8, device=data.device)
    shifted = data.unsqueeze(1) * powers.unsqueeze(-1)  # modulo 256: the digits above are gone
    return ((shifted.int() * 3) >> 8).to(torch.uint8).flatten(1)


def _tq1_0(blocks: Tensor) -> Affine:
    codes = torch.cat((_trits(blocks[:, :32], 5), _trits(blocks[:, 32:48], 5), _trits(blocks[:, 48:52], 4)), dim=1)
    return Affine(codes, half(blocks, 52), zero=1)


def _tq2_0(blocks: Tensor) -> Affine:
    return Affine(spread(blocks[:, :64].unflatten(1, (2, 32)), 2).flatten(1), half(blocks, 64), zero=1)


def _q1_0(blocks: Tensor) -> Affine:
    scales = half(blocks, 0)
    return Affine(in_turn(blocks[:, 2:], 1), 2 * scales, offsets=-scales)


def _q2_0(blocks: Tensor) -> Affine:
    return Affine(in_turn(blocks[:, 2:], 2), half(blocks, 0), zero=1)


AFFINE: dict[str, Callable[[Tensor], Affine]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q8_1": _q8_1,
    "Q8_K": _q8_k,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "Q1_0": _q1_0,
    "Q2_0": _q2_0,
}
"""By type: uint8 [n, block_bytes] -> Affine."""
