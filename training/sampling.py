"""Text that a model of `training/llama.py` says of itself, many sequences at a time, and what it thought at each token.

Knows nothing of what the text is for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.llama import KeysValues, Llama

NUM_TOP = 32


Choose = Callable[[Tensor, int], Tensor]
"""(fp32 logits [sequences, vocab], how many tokens were chosen before) -> ids [sequences, 1]"""


def by_chance(temperatures: Tensor, generator: torch.Generator) -> Choose:
    """Samples at a temperature for each sequence; 0 is greedy."""

    def choose(logits: Tensor, index: int) -> Tensor:
        noise = -torch.empty_like(logits).exponential_(generator=generator).log_()
        return (logits + temperatures[:, None] * noise).argmax(-1, keepdim=True)

    return choose


@torch.no_grad()
def continued(model: Llama, prompts: Tensor, num_tokens: int, choose: Choose, dtype: torch.dtype) -> Tensor:
    """Prompts [sequences, length] and behind each `num_tokens` that were chosen.

    dtype: of products and cache. bf16 takes a fifth of the time of fp32 on a CPU that has it.
    """
    cache = KeysValues(model.shape, len(prompts), prompts.shape[1] + num_tokens, dtype)
    found = [prompts]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for index in range(num_tokens):
            found.append(choose(model.next_logits(found[-1], cache).float(), index))
    return torch.cat(found, dim=1)


@torch.no_grad()
def top_logprobs(model: Llama, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The NUM_TOP likeliest next tokens after each of [sequences, length]: int16 ids and fp16 natural logarithms, both
    [sequences, length, NUM_TOP]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    top = F.log_softmax(logits.float(), dim=-1).topk(NUM_TOP, dim=-1)
    return top.indices.to(torch.int16), top.values.to(torch.float16)
