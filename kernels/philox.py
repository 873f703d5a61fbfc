"""Noise for sampling from a counter-based generator: the same number for the same counter, on any device, in any batch.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) is keyed by the request's seed; its
counter is (choice, position in the completion, vocabulary id / 4, 0), and each of the four words of a block belongs to
one vocabulary id. A word w is the uniform number (w + 1/2) / 2**32, which is never 0 or 1. Knows nothing of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import Value, constexpr, jit, tl

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF

Word = int | Tensor


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Word, Word], rounds: int = 10
) -> list[Tensor]:
    """Four int64 tensors, each word in [0, 2**32), from counters of one shape and a two-word key that broadcasts."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        hi0, lo0 = _mul_hi_lo(c0, _M0)
        hi1, lo1 = _mul_hi_lo(c2, _M1)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return [c0, c1, c2, c3]


def _mul_hi_lo(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product; int64 holds no 64-bit unsigned, so the factor is split in halves."""
    low = a * (m & 0xFFFF)  # < 2**48
    high = a * (m >> 16)  # < 2**48, in units of 2**16
    total = high + (low >> 16)  # < 2**49
    return total >> 16, ((total & 0xFFFF) << 16) | (low & 0xFFFF)


def uniform_words(seed: Word, position: Word, first_id: int, num_ids: int, device: torch.device) -> Tensor:
    """int64 [num_ids], or [rows, num_ids] for seeds and positions [rows, 1]: the words of first_id and what follows."""
    first_block, last_block = first_id // 4, (first_id + num_ids + 3) // 4
    blocks = torch.arange(first_block, last_block, dtype=torch.int64, device=device)
    words = _words_of_blocks(seed, position, blocks)
    return torch.stack(words, dim=-1).flatten(-2)[..., first_id - 4 * first_block :][..., :num_ids]


def uniform_words_at(seed: Word, position: Word, ids: Tensor) -> Tensor:
    """int64, shaped as `ids`: the words of these vocabulary ids."""
    words = torch.stack(_words_of_blocks(seed, position, ids // 4), dim=-1)
    return words.gather(-1, (ids % 4).unsqueeze(-1)).squeeze(-1)


def _words_of_blocks(seed: Word, position: Word, blocks: Tensor) -> list[Tensor]:
    zero = torch.zeros_like(blocks)
    return philox4x32((zero, zero + position, blocks, zero), (seed & _MASK, (seed >> 32) & _MASK))


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise in fp64."""
    return -torch.log(-torch.log((words.double() + 0.5) / 2.0**32))


@jit
def words_of_blocks(seed: Value, position: Value, blocks: Value) -> tuple[Value, Value, Value, Value]:
    """The four words of each block of four vocabulary ids."""
    zero = blocks * 0
    w0, w1, w2, w3 = tl.philox(seed, zero, zero + position.to(tl.int32), blocks, zero)
    return w0, w1, w2, w3


@jit
def words_of_tile(seed: Value, position: Value, first_block: Value, BLOCK: constexpr) -> Value:
    """The words of BLOCK vocabulary ids in a row, from a block's first on."""
    w0, w1, w2, w3 = words_of_blocks(seed, position, first_block + tl.arange(0, BLOCK // 4))
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@jit
def words_of_ids(seed: Value, position: Value, ids: Value) -> Value:
    """The words of any vocabulary ids: four times the work."""
    w0, w1, w2, w3 = words_of_blocks(seed, position, ids // 4)
    word = ids % 4
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@jit
def fast_gumbel(words: Value) -> Value:
    """Standard Gumbel noise in fp32, a few 1e-6 from exact.

    -log(u) of a u near 1 is taken from 1 - u, which has all its bits in the word, by the series of the logarithm: the
    largest noise, which is what wins, comes from there.
    """
    is_upper = words >= 0x80000000
    half = tl.where(is_upper, words ^ 0xFFFFFFFF, words)
    h = (half.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2**-32: u, or 1 - u in the upper half
    series = h * (1.0 + h * (0.5 + h * (0.33333333 + h * (0.25 + h * (0.2 + h * 0.16666667)))))
    exponential = tl.where(is_upper & (h < 0.0625), series, -tl.log(tl.where(is_upper, 1.0 - h, h)))
    return -tl.log(exponential)


@jit
def gumbel_bound(words: Value) -> Value:
    """Never below the noise, without a logarithm.

    -log(u) >= 1 - u, and the bits of a float, read as a number, are its logarithm on a scale that is straight between
    powers of two: never above it, and by 0.06 below at most.
    """
    rest = ((words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 1 - u
    return (127.0 - rest.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07) * 0.6931471805599453
