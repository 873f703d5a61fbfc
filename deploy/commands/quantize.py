"""`switchyard quantize`: makes a smaller checkpoint of a checkpoint, or says what it would cost."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.errors import ConfigError, StartError, one_line
from deploy.progress import deliver

if TYPE_CHECKING:
    from compress.calibration.blocks import TokenBlocks
    from compress.job import PlainModel
    from compress.recipe import Recipe
    from compress.selection.mixed import MixedRecipe

DEQUANTIZE = "dequantize"


@click.command()
@click.argument("model_dir", metavar="MODEL")
@click.option("--out", metavar="DIR", help="Where the compressed model goes; DIR.partial holds it until it is whole.")
@click.option("--method", default="", metavar="NAME", help="How weights are changed. Default: gptq; rtn for gguf.")
@click.option("--scheme", default="", metavar="NAME", help="What is stored. Default: what the method is known for.")
@click.option(
    "--format", "file_format", default="", metavar="NAME", help="Default: compressed-tensors; gguf is one file."
)
@click.option("--group-size", type=int, default=64, show_default=True, metavar="N", help="0: a scale for each row.")
@click.option(
    "--act-order",
    type=click.Choice(["none", "static", "permuted"]),
    default="static",
    show_default=True,
    help="In which order GPTQ takes columns.",
)
@click.option("--search-range", is_flag=True, help="Try smaller ranges than each group's extremes.")
@click.option("--sparsity", default="2:4", show_default=True, metavar="N:M_OR_SHARE", help="What pruning leaves.")
@click.option("--kv-scales", is_flag=True, help="Also store scales for an fp8 KV cache.")
@click.option("--kv-channels", is_flag=True, help="Also learn channels' scales and shifts for a wkv4 KV cache.")
@click.option("--keep", "kept", multiple=True, metavar="REGEX", help="Matrices that stay as they are.")
@click.option("--budget", default="", metavar="BYTES", help="Of all weights: each product gets one of --schemes.")
@click.option(
    "--schemes",
    default="w4a16:64,w4a16:32,w8a16:64,plain",
    show_default=True,
    metavar="LIST",
    help="With --budget: names, and group sizes behind a colon.",
)
@click.option("--calibration", default="self", show_default=True, metavar="FILE", help="Text, .json or .npy of ids.")
@click.option("--held-out", default="", metavar="FILE", help="Default: every fourth block of the calibration.")
@click.option("--block-tokens", type=click.IntRange(2), default=512, show_default=True, metavar="N")
@click.option("--blocks", "num_blocks", type=click.IntRange(1), default=128, show_default=True, metavar="N")
@click.option("--held-out-blocks", type=click.IntRange(1), default=40, show_default=True, metavar="N")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the model's own samples.")
@click.option("--device", default="cpu", show_default=True, metavar="NAME")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--plan", "is_plan", is_flag=True, help="Say what each scheme would cost, and stop.")
@click.option("--gpu", default="h200", show_default=True, metavar="NAME", help="For --plan.")
@click.option("--sequences", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="For --plan.")
@click.option("--context", type=click.IntRange(1), default=2048, show_default=True, metavar="N", help="For --plan.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def quantize(model_dir: str, out: str | None, is_plan: bool, as_json: bool, **options: object) -> int:
    """Compress the model in a directory, one layer at a time; a run that was cut off goes on where it was."""
    from compress.errors import CompressError, DiskError

    try:
        if is_plan:
            return _print_plan(model_dir, as_json, options)
        if out is None:
            raise ConfigError("--out: where the compressed model goes must be given")
        if options["method"] == DEQUANTIZE:
            return _dequantize(model_dir, Path(out), options)
        return _compress(model_dir, Path(out), as_json, options)
    except DiskError as error:
        raise StartError(one_line(error)) from None
    except CompressError as error:
        raise ConfigError(one_line(error)) from None
    except MemoryError:
        raise StartError(f"{model_dir}: not enough memory for a layer; give fewer --blocks") from None


def _print_plan(model_dir: str, as_json: bool, options: dict[str, object]) -> int:
    from compress.errors import CompressError
    from compress.plan import Workload, gpu_named, plan
    from workers.errors import ModelError
    from workers.model.registry import load_config

    gpu, load = gpu_named(str(options["gpu"])), Workload(_int(options, "sequences"), _int(options, "context"))
    try:
        rows = plan(load_config(model_dir), gpu, load, _int(options, "group_size"))
    except ModelError as error:
        raise CompressError(str(error)) from None
    if as_json:
        deliver(json.dumps([dataclasses.asdict(row) for row in rows]) + "\n", sys.stdout)
        return 0
    lines = [
        f"{'scheme':<12}{'bits/weight':>12}{'weights':>12}{'read a step':>14}{'tokens/s':>12}  on {options['gpu']}"
    ]
    for row in rows:
        if row.problem:
            lines.append(f"{row.scheme:<12}  not possible: {row.problem}")
            continue
        sizes = f"{row.bits_per_weight:>12.3f}{row.weight_bytes / 1e9:>9.3f} GB{row.step_bytes / 1e9:>11.3f} GB"
        lines.append(f"{row.scheme:<12}{sizes}{row.tokens_per_s:>12.0f}" + ("" if row.fits else "  does not fit"))
    lines.append("at most: memory and arithmetic at their peaks, nothing else")
    deliver("\n".join(lines) + "\n", sys.stdout)
    return 0


def _dequantize(model_dir: str, out: Path, options: dict[str, object]) -> int:
    import torch

    from compress.dequantized import dequantize_model
    from workers.config import resolve_model
    from workers.errors import ModelError

    if out.exists():
        raise ConfigError(f"{out}: is there already")
    dtype = torch.bfloat16 if options["dtype"] == "bfloat16" else torch.float32
    try:
        directory = resolve_model(model_dir)
    except ModelError as error:
        raise ConfigError(str(error)) from None
    num_bytes = dequantize_model(directory, out, dtype, lambda done: None)
    deliver(f"{out}: {num_bytes / 1e6:.1f} MB in {options['dtype']}\n", sys.stdout)
    return 0


def _compress(model_dir: str, out: Path, as_json: bool, options: dict[str, object]) -> int:
    from compress.job import open_model
    from compress.request import OWN_SAMPLES, Request, TokenRequest, blocks_for, recipe_for

    asked: dict[str, Any] = {
        key: options[key] for key in ("method", "scheme", "group_size", "act_order", "sparsity", "kept", "file_format")
    }
    recipe = recipe_for(
        Request(
            **asked,
            searches_range=bool(options["search_range"]),
            has_kv_scales=bool(options["kv_scales"]),
            has_kv_channels=bool(options["kv_channels"]),
        )
    )
    if out.exists():
        raise ConfigError(f"{out}: is there already")
    if recipe.file_format == "gguf" and options["budget"]:
        raise ConfigError("--budget: a GGUF's mixture chooses the types")
    model = open_model(Path(model_dir), str(options["device"]), str(options["dtype"]))
    calibration, held_out = str(options["calibration"]), str(options["held_out"])
    if calibration == OWN_SAMPLES and held_out and not (recipe.needs_calibration or options["budget"]):
        calibration = ""
    tokens = TokenRequest(
        calibration,
        held_out,
        _int(options, "block_tokens"),
        _int(options, "num_blocks"),
        _int(options, "held_out_blocks"),
        _int(options, "seed"),
    )
    with _bar(model, "sampled", tokens.block_tokens if calibration == OWN_SAMPLES else 0) as bar:
        blocks = blocks_for(model, tokens, lambda done: bar.update(done - bar.n))
    chosen = _mix(model, recipe, blocks, str(options["budget"]), str(options["schemes"]))
    return _run(model, chosen, blocks, out, as_json)


def _mix(model: PlainModel, recipe: Recipe, blocks: TokenBlocks, budget: str, schemes: str) -> MixedRecipe:
    """Measure each product under each scheme, where there is a budget."""
    from compress.request import parse_bytes
    from compress.schemes import scheme_labelled
    from compress.selection.mixed import MixedRecipe, measure, mixed_recipe

    if not budget:
        return MixedRecipe(recipe, None)
    budget_bytes, tried = parse_bytes(budget), [scheme_labelled(label) for label in schemes.split(",")]
    with _bar(model, "measured") as bar:
        items = measure(model, recipe, tried, blocks, lambda done: bar.update(done - bar.n))
    return mixed_recipe(model, recipe, items, budget_bytes)


def _run(model: PlainModel, chosen: MixedRecipe, blocks: TokenBlocks, out: Path, as_json: bool) -> int:
    from compress.job import compress_model
    from compress.report import as_json as report_json

    with _bar(model, "layers") as bar:
        predicted = chosen.predicted_kl_nats
        report = compress_model(model, chosen.recipe, blocks, out, lambda done: bar.update(done - bar.n), predicted)
    if report.warning:
        click.echo(f"warning: {report.warning}", err=True)
    text = report_json(report) if as_json else f"{out}: {report.summary()}, {report.took_s:.0f} s\n"
    deliver(text, sys.stdout)
    return 0


def _bar(model: PlainModel, what: str, num_tokens: int | None = None) -> Any:
    """Of layers; or of tokens: 0 of them is no bar."""
    from tqdm import tqdm

    total, unit = (model.config.num_hidden_layers, "layer") if num_tokens is None else (num_tokens, "token")
    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=total == 0)


def _int(options: dict[str, object], name: str) -> int:
    value = options[name]
    assert isinstance(value, int)
    return value
