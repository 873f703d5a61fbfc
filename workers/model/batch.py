"""The rows of one forward pass, as the layers of a model see them. Knows nothing of requests or weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

_Plan = TypeVar("_Plan")


@dataclass(frozen=True, slots=True)
class GroupInputs:
    """Where the layers of one cache group read and write."""

    block_table: Tensor  # int32 [sequences, max_blocks]; entries behind the window and beyond the end are not read
    slot_mapping: Tensor  # int64 [tokens]; -1: already in the cache


@dataclass(frozen=True, slots=True)
class Batch:
    """First the sequences with one token each, then those with several.

    Decode attention makes its sums in another order than prefill attention: in batch-invariant mode all sequences count
    as prefills, so that it does not matter which way a token comes.
    """

    token_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    groups: tuple[GroupInputs, ...]  # one per cache group of the model, see workers.model.cache_spec
    num_decodes: int  # the first rows, one token each
    seq_lens: Tensor  # int32 [sequences], this pass's tokens included
    query_start_loc: Tensor  # int32 [prefills + 1], counted from the first prefill row
    max_query_len: int  # of the prefills
    logit_rows: Tensor  # int64: rows whose logits are wanted
    _plans: dict[Hashable, object] = field(default_factory=dict, init=False)

    def plan(self, key: tuple[type[_Plan], Hashable], make: Callable[[], _Plan]) -> _Plan:
        """What layers make of the batch alone, and only the first of them has to. key: its type, and what it is of."""
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = make()
        assert isinstance(found, key[0]), "a key begins with the plan's type"
        return found
