"""Runs the workloads on our cluster and on each peer in turn, round by round, and makes rows of the medians.

A peer is loaded once for each model and is stopped between its turns. Our cluster is started for each turn and ended
after it, because an idle one still uses the CPU. A peer that was not given, does not start, dies or answers wrongly is
in no figure, and its name and the reason are in every row of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.peers import ours
from bench.peers.models import MODELS, PeerModel, directory_of, full_model, write_gguf
from bench.peers.ours import OurCluster, OurOptions, our_cluster
from bench.peers.peer_side import PeerOptions
from bench.peers.processes import LLAMA_CPP, PEERS, PeerFailed, PeerSpec, RunningPeer, peer
from bench.peers.step_profile import StepProfile, engine_alone
from bench.peers.table import ratio_to_best
from bench.peers.workload import QUANTITIES, Call, Completion, calls_of, figures_of, prompt_call, step_call, warm_up
from bench.rows import Measurement

_MAX_NUM_SEQS = 16  # the largest batch
_PEER_DTYPE = "bfloat16"
_NUM_FIRST_TOKENS = 4
_NUM_TURNS = 6  # of the cluster and of its engine alone, in each round

Run = Callable[[Call], Sequence[Completion]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What is compared, and how."""

    interpreters: Mapping[str, str]  # of the peers that are there, by name
    folder: Path  # models and what peers make of them are kept here
    models: Sequence[str] = tuple(MODELS)
    num_rounds: int = 2
    ours: OurOptions = field(default_factory=lambda: OurOptions("bfloat16", 2))
    specs: Mapping[str, PeerSpec] = field(default_factory=lambda: PEERS)


@dataclass(frozen=True, slots=True)
class Turn:
    """What our cluster takes for a prompt and for a token of one stream, and its engine alone right after it."""

    ttft_ms: float  # at the client
    token_ms: float
    step_ms: float
    alone: StepProfile


@dataclass(slots=True)
class ModelResults:
    """Of one model; figures by engine and quantity, one of each round."""

    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    about: dict[str, dict[str, str]] = field(default_factory=dict)
    first_tokens: dict[str, list[int]] = field(default_factory=dict)  # of one prompt: engines can be compared
    not_measured: dict[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)

    def add_turn(self, engine: str, run: Run, model: PeerModel, vocab_size: int, number: int) -> None:
        """Run all workloads of a round."""
        for workload in model.workloads:
            answers = _run_all(run, calls_of(workload, vocab_size, number))
            self.first_tokens.setdefault(engine, list(answers[0][0].token_ids[:_NUM_FIRST_TOKENS]))
            for quantity, figure in figures_of(workload, answers).items():
                self.figures.setdefault(engine, {}).setdefault(quantity, []).append(figure)

    def drop(self, engine: str, reason: str) -> None:
        """The engine is not measured after all."""
        self.figures.pop(engine, None)
        self.not_measured[engine] = reason


def measure_peers(comparison: Comparison) -> list[Measurement]:
    """All rows of all models."""
    rows: list[Measurement] = []
    for name in comparison.models:
        model = MODELS[name]
        directory = directory_of(model, comparison.folder)
        results = _measure_model(comparison, model, directory)
        for engine, reason in results.not_measured.items():
            _say(f"{name}: not measured: {engine}: {reason}")
        rows += _rows(comparison, model, results)
        if "single" in model.workloads:
            rows += _cluster_rows(comparison, model, results.turns)
    return rows


def _measure_model(comparison: Comparison, model: PeerModel, directory: Path) -> ModelResults:
    vocab_size = int(json.loads((directory / "config.json").read_text())["vocab_size"])
    results = ModelResults()
    results.about[ours.NAME] = {"dtype": comparison.ours.dtype}
    if comparison.ours.settings:
        results.about[ours.NAME]["settings"] = " ".join(comparison.ours.settings)
    with ExitStack() as stack:
        running = _load_peers(comparison, model, directory, warm_up(vocab_size), results, stack)
        for number in range(comparison.num_rounds):
            with our_cluster(directory, comparison.ours) as cluster:
                _run_all(cluster.run, warm_up(vocab_size))
                results.add_turn(ours.NAME, cluster.run, model, vocab_size, number)
                if "single" in model.workloads:
                    seeds = range(number * _NUM_TURNS, (number + 1) * _NUM_TURNS)
                    results.turns += _turns(cluster, directory, comparison.ours, vocab_size, seeds)
            _say_turn(model, number, ours.NAME, results)
            for name, one in list(running.items()):
                try:
                    with one.turn():
                        results.add_turn(name, one.run, model, vocab_size, number)
                    _say_turn(model, number, name, results)
                except PeerFailed as error:
                    results.drop(name, f"in round {number + 1}: {error}")
                    del running[name]
    return results


