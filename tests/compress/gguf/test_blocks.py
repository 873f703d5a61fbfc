"""Blocks of our quantisers: read by `gguf` as by us, and no farther from the numbers than ggml's own blocks."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from checkpoint.gguf.block_types import QUANTISED
from compress.gguf.blocks.quantise import BLOCK_KINDS, quantise
from workers.model.quant.gguf_blocks.dequantise import dequantise

GGML_ERRORS = {
    "Q4_0": 0.083, "Q5_0": 0.043, "Q5_1": 0.038, "Q8_0": 0.0054, "IQ4_NL": 0.0765, "Q4_K": 0.073, "Q5_K": 0.036,
    "Q6_K": 0.018, "IQ3_XXS": 0.198,
}  # fmt: skip
"""Root of the relative squared error on normal numbers, by ggml 0.20 (ggml_quantize_chunk)."""
GGML_ERRORS_WITH_IMPORTANCES = {"IQ3_XXS": 0.198, "IQ2_XXS": 0.360}


def normal(rows: int = 16, columns: int = 1024) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(5)) * 0.02


def importances(columns: int = 1024) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(6)).abs() + 0.05


def relative_error(found: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor | float = 1.0) -> float:
    change = (weights * (found - wanted).square()).sum() / (weights * wanted.square()).sum()
    return float(change.sqrt())


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_others_read_the_numbers_that_we_read(kind: str) -> None:
    rows = normal()
    rows[0] *= 1e4
    made = quantise(kind, rows)
    theirs = gguf.quants.dequantize(made.numpy(), gguf.GGMLQuantizationType[kind])
    np.testing.assert_allclose(dequantise(kind, made).numpy(), theirs, rtol=1e-6)


@pytest.mark.parametrize(("kind", "error"), GGML_ERRORS.items())
def test_it_is_as_close_as_ggml(kind: str, error: float) -> None:
    rows = normal()
    assert relative_error(dequantise(kind, quantise(kind, rows)), rows) <= 1.05 * error


@pytest.mark.parametrize(("kind", "error"), GGML_ERRORS_WITH_IMPORTANCES.items())
def test_it_is_as_close_as_ggml_with_importances(kind: str, error: float) -> None:
    rows = normal()
    assert relative_error(dequantise(kind, quantise(kind, rows, importances())), rows) <= 1.05 * error


def test_bytes_of_q8_0_are_ggmls() -> None:
    rows = torch.cat((normal(), torch.arange(-512, 512)[None] / 8.0))
    theirs = gguf.quants.quantize(rows.numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(quantise("Q8_0", rows).numpy(), theirs)


@pytest.mark.parametrize("kind", [kind for kind in BLOCK_KINDS if kind != "Q8_0"])
def test_important_columns_are_closer(kind: str) -> None:
    rows, weights = normal(), importances() ** 4
    errors = [relative_error(dequantise(kind, quantise(kind, rows, w)), rows, weights) for w in (None, weights)]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_edges(kind: str) -> None:
    """Zeros stay zeros; one number in a block, equal numbers, and those too small for the scale stay finite."""
    size = QUANTISED[kind].block_size
    rows = torch.zeros(6, size)
    rows[1, 3] = -0.7
    rows[2] = 0.25
    rows[3] = -1e-9
    rows[4] = torch.linspace(0.5, 1, size)
    rows[5] = -rows[4]
    found = dequantise(kind, quantise(kind, rows, torch.zeros(size)))
    assert bool(found.isfinite().all())
    assert float(found[0].abs().max()) == 0
    assert float(found[3].abs().max()) < 1e-6
    has_no_zero = kind in ("IQ2_XXS", "IQ3_XXS")
    for index in (2, 4, 5) if has_no_zero else (1, 2, 4, 5):
        assert relative_error(found[index], rows[index]) < (0.35 if has_no_zero else 0.12)


@pytest.mark.parametrize("kind", ["IQ2_XXS", "IQ3_XXS"])
def test_signs_are_those_of_the_numbers_but_for_the_cheapest_of_eight(kind: str) -> None:
    rows = normal()
    found = dequantise(kind, quantise(kind, rows)).view(-1, 8)
    differs = (found.sign() != rows.view(-1, 8).sign()).sum(1)
    is_odd = (rows.view(-1, 8) < 0).sum(1) % 2
    assert torch.equal(differs, is_odd)
    assert int(((found < 0).sum(1) % 2).sum()) == 0


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_rows_do_not_depend_on_their_neighbours(kind: str) -> None:
    rows = normal(200, 1024)
    weights = importances()
    assert torch.equal(quantise(kind, rows, weights)[150:], quantise(kind, rows[150:], weights))
