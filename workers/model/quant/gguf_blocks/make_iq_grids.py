"""Writes iq_grids.npz from the package `gguf` (pip install gguf). It was run once, with version 0.19.0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

_NAMES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S")  # IQ1_M uses that of IQ1_S


def main() -> None:
    """int8 [points, coordinates] of each type."""
    from gguf import quants

    grids = {}
    for name in _NAMES:
        kind = getattr(quants, name)
        kind.init_grid()
        grids[name.lower()] = kind.grid.reshape(kind.grid_shape).astype(np.int8)
    np.savez_compressed(Path(__file__).with_name("iq_grids.npz"), **grids)


if __name__ == "__main__":
    main()
