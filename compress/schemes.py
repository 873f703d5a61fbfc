"""What can be stored in place of a matrix, by name: the numbers of its weights and how its inputs are rounded.

Knows nothing of files and of how weights are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from checkpoint.gguf.block_types import QUANTISED
from compress.calibration.activations import ActivationRounding
from compress.errors import CompressError
from compress.grids.floating import Fp8Grid, Mxfp4Grid, Nf4Grid, Nvfp4Grid
from compress.grids.grid import Grid
from compress.grids.integer import IntGrid
from compress.methods.low_rank import rank_of

_TOKEN_INT8 = ActivationRounding("int8", "token")


@dataclass(frozen=True, slots=True)
class Scheme:
    """A frozen description; two schemes of one name and group size are equal."""

    name: str
    grid: Grid | None  # None: plain numbers in the checkpoint's own type
    activations: ActivationRounding | None = None
    kept_share: float = 1.0  # below 1: two thin matrices with this share of the parameters
    block_type: str = ""  # of a GGUF, which has scales and codes in blocks of bytes; "": none

    @property
    def is_low_rank(self) -> bool:
        """Whether thin matrices are stored."""
        return self.kept_share < 1

    @property
    def is_plain(self) -> bool:
        """Whether nothing changes."""
        return self.grid is None and not self.is_low_rank and not self.block_type

    @property
    def label(self) -> str:
        """The name, and behind a colon the group size, or the share of a low rank in percent, where it can differ."""
        if self.is_low_rank:
            return f"{self.name}:{round(100 * self.kept_share)}"
        return f"{self.name}:{self.grid.group_size}" if self.grid is not None and self.name in _GROUPED else self.name

    @property
    def needs_calibration(self) -> bool:
        """Whether a scale of inputs comes from calibration."""
        return self.activations is not None and self.activations.scale_per == "tensor"

    def bits_of(self, outputs: int, inputs: int, plain_bits: int = 16) -> int:
        """Stored for a matrix."""
        if self.is_low_rank:
            return plain_bits * rank_of(outputs, inputs, self.kept_share) * (outputs + inputs)
        if self.block_type:
            return 8 * outputs * QUANTISED[self.block_type].row_bytes(inputs)
        if self.grid is None:
            return plain_bits * outputs * inputs
        return self.grid.bits * outputs * inputs + self.grid.scale_bits(outputs, inputs)


PLAIN = Scheme("plain", None)

_MAKERS: dict[str, Callable[[int, bool], Scheme]] = {
    "w4a16": lambda group, search: Scheme("w4a16", IntGrid(4, group, True, search)),
    "w4a16-asym": lambda group, search: Scheme("w4a16-asym", IntGrid(4, group, False, search)),
    "w8a16": lambda group, search: Scheme("w8a16", IntGrid(8, group, True, search)),
    "w4a8": lambda group, search: Scheme("w4a8", IntGrid(4, group, True, search), _TOKEN_INT8),
    "w8a8": lambda group, search: Scheme("w8a8", IntGrid(8, 0, True, search), _TOKEN_INT8),
    "w8a8-static": lambda group, search: Scheme(
        "w8a8-static", IntGrid(8, 0, True, search), ActivationRounding("int8", "tensor")
    ),
    "fp8": lambda group, search: Scheme("fp8", Fp8Grid("row"), ActivationRounding("fp8", "token")),
    "fp8-static": lambda group, search: Scheme("fp8-static", Fp8Grid("matrix"), ActivationRounding("fp8", "tensor")),
    "fp8-block": lambda group, search: Scheme("fp8-block", Fp8Grid("block"), ActivationRounding("fp8", "group")),
    "mxfp4": lambda group, search: Scheme("mxfp4", Mxfp4Grid()),
    "nvfp4": lambda group, search: Scheme("nvfp4", Nvfp4Grid()),
    "nf4": lambda group, search: Scheme("nf4", Nf4Grid()),
    "llm-int8": lambda group, search: Scheme(
        "llm-int8", IntGrid(8, 0, True, search, is_balanced=True), ActivationRounding("int8", "token", 6.0)
    ),
    "low-rank": lambda group, search: Scheme("low-rank", None, None, group / 100),
    "plain": lambda group, search: PLAIN,
}
SCHEME_NAMES = tuple(_MAKERS)
_GROUPED = ("w4a16", "w4a16-asym", "w8a16", "w4a8")


def scheme_labelled(label: str) -> Scheme:
    """From a label such as w4a16:32 or low-rank:80. Raises CompressError."""
    name, _, size = label.partition(":")
    if size and not size.isdigit():
        raise CompressError(f"scheme {label!r}: behind the colon stands a group size, or a share in percent")
    return scheme_named(name, int(size)) if size else scheme_named(name)


def scheme_named(name: str, group_size: int = 64, searches_range: bool = False) -> Scheme:
    """One of SCHEME_NAMES. group_size: of integer weights; others have sizes of their own. Raises CompressError."""
    if name not in _MAKERS:
        raise CompressError(f"scheme {name!r} is not known (known: {', '.join(SCHEME_NAMES)})")
    if name == "low-rank" and not 1 <= group_size <= 99:
        raise CompressError(f"scheme low-rank:{group_size}: behind the colon stands a share from 1 to 99 percent")
    if name in _GROUPED and group_size not in (0, 32, 64, 128, 256):
        raise CompressError(f"group_size must be 32, 64, 128, 256, or 0 for whole rows, not {group_size}")
    return _MAKERS[name](group_size, searches_range)