def _load_peers(
    comparison: Comparison,
    model: PeerModel,
    directory: Path,
    warm_up_calls: Sequence[Call],
    results: ModelResults,
    stack: ExitStack,
) -> dict[str, RunningPeer]:
    """Those that start, ready for their first turn; the others are noted in the results."""
    running: dict[str, RunningPeer] = {}
    for name, spec in comparison.specs.items():
        if name not in comparison.interpreters:
            results.not_measured[name] = "not given"
            continue
        _say(f"{model.name}: loading {name}")
        try:
            options = _peer_options(comparison, model, name, directory)
            one = stack.enter_context(peer(spec, comparison.interpreters[name], options))
            with one.turn():
                _run_all(one.run, warm_up_calls)
        except (PeerFailed, OSError) as error:
            results.not_measured[name] = str(error)
        else:
            running[name], results.about[name] = one, one.about
    return running


def _peer_options(comparison: Comparison, model: PeerModel, name: str, directory: Path) -> PeerOptions:
    work = comparison.folder / model.name / name
    work.mkdir(parents=True, exist_ok=True)
    if model.precision:
        directory = directory_of(full_model(model), comparison.folder)
    if name == LLAMA_CPP:
        write_gguf(model, comparison.folder, work)
    threads = comparison.ours.num_threads
    return PeerOptions(str(directory), str(work), _PEER_DTYPE, threads, _MAX_NUM_SEQS, model.precision)


def _run_all(run: Run, calls: Sequence[Call]) -> list[Sequence[Completion]]:
    return [run(call) for call in calls]


def _turns(
    cluster: OurCluster, directory: Path, options: OurOptions, vocab_size: int, seeds: Sequence[int]
) -> list[Turn]:
    """Neither has work while it is the other's turn. The idle cluster is not stopped: what it costs is in both."""
    turns = []
    with engine_alone(directory, options) as measure:
        for seed in seeds:
            (prompt,) = cluster.run(prompt_call(vocab_size, seed))
            before_s, num_before = cluster.step_seconds()
            (one,) = cluster.run(step_call(vocab_size, seed))
            after_s, num_after = cluster.step_seconds()
            step_ms = 1000 * (after_s - before_s) / (num_after - num_before)
            token_ms = 1000 * (one.end_s - one.first_s) / (len(one.token_ids) - 1)
            turns.append(Turn(1000 * prompt.first_s, token_ms, step_ms, measure(seed)))
    return turns


# ---- rows


def _rows(comparison: Comparison, model: PeerModel, results: ModelResults) -> list[Measurement]:
    """One of each engine and quantity; beside ours those of the peers, then its ratio to the best of them."""
    rows = []
    for name, quantity in QUANTITIES.items():
        measured = {engine: found[name] for engine, found in results.figures.items() if name in found}
        peers = {engine: median(runs) for engine, runs in measured.items() if engine != ours.NAME}
        for engine, runs in measured.items():
            setting: dict[str, object] = {
                "model": model.name,
                "engine": engine,
                "threads": comparison.ours.num_threads,
                "first_tokens": results.first_tokens[engine],
                **results.about[engine],
            }
            if engine != ours.NAME:
                rows.append(Measurement(f"peers.{name}", quantity.unit, runs, setting))
                continue
            setting["not_measured"] = dict(results.not_measured)
            rows.append(Measurement(f"peers.{name}", quantity.unit, runs, setting, peers))
            if peers:
                ratio = ratio_to_best(quantity, median(runs), list(peers.values()))
                rows.append(Measurement(f"peers.{name}.ratio", "of the best peer", [ratio], setting))
    return rows


def _cluster_rows(comparison: Comparison, model: PeerModel, turns: Sequence[Turn]) -> list[Measurement]:
    """A token of one stream in our cluster and its parts; and how much longer it and a prompt take than alone."""
    alone = [turn.alone for turn in turns]
    token_ms = median(turn.token_ms for turn in turns)
    parts = {
        "sampling": median(one.sampling_ms for one in alone),
        "scheduling": median(one.scheduling_ms for one in alone),
        "slower_in_cluster": median(turn.step_ms - turn.alone.mean_step_ms for turn in turns),
        "transport": median(turn.token_ms - turn.step_ms for turn in turns),
    }
    parts = {"model": token_ms - sum(parts.values()), **parts}
    setting: dict[str, object] = {
        "model": model.name,
        "engine": ours.NAME,
        "threads": comparison.ours.num_threads,
        "dtype": comparison.ours.dtype,
        "operation_shares": alone[-1].operation_shares,
    }
    tokens = [turn.token_ms / turn.alone.mean_step_ms for turn in turns]
    prompts = [turn.ttft_ms / turn.alone.ttft_ms for turn in turns]
    return [
        Measurement("peers.decode_step", "ms", [turn.token_ms for turn in turns], setting, parts),
        Measurement("peers.token_in_cluster", "of the engine alone", tokens, setting),
        Measurement("peers.ttft_in_cluster", "of the engine alone", prompts, setting),
    ]


def _say_turn(model: PeerModel, number: int, engine: str, results: ModelResults) -> None:
    latest = ", ".join(
        f"{name} {runs[-1]:.4g} {QUANTITIES[name].unit}" for name, runs in results.figures[engine].items()
    )
    _say(f"{model.name}, round {number + 1}: {engine}: {latest}")


def _say(line: str) -> None:
    print(line, flush=True)
