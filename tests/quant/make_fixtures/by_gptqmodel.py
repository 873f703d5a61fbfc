"""GPTQ and AWQ checkpoints by gptqmodel and auto-round; gptqmodel loads them for the oracle.

gptqmodel runs in 16 bits. For exact answers its dequantized weights are put into plain linear layers, which run in
float32, after its own run has given nearly the same. Run by the driver in an environment of
requirements_gptqmodel.txt.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gptqmodel
import torch
from auto_round import AutoRound
from fixture_files import Maker, run, sampled_weights, versions, write_oracle
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.quantization import METHOD
from safetensors.torch import load_file
from tiny_model import tiny_llama, token_ids, tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

gptqmodel._default_cpu_workers = lambda *_: 2  # its own choice fails on a machine of two cores
Arguments = dict[str, object]
NUM_ROWS, NUM_TOKENS = 16, 64  # of the calibration
GREATEST_DIFFERENCE = 0.02  # of the logits, relative, between its own run in 16 bits and ours

W4: Arguments = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}
DYNAMIC = {r"-:.*layers\.1\.self_attn\.o_proj": {}, r"+:.*layers\.0\.mlp\.down_proj": {"bits": 8, "group_size": 64}}
CONFIGS: dict[str, Arguments] = {
    "gptq-v1": W4,
    "gptq-v2": {**W4, "format": "gptq_v2"},
    "gptq-actorder": {**W4, "desc_act": True, "act_group_aware": False},
    "gptq-asym": {**W4, "sym": False},
    "gptq-8bit": {**W4, "bits": 8, "group_size": 64},
    "gptq-channel": {**W4, "group_size": -1, "act_group_aware": False},
    "gptq-dynamic": {**W4, "dynamic": DYNAMIC},
    "awq-gemm": {**W4, "method": METHOD.AWQ, "format": "gemm", "sym": False},
}
LEFT_PLAIN = "model.layers.1.self_attn.o_proj"
KEPT = ("config.json", "quantize_config.json", "quantization_config.json", "model.safetensors")


def make(name: str, folder: Path) -> dict[str, object]:
    config = CONFIGS[name]
    _quantize(config, folder)
    _answer(folder, "method" in config)
    return {"versions": versions("gptqmodel"), "command": f"GPTQModel.quantize() with QuantizeConfig(**{config})"}


def make_partial_awq(folder: Path) -> dict[str, object]:
    """By auto-round, because gptqmodel names no modules_to_not_convert; nor does it heed those of a checkpoint."""
    with tempfile.TemporaryDirectory() as base:
        tiny_llama(torch.float16).save_pretrained(base)
        tokenizer().save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
        arguments = {"bits": 4, "group_size": 32, "sym": False, "iters": 0, "disable_opt_rtn": True}
        left = {LEFT_PLAIN: {"bits": 16}}
        rounder = AutoRound(model, tokenizer(), **arguments, layer_config=left, device_map="cpu")
        rounder.quantize_and_save(f"{base}/out", format="auto_awq")
        made = next(Path(f"{base}/out").rglob("model.safetensors")).parent
        for path in made.iterdir():
            shutil.copyfile(path, folder / path.name)
    _answer(folder, True, plain=[LEFT_PLAIN])
    return {
        "versions": versions("auto-round", "gptqmodel"),
        "command": f"auto_round.AutoRound(**{arguments}, layer_config={left}).quantize_and_save(format='auto_awq')",
    }


def _answer(folder: Path, is_awq: bool, plain: Sequence[str] = ()) -> None:
    """Writes the oracle. `plain` names modules that are not quantized and that gptqmodel takes for quantized ones."""
    backend = BACKEND.TORCH_AWQ if is_awq else BACKEND.TORCH
    loaded = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float16).model.eval()
    for path in folder.iterdir():  # the tokenizer's files and a log go, now that it is loaded
        if path.name not in KEPT:
            path.unlink()
    with torch.no_grad():
        own = loaded(token_ids()).logits.float()
        weights = _replace_by_linears(loaded)
        tensors = load_file(folder / "model.safetensors")
        for module in plain:
            loaded.get_submodule(module).weight.data = tensors[f"{module}.weight"]
        logits = loaded.float()(token_ids()).logits
    difference = float((own - logits).norm() / logits.norm())
    if difference > GREATEST_DIFFERENCE and not plain:
        raise SystemExit(f"{folder.name}: gptqmodel's own logits are {difference:.3f} away")
    by = f"{versions('gptqmodel')}: plain linear layers with gptqmodel's dequantized weights, in float32"
    sampled = {module: weights.get(module, weight) for module, weight in sampled_weights(loaded).items()}
    write_oracle(folder, token_ids(), logits, sampled, by)


def make_mislabelled(folder: Path) -> dict[str, object]:
    """Some published checkpoints say gptq and store the words of gptq_v2."""
    note = make("gptq-v2", folder)
    for file in ("config.json", "quantize_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"gptq_v2"', '"gptq"'))
    return {**note, "command": f'{note["command"]}, and in its files "gptq_v2" is replaced by "gptq"'}


def _quantize(config: Arguments, folder: Path) -> None:
    rows = [
        {"input_ids": row, "attention_mask": [1] * NUM_TOKENS} for row in token_ids(1, NUM_ROWS, NUM_TOKENS).tolist()
    ]
    arguments = {"backend": BACKEND.TORCH_AWQ} if "method" in config else {}
    with tempfile.TemporaryDirectory() as base:
        tiny_llama(torch.float16).save_pretrained(base)
        tokenizer().save_pretrained(base)
        quantize_config = QuantizeConfig(**config, offload_to_disk=False)
        model = GPTQModel.load(base, quantize_config, device="cpu", dtype=torch.float16)
        model.quantize(rows, batch_size=4, **arguments)
        model.save(str(folder))


def _replace_by_linears(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The dequantized weights in gptqmodel's own type, by module; each [out, in]."""
    weights: dict[str, torch.Tensor] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseQuantLinear):
            weight = _dequantized(module)
            linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight.data = weight.clone()
            model.set_submodule(name, linear)
            weights[name] = weight
    return weights


def _dequantized(module: BaseQuantLinear) -> torch.Tensor:
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().T.contiguous()
    return module(torch.eye(module.in_features, dtype=torch.float16)).T.contiguous()


MAKERS: dict[str, Maker] = {name: functools.partial(make, name) for name in CONFIGS}
MAKERS["gptq-mislabelled"] = make_mislabelled
MAKERS["awq-not-converted"] = make_partial_awq

if __name__ == "__main__":
    run(MAKERS, "gptqmodel")
