"""Adapters that are trained on a base in 4 bits: peft and our own reader agree on what was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from checkpoint.adapters.directory import read_adapter
from checkpoint.tensors import weights_digest
from tests.quant.served import FIXTURES, oracle
from training import train
from training.qlora import __main__ as command
from training.qlora import run
from training.qlora.adapter import TARGETS, LoraOptions, write
from training.qlora.data import Rows
from training.qlora.model import AdaptedModel, open_model
from training.qlora.nf4 import encoded, quantized

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose head is its own (Llama, with scaled rotation), or tied (Qwen 3)."""
    torch.manual_seed(3)
    if request.param == "llama":
        config = LlamaConfig(**SIZES, rope_parameters=SCALED, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    directory = tmp_path_factory.mktemp(request.param)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def _rows() -> Rows:
    """Token ids that count upwards: what an adapter learns at once."""
    rows = torch.stack([torch.arange(start, start + 33) % 90 + 1 for start in range(24)])
    return Rows(rows[:20], rows[20:])


def _plan(num_steps: int = 30, options: LoraOptions | None = None) -> run.Plan:
    return run.Plan(options or LoraOptions(rank=4, alpha=8.0), num_steps, batch_rows=4, lr=0.01, seed=5)


def _trained(base: Path, plan: run.Plan, checkpoint: Path) -> tuple[AdaptedModel, run.Training]:
    model = open_model(base, plan.options, is_quantized=True, seed=plan.seed)
    training = run.Training(plan, model, _rows(), weights_digest(base))
    if checkpoint.exists():
        training.resume(checkpoint)
    training.run(checkpoint)
    return model, training


def test_the_base_as_it_is_computes_what_transformers_does(base: Path) -> None:
    ids = torch.randint(96, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(open_model(base, None, is_quantized=False)(ids), expected, rtol=1e-4, atol=1e-4)


def test_matrices_are_rounded_as_bitsandbytes_rounds_them() -> None:
    """What bitsandbytes rounded once stays as it is, within what double quantization may move its scales."""
    for name, matrix in oracle("bnb-nf4-double").items():
        if name.startswith("dequantized."):
            again = quantized(name, matrix.float()).dense(torch.float32)
            assert (again - matrix).norm() / matrix.norm() < 0.01
            assert ((again == 0) == (matrix == 0)).all()


def test_the_table_of_scales_is_that_of_bitsandbytes() -> None:
    from safetensors import safe_open

    with safe_open(FIXTURES / "bnb-nf4-double" / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.endswith("nested_quant_map")]  # noqa: SIM118  # no mapping
        assert names
        for name in names:
            made = encoded("m", torch.randn(4, 64))["m.weight.nested_quant_map"]
            assert torch.equal(made, file.get_tensor(name))


def test_a_matrix_in_4_bits_is_near_the_plain_one() -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(2))
    error = (quantized("m", weight).dense(torch.float32) - weight).norm() / weight.norm()
    assert 0.05 < error < 0.12


def test_the_loss_falls_and_only_the_adapter_changes(base: Path, tmp_path: Path) -> None:
    before = open_model(base, None, is_quantized=True)
    digest = weights_digest(base)
    model, training = _trained(base, _plan(), tmp_path / "state.pt")
    losses = [row["loss_nats"] for row in training.history]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert run.perplexity(model, _rows().held_out) < 0.8 * run.perplexity(before, _rows().held_out)
    assert weights_digest(base) == digest
    assert len(model.pairs) == 2 * len(TARGETS)
    named = [name for name, _ in model.named_parameters()]
    assert all(name.endswith((".pair.lora_A", ".pair.lora_B")) for name in named)
    assert len(named) == 4 * len(TARGETS)
    ids = _rows().held_out[:, :-1]
    for pair in model.pairs.values():  # without the adapter it is the base that it was
        torch.nn.init.zeros_(pair.lora_B)
    assert torch.equal(model(ids), before(ids))


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")])
def test_peft_computes_what_was_trained(base: Path, targets: tuple[str, ...], tmp_path: Path) -> None:
    """On the plain base, unmerged in peft and merged here; and our own reader finds the same modules."""
    plan = _plan(8, LoraOptions(rank=3, alpha=7.0, targets=targets))
    model, _ = _trained(base, plan, tmp_path / "state.pt")
    model.round_adapter()
    write(model.pairs, plan.options, str(base), tmp_path)
    plain = open_model(base, plan.options, is_quantized=False)
    plain.load_state_dict(model.state_dict())
    ids = _rows().held_out[:, :-1]
    with torch.no_grad():
        unmerged = plain(ids)
        plain.merge()
        merged = plain(ids)
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
        expected = theirs(ids).logits
        of_base = open_model(base, None, is_quantized=False)(ids)
    torch.testing.assert_close(unmerged, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (merged - of_base).abs().max() > 0.05
    adapter = read_adapter(tmp_path)
    assert {module.name for module in adapter.modules} == set(model.pairs)
    assert {(module.rank, module.scale) for module in adapter.modules} == {(3, 7 / 3)}


def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, training = _trained(base, _plan(14), tmp_path / "whole.pt")
    draw = run.batch_of

    def stop(rows: torch.Tensor, plan: run.Plan, step: int) -> torch.Tensor:
        if step == 13:
            raise KeyboardInterrupt
        return draw(rows, plan, step)

    with monkeypatch.context() as patch:
        patch.setattr(run, "batch_of", stop)
        with pytest.raises(KeyboardInterrupt):
            _trained(base, _plan(14), tmp_path / "cut.pt")
    resumed, again = _trained(base, _plan(14), tmp_path / "cut.pt")
    assert again.history == training.history
    for name, one in resumed.state_dict().items():
        assert torch.equal(one, whole.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_refused(base: Path, tmp_path: Path) -> None:
    _trained(base, _plan(2), tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"--checkpoint: .* was begun with another plan"):
        _trained(base, _plan(3), tmp_path / "state.pt")
    (tmp_path / "state.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"--checkpoint: .* not a checkpoint of this command"):
        _trained(base, _plan(2), tmp_path / "state.pt")


def test_the_command_writes_an_adapter_of_the_packaged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Perplexities as it prints them; the same command after a stop has nothing left to train."""
    text, out = tmp_path / "text.py", tmp_path / "adapter"
    text.write_text("".join(f'def count_{i}(x):\n    """Count."""\n    return x + {i}\n\n\n' for i in range(60)))
    arguments = [str(train.MODELS / "demo"), str(text), "--held-out", str(text), "--out", str(out), "--rank", "2",
                 "--steps", "6", "--batch", "2", "--length", "64"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["qlora", *arguments])
    assert command.main() == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "training_history.json").read_text())
    assert len(report["history"]) == 6
    measured = report["held_out"]
    assert f"with_adapter_plain: {measured['with_adapter_plain']:.3f}" in printed
    assert measured["with_adapter_plain"] < measured["base_plain"]
    assert measured["with_adapter_nf4"] < measured["base_nf4"]
    assert measured["base_plain"] < measured["base_nf4"]
    assert {module.rank for module in read_adapter(out).modules} == {2}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["./no-such-model", "{text}"], "./no-such-model: no such model directory"),
        (["{demo}", "{text}", "--rank", "0"], "--rank: '0' is not a positive whole number"),
        (["{demo}", "{text}", "--rank", "1000"], "--rank: 1000 is more than 512"),
        (["{demo}", "{text}", "--alpha", "nan"], "--alpha: 'nan' is not a number above 0"),
        (["{demo}", "{text}", "--targets", "lm_head"], "--targets: invalid choice: 'lm_head'"),
        (["{demo}", "{text}", "--lr", "-1"], "--lr: '-1' is not a number above 0"),
        (["{demo}", "{text}", "--length", "4096"], "--length: 4096 is more than the model's 2048 positions"),
        (["{demo}", "{text}", "--length", "512"], "texts: 4 tokens are less than a row of --length 512"),
        (["{demo}", "no-such-text"], "texts: no-such-text: No such file or directory"),
        (["{demo}", "{text}", "--held-out", "{binary}"], "not a text in UTF-8"),
        (["{fixture}", "{text}"], "quantization_config: it is compressed already"),
    ],
)
def test_bad_input_is_named_in_one_line(
    arguments: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text").write_text("a = 1")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    known = {
        "text": tmp_path / "text",
        "binary": tmp_path / "binary",
        "demo": train.MODELS / "demo",
        "fixture": FIXTURES / "bnb-nf4",
    }
    filled = [argument.format(**known) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["qlora", *filled, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint in said
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qlora", "demo", "text", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        command.main()
    assert f"--out: {tmp_path} is there already" in capsys.readouterr().err
