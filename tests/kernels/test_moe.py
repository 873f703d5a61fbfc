"""Grouping by expert and the expert layer at the edges of what a router may give."""

import pytest
import torch

from kernels.experts.grouping import NO_EXPERT, group_by_expert, max_blocks
from kernels.experts.moe import moe_experts


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(9, 1, dtype=torch.int32),  # all to one
        torch.arange(8, dtype=torch.int32).view(4, 2),  # one to each
        torch.tensor([[0, 3], [3, 0], [3, 1]], dtype=torch.int32),
        torch.full((3, 2), NO_EXPERT, dtype=torch.int32),  # all elsewhere
    ],
    ids=["all to one", "one to each", "ragged", "all elsewhere"],
)
@pytest.mark.parametrize("block", [1, 2, 16])
def test_every_row_has_one_slot_in_a_block_of_its_expert(ids, block):
    rows, experts = group_by_expert(ids, 8, block)
    num_rows = ids.numel()
    assert len(experts) == max_blocks(num_rows, 8, block)
    seen = []
    for slots, expert in zip(rows.view(-1, block).tolist(), experts.tolist(), strict=True):
        used = [row for row in slots if row != num_rows]
        assert bool(used) == (expert != NO_EXPERT)
        assert all(ids.view(-1)[row] == expert for row in used)
        seen += used
    assert sorted(seen) == (ids.view(-1) >= 0).nonzero().view(-1).tolist()


def layer(num_tokens, num_experts=4, hidden=16, width=8):
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, hidden), (num_experts, 2 * width, hidden), (num_experts, hidden, width)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_ranks_that_share_the_experts_add_up_to_the_whole():
    x, gate_up, down = layer(6)
    ids = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [0, 2], [1, 3]], dtype=torch.int32)
    weights = torch.full((6, 2), 0.5)
    whole = moe_experts(x, gate_up, down, ids, weights)
    total = torch.zeros_like(whole)
    for first in (0, 2):
        mine = torch.where((ids >= first) & (ids < first + 2), ids - first, NO_EXPERT)
        total += moe_experts(x, gate_up[first : first + 2], down[first : first + 2], mine, weights)
    torch.testing.assert_close(total, whole)


def test_a_token_without_an_expert_here_and_a_batch_without_tokens():
    x, gate_up, down = layer(2)
    ids = torch.tensor([[NO_EXPERT, NO_EXPERT], [1, NO_EXPERT]], dtype=torch.int32)
    out = moe_experts(x, gate_up, down, ids, torch.ones(2, 2))
    assert not out[0].any()
    assert out[1].any()
    assert moe_experts(x[:0], gate_up, down, ids[:0], torch.ones(0, 2)).shape == (0, 16)
