"""Methods: each does better by its own measure than what it replaces."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from compress.calibration.statistics import InputRecorder, InputStatistics
from compress.grids.grid import Grid
from compress.methods.gptq import ActOrder, GptqOptions, gptq, inverse_factor
from compress.methods.low_rank import factorized, rank_of
from compress.methods.nearest import round_to_nearest
from compress.methods.pruning import Pattern, prune
from compress.methods.smoothing import Consumers, awq_factors, clip_to_best_range, smoothquant_factors
from compress.schemes import scheme_named

BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Product:
    weight: Tensor
    statistics: InputStatistics

    def error(self, changed: Tensor) -> float:
        return self.statistics.output_error(changed - self.weight)


@pytest.fixture
def product() -> Product:
    """Inputs that depend on one another, and a few columns with large numbers."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(256, 256, generator=generator) * 0.3 + torch.eye(256)
    inputs = torch.randn(1500, 256, generator=generator) @ mixing
    inputs[:, ::40] *= 12
    recorder = InputRecorder(256, True, torch.device("cpu"))
    for part in inputs.split(500):
        recorder.add(part)
    return Product(torch.randn(96, 256, generator=generator) * 0.05, recorder.result())


def grid_of(name: str) -> Grid:
    grid = scheme_named(name, 64).grid
    assert grid is not None
    return grid


@pytest.mark.parametrize("order", ["none", "static", "permuted"])
@pytest.mark.parametrize("name", ["w4a16", "w4a16-asym", "w8a8", "fp8", "fp8-block", "mxfp4", "nvfp4", "nf4"])
def test_gptq_changes_outputs_less_than_rounding(product: Product, name: str, order: ActOrder) -> None:
    grid, hessian, peak = grid_of(name), product.statistics.hessian, product.weight.abs().max()
    assert hessian is not None
    nearest = round_to_nearest(product.weight, grid, peak, BF16).values
    made = gptq(product.weight, hessian, grid, peak, BF16, GptqOptions(order)).values
    assert product.error(made) < 0.8 * product.error(nearest)


def test_gptq_without_correlation_is_rounding(product: Product) -> None:
    """With a diagonal Hessian nothing can be undone in other columns."""
    grid, peak = grid_of("w4a16"), product.weight.abs().max()
    made = gptq(product.weight, torch.diag(torch.rand(256) + 0.1), grid, peak, BF16, GptqOptions("none"))
    torch.testing.assert_close(made.values, round_to_nearest(product.weight, grid, peak, BF16).values)


def test_scales_of_groups_that_begin_within_a_block_are_those_of_the_updated_weights(product: Product) -> None:
    """Groups of 32 lie within blocks of 128 columns, and groups of 256 over two: in one block all is updated anyway."""
    import compress.methods.gptq as module

    hessian, peak = product.statistics.hessian, product.weight.abs().max()
    assert hessian is not None
    for size in (32, 64, 256):
        grid = scheme_named("w4a16", size).grid
        assert grid is not None
        found = gptq(product.weight, hessian, grid, peak, BF16, GptqOptions("none")).values
        before, module._BLOCK_COLUMNS = module._BLOCK_COLUMNS, 256
        try:
            expected = gptq(product.weight, hessian, grid, peak, BF16, GptqOptions("none")).values
        finally:
            module._BLOCK_COLUMNS = before
        assert (found != expected).float().mean() < 0.01  # sums are made in another order


def test_a_singular_hessian_is_damped_until_it_can_be_inverted() -> None:
    row = torch.randn(1, 64)
    factor = inverse_factor(row.T @ row, 0.0)
    assert factor.isfinite().all()


def test_dead_columns_are_rounded_by_themselves(product: Product) -> None:
    hessian = product.statistics.hessian
    assert hessian is not None
    hessian = hessian.clone()
    hessian[3], hessian[:, 3] = 0, 0
    grid, peak = grid_of("w4a16"), product.weight.abs().max()
    made = gptq(product.weight, hessian, grid, peak, BF16, GptqOptions("static")).values
    torch.testing.assert_close(made[:, 3], round_to_nearest(product.weight, grid, peak, BF16).values[:, 3])


