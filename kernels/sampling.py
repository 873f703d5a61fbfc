"""The next token of each row of logits, of one shard of the vocabulary.

Sampling is Gumbel-max: the arg max of logits / temperature + Gumbel noise, over the tokens that top-k, top-p and min-p
leave, is a sample of their softmax. The noise belongs to (seed, position, vocabulary id), see `kernels.philox`, so a
choice is the same on any worker, in any batch and however the vocabulary is cut: ranks reduce one (value, id) pair. On
a tie the smallest id wins. A temperature of 0 takes the largest logit.

What the filters leave, in this order: the top_k largest logits (0 is all); of those the fewest whose probability
reaches top_p (1 is all); those at least min_p times as probable as the first (0 is all). Each is a threshold on the
logit: tokens tied with the last one stay. top-k and top-p ask for the whole vocabulary in one shard.

No sort. One pass keeps the maxima of thousands of columns of the row; the threshold that as many of them reach as
tokens are wanted is reached by few tokens more than that. A second pass writes those few to a scratch list and sums up
the softmax. Thresholds are then found by bisection over the list, as integers of the same order as the floats, and the
choice is made from it. Where the list is not long enough (top_k above 512, or a nucleus of more tokens than that) the
bisection reads the row instead. Knows nothing of requests.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from costs import ops as costs
from kernels.cases import DTYPE_NAMES, Draw
from kernels.jit import Value, constexpr, jit, next_power_of_2, tl
from kernels.op import Case, Op, Target
from kernels.philox import fast_gumbel, gumbel, uniform_words, uniform_words_at, words_of_ids
from kernels.vocab_argmax import SASS, STAGES, Choice, choose, draw_logits, empty_choice, inverse_of

_MAX_COLUMNS = 2048
_FEW = 1024  # CPU: so many candidates are looked at before the whole row is sorted


@jit
def _ordered(x: Value) -> Value:
    """fp32 as int32 of the same order, and back."""
    return x ^ ((x >> 31) & 0x7FFFFFFF)


@jit
def _key(x: Value) -> Value:
    return _ordered(x.to(tl.int32, bitcast=True)).to(tl.int64)


@jit
def _number(key: Value) -> Value:
    return _ordered(key.to(tl.int32)).to(tl.float32, bitcast=True)


@jit
def _count_and_mass(
    ptr: Value, length: Value, threshold: Value, floor: Value, peak: Value, rate: Value, BLOCK: constexpr
) -> tuple[Value, Value]:
    """How many numbers are >= threshold; and the weight, exp2((x - peak) * rate), of those > threshold and >= floor."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        x = tl.load(ptr + start + lane, mask=start + lane < length, other=float("-inf")).to(tl.float32)
        inside = start + lane < length
        count += (inside & (x >= threshold)).to(tl.int32)
        mass += tl.where((x > threshold) & (x >= floor), tl.exp2((x - peak) * rate), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@jit
def _filter_kernel(
    value_ptr: Value,  # [rows] fp32
    id_ptr: Value,  # [rows] int64
    threshold_ptr: Value,  # [rows] fp32: the least logit that is left; +inf where the choice is made already
    list_ptr: Value,  # [rows, COLUMNS // 2], of the logits' type
    list_id_ptr: Value,  # [rows, COLUMNS // 2] int32
    logits_ptr: Value,  # [rows, num_ids]
    temperature_ptr: Value,
    top_k_ptr: Value,
    top_p_ptr: Value,
    min_p_ptr: Value,
    seed_ptr: Value,
    position_ptr: Value,
    stride: Value,
    num_ids: Value,
    first_id: Value,
    COLUMNS: constexpr,
    STAGES: constexpr,
) -> None:
    CAPACITY: constexpr = COLUMNS // 2
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    top_k, top_p = tl.load(top_k_ptr + row).to(tl.int32), tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    has_k, has_p = (top_k > 0) & (top_k < num_ids), top_p < 1.0
    threshold = float("-inf")
    if (temperature > 0) & (has_k | has_p | (min_p > 0)):
        lane = tl.arange(0, COLUMNS)
        row_ptr = logits_ptr + row * stride
        maxima = tl.full([COLUMNS], float("-inf"), tl.float32)
        for start in tl.range(0, num_ids, COLUMNS, num_stages=STAGES):
            x = tl.load(row_ptr + start + lane, mask=start + lane < num_ids, other=float("-inf")).to(tl.float32)
            maxima = tl.maximum(maxima, x)
        peak = tl.max(maxima, 0)
        rate = inverse_of(temperature) * 1.4426950408889634  # log2(e)
        if min_p > 0:
            # exp((x - peak) / temperature) >= min_p
            threshold = peak + tl.log(min_p) * tl.maximum(temperature, 1e-30)
        if has_k | has_p:
            wanted = tl.where(has_k, tl.minimum(top_k, COLUMNS // 4), COLUMNS // 4)
            keys = _key(maxima)
            low, high = _key(peak) * 0 - 2139095041, _key(peak) + 1  # from the key of -inf
            reached = COLUMNS
            while (high - low > 1) & (reached > wanted + wanted // 4):
                middle = low + (high - low) // 2
                count = tl.sum((keys >= middle).to(tl.int32), 0)
                low, high = tl.where(count >= wanted, middle, low), tl.where(count >= wanted, high, middle)
                reached = tl.where(count >= wanted, count, reached)
            pivot = _number(low)

            # The list, in the order of ids, and the softmax's sum.
            mass = tl.zeros([COLUMNS], tl.float32)
            length = 0
            for start in tl.range(0, num_ids, COLUMNS, num_stages=STAGES):
                x = tl.load(row_ptr + start + lane, mask=start + lane < num_ids, other=float("-inf"))
                wide = x.to(tl.float32)
                mass += tl.exp2((wide - peak) * rate)
                listed = ((wide >= pivot) & (start + lane < num_ids)).to(tl.int32)
                list_index = length + tl.cumsum(listed, 0) - 1
                length += tl.sum(listed, 0)
                is_kept = (listed > 0) & (list_index < CAPACITY)
                tl.store(list_ptr + row * CAPACITY + list_index, x, mask=is_kept)
                tl.store(list_id_ptr + row * CAPACITY + list_index, start + lane, mask=is_kept)
            total = tl.sum(mass, 0)
            tl.debug_barrier()

            is_listed = length <= CAPACITY
            if is_listed:
                _, listed_mass = _count_and_mass(
                    list_ptr + row * CAPACITY, length, float("-inf"), float("-inf"), peak, rate, CAPACITY
                )
                is_listed = tl.where(has_k, length >= top_k, listed_mass >= top_p * total)
            source = row_ptr
            lowest = _key(peak) * 0 - 2139095041
            if is_listed:
                source = list_ptr + row * CAPACITY
                lowest = low
            else:
                length = num_ids
            floor = float("-inf")
            if has_k:
                low, high = lowest, _key(peak) + 1
                reached = length + 1
                while (high - low > 1) & (reached != top_k):
                    middle = low + (high - low) // 2
                    count, _ = _count_and_mass(source, length, _number(middle), floor, peak, rate, CAPACITY)
                    low, high = tl.where(count >= top_k, middle, low), tl.where(count >= top_k, high, middle)
                    reached = tl.where(count >= top_k, count, reached)
                floor = _number(low)
                lowest = low
                threshold = tl.maximum(threshold, floor)
            if has_p:
                if has_k:
                    _, total = _count_and_mass(source, length, float("-inf"), floor, peak, rate, CAPACITY)
                low, high = lowest - 1, _key(peak)
                while high - low > 1:
                    middle = low + (high - low) // 2
                    _, mass_above = _count_and_mass(source, length, _number(middle), floor, peak, rate, CAPACITY)
                    is_left = mass_above < top_p * total
                    low, high = tl.where(is_left, low, middle), tl.where(is_left, middle, high)
                threshold = tl.maximum(threshold, _number(high))
            if is_listed:
                seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
                slot = tl.arange(0, CAPACITY)
                x = tl.load(source + slot, mask=slot < length, other=float("-inf")).to(tl.float32)
                ids = tl.load(list_id_ptr + row * CAPACITY + slot, mask=slot < length, other=0) + first_id
                score = x * inverse_of(temperature) + fast_gumbel(words_of_ids(seed, position, ids))
                score = tl.where((slot < length) & (x >= threshold), score, float("-inf"))
                best = tl.max(score, 0)
                tl.store(value_ptr + row, best)
                tl.store(id_ptr + row, tl.min(tl.where(score == best, ids, 0x7FFFFFFF), 0).to(tl.int64))
                threshold = float("inf")
    tl.store(threshold_ptr + row, threshold)


def launch(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int,
) -> Choice:
    num_rows, num_ids = logits.shape
    choice = empty_choice(logits, logits.shape[0])
    columns = min(_MAX_COLUMNS, max(128, next_power_of_2(num_ids) // 8))
    threshold = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    listed = torch.empty(num_rows, columns // 2, dtype=logits.dtype, device=logits.device)
    listed_ids = torch.empty(num_rows, columns // 2, dtype=torch.int32, device=logits.device)
    _filter_kernel[(num_rows,)](
        *choice, threshold, listed, listed_ids, logits, temperature, top_k, top_p, min_p, seeds, positions,
        logits.stride(0), num_ids, first_id, COLUMNS=columns, STAGES=STAGES, num_warps=max(1, columns // 256),
    )  # fmt: skip
    return choose(logits, first_id, choice, threshold, (temperature, seeds, positions))


def reference(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int,
) -> Choice:
    """Row by row in float64, by sorting."""
    scores = []
    specs = zip(*(x.tolist() for x in (temperature, top_k, top_p, min_p, seeds, positions)), strict=True)
    for row, (heat, k, p, least, seed, position) in zip(logits.double(), specs, strict=True):
        if heat == 0:
            scores.append(row)
            continue
        scaled = row / heat
        left = scaled
        if 0 < k < len(row):
            left = left.masked_fill(left < torch.topk(left, k).values[-1], -math.inf)
        if p < 1:
            ordered = left.sort(descending=True).values
            share = torch.softmax(ordered, dim=-1)
            is_left = share.cumsum(dim=-1) - share < p
            left = left.masked_fill(left < ordered[is_left].amin(), -math.inf)
        if least > 0:
            left = left.masked_fill(left < scaled.max() + math.log(least), -math.inf)
        scores.append(left + gumbel(uniform_words(seed, position, first_id, len(row), row.device)))
    values, ids = torch.stack(scores).max(dim=-1)
    return values.float(), ids + first_id


def cpu(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int,
) -> Choice:
    """As the reference, but a filtered row is cut to its 1,024 largest logits first, where those are enough."""
    choice = empty_choice(logits, logits.shape[0])
    specs = zip(*(x.tolist() for x in (temperature, top_k, top_p, min_p, seeds, positions)), strict=True)
    for i, (heat, k, p, least, seed, position) in enumerate(specs):
        row = logits[i].double()
        if heat == 0:
            value, index = row.max(dim=-1)
        else:
            value, index = _sample_row(row / heat, k, p, least, seed, position, first_id)
        choice[0][i], choice[1][i] = value, index + first_id
    return choice


def _sample_row(
    scaled: Tensor, k: int, p: float, least: float, seed: int, position: int, first_id: int
) -> tuple[Tensor, Tensor]:
    num_ids = len(scaled)
    if not (0 < k < num_ids or p < 1):
        scores = scaled + gumbel(uniform_words(seed, position, first_id, num_ids, scaled.device))
        if least > 0:
            scores = scores.masked_fill(scaled < scaled.max() + math.log(least), -math.inf)
        return tuple(scores.max(dim=-1))  # type: ignore[return-value]
    total = torch.logsumexp(scaled, dim=-1)
    for few in (min(_FEW, num_ids), num_ids):
        kept, ids = scaled.topk(few)
        peak = kept[0]
        if 0 < k < num_ids:
            if k > few:
                continue
            kept = kept[kept >= kept[k - 1]]
            if len(kept) == few < num_ids:
                continue  # more may be tied with the last
            total = torch.logsumexp(kept, dim=-1)
        if p < 1:
            share = torch.exp(kept - total)
            kept = kept[kept >= kept[int((share.cumsum(dim=-1) - share < p).sum()) - 1]]
        if len(kept) < few or few == num_ids:
            break
    if least > 0:
        kept = kept[kept >= peak + math.log(least)]
    ids = ids[: len(kept)]
    scores = kept + gumbel(uniform_words_at(seed, position, ids + first_id))
    best = scores.max()
    return best, ids[scores == best].min()


def _cost(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    first_id: int,
) -> costs.OpCost:
    return costs.sample(logits.shape[0], logits.shape[1], logits.element_size())


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# What a row asks for: temperature, top_k, top_p, min_p.
Spec = tuple[float, int, float, float]
_PLAIN, _GREEDY, _TOP_K = (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (0.8, 50, 1.0, 0.0)
_ALL: Spec = (0.7, 40, 0.95, 0.05)


def _case(
    name: str, num_rows: int, num_ids: int, dtype: torch.dtype, specs: tuple[Spec, ...],
    first_id: int = 0, row_gap: int = 0, target: Target | None = None,
) -> Case:  # fmt: skip
    """The specs take turns over the rows."""

    def build(device: str) -> tuple[object, ...]:
        draw = Draw(device, dtype)
        columns = list(zip(*(specs[i % len(specs)] for i in range(num_rows)), strict=True))
        floats = [torch.tensor(columns[i], dtype=torch.float32, device=device) for i in (0, 2, 3)]
        top_k = draw.integers(torch.tensor(columns[1]))
        seeds = draw.integers(torch.arange(num_rows) * 0x1234567890ABCDE - 7, torch.int64)
        positions = draw.integers(torch.arange(num_rows) * 3, torch.int64)
        logits = draw_logits(draw, num_rows, num_ids, row_gap)
        return logits, floats[0], top_k, floats[1], floats[2], seeds, positions, first_id

    sass = SASS if num_ids > 100_000 else ()
    return Case(f"{DTYPE_NAMES[dtype]} {num_rows}x{num_ids} {name}", dtype, build, sass, target)


SMALL = (
    _case("plain and greedy", 3, 1000, FP32, (_PLAIN, _GREEDY, (1.7, 0, 1.0, 0.0))),
    _case("plain shard", 2, 3001, BF16, (_PLAIN,), first_id=6003, row_gap=3),
    _case("top-k", 2, 1000, FP32, ((0.8, 12, 1.0, 0.0), (1.2, 1, 1.0, 0.0))),
    _case("top-k above the list", 1, 200, FP32, ((1.0, 90, 1.0, 0.0),)),
    _case("top-p", 1, 1500, FP16, ((0.5, 0, 0.6, 0.0),)),
    _case("top-p wider than the list", 1, 200, FP32, ((5.0, 0, 0.9, 0.0),)),
    _case("all three", 1, 900, FP32, ((0.7, 30, 0.8, 0.05),)),
    _case("min-p", 2, 1200, BF16, ((1.5, 0, 1.0, 0.2), (1.0, 0, 1.0, 1.0))),
    _case("few ids", 2, 5, FP32, ((1.0, 3, 1.0, 0.0), (1.0, 0, 0.5, 0.0))),
)
_ONE_AND_A_HALF = Target(0.67, "memory")  # the time of one and a half passes over the logits
FULL = (
    _case("top-k 50 top-p 0.95 min-p 0.05", 256, 128256, FP32, (_ALL,), target=_ONE_AND_A_HALF),
    _case("top-p 0.9", 256, 128256, FP32, ((0.3, 0, 0.9, 0.0),), target=_ONE_AND_A_HALF),
    _case("plain", 256, 128256, FP32, (_PLAIN,), target=_ONE_AND_A_HALF),
    _case("top-k 50", 256, 151936, BF16, (_TOP_K,), target=_ONE_AND_A_HALF),
    _case("mixed", 256, 128256, BF16, (_PLAIN, _GREEDY, _TOP_K, _ALL), target=_ONE_AND_A_HALF),
    _case("mixed", 1, 128256, BF16, (_ALL,), target=Target(40, "us")),
    _case("plain shard", 256, 18992, FP16, (_PLAIN,), first_id=18992, target=_ONE_AND_A_HALF),
)

LIMIT = (
    "A filtered row: two passes by one block, the second with a scan a tile, then some 60 steps of bisection over "
    "a list in L1, each a reduction over the block; at few rows that latency is all there is. A plain row: the "
    "generator, 18 instructions a token, beside the load; logarithms are left out where a bound shows that they "
    "cannot matter. Tried: no copies ahead (8 KB in flight in the second pass); five to eight stages, and twice "
    "the columns with 16 warps (one block an SM, at 142 to 186 and at 113 registers; the latter spills when held "
    "to 64). Weighed and left: choosing first and filtering afterwards, which a flat row rejects ten times over."
)

sample = Op("sample", reference, launch, cpu, _cost, SMALL, FULL, limit=LIMIT)
