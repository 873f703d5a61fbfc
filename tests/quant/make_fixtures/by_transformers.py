"""What transformers itself dequantizes: DeepSeek's FP8 in blocks, gpt-oss's MXFP4 and BitNet's packed ternary weights.

The FP8 checkpoints are written here, because transformers only makes them on a GPU. It takes the size of a block for
the weight's rows over the scale's, which is wrong where the last block is smaller, so there compressed-tensors
dequantizes. Run by the driver in an environment of requirements_transformers.txt.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize
from fixture_files import SAMPLED_MODULES, Maker, run, sampled_weights, versions, write_oracle
from safetensors.torch import load_file, save_file
from tiny_model import tiny_experts, tiny_llama, token_ids
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights, unpack_weights
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

BLOCK = 128
FP8_MAX = 448.0
FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [BLOCK, BLOCK],
}
WRITTEN = "written by this script: every linear layer but lm_head and the experts' gate in blocks, scale = greatest/448"


def make_fp8(folder: Path) -> dict[str, object]:
    return _make_blocks(tiny_llama(num_key_value_heads=4), folder)  # with 2, k and v would have half a block of rows


def make_fp8_experts(folder: Path) -> dict[str, object]:
    return _make_blocks(tiny_experts(), folder)


def make_fp8_ragged(folder: Path) -> dict[str, object]:
    model = tiny_llama(intermediate_size=192)
    _write_blocks(model, folder)
    tensors = load_file(folder / "model.safetensors")
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[BLOCK, BLOCK])
    for name in [name.removesuffix("_scale_inv") for name in tensors if name.endswith("_scale_inv")]:
        scale = tensors[f"{name}_scale_inv"]
        padded = torch.zeros([side * BLOCK for side in scale.shape])
        rows, columns = tensors[name].shape
        padded[:rows, :columns] = tensors[name].float()
        weight = dequantize(padded, scale, args=args)[:rows, :columns]
        model.get_parameter(name).data = weight
    with torch.no_grad():
        logits = model.float()(token_ids()).logits
    sampled = {module: model.get_submodule(module).weight.bfloat16() for module in SAMPLED_MODULES}
    how = "a plain model with compressed-tensors' dequantized weights, in float32; the samples rounded to bfloat16"
    write_oracle(folder, token_ids(), logits, sampled, f"{versions('compressed-tensors')}: {how}")
    return {"versions": versions("compressed-tensors"), "command": WRITTEN}


def _make_blocks(model: PreTrainedModel, folder: Path) -> dict[str, object]:
    _write_blocks(model, folder)
    in_bf16, in_f32 = (
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=FineGrainedFP8Config(dequantize=True)
        ).eval()
        for dtype in (torch.bfloat16, torch.float32)
    )
    with torch.no_grad():
        logits = in_f32(token_ids()).logits
    how = "dequantizes the checkpoint to float32 and runs it; inputs of products are not quantized"
    write_oracle(folder, token_ids(), logits, sampled_weights(in_bf16), f"{versions()}: {how}")
    return {"versions": versions(), "command": WRITTEN}


def _write_blocks(model: PreTrainedModel, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as base:
        model.save_pretrained(base)
        plain = load_file(Path(base) / "model.safetensors")
        config = json.loads((Path(base) / "config.json").read_text())
    tensors = {}
    for name, weight in plain.items():
        if weight.dim() == 2 and name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = _in_blocks(weight)
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": FP8_CONFIG}, indent=2) + "\n")


def _in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 [out, in], and the factors [blocks of out, blocks of in] that give the weight back."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [rows, 128, columns, 128]
    scale = blocks.abs().amax((1, 3)) / FP8_MAX
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes.to(torch.float8_e4m3fn).contiguous(), scale


def make_mxfp4_codec(folder: Path) -> dict[str, object]:
    """Two experts, 16 rows of 64 inputs. All codes; exponents near the middle, and a few far from it."""
    generator = torch.Generator().manual_seed(3)
    blocks = torch.randint(0, 256, (2, 16, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 130, (2, 16, 2), dtype=torch.uint8, generator=generator)
    scales[0, 0] = torch.tensor([100, 150], dtype=torch.uint8)
    tensors = {"blocks": blocks, "scales": scales}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        tensors[f"dequantized.{name}"] = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    save_file(tensors, folder / "codec-mxfp4-gptoss.safetensors", metadata={"dequantized": "[expert, in, out]"})
    return {"versions": versions(), "command": "transformers.integrations.mxfp4.convert_moe_packed_tensors()"}


def make_bitnet_codec(folder: Path) -> dict[str, object]:
    """One packed layer of 32 outputs and 64 inputs, and what both of transformers' layers make of five rows."""
    generator = torch.Generator().manual_seed(4)
    ternary = torch.randint(-1, 2, (32, 64), generator=generator).float()
    packed = pack_weights(ternary.clone())
    scale = torch.tensor([1.75])
    inputs = torch.randn(5, 64, generator=generator) * torch.tensor([0.01, 0.1, 1, 10, 100])[:, None]
    bit, auto = BitLinear(64, 32, bias=False, dtype=torch.float32), AutoBitLinear(64, 32, bias=False)
    bit.weight, bit.weight_scale = packed, scale
    auto.weight.data, auto.weight_scale = unpack_weights(packed, torch.float32), scale
    with torch.no_grad():
        outputs = {"output.bitlinear": bit(inputs), "output.autobitlinear": auto(inputs)}
    tensors = {"weight": packed, "weight_scale": scale, "input": inputs, **outputs}
    tensors["unpacked"] = unpack_weights(packed, torch.float32)
    meaning = {"bitlinear": "y = int8(x) W / weight_scale / s", "autobitlinear": "y = int8(x) / s W * weight_scale"}
    save_file(tensors, folder / "codec-bitnet.safetensors", metadata=meaning)
    return {
        "versions": versions(),
        "command": "transformers.integrations.bitnet: pack_weights(), BitLinear, AutoBitLinear",
    }


MAKERS: dict[str, Maker] = {
    "fp8-deepseek": make_fp8,
    "fp8-deepseek-ragged": make_fp8_ragged,
    "fp8-deepseek-moe": make_fp8_experts,
    "codec-mxfp4-gptoss": make_mxfp4_codec,
    "codec-bitnet": make_bitnet_codec,
}

if __name__ == "__main__":
    run(MAKERS, "transformers")
