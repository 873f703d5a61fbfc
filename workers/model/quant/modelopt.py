"""What NVIDIA's ModelOpt writes: FP8 with fixed scales of the inputs, and INT8 with SmoothQuant's (arXiv:2211.10438).

Newer versions repeat hf_quant_config.json in config.json; older ones have it alone (workers.model.registry reads it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from workers.model.quant.floats import Fp8Storage
from workers.model.quant.integers import IntegerStorage
from workers.model.quant.modules import DecoderMatrices
from workers.model.quant.options import Options
from workers.model.quant.storage import MatrixStorage, StoredFormat
from workers.model.weight_format import QuantMethod

_STORAGES: dict[str, MatrixStorage] = {
    "FP8": Fp8Storage("weight_scale", input_rounding="fixed", has_multiplier=True),
    "W8A8_SQ_PER_CHANNEL": IntegerStorage(8, 0, "fixed", has_multiplier=True),
}
_KEYS = (
    "quant_method",
    "quant_algo",
    "kv_cache_quant_algo",
    "kv_cache_scheme",
    "exclude_modules",
    "ignore",
    "config_groups",
    "producer",
)


def read(quantization: Mapping[str, Any], where: str) -> StoredFormat:
    """From quantization_config, or from hf_quant_config.json. Raises ModelError."""
    options = Options(quantization, where)
    options.known(*_KEYS)
    algorithm = options.one_of("quant_algo", tuple(_STORAGES))
    plain = options.texts("ignore") + options.texts("exclude_modules")
    return StoredFormat(DecoderMatrices(_STORAGES[algorithm], plain))


QUANT_METHODS = (QuantMethod("modelopt", read),)
