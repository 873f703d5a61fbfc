"""Trees of draft tokens: what is offered to the model at once, and which of it was right.

Node 0 is the last token that is known; every other node stands for a token that may follow its parent. All nodes of a
depth have one position in the completion, and so one noise: what the model chooses at a node is what it would choose
there anyway, and at most one child of a node can be it. Nodes come in such an order that parents stand before their
children. Pure; knows nothing of how candidates are found, or how nodes are computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

MAX_NODES = 64  # with the root: the bits of a word (kernels.attention.tree)
NO_PARENT = -1
_WORD = 1 << MAX_NODES


@dataclass(frozen=True)
class DraftTree:
    """token_ids and parents of all nodes, the root first; its parent is NO_PARENT.

    Raises ValueError for parents that do not stand before their children, two equal children of one node, and trees
    that are empty or too large.
    """

    token_ids: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.parents):
            raise ValueError(f"parents: {len(self.parents)} of {len(self.token_ids)} nodes")
        if not 0 < len(self.parents) <= MAX_NODES:
            raise ValueError(f"token_ids: {len(self.parents)} nodes; a tree has 1 to {MAX_NODES}")
        if self.parents[0] != NO_PARENT:
            raise ValueError(f"parents[0]: {self.parents[0]}; the root has none, {NO_PARENT}")
        for node, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < node:
                raise ValueError(f"parents[{node}]: {parent}; a parent stands before its child")
        edges = list(zip(self.parents, self.token_ids, strict=True))
        if len(set(edges)) < len(edges):
            raise ValueError("token_ids: a node has two children of one token")

    @staticmethod
    def chain(token_ids: Sequence[int]) -> DraftTree:
        """Each token follows the one before."""
        return DraftTree(tuple(token_ids), tuple(range(-1, len(token_ids) - 1)))

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node, the number of its ancestors."""
        return _depths(self.parents)

    @cached_property
    def ancestors(self) -> tuple[int, ...]:
        """Of each node a word of 64 bits, signed as an int64 is: bit j is set if node j is an ancestor or itself."""
        words: list[int] = []
        for node, parent in enumerate(self.parents):
            words.append((words[parent] if words else 0) | 1 << node)
        return tuple(word - _WORD if word >> MAX_NODES - 1 else word for word in words)

    def positions(self, root: int) -> tuple[int, ...]:
        """Of each node, for rotary embedding and noise. root: position of the root."""
        return tuple(root + depth for depth in self.depths)

    def accepted(self, chosen_ids: Sequence[int]) -> list[int]:
        """The nodes whose tokens are right, from the root on, in the order of depth.

        chosen_ids: of each node, the token that the model chooses after it. That of the last accepted node is the first
        token that the tree did not have: a step gives as many tokens as there are accepted nodes.
        """
        children = {edge: node for node, edge in enumerate(zip(self.parents, self.token_ids, strict=True))}
        path, node = list[int](), 0
        while True:
            path.append(node)
            found = children.get((node, chosen_ids[node]))
            if found is None:
                return path
            node = found

    def branches(self) -> list[list[int]]:
        """The paths from the root to each leaf: the tree as sequences that share their beginnings."""
        inner, paths = set(self.parents), list[list[int]]()
        for leaf in range(len(self.parents)):
            if leaf not in inner:
                path = [leaf]
                while (parent := self.parents[path[-1]]) != NO_PARENT:
                    path.append(parent)
                paths.append(path[::-1])
        return paths


@dataclass(frozen=True, slots=True)
class TreeShape:
    """A tree before its tokens are known: each node is the candidate of some rank after its parent, the best is 0."""

    parents: tuple[int, ...]  # the root first
    ranks: tuple[int, ...]  # that of the root is 0, and means nothing

    def num_accepted(self, ranks: Sequence[int]) -> int:
        """Nodes below the root that are right, where the right token of each depth has these ranks after a right path.

        A rank that no candidate has is any large number.
        """
        children = {(p, r): node for node, (p, r) in enumerate(zip(self.parents, self.ranks, strict=True)) if node}
        node, depth = 0, 0
        while depth < len(ranks) and (found := children.get((node, ranks[depth]))) is not None:
            node, depth = found, depth + 1
        return depth

    @property
    def depth(self) -> int:
        """Levels below the root: steps of a draft model that the tree needs."""
        return max(_depths(self.parents))

    @property
    def num_drafts(self) -> int:
        """Nodes below the root."""
        return len(self.parents) - 1

    @property
    def branch_lengths(self) -> tuple[int, ...]:
        """Of each leaf the tokens of its path, the root's among them: the tree as sequences."""
        inner = set(self.parents)
        return tuple(depth + 1 for node, depth in enumerate(_depths(self.parents)) if node not in inner)

    @property
    def widths(self) -> tuple[int, ...]:
        """Of each depth but the last the nodes that have children: what each step of a draft model computes."""
        depths = _depths(self.parents)
        return tuple(
            len({p for p, d in zip(self.parents, depths, strict=True) if d == k + 1}) for k in range(self.depth)
        )


def chain_shape(num_drafts: int) -> TreeShape:
    """The best candidate of each depth."""
    return TreeShape(tuple(range(-1, num_drafts)), (0,) * (num_drafts + 1))


def star_shape(num_drafts: int) -> TreeShape:
    """The best candidates of one depth."""
    return TreeShape((NO_PARENT, *(0,) * num_drafts), (0, *range(num_drafts)))


def likeliest_shape(rank_shares: Sequence[float], num_drafts: int, max_depth: int = MAX_NODES) -> TreeShape:
    """The tree of so many drafts with the most expected tokens, where depths are alike and independent.

    rank_shares: how often the right token is the candidate of each rank, falling. As Sequoia plans it (arXiv
    2402.12374), but each node counts by itself: its path is likely as the product of the shares of its ranks.
    """
    parents, ranks, depths, likely = [NO_PARENT], [0], [0], [1.0]
    offered = [(-rank_shares[0], 0, 0)] if max_depth else []  # of each node, its next child
    while offered and len(parents) <= num_drafts:
        negative, parent, rank = heapq.heappop(offered)
        parents.append(parent)
        ranks.append(rank)
        depths.append(depths[parent] + 1)
        likely.append(-negative)
        if rank + 1 < len(rank_shares):
            heapq.heappush(offered, (-likely[parent] * rank_shares[rank + 1], parent, rank + 1))
        if depths[-1] < max_depth:
            heapq.heappush(offered, (negative * rank_shares[0], len(parents) - 1, 0))
    return TreeShape(tuple(parents), tuple(ranks))


def _depths(parents: Sequence[int]) -> tuple[int, ...]:
    depths: list[int] = []
    for parent in parents:
        depths.append(depths[parent] + 1 if depths else 0)
    return tuple(depths)
