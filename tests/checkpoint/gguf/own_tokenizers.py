"""Tokenizers trained on our sources, in the forms of the models that names in a GGUF stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ROOT = Path(__file__).resolve().parents[3]
TEXTS = [
    "The capital of France is",
    "Hello, world!  It's 3.14159 and 12345678 people",
    "def f(x):\n    return x**2  # comment\n\n\tprint(f(1_000))\n",
    "  leading and trailing   ",
    "tabs\t\tand\r\nnewlines\n\n\n  x",
    "Ünïcödé: naïve café — “quotes” … 日本語テキスト 한국어 العربية हिन्दी",
    "emoji 👩‍👩‍👧 🚀🔥 e\u0301 (combining) ﬁ Å",
    "<|begin|>user\nHi<|end|>\n <|begin|>assistant<think>\n",
    "I'M can't won't THEY'LL we'd 've",
    "x=1;y=22;z=333;w=4444 ½ Ⅷ ٣٤٥ 五",
    "control \u200b zero\u00a0nbsp \x00\x01",
    "a" * 50 + " " * 30 + "b",
    "1 2  3   4    5\n6\n\n7",
    "",
    " ",
    "\n",
]
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def gpt2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def smollm() -> Tokenizer:
    tokenizer = gpt2()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def qwen2() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split(_QWEN2)
    return tokenizer


def llama3() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = _split(_LLAMA3)
    return tokenizer


def _corpus() -> Iterator[str]:
    for path in sorted(ROOT.glob("*.md")):
        yield path.read_text()
    yield from TEXTS * 3


def trained(make: Callable[[], Tokenizer]) -> Tokenizer:
    tokenizer = make()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=["<|begin|>", "<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As tokenizer.json of Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=special, limit_alphabet=150, show_progress=False)
    words = (word for text in _corpus() for word in text.replace("\n", " \n ").split(" "))
    tokenizer.train_from_iterator(words, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return tokenizer
