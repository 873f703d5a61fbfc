"""Training with rounded weights, on a tiny model: what is trained is what is served, and a run that was cut off goes
on as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.quant.served import dequantized, last_logits
from training import qat, train
from training.llama import Llama, Shape
from training.qat import QatPlan, QatTraining
from training.rounded import RoundedLinear, TernaryLinear, W4Linear
from training.rounded_export import export
from workers.model.registry import load_config
from workers.model.tensor_layout import check_checkpoint

TINY = Shape(96, 64, 128, 2, 4, 2, 16, 256)


@pytest.fixture(scope="module")
def teacher() -> Llama:
    torch.manual_seed(1)
    model = Llama(TINY)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    model.load_state_dict({name: p.to(torch.bfloat16).float() for name, p in model.state_dict().items()})
    return model


def _plan(kind: str, num_steps: int = 12) -> QatPlan:
    base = train.Plan(f"tiny-{kind}", TINY, num_steps, batch_tokens=256, short_tokens=64, cooldown_steps=0)
    if kind == "w4":
        return QatPlan(kind, base, lr=5e-4, trains_all=False, scale_lr=1e-4)
    return QatPlan(kind, base, lr=5e-3, trains_all=True)


def _streams() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(96, (3000,), generator=generator) for _ in range(2))
    return first, second


@pytest.fixture(scope="module", params=qat.KINDS)
def trained(request: pytest.FixtureRequest, teacher: Llama, tmp_path_factory: pytest.TempPathFactory) -> QatTraining:
    folder = tmp_path_factory.mktemp(request.param)
    return qat.run(_plan(request.param, 60), teacher, _streams(), folder / "state.pt")


def test_the_divergence_falls(trained: QatTraining) -> None:
    first, last = (sum(row["kl_nats"] for row in part) for part in (trained.history[:5], trained.history[-5:]))
    assert last < 0.85 * first
    assert [row["step"] for row in trained.history] == list(range(1, 61))


def test_what_is_served_is_what_was_trained(trained: QatTraining, tmp_path: Path) -> None:
    """Matrices bit for bit, read by the engine; logits of one pass of its own products."""
    out, model = tmp_path / "out", trained.model
    export(model, train.MODELS / "demo", out)
    config = load_config(out)
    check_checkpoint(out, config)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, RoundedLinear)}
    assert len(linears) == 14
    for name, module in linears.items():
        found = dequantized(out, f"model.{name}", tuple(module.weight.shape))
        assert torch.equal(found, module.rounded()), name
    ids = _streams()[0][:60]
    served = last_logits(out, torch.float32, ids, 60)
    with torch.no_grad():
        for parameter in model.parameters():  # the ends are stored in 16 bits
            if not any(parameter is module.weight for module in linears.values()):
                parameter.copy_(parameter.to(torch.bfloat16))
        expected = model(ids[None])[0]
    is_ternary = trained.plan.kind == "ternary"
    # An input between two of 8 bits' numbers may go to either.
    assert (served - expected).norm() / expected.norm() < (1e-2 if is_ternary else 1e-5)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == (
        "bitnet" if is_ternary else "compressed-tensors"
    )


def test_only_what_is_rounded_is_trained_in_4_bits(teacher: Llama, tmp_path: Path) -> None:
    training = qat.run(_plan("w4", 3), teacher, _streams(), tmp_path / "state.pt")
    assert torch.equal(training.model.embed_tokens.weight, teacher.embed_tokens.weight)
    changed = training.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(changed, teacher.layers[0].mlp.down_proj.weight)


def test_numbers_are_those_of_the_grid() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(4))
    four = W4Linear(weight)
    codes = four.rounded().unflatten(1, (-1, 64)) / four.scale.unsqueeze(-1)
    assert torch.equal(codes.round().unique(), torch.arange(-8.0, 8.0))
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    ternary = TernaryLinear(weight)
    assert torch.equal((ternary.rounded() / weight.abs().mean()).unique(), torch.tensor([-1.0, 0.0, 1.0]))


@pytest.mark.parametrize("make", [W4Linear, TernaryLinear])
def test_gradients_pass_a_rounding(make: type[RoundedLinear]) -> None:
    """Within the outer codes the gradient is that of a plain product; beyond them there is none."""
    module = make(torch.tensor([[0.3, -0.2, 0.05, 0.01] * 16] * 4))
    x = torch.rand(3, 64)
    module(x).sum().backward()
    gradient, plain = module.weight.grad, x.sum(0)
    assert gradient is not None
    is_within = gradient != 0
    assert bool(is_within.any())
    torch.testing.assert_close(gradient[is_within], plain.expand(4, 64)[is_within], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", qat.KINDS)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    kind: str, teacher: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = qat.run(_plan(kind), teacher, _streams(), tmp_path / "whole.pt")
    draw, plan = train.batch_at, _plan(kind)

    def stop(streams: tuple[torch.Tensor, torch.Tensor], base: train.Plan, step: int) -> torch.Tensor:
        if step == 11:
            raise KeyboardInterrupt
        return draw(streams, base, step)

    with monkeypatch.context() as patch:
        patch.setattr(train, "batch_at", stop)
        with pytest.raises(KeyboardInterrupt):
            qat.run(plan, teacher, _streams(), tmp_path / "cut.pt")
    resumed = qat.run(plan, teacher, _streams(), tmp_path / "cut.pt")
    assert resumed.history == whole.history
    for (name, one), (_, other) in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_checkpoint_of_another_plan_is_refused(teacher: Llama, tmp_path: Path) -> None:
    qat.run(_plan("w4", 2), teacher, _streams(), tmp_path / "state.pt")
    with pytest.raises(ValueError, match="was begun with other options"):
        qat.run(_plan("w4", 3), teacher, _streams(), tmp_path / "state.pt")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("w4", "--out", "."), "--out: . is there already"),
        (("w4", "--out", "x", "--steps", "0"), "--steps must be at least 1"),
        (("w3", "--out", "x"), "invalid choice: 'w3'"),
    ],
)
def test_bad_options_are_named(
    arguments: tuple[str, ...], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["qat", *arguments])
    with pytest.raises(SystemExit) as stopped:
        qat.main()
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err
