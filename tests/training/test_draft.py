"""Distillation of a draft, on tiny models: what the teacher said, the loss, a run that goes on, how it is judged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from training import acceptance, draft, guided, train
from training.draft import DraftPlan
from training.guided import Guided, ShardPlan
from training.llama import KeysValues, Llama, Shape
from training.sampling import NUM_TOP, by_chance, continued, top_logprobs

VOCAB = 64
TEACHER, STUDENT = Shape(VOCAB, 64, 128, 2, 4, 2, 16, 256), Shape(VOCAB, 32, 64, 1, 2, 1, 16, 256)
SHARD = ShardPlan(said_rows=8, said_tokens=64, read_rows=4, read_tokens=128, sampled_together=4)
PLAN = DraftPlan(
    train.Plan("tiny", STUDENT, 24, 8192, 128, slope_steps=30, cooldown_steps=4, warmup_steps=2),
    2,
    SHARD,
    said_rows=4,
    read_rows=1,
    is_compiled=False,
)


@pytest.fixture(scope="module")
def teacher() -> Llama:
    torch.manual_seed(1)
    model = Llama(TEACHER)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    return model


def _streams() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randint(VOCAB // 2, (2000,), generator=generator) for _ in range(2))
    return first, second + VOCAB // 2


def test_tokens_one_by_one_have_the_logits_of_the_whole(teacher: Llama) -> None:
    ids = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(3))
    cache = KeysValues(TEACHER, 3, 20, torch.float32)
    found = [teacher.next_logits(ids[:, :12], cache)]
    found += [teacher.next_logits(ids[:, i : i + 1], cache) for i in range(12, 20)]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(found, 1), teacher(ids)[:, 11:], rtol=1e-4, atol=1e-5)


def test_what_is_said_is_what_the_model_would_choose(teacher: Llama) -> None:
    """Greedy rows by the arg max; others as often as the softmax says."""
    prompts = torch.zeros(4000, 1, dtype=torch.int64)
    temperatures = torch.cat([torch.zeros(2000), torch.full((2000,), 0.7)])
    said = continued(teacher, prompts, 1, by_chance(temperatures, torch.Generator().manual_seed(4)), torch.float32)
    with torch.no_grad():
        logits = teacher(prompts[:1])[0, 0]
    assert (said[:2000, 1] == logits.argmax()).all()
    expected = 2000 * F.softmax(logits / 0.7, dim=-1)
    observed = torch.bincount(said[2000:, 1], minlength=VOCAB)
    is_common = expected > 5
    statistic = ((observed - expected) ** 2 / expected)[is_common].sum()
    count = int(is_common.sum())
    assert statistic < count + 5 * (2 * count) ** 0.5


def test_the_guide_has_the_likeliest_tokens(teacher: Llama) -> None:
    ids = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(5))
    top_ids, top = top_logprobs(teacher, ids)
    with torch.no_grad():
        expected = F.log_softmax(teacher(ids), dim=-1)
    assert top_ids.shape == (2, 30, NUM_TOP)
    assert ((top_ids[..., 0] == expected.argmax(-1)).float().mean()) > 0.9  # bf16 may swap two that are near
    torch.testing.assert_close(top.float(), expected.gather(-1, top_ids.long()), rtol=0, atol=0.1)


def test_shards_are_made_once_and_begin_with_the_prompts(teacher: Llama, tmp_path: Path) -> None:
    first = guided.shards(tmp_path, 1, SHARD, teacher, _streams())
    written = (tmp_path / "000.safetensors").stat().st_mtime_ns
    both = guided.shards(tmp_path, 2, SHARD, teacher, _streams())
    assert (tmp_path / "000.safetensors").stat().st_mtime_ns == written
    again = guided.make_shard(SHARD, teacher, _streams(), guided.SEED)
    for one, other in ((first[0].said, again.said), (both[0].read, again.read)):
        for name in Guided.__slots__:
            assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert not torch.equal(both[0].said.tokens, both[1].said.tokens)
    sources = " ".join(map(str, torch.cat(_streams()).tolist()))
    for row in both[1].read.tokens:
        assert " ".join(map(str, row.tolist())) in sources
    shortest = guided.PROMPT_TOKENS[0] * SHARD.said_tokens // 512
    for row in both[1].said.tokens:
        assert " ".join(map(str, row[:shortest].tolist())) in sources


def _guide(logits: torch.Tensor, tokens: torch.Tensor) -> Guided:
    top = F.log_softmax(logits, dim=-1).topk(NUM_TOP, dim=-1)
    return Guided(tokens.to(torch.int16), top.indices.to(torch.int16), top.values)


def test_the_loss_is_divergence_text_and_overlap() -> None:
    """With a vocabulary that the guide holds whole, against torch's own; least where the student is the teacher."""
    generator = torch.Generator().manual_seed(6)
    tokens = torch.randint(NUM_TOP, (2, 9), generator=generator)
    theirs, mine = (torch.randn(2, 8, NUM_TOP, generator=generator) * 2 for _ in range(2))
    log_p, log_q = F.log_softmax(theirs, dim=-1), F.log_softmax(mine, dim=-1)
    divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    text = F.nll_loss(log_q.flatten(0, 1), tokens[:, 1:].flatten())
    sharp = [F.softmax(each / PLAN.overlap_temperature, dim=-1) for each in (theirs, mine)]
    apart = (sharp[0] - sharp[1]).abs().sum(-1).mean() / 2
    found = draft.distillation_loss(mine, _guide(theirs, tokens), PLAN)
    torch.testing.assert_close(found, 0.9 * divergence + 0.1 * text + apart, rtol=1e-4, atol=1e-4)
    own = draft.distillation_loss(theirs, _guide(theirs, tokens), PLAN)
    torch.testing.assert_close(
        own, 0.1 * F.nll_loss(log_p.flatten(0, 1), tokens[:, 1:].flatten()), rtol=1e-3, atol=1e-3
    )


