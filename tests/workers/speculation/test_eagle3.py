"""The EAGLE-3 head: what it proposes is what plain torch proposes from the hidden states that there are."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.workers.speculation.tiny_eagle import HIDDEN, PlainHead, make_head
from tests.workers.tiny_llama import make_checkpoint, write_tokenizer
from workers.config import EngineConfig, SpeculativeOptions
from workers.engine.adapters.ref import AdapterRef
from workers.engine.request import Request
from workers.engine.step import SchedulerOutput
from workers.model.heads.eagle3 import Eagle3Head
from workers.runtime.drafting.build import load_draft
from workers.sampling.params import SamplingParams
from workers.speculation.drafters.drafter import DraftWanted
from workers.speculation.drafters.feature_head import FeatureHead
from workers.speculation.features import StepFeatures

CPU = torch.device("cpu")
BLOCK = 4
LAYOUTS = {
    "published": {},
    "numbered": {"layer": "layers.0.", "architectures": ["Eagle3LlamaForCausalLM"], "norm_before_residual": True},
    "nested": {"root": "model.", "has_embedding": True, "draft_vocab_size": 97},
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("gqa", tmp_path_factory.mktemp("tiny"))
    write_tokenizer(path / "tokenizer.json")
    return path


@dataclass
class Bench:
    """A head, its twin in plain torch, and the logits that the head chose from."""

    drafter: FeatureHead
    plain: PlainHead
    logits: list[Tensor] = field(default_factory=list)


def bench_of(target: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, **engine: object) -> Bench:
    head = make_head(directory / name, **LAYOUTS[name])
    speculative = SpeculativeOptions(method="eagle3", model=str(head), enable_adaptive_verification=False)
    values = {"block_size": BLOCK, "num_blocks": 64, "max_num_seqs": 3, "max_num_batched_tokens": 16, **engine}
    drafter = load_draft(EngineConfig(str(target), "float32", "cpu", speculative=speculative, **values), CPU)
    assert isinstance(drafter, FeatureHead)
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    bench = Bench(drafter, PlainHead.of(head, embedding, norm_before_residual="norm_before_residual" in LAYOUTS[name]))
    compute = Eagle3Head.logits

    def recorded(self: Eagle3Head, hidden: Tensor) -> Tensor:
        bench.logits.append(compute(self, hidden))
        return bench.logits[-1]

    monkeypatch.setattr(Eagle3Head, "logits", recorded)
    return bench


class Text:
    """A request, and the hidden states that a model would have: the same at a position, whatever is drafted there."""

    def __init__(self, name: str, token_ids: list[int], **sampling: object) -> None:
        self.request = Request(name, list(token_ids), len(token_ids), SamplingParams(max_tokens=99, **sampling))
        self.features = torch.randn(200, 3 * HIDDEN, generator=torch.Generator().manual_seed(sum(map(ord, name))))
        self.given: set[int] = set()

    def give(self, drafter: FeatureHead, start: int, end: int) -> None:
        """A step has computed these tokens, behind those of another request."""
        plan = SchedulerOutput(requests=[self.request], start_positions=[start], num_tokens=[end - start])
        hidden = torch.cat((torch.full((3, 3 * HIDDEN), 9.0), self.features[start:end]))
        drafter.computed(plan, StepFeatures(hidden, [3]))
        self.given |= set(range(start, min(end, self.request.num_tokens - 1)))

    def expected(self, plain: PlainHead, num_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy drafts from the entries that there are, and the logits that they are chosen from."""
        tokens, positions = list(self.request.token_ids), sorted(self.given)
        hidden = plain.fused(self.features[positions])
        drafts, logits = [], []
        for _ in range(num_tokens):
            outputs = plain.outputs(hidden, [tokens[p + 1] for p in positions], positions)
            logits.append(plain.logits(outputs[-1:])[0])
            drafts.append(int(logits[-1].argmax()))
            tokens.append(drafts[-1])
            positions.append(positions[-1] + 1)
            hidden = torch.cat((hidden, outputs[-1:]))
        return drafts, torch.stack(logits)


