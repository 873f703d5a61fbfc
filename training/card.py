"""Writes the model cards: `python -m training.card`. Measures held-out bits per byte, beside xz on the same files."""

from __future__ import annotations

import json
import lzma
import platform

import torch
from tokenizers import Tokenizer

from training import corpus
from training.draft import DRAFT
from training.guided import TEMPERATURES
from training.train import CONTEXT_TOKENS, DEMO, MODELS, SEED, VOCAB_SIZE, Plan, bits_per_byte, load


def xz_bits_per_byte(documents: list[str]) -> float:
    """What `xz -9e` makes of all the documents in one file."""
    raw = "".join(documents).encode()
    return 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)


def draw_loss_curve(plan: Plan, history: list[dict[str, float]]) -> None:
    """loss_curve.png beside the weights."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 3.5), dpi=110)
    tokens = [row["tokens"] / 1e6 for row in history]
    axis.plot(tokens, [row["train_loss"] for row in history], linewidth=0.8, label="training loss")
    measured = [row for row in history if "held_out_bpb" in row]
    twin = axis.twinx()
    twin.plot(
        [row["tokens"] / 1e6 for row in measured],
        [row["held_out_bpb"] for row in measured],
        "o-",
        color="tab:red",
        markersize=3,
        label="held out, a sample",
    )
    axis.set(xlabel="tokens seen (millions)", ylabel="training loss", title=f"{plan.name}")
    twin.set_ylabel("bits per byte")
    figure.legend(loc="upper right", bbox_to_anchor=(0.88, 0.88))
    figure.tight_layout()
    figure.savefig(MODELS / plan.name / "loss_curve.png")


def num_megabytes(documents: list[str]) -> float:
    """10^6 bytes of UTF-8."""
    return sum(len(text.encode()) for text in documents) / 1e6


def _of_demo(data: corpus.Corpus) -> tuple[str, str, str]:
    """How it was made, rows of the table about its data, and its training."""
    sources, tests = (num_megabytes(part) for part in (data.sources, data.tests))
    return (
        "trained on the text alone",
        f"| context | {CONTEXT_TOKENS} tokens (the last {DEMO.cooldown_steps} steps train on all of it) |\n"
        f"| data | the CPython {platform.python_version()} standard library without generated tables: {sources:.1f} MB "
        f"of sources and {tests:.1f} MB of tests, half of each batch from either |",
        f"{DEMO.num_steps} steps of {DEMO.batch_tokens} tokens, Muon and Adam, seed {SEED}: `python -m training.train`",
    )


def _of_draft() -> tuple[str, str, str]:
    """The same for the draft."""
    shard, temperatures = DRAFT.shard, ", ".join(str(each) for each in sorted(set(TEMPERATURES)))
    said, read = (
        DRAFT.num_shards * rows * tokens / 1e6
        for rows, tokens in ((shard.said_rows, shard.said_tokens), (shard.read_rows, shard.read_tokens))
    )
    return (
        "distilled from `demo`: the draft for speculative decoding",
        f"| context | {CONTEXT_TOKENS} tokens |\n"
        f"| data | {said:.1f} M tokens that `demo` said behind prompts from its training modules, at temperatures "
        f"{temperatures}, and {read:.1f} M tokens of those modules, each with `demo`'s distribution |\n"
        f"| loss | 0.9 of the KL divergence from `demo`, 0.1 of the text, and what the two have not in common at "
        f"temperature {DRAFT.overlap_temperature} |",
        f"{DRAFT.base.num_steps} steps of {DRAFT.tokens_per_step} tokens, Muon and Adam, seed {SEED}: "
        "`python -m training.draft`; how often it says what `demo` says: `python -m training.acceptance`",
    )


def card(plan: Plan, num_parameters: int, bpb: float, xz_bpb: float, data: corpus.Corpus) -> str:
    """The text of one card."""
    shape = plan.shape
    how, about_data, training = _of_demo(data) if plan is DEMO else _of_draft()
    modules = ", ".join(f"`{name}`" for name in corpus.HELD_OUT_MODULES)
    layers = "1 layer" if shape.num_hidden_layers == 1 else f"{shape.num_hidden_layers} layers"
    return f"""---
license: psf-2.0
language: [code]
pipeline_tag: text-generation
---

# {plan.name}

A Llama of {num_parameters / 1e6:.1f} M parameters that completes Python, {how}. It exists so that Switchyard serves
something real on a laptop; it is no assistant and knows nothing but how the standard library is written.

| | |
| --- | --- |
| shape | {layers}, hidden {shape.hidden_size}, {shape.num_attention_heads} heads on \
{shape.num_key_value_heads} KV heads of {shape.head_dim}, MLP {shape.intermediate_size}, tied head, bf16 |
| tokenizer | byte-level BPE, {VOCAB_SIZE} tokens, trained on the same text |
| chat | `chat_template.jinja`: what the user says becomes comments, and the code below them is the answer |
{about_data}
| held out | {num_megabytes(data.held_out):.2f} MB, every sixteenth module of the library, whole: {modules}. \
Their tests are not trained on either |
| training | {training} |
| **held-out bits per byte** | **{bpb:.3f}** (`xz -9e` on the same files: {xz_bpb:.3f}) |

![loss](loss_curve.png)

Licence: the weights are derived from the CPython standard library, under the PSF License Agreement; the script that
makes them is under Switchyard's Apache-2.0.
"""


def main() -> None:
    """A card for each model that is there."""
    torch.set_num_threads(2)
    tok = Tokenizer.from_file(str(MODELS / "demo" / "tokenizer.json"))
    data = corpus.read()
    xz_bpb = xz_bits_per_byte(data.held_out)
    for plan in (DEMO, DRAFT.base):
        if not (MODELS / plan.name / "model.safetensors").exists():
            continue
        model = load(plan)
        bpb = bits_per_byte(model, tok, data.held_out)
        history = json.loads((MODELS / plan.name / "training_history.json").read_text())
        draw_loss_curve(plan, history)
        parameters = sum(p.numel() for p in model.parameters())
        (MODELS / plan.name / "README.md").write_text(card(plan, parameters, bpb, xz_bpb, data))
        print(f"{plan.name}: {parameters} parameters, {bpb:.4f} bits per byte held out (xz -9e: {xz_bpb:.4f})")


if __name__ == "__main__":
    main()