def test_tokens_outside_the_guide_count_as_one() -> None:
    """Twice the vocabulary, of which the guide holds half: a coarser divergence, never more than the whole one."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(VOCAB, (2, 9), generator=generator)
    theirs, mine = (torch.randn(2, 8, VOCAB, generator=generator) * 2 for _ in range(2))
    plan = DraftPlan(PLAN.base, overlap_weight=0.0)
    log_p, log_q = F.log_softmax(theirs, dim=-1), F.log_softmax(mine, dim=-1)
    text = F.nll_loss(log_q.flatten(0, 1), tokens[:, 1:].flatten())
    whole = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
    found = (draft.distillation_loss(mine, _guide(theirs, tokens), plan) - 0.1 * text) / 0.9
    guide = _guide(theirs, tokens)
    p_rest = 1 - guide.top_logprobs.exp().sum(-1)
    constant = (p_rest * p_rest.log()).mean()  # of the teacher's own, which the loss leaves out
    assert 0 < found + constant <= whole + 1e-5


def _run(teacher: Llama, folder: Path, checkpoint: str) -> train.Training:
    tok = Tokenizer.from_file(str(train.MODELS / "demo" / "tokenizer.json"))
    texts = guided.shards(folder / "shards", PLAN.num_shards, SHARD, teacher, _streams())
    return draft.run(PLAN, teacher, texts, [], tok, folder / checkpoint)


def test_the_loss_falls_and_a_run_that_was_cut_off_goes_on(
    teacher: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "bits_per_byte", lambda *_: 0.0)  # the tiny models have no text
    monkeypatch.setattr(draft, "_SAVED_EVERY", 10)
    whole = _run(teacher, tmp_path, "whole.pt")
    losses = [row["train_loss"] for row in whole.history]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    draw = draft.micro_batches

    def stop(plan: DraftPlan, said: draft.Rows, read: draft.Rows, step: int) -> list[Guided]:
        if step == 15:
            raise KeyboardInterrupt
        return draw(plan, said, read, step)

    with monkeypatch.context() as patch:
        patch.setattr(draft, "micro_batches", stop)
        with pytest.raises(KeyboardInterrupt):
            _run(teacher, tmp_path, "cut.pt")
    resumed = _run(teacher, tmp_path, "cut.pt")
    assert [row["train_loss"] for row in resumed.history] == losses
    for (name, one), (_, other) in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_all_rows_are_seen_once_before_any_is_seen_again(teacher: Llama) -> None:
    shard = guided.make_shard(SHARD, teacher, _streams(), 1)
    rows = draft.Rows([shard.said, guided.make_shard(SHARD, teacher, _streams(), 2).said], seed=3)
    seen = [tuple(row.tolist()) for step in range(4) for row in rows.at(step, 4).tokens]
    assert len(set(seen)) == 16
    again = [tuple(row.tolist()) for step in range(4, 8) for row in rows.at(step, 4).tokens]
    assert set(again) == set(seen)
    assert again != seen


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_teacher_as_its_own_draft_is_always_right(teacher: Llama, temperature: float) -> None:
    prompts = torch.randint(VOCAB, (5, 8), generator=torch.Generator().manual_seed(8))
    said = acceptance.streams(teacher, prompts, 24, temperature)
    found = acceptance.acceptance("itself", teacher, said)
    assert found.share == 1
    assert found.per_position == (1, 1, 1, 1)
    assert found.tokens_per_step == (2, 3, 4, 5)
    if temperature:
        assert len(said.token_ids[:, 8:].unique()) > 20


def test_a_draft_of_a_known_overlap_is_right_as_often_as_the_coupling_says() -> None:
    """P(equal) = sum over i of 1 / sum over j of max(p_j / p_i, q_j / q_i) (arXiv:2408.07978)."""
    generator = torch.Generator().manual_seed(9)
    theirs, mine = (torch.randn(VOCAB, generator=generator) * 2 for _ in range(2))
    rows = [each.expand(20, 200, VOCAB) for each in (theirs, mine)]
    chosen = [acceptance.choices(logits, 1.0, range(200)) for logits in rows]
    p, q = (F.softmax(each.double(), dim=-1) for each in (theirs, mine))
    ratios = torch.maximum(p[None] / p[:, None], q[None] / q[:, None]).sum(1)
    expected = float((1 / ratios).sum())
    found = float((chosen[0] == chosen[1]).double().mean())
    assert abs(found - expected) < 4 * (expected * (1 - expected) / 4000) ** 0.5
    assert 0.05 < expected < 0.95


def test_steps_go_on_behind_the_token_that_was_wrong() -> None:
    right = torch.tensor([[1, 1, 0, 1, 0, 1, 1, 1, 1]], dtype=torch.bool)
    assert acceptance.rounds(right, 1) == [1, 0, 1, 1, 1]
    assert acceptance.rounds(right, 2) == [2, 1, 2]
    assert acceptance.rounds(right, 4) == [2, 1, 4]