def check(bench: Bench, text: Text, num_tokens: int = 3) -> list[int]:
    bench.logits.clear()
    (found,) = bench.drafter.propose([DraftWanted(text.request, num_tokens)])
    drafts, logits = text.expected(bench.plain, num_tokens)
    assert list(found) == drafts
    assert torch.stack([rows[-1] for rows in bench.logits]).double().isfinite().any()
    torch.testing.assert_close(torch.stack([rows[-1] for rows in bench.logits]).double(), logits, atol=1e-5, rtol=0)
    return list(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_drafts_are_those_of_plain_torch_whatever_was_accepted(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    bench, chance = bench_of(target, tmp_path, monkeypatch, layout), random.Random(4)
    text = Text("r", [chance.randrange(97) for _ in range(21)])
    for start, end in ((0, 7), (7, 16), (16, 21)):  # chunks of the prompt; then its first token is there
        text.request.token_ids += [5] if end == 21 else []
        text.give(bench.drafter, start, end)
    for _ in range(8):
        drafts = check(bench, text)
        if chance.random() < 0.3:
            assert check(bench, text) == drafts  # the step took none of them
        before, right = text.request.num_tokens, chance.randrange(4)
        text.request.token_ids += [*drafts[:right], (drafts[right] + 1) % 97 if right < 3 else 8]
        text.give(bench.drafter, before - 1, before + 3)


def test_tokens_without_hidden_states_are_left_out(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(target, tmp_path, monkeypatch, "published")
    text = Text("r", [(5 * i * i) % 97 for i in range(30)])
    text.request.token_ids.append(3)
    assert bench.drafter.propose([DraftWanted(text.request, 2)]) == [[]]  # nothing is known of it
    text.give(bench.drafter, 24, 30)  # a prefix hit
    check(bench, text)
    text.request.token_ids += [4, 5, 6, 7]
    text.give(bench.drafter, 33, 34)  # and a gap
    check(bench, text)
    text.give(bench.drafter, 20, 34)  # computed again
    text.given -= set(range(20, 24)) | {30, 31, 32}
    check(bench, text)


def test_prefixes_are_shared_with_the_hidden_states_that_made_them(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(target, tmp_path, monkeypatch, "published")
    first = Text("same", [(7 * i) % 97 for i in range(18)])
    first.request.token_ids.append(1)
    first.give(bench.drafter, 0, 18)
    drafts = check(bench, first)
    bench.drafter.forget(first.request)
    again = Text("same", first.request.token_ids[:18])
    again.request.token_ids.append(1)
    again.give(bench.drafter, 16, 18)  # the model had 16 tokens of it, the head 16 entries
    again.given = set(range(18))
    assert check(bench, again) == drafts
    other = Text("other", [2, *first.request.token_ids[1:18]])  # the token before the first entry is another
    other.request.token_ids.append(1)
    other.give(bench.drafter, 16, 18)
    check(bench, other)
    adapted = Text("adapted", first.request.token_ids[:18])  # what the model computes is other with an adapter
    adapted.request.adapter = AdapterRef("a", b"a" * 32, "nowhere")
    adapted.request.token_ids.append(1)
    adapted.give(bench.drafter, 16, 18)
    check(bench, adapted)


def test_many_requests_in_little_space(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, chance = bench_of(target, tmp_path, monkeypatch, "published", num_blocks=40), random.Random(8)
    texts = [Text(f"r{i}", [chance.randrange(97) for _ in range(9 + i)]) for i in range(3)]
    for text in texts:
        text.request.token_ids.append(chance.randrange(97))
        text.give(bench.drafter, 0, text.request.num_prompt_tokens)
    for turn in range(12):
        for _ in range(20):
            found = bench.drafter.propose([DraftWanted(text.request, 1 + i) for i, text in enumerate(texts)])
            if all(found):
                break
        assert [list(one) for one in found] == [text.expected(bench.plain, 1 + i)[0] for i, text in enumerate(texts)], (
            turn
        )
        for text, drafts in zip(texts, found, strict=True):
            before = text.request.num_tokens
            text.request.token_ids += [*drafts, chance.randrange(97)]
            text.give(bench.drafter, before - 1, text.request.num_tokens - 1)


def test_drafts_share_the_noise_of_the_model(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a high temperature noise alone chooses: then the draft is what the model's sampler would take of its ids."""
    from workers.parallel import ParallelGroups, Shard
    from workers.sampling.params import SamplingRows
    from workers.sampling.sampler import sample

    bench = bench_of(target, tmp_path, monkeypatch, "published")
    text = Text("r", [1, 2, 3, 4, 5], temperature=1000.0, seed=77)
    text.request.token_ids += [6, 7]
    text.give(bench.drafter, 3, 6)
    (found,) = bench.drafter.propose([DraftWanted(text.request, 3)])
    rows = SamplingRows.greedy(1)
    rows.put(0, text.request.sampling)
    flat = torch.full((1, 97), float("-inf"))
    flat[:, bench.plain.weights["d2t"] + torch.arange(70)] = 0.0
    groups = ParallelGroups(Shard(), CPU)
    positions = [text.request.num_output_tokens + i for i in range(3)]
    assert list(found) == [int(sample(flat, rows, torch.tensor([p]).numpy(), groups, 97)) for p in positions]
