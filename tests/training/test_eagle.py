"""Training of an EAGLE-3 head, on tiny models: what it learns on is what it is served as, and it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.workers.speculation.tiny_eagle import HEADS, HIDDEN, INNER, KV_HEADS, VOCAB, PlainHead
from training import eagle, train
from training.eagle_head import Head, HeadShape, taught
from training.llama import Llama, Shape
from workers.model.config import ModelConfig
from workers.model.heads.eagle3_config import draft_ids, read_eagle3
from workers.model.registry import load_config

TEACHER = Shape(VOCAB, HIDDEN, 48, 3, 4, 2, 8, 64)
SHAPE = HeadShape(Shape(VOCAB, HIDDEN, INNER, 1, HEADS, KV_HEADS, HIDDEN // HEADS, 64), 60, (1, 2, 3))
PLAN = eagle.EaglePlan(SHAPE, 24, rows_per_step=4, rows_together=2, warmup_steps=2)


@pytest.fixture(scope="module")
def teacher() -> Llama:
    torch.manual_seed(1)
    model = Llama(TEACHER)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return model


def head_of(teacher: Llama) -> Head:
    """Of random weights that bf16 holds exactly."""
    torch.manual_seed(2)
    head = Head(SHAPE, teacher, torch.randperm(VOCAB)[:60].sort().values)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape)).copy_(parameter.bfloat16().float())
    return head


def rows(count: int) -> torch.Tensor:
    return torch.randint(VOCAB // 3, (count, 26), generator=torch.Generator().manual_seed(3))


def test_a_pass_is_the_next_link_of_every_chain(teacher: Llama, tmp_path: Path) -> None:
    head, text = head_of(teacher), rows(1)
    features, _ = taught(teacher, text[:, :-1], SHAPE.feature_layers)
    with torch.no_grad():
        passes = head(features, text[:, 1:], 3)
    eagle.export(eagle.Run(head, [], [{"step": 1, "tokens": 26}]), tmp_path)
    plain = PlainHead.of(tmp_path, teacher.embed_tokens.weight.detach())
    ids = draft_ids(read_eagle3(tmp_path, _config(tmp_path / "teacher")))
    token_ids = text[0, 1:].tolist()
    for end in (5, 17, 25):  # entries with hidden states of the teacher, then a chain over the text itself
        hidden = plain.fused(features[0, :end])
        for ahead in range(min(3, 26 - end)):
            last = end - 1 + ahead
            outputs = plain.outputs(hidden, token_ids[: last + 1], list(range(last + 1)))
            found = passes[ahead][0, last].double()
            torch.testing.assert_close(found, plain.logits(outputs[-1:])[0, ids], atol=1e-4, rtol=1e-4)
            hidden = torch.cat((hidden, outputs[-1:]))


def _config(directory: Path) -> ModelConfig:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TEACHER.config_json()))
    return load_config(directory)


def test_hidden_states_are_those_between_layers(teacher: Llama) -> None:
    text = rows(2)
    with torch.no_grad():
        features, logits = taught(teacher, text, (0, 3))
        torch.testing.assert_close(logits, teacher(text))
        torch.testing.assert_close(features[..., :HIDDEN], teacher.embed_tokens(text))
        last = teacher.norm(features[..., HIDDEN:]) @ teacher.embed_tokens.weight.T
    torch.testing.assert_close(last, logits)


def test_the_most_frequent_tokens_are_proposed() -> None:
    texts = torch.tensor([[5, 5, 5, 9], [9, 2, 7, 5], [2, 2, 9, 0]])
    assert eagle.frequent_ids(texts, 3).tolist() == [2, 5, 9]


def test_a_loss_is_least_where_the_head_says_what_the_teacher_says() -> None:
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(4))
    ids = torch.arange(VOCAB)
    same = eagle.distillation_loss(logits, logits, ids, PLAN)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(same, entropy)
    assert eagle.distillation_loss(logits.roll(1, 0), logits, ids, PLAN) > same + 0.5


def test_a_run_learns_and_goes_on_where_it_stopped(teacher: Llama, tmp_path: Path) -> None:
    texts = rows(16)
    whole = eagle.run(PLAN, teacher, texts, tmp_path / "whole.pt")
    losses = [row["train_loss"] for row in whole.history]
    assert len(losses) == PLAN.num_steps
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.2  # a turn of all rows each
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert [row["train_loss"] for row in saved["history"]] == losses
    halves = tmp_path / "halves.pt"
    torch.manual_seed(train.SEED)
    part = eagle.Run(Head(SHAPE, teacher, eagle.frequent_ids(texts, 60)), [], [])
    part.optimizers = eagle.make_optimizers(part.head, PLAN)
    for step in range(5):
        eagle.one_step(part, PLAN, teacher, texts, step)
    part.save(halves)
    again = eagle.run(PLAN, teacher, texts, halves)
    assert [row["train_loss"] for row in again.history] == losses
    for name, tensor in again.head.checkpoint().items():
        assert torch.equal(tensor, whole.head.checkpoint()[name]), name
