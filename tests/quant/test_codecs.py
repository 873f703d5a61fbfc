"""Formats whose architectures are not served yet: their matrices alone, against transformers' own decoding."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from compress.stored import HeldTensors
from tests.quant.served import CPU, FIXTURES, whole
from workers.model.arithmetic import Arithmetic
from workers.model.products import linear_of
from workers.model.quant.bitnet import TernaryStorage
from workers.model.quant.mxfp4 import BlocksStorage
from workers.parallel import ParallelGroups, Shard


def test_mxfp4_of_gpt_oss() -> None:
    said = load_file(FIXTURES / "codec-mxfp4-gptoss" / "codec-mxfp4-gptoss.safetensors")
    experts, outputs, groups, _ = said["blocks"].shape
    tensors = HeldTensors({"up_blocks": said["blocks"].flatten(0, 1), "up_scales": said["scales"].flatten(0, 1)})
    weight = BlocksStorage().read(tensors, whole("up", experts * outputs, 32 * groups))
    found = weight.dense(torch.float32).unflatten(0, (experts, outputs)).transpose(1, 2)
    assert torch.equal(found, said["dequantized.float32"])


@pytest.mark.parametrize("divides", [True, False], ids=["bitlinear", "autobitlinear"])
def test_bitnet(divides: bool) -> None:
    said = load_file(FIXTURES / "codec-bitnet" / "codec-bitnet.safetensors")
    outputs, inputs = said["unpacked"].shape
    tensors = HeldTensors({"q.weight": said["weight"], "q.weight_scale": said["weight_scale"]})
    weight = TernaryStorage(divides).read(tensors, whole("q", outputs, inputs))
    assert torch.equal(weight.codes.float(), said["unpacked"])
    product = linear_of([weight], torch.float32, Arithmetic(ParallelGroups(Shard(), CPU)), None)
    expected = said["output.bitlinear" if divides else "output.autobitlinear"]
    torch.testing.assert_close(product(said["input"]), expected, rtol=1e-5, atol=1e-5)
