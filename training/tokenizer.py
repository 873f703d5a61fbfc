"""The demo models' tokenizer: byte-level BPE, trained on the corpus.

Knows nothing of models. Identifiers, short numbers, runs of punctuation and runs of white space are the pieces that
merges may not cross, so a prompt that ends at any of those borders is split as the training text was.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

END_OF_TEXT = "<|endoftext|>"  # id 0: stands before each document, and so also ends one
_PIECES = r" ?[^\W\d]\w*| ?\d{1,3}| ?[^\s\w]+|\s+(?!\S)|\s+"


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of exactly `vocab_size` tokens, the end-of-text token among them."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# A model that knows Python alone: what others say are comments, and what it says is the code below them. It was never
# taught to call tools; held to the form of a call it does.
CHAT_TEMPLATE = """\
{%- for tool in tools or [] %}
{{- "# Tool: " + (tool.function | tojson) + "\\n" }}
{%- endfor %}
{%- if tools %}
{{- '# A call: <tool_call>{"name": "...", "arguments": {...}}</tool_call>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == "assistant" %}
{{- message.content or "" }}
{%- for call in message.tool_calls or [] %}
{%- set arguments = call.function.arguments %}
{%- set arguments = arguments if arguments is string else arguments | tojson %}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + arguments + "}</tool_call>" }}
{%- endfor %}
{{- "\\n\\n\\n" }}
{%- else %}
{%- for line in (message.content or "").split("\\n") %}
{{- ("# " + line).rstrip() + "\\n" }}
{%- endfor %}
{%- endif %}
{%- endfor -%}
"""


def save(tokenizer: Tokenizer, directory: Path, context_tokens: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja in the Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_tokens,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
