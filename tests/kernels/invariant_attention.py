"""Whether attention in batch-invariant mode gives a token the same bits whatever is computed beside it.

    TRITON_INTERPRET=1 python tests/kernels/invariant_attention.py cpu    # the Triton code, interpreted
    python tests/kernels/invariant_attention.py cuda

Prints a JSON line per check: how many results there are and how many of them have other bits.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kernels.attention.cases import Options
from kernels.attention.decode import decode_attention
from kernels.attention.prefill import prefill_attention
from kernels.cases import Draw, PagedShape

Results = list[torch.Tensor]


@dataclass(frozen=True)
class Sequences:
    """All tokens of some sequences: q [tokens, heads, head_dim] of each, and their cache."""

    q: Results
    kv_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    options: tuple[Any, ...]
    decode: Callable[..., torch.Tensor]
    prefill: Callable[..., torch.Tensor]

    def last_tokens(self, members: list[int]) -> Results:
        """Each member's last token by decode, in a batch of these."""
        index = torch.tensor(members, device=self.kv_cache.device)
        q = torch.stack([self.q[i][-1] for i in members])
        return list(self.decode(q, self.kv_cache, self.block_table[index], self.seq_lens[index], 0.2, *self.options))

    def chunk(self, members: list[int], begins: list[int], ends: list[int]) -> Results:
        """Tokens begins[i] .. ends[i] - 1 of each member by prefill, in one call."""
        device = self.kv_cache.device
        lengths = [end - begin for begin, end in zip(begins, ends, strict=True)]
        starts = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        q = torch.cat([self.q[i][b:e] for i, b, e in zip(members, begins, ends, strict=True)])
        table = self.block_table[torch.tensor(members, device=device)]
        seq_lens = torch.tensor(ends, dtype=torch.int32, device=device)
        out = self.prefill(q, self.kv_cache, table, starts, seq_lens, max(lengths), 0.2, *self.options)
        return list(out.split(lengths))

    def in_chunks(self, member: int, size: int) -> torch.Tensor:
        n = len(self.q[member])
        parts = [self.chunk([member], [b], [min(b + size, n)])[0] for b in range(0, n, size)]
        return torch.cat(parts)


def draw(shape: PagedShape, dtype: torch.dtype, options: Options, device: str, run: Callable[[Any], Any]) -> Sequences:
    source = Draw(device, dtype)
    q = [source.normal(n, shape.num_q_heads, shape.head_dim) for n in shape.seq_lens]
    paged = source.paged_cache(shape, options.kv_dtype)
    values = options.draw(source, shape.num_q_heads, paged[0])
    return Sequences(q, *paged, values, run(decode_attention), run(prefill_attention))


def checks(s: Sequences, chunk_sizes: list[int]) -> Iterator[tuple[str, list[tuple[torch.Tensor, torch.Tensor]]]]:
    """(what is claimed, pairs that must have the same bits)"""
    everyone = list(range(len(s.q)))
    alone = [s.last_tokens([i])[0] for i in everyone]
    for members in (everyone, everyone[::-1], everyone[1:] + everyone[1:2] * 3):
        together = s.last_tokens(members)
        yield f"decode in the batch {members}", [(out, alone[i]) for out, i in zip(together, members, strict=True)]
    wide = replace(s, block_table=torch.cat((s.block_table, s.block_table), dim=1))
    yield "decode under a wide table", list(zip(wide.last_tokens(everyone), alone, strict=True))
    lengths = [len(q) for q in s.q]
    whole = [s.chunk([i], [0], [n])[0] for i, n in enumerate(lengths)]
    together = s.chunk(everyone[::-1], [0] * len(lengths), lengths[::-1])
    yield "prefill in a batch", [(out, whole[i]) for out, i in zip(together, everyone[::-1], strict=True)]
    for size in chunk_sizes:
        yield f"prefill in chunks of {size}", [(s.in_chunks(i, size), out) for i, out in enumerate(whole)]
    yield "decode and prefill", [(one, out[-1]) for one, out in zip(alone, whole, strict=True)]


def differing(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    return sum(int((out != expected).sum()) + int(out.isnan().sum()) for out, expected in pairs)


def main() -> None:
    device = sys.argv[1]
    if device == "cpu":
        from kernels.harness.interpret import repair

        repair()
    lengths, sizes = ((600, 70), [40, 64]) if device == "cpu" else ((2600, 700, 64), [1, 7, 100, 512])
    kinds = [Options(batch_invariant=True), Options(batch_invariant=True, window=50, sinks=True)]
    for options in kinds if device == "cpu" else [*kinds, replace(kinds[0], kv_dtype=torch.float8_e4m3fn)]:
        shape = PagedShape(lengths, 2, 1, 64, 64)
        for name, pairs in checks(draw(shape, torch.bfloat16, options, device, lambda op: op.launch), sizes):
            record = {"check": name + options.name(), "wrong": differing(pairs), "of": sum(a.numel() for a, _ in pairs)}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