def test_awq_protects_the_weights_of_large_inputs(product: Product) -> None:
    scheme = scheme_named("w4a16-asym", 64)
    consumers = Consumers([product.weight], product.statistics, scheme, BF16)
    factors = awq_factors(consumers)
    large = torch.arange(256) % 40 == 0
    assert factors[large].mean() > 1.5 * factors[~large].mean()
    assert consumers.error(factors) < 0.9 * consumers.error(torch.ones(256))


def test_clipping_changes_outputs_less(product: Product) -> None:
    grid, peak = grid_of("w4a16-asym"), product.weight.abs().max()
    clipped = clip_to_best_range(product.weight, product.statistics, grid, BF16)
    assert product.error(round_to_nearest(clipped, grid, peak, BF16).values) < product.error(
        round_to_nearest(product.weight, grid, peak, BF16).values
    )


def test_smoothquant_helps_where_inputs_have_large_columns(product: Product) -> None:
    consumers = Consumers([product.weight], product.statistics, scheme_named("w8a8"), BF16)
    assert consumers.error(smoothquant_factors(consumers)) < 0.5 * consumers.error(torch.ones(256))


@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_sparsegpt_is_better_than_wanda_than_magnitude(product: Product, pattern: str) -> None:
    errors = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        pruned = prune(product.weight, method, Pattern.parse(pattern), product.statistics)  # type: ignore[arg-type]
        assert (pruned == 0).float().mean() == 0.5
        if pattern == "2:4":
            assert ((pruned.view(96, -1, 4) != 0).sum(-1) == 2).all()
        errors.append(product.error(pruned))
    assert errors == sorted(errors)


def test_rounding_leaves_pruned_weights_at_zero(product: Product) -> None:
    hessian, grid = product.statistics.hessian, grid_of("w4a16")
    assert hessian is not None
    pruned = prune(product.weight, "sparsegpt", Pattern.parse("2:4"), product.statistics)
    made = gptq(pruned, hessian, grid, pruned.abs().max(), BF16, GptqOptions()).values
    assert (made[pruned == 0] == 0).all()


def test_the_recorder_adds_up(product: Product) -> None:
    recorder, parts = InputRecorder(8, True, torch.device("cpu")), torch.randn(3, 10, 8)
    for part in parts:
        recorder.add(part)
    found, rows = recorder.result(), parts.flatten(0, 1)
    assert found.num_rows == 30
    assert found.hessian is not None
    torch.testing.assert_close(found.hessian, rows.T @ rows / 30)
    torch.testing.assert_close(found.peak, rows.abs().amax(0))
    torch.testing.assert_close(found.mean_magnitude, rows.abs().mean(0))
    change = torch.randn(5, 8)
    assert found.output_error(change) == pytest.approx(float((rows @ change.T).square().sum() / 30), rel=1e-4)


def test_a_whitened_factorization_is_the_best_of_its_rank(product: Product) -> None:
    """Below a plain decomposition, below one by magnitudes, and below small changes of itself."""
    rank, shape = rank_of(96, 256, 0.6), product.weight.shape
    assert rank * sum(shape) <= 0.6 * shape[0] * shape[1] < (rank + 1) * sum(shape)
    best, plain = (factorized(product.weight, rank, seen) for seen in (product.statistics, None))
    by_magnitude = factorized(product.weight, rank, replace(product.statistics, hessian=None))
    error = product.error(best.left @ best.right)
    assert error < 0.9 * product.error(plain.left @ plain.right)
    assert error < product.error(by_magnitude.left @ by_magnitude.right)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        nudge = torch.randn(best.left.shape, generator=generator) * 0.01 * best.left.std()
        assert error < product.error((best.left + nudge) @ best.right)


def test_at_full_rank_a_factorization_is_the_matrix(product: Product) -> None:
    factors = factorized(product.weight, 96, product.statistics)
    torch.testing.assert_close(factors.left @ factors.right, product.weight, atol=1e-4, rtol=1e-3)
