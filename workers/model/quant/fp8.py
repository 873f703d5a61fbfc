"""FP8 as DeepSeek-V3 and others store it (quant_method fp8), and as NVIDIA's ModelOpt does (modelopt)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.errors import ModelError
from workers.model.quant.floats import Fp8Storage
from workers.model.quant.integers import InputRounding
from workers.model.quant.modules import DecoderMatrices
from workers.model.quant.options import Options
from workers.model.quant.storage import StoredFormat
from workers.model.weight_format import QuantMethod

_DEEPSEEK_KEYS = (
    "quant_method",
    "activation_scheme",
    "fmt",
    "weight_block_size",
    "modules_to_not_convert",
    "ignored_layers",
    "dequantize",
    "scale_fmt",
)


def read_deepseek(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config. Raises ModelError."""
    options = Options(quantization, where)
    options.known(*_DEEPSEEK_KEYS)
    options.one_of("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    scheme = options.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
    block = quantization.get("weight_block_size")
    if block not in (None, [128, 128]):
        raise ModelError(f"{where}.weight_block_size={block!r} is not served (served: [128, 128])")
    if block is not None and scheme == "static":
        raise ModelError(f"{where}.activation_scheme='static' is not served with weight_block_size")
    rounding: InputRounding = "row" if scheme == "dynamic" else "fixed"
    storage = Fp8Storage("weight_scale_inv" if block else "weight_scale", bool(block), rounding)
    return StoredFormat(
        DecoderMatrices(storage, options.texts("modules_to_not_convert") + options.texts("ignored_layers"))
    )


QUANT_METHODS = (QuantMethod("fp8", read_deepseek),)
