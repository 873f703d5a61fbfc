"""The `switchyard` command. Exit codes: 0 done, 1 failed, 2 bad usage or config; a failure is one line on stderr.

Turns options into calls and results into text or JSON. Knows nothing of how clusters are made.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

import click

from deploy.commands.autoscaler import autoscaler
from deploy.commands.models import models
from deploy.commands.quantize import quantize
from deploy.commands.router import router
from deploy.commands.scale import scale
from deploy.commands.status import status
from deploy.errors import ConfigError, DeployError, StartError, one_line
from deploy.processes.front import run_behind_front
from deploy.processes.interrupts import Interrupts
from deploy.progress import Steps, deliver, open_closed_streams, own_stdout, say

if TYPE_CHECKING:
    from deploy.cluster import Cluster

SAMPLE_PROMPT = "def fibonacci(n):"
_SAMPLE_TOKENS = 64
_CALLERS_FAULT = ("INVALID_ARGUMENT", "NOT_FOUND")


def _check_targets(context: click.Context, option: click.Parameter, value: Any) -> Any:
    """Refuse what cannot be dialled: gRPC would resolve and try it for a minute."""
    from kvstore.network.addresses import split_host_port

    for target in (value,) if isinstance(value, str) else value:
        try:
            is_right = split_host_port(target)[1] > 0
        except ValueError:
            is_right = False
        if not is_right:
            raise ConfigError(f"--target: must be HOST:PORT, not {target[:100]!r}")
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=False)
@click.version_option(package_name="switchyard")
def cli() -> None:
    """Distributed serving of large language models."""


@cli.command()
@click.option("--config", "config_path", metavar="FILE", help="YAML of the whole cluster.")
@click.option(
    "--model", metavar="MODEL", help="Model directory, GGUF file, smollm2 or Hub id. Default: the demo model."
)
@click.option("--prefill", type=int, metavar="N", help="Prefill workers.")
@click.option("--decode", type=int, metavar="N", help="Decode workers.")
@click.option("--mixed", type=int, metavar="N", help="Workers that do both; alone, instead of the default pair.")
@click.option("--routers", type=int, metavar="N", help="Router processes; each next one has the next higher ports.")
@click.option("--tp", type=int, metavar="N", help="Tensor-parallel ranks, in every pool.")
@click.option("--pp", type=int, metavar="N", help="Pipeline stages, in every pool.")
@click.option("--set", "assignments", multiple=True, metavar="A.B=C", help="Set any key of the configuration.")
@click.option("--grpc-port", type=int, metavar="P", help="Default: 50051.")
@click.option("--http-port", type=int, metavar="P", help="Default: 8000.")
@click.option(
    "--speculative-config",
    metavar="JSON",
    help="Speculative decoding: the keys of the branch `speculative`, such as "
    '\'{"method": "suffix", "num_speculative_tokens": 8}\'.',
)
@click.option("--enable-lora", is_flag=True, default=None, help="Take requests with LoRA adapters.")
@click.option(
    "--lora-modules",
    multiple=True,
    metavar="NAME=PATH",
    help="An adapter to serve under a name; again for each further one. Needs --enable-lora.",
)
@click.option("--lora-root", metavar="DIR", help="Where adapters may be loaded from while the cluster runs.")
@click.option("--max-loras", type=int, metavar="N", help="Adapters on a worker's device at a time.")
@click.option("--max-lora-rank", type=int, metavar="N", help="Largest rank of an adapter.")
@click.option("--max-cpu-loras", type=int, metavar="N", help="Adapters in a worker's host memory.")
@click.option("--once", metavar="PROMPT", help="Answer this prompt, print the answer and its timings, exit.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def serve(config_path: str | None, assignments: tuple[str, ...], once: str | None, as_json: bool, **flags: Any) -> int:
    """Start a cluster on this machine, or on a Ray cluster; Ctrl-C stops what was started."""
    from deploy.overrides import ServeFlags, load_with_flags

    if once is not None and not once:
        raise ConfigError("--once: the prompt must not be empty")
    _check_current_folder()
    config = load_with_flags(config_path, ServeFlags(**flags), assignments)
    from deploy.cluster import Cluster

    with own_stdout() as out:
        steps = Steps()
        _run_cluster(Cluster(config, steps), steps, once, as_json, out)
    return 0


@cli.command()
def schema() -> int:
    """Print the JSON schema of the configuration."""
    from deploy.config import ClusterConfig
    from settings.docs import json_schema

    deliver(json.dumps(json_schema(ClusterConfig), indent=2) + "\n", stream=sys.stdout)
    return 0


@cli.command()
@click.option(
    "--target",
    "targets",
    multiple=True,
    default=["127.0.0.1:50051"],
    metavar="HOST:PORT",
    show_default=True,
    callback=_check_targets,
    help="A router's gRPC address; of several, the next one goes on with a stream whose router dies.",
)
@click.option("--prompt", required=True, metavar="TEXT", help="What to continue.")
@click.option("--model", default="", metavar="NAME", help="An adapter of the model. Default: the model itself.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 2**63 - 1),
    metavar="N",
    help="Most tokens to generate. Default: up to the context length.",
)
@click.option("--temperature", type=float, metavar="T", help="0 is greedy. Default: the model's.")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**64 - 1),
    metavar="S",
    help="Makes sampling repeatable. Default: the router draws one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def generate(
    targets: tuple[str, ...],
    prompt: str,
    model: str,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    as_json: bool,
) -> int:
    """Stream one completion from a running cluster."""
    from switchyard_client import GenerationRequest, SamplingParams

    from deploy.completion import summary

    sampling = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=seed)
    write = functools.partial(deliver, stream=sys.stdout)
    request = GenerationRequest(prompt, sampling, model)
    completion = _complete(targets, request, None if as_json else write)
    if as_json:
        write(json.dumps(_plain(completion)) + "\n")
    else:
        click.echo("\n" + "\n".join(summary(completion)), err=True)
    return 0


@cli.command()
@click.option(
    "--target",
    default="127.0.0.1:50051",
    metavar="HOST:PORT",
    show_default=True,
    callback=_check_targets,
    help="A router's gRPC address.",
)
@click.option("--trace", metavar="FILE", help="Requests to play: .csv (Azure) or .jsonl (Mooncake).")
@click.option("--synthetic", metavar="SPEC", help="Made-up ones, such as requests=32,prompt=128,output=64,rate=4.")
@click.option("--concurrency", type=click.IntRange(min=1), default=32, show_default=True, help="Most at a time.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N requests.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def bench(
    target: str, trace: str | None, synthetic: str | None, concurrency: int, limit: int | None, as_json: bool
) -> int:
    """Play requests against a running cluster and report what its clients feel."""
    import asyncio
    from pathlib import Path

    from switchyard_client import GenerationError

    from bench.loadgen import play
    from planner.trace import TraceError, load_trace, synthetic_trace

    if trace is not None and synthetic is not None:
        raise ConfigError("--trace and --synthetic exclude each other")
    try:
        requests = load_trace(Path(trace)) if trace is not None else synthetic_trace(synthetic or "")
        report = asyncio.run(play(target, requests[:limit], concurrency))
    except TraceError as error:
        raise ConfigError(str(error)) from None
    except GenerationError as error:
        raise StartError(one_line(error)) from None
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(report)))
    else:
        click.echo("\n".join(report.lines()))
    return 1 if report.num_failed else 0


for command in (status, router, autoscaler, scale, models, quantize):
    cli.add_command(command)


def _run_cluster(cluster: Cluster, steps: Steps, once: str | None, as_json: bool, out: TextIO) -> None:
    """Start it, show a completion, stay unless `once`, and end what was started."""
    from deploy.processes.routers import target_of

    interrupts = Interrupts(cluster.end_at_once)
    steps.before_step = interrupts.check
    is_up = keep_logs = False
    try:
        began_s = time.monotonic()
        endpoints = cluster.start()
        interrupts.check()  # Ray has its own way with signals
        ready_s = time.monotonic() - began_s
        about = {"startup_s": ready_s, "endpoints": endpoints}
        write = functools.partial(say if once is None else deliver, stream=out)
        said = _sample([target_of(router) for router in endpoints.routers], once, about, as_json, write)
        is_up = once is None  # a reader of the last line may stop the cluster at once
        write(said)
        if once is None:
            _show_endpoints(endpoints, as_json, out)
            interrupts.check()
            threading.Event().wait()
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # Ray makes SystemExit of a signal while it starts
        if interrupts.was_asked and is_up:
            steps.note(cluster.stopping)
            return
        if interrupts.was_asked:
            raise StartError("interrupted") from None
        if isinstance(error, StartError) and cluster.run_dir.exists():
            keep_logs = True
            raise StartError(f"{error} (logs in {cluster.run_dir})") from error
        raise
    finally:
        interrupts.is_stopping = True
        interrupts.install()
        cluster.stop(keep_logs)
        interrupts.restore()


def _check_current_folder() -> None:
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the current folder cannot be used: {error.strerror}; start from another one") from None


# ---- what is shown


def _complete(targets: Sequence[str], request: Any, write: Callable[[str], None] | None) -> Any:
    from switchyard_client import GenerationError

    from deploy.completion import complete

    def on_text(text: str) -> None:
        if write is not None:
            write(text)

    try:
        return complete(targets, request, on_text)
    except GenerationError as error:
        kind = ConfigError if error.status in _CALLERS_FAULT else StartError
        raise kind(one_line(error)) from None


def _sample(
    targets: Sequence[str], once: str | None, about: dict[str, Any], as_json: bool, write: Callable[[str], None]
) -> str:
    """One completion: the answer of `--once`, or a sign of life. Shows it as it comes; returns what is left to say."""
    from switchyard_client import GenerationRequest, SamplingParams

    from deploy.completion import summary

    prompt = SAMPLE_PROMPT if once is None else once
    if not as_json:
        write(f"\n{prompt}")
    sampling = SamplingParams(temperature=0.0, max_tokens=_SAMPLE_TOKENS)
    completion = _complete(targets, GenerationRequest(prompt, sampling), None if as_json else write)
    if as_json:
        return json.dumps({**_plain(completion), **_plain(about)}) + "\n"
    lines = [*summary(completion), f"ready after           {about['startup_s']:.1f} s"]
    return "\n\n" + "\n".join(lines) + "\n"


def _show_endpoints(endpoints: Any, as_json: bool, out: TextIO) -> None:
    """Where everything is."""
    if as_json:
        return
    lines = [""]
    for listening in endpoints.routers:
        lines += [f"gRPC       {listening.grpc}", f"HTTP       http://{listening.http}/v1"]
    if endpoints.dashboard:
        lines.append(f"Dashboard  {endpoints.dashboard}/#/serve")
    lines += [f"Metrics    {endpoints.metrics}", f"Ray        {endpoints.ray_address}", "Ctrl-C stops the cluster."]
    say("\n".join(lines) + "\n", out)


def _plain(value: Any) -> Any:
    """Dataclasses as mappings; what `stats` holds stands beside the rest."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        merged = {key: _plain(item) for key, item in value.items() if key != "stats"}
        return {**value.get("stats", {}), **merged}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


# ---- ends


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit code."""
    for argument in arguments:
        if not _is_text(argument):  # Ray notes the command line, and its start would hang on one that is no text
            return _fail(f"{argument!a}: not text in this locale's encoding, {sys.getfilesystemencoding()}", 2)
    try:
        return cli.main(list(arguments), prog_name="switchyard", standalone_mode=False) or 0
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except DeployError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 1)
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is not installed; pip install 'switchyard[cluster]' brings what this needs", 1)
    except Exception as error:  # a bug: say where, still in one line
        where = traceback.extract_tb(error.__traceback__)[-1]
        return _fail(f"{type(error).__name__}: {one_line(error)} ({where.filename}:{where.lineno})", 1)


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:  # bytes that could not be decoded stand in it as surrogates
        return False
    return True


def _fail(message: str, code: int) -> int:
    say(f"switchyard: {' '.join(message.split())}\n", sys.stderr)
    return code


def main() -> None:
    """The entry point. A cluster is run in a child, which no signal to our process group reaches."""
    open_closed_streams()
    arguments = sys.argv[1:]
    is_serve = arguments[:1] == ["serve"]
    sys.exit(run_behind_front(lambda: run(arguments)) if is_serve else run(arguments))


if __name__ == "__main__":
    main()
